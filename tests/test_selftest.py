"""apo-doctor selftest: it agrees here, and it would see a layout that is wrong, fails or hangs."""

from __future__ import annotations

import json
import os
import socket
import time
from pathlib import Path
from typing import Any

import pytest

from apo_megatron import doctor
from apo_megatron.diagnosis import selftest, selftest_command
from apo_megatron.diagnosis.selftest import Comparison, Outcome
from apo_megatron.parallel.device_facts import num_gpus

RANK = """
import os, sys, time
folder, rank = sys.argv[1:]
with open(f"{{folder}}/../pid{{rank}}", "w") as file:
    file.write(str(os.getpid()))
while not os.path.exists(f"{{folder}}/../pid0"):
    time.sleep(0.05)
print("rank", rank, "began")
{body}
"""


def with_ranks_that(body: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ranks run this instead of the self-test's."""
    package = folder / "apo_megatron" / "diagnosis"
    package.mkdir(parents=True)
    (package.parent / "__init__.py").touch()
    (package / "__init__.py").touch()
    (package / "selftest_rank.py").write_text(RANK.format(body=body))
    monkeypatch.setenv("PYTHONPATH", str(folder))
    monkeypatch.chdir(folder)


def test_all_layouts_of_this_machine_agree(capsys: pytest.CaptureFixture[str]) -> None:
    assert doctor.main(["selftest", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["ok"] and found["failure"] is None
    layouts = {row["layout"]: row for row in found["comparisons"]}
    assert all(row["agrees"] for row in layouts.values())
    if num_gpus() == 0:
        assert found["backend"] == "gloo" and {"DP2", "TP2", "TP2 + SP", "PP2", "CP2"} < layouts.keys()
        assert all(0 < layouts[name]["differences"]["parameters"] < 1e-5 for name in ("DP2", "TP2", "PP2"))


def test_no_other_program_can_take_the_ports_of_the_ranks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def connect(folder: Path, size: int, max_seconds: float) -> None:
        for world in json.loads((folder / "worlds.json").read_text()):
            socket.create_connection(("127.0.0.1", world["port"]), timeout=5).close()

    monkeypatch.setattr(selftest, "_run_ranks", connect)
    assert selftest.compare_layouts(tmp_path).comparisons == []


def outcome(**differences: float) -> Outcome:
    return Outcome("gloo", [Comparison("TP2", 2, differences, 1e-5)], None)


def test_a_difference_or_no_number_is_no_agreement() -> None:
    assert outcome(loss=1e-6, grad_norm=1e-6).agrees
    assert not outcome(loss=1e-6, grad_norm=1e-3).agrees
    assert not outcome(loss=float("nan")).agrees


def test_a_layout_that_differs_is_named(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    found = outcome(loss=1e-6, grad_norm=0.2, parameters=0.0)
    monkeypatch.setattr(selftest_command, "compare_layouts", lambda folder, seconds: found)
    assert doctor.main(["selftest"]) == selftest_command.EXIT_DIFFERS
    shown = " ".join(capsys.readouterr().out.split())
    assert "DIFFERS" in shown and "TP2: more than rounding (1e-05) apart from one rank" in shown


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("if rank == '1': sys.exit('no such interface')\ntime.sleep(60)", "rank 1 of 2 ended with 1"),
        ("time.sleep(60)", "rank 0 of 2 did not end within 3 s"),
    ],
)
def test_ranks_that_fail_or_hang_are_ended(
    body: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_ranks_that(body, tmp_path / "fake", monkeypatch)
    monkeypatch.setattr(selftest, "num_gpus", lambda: 0)
    (tmp_path / "work").mkdir()
    start = time.monotonic()
    found: Any = selftest.compare_layouts(tmp_path / "work", max_seconds=3)
    assert time.monotonic() - start < 30
    assert found.failure.message == message and found.comparisons == [] and not found.agrees
    for rank in range(2):
        pid = int((tmp_path / f"pid{rank}").read_text())
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


def test_worlds_are_those_that_the_gpus_allow() -> None:
    assert [selftest.world_sizes(gpus) for gpus in (0, 1, 3, 8)] == [[2], [], [2], [2, 4, 8]]
