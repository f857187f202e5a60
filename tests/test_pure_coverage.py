"""The pure modules are tested by tests of their own: half a minute."""

from __future__ import annotations

import pytest


@pytest.mark.slow  # it runs other tests again
def test_pure_modules_are_covered(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("coverage")  # an extra of development
    from tests import pure_coverage

    assert pure_coverage.main() == 0, capsys.readouterr().out
