"""The environment of `make sglang-cpu`: pinned, as in the repository, and for CPUs only where told so."""

from __future__ import annotations

import json
import os
import re
import subprocess
from pathlib import Path

from tests.sglang_servers import sglang_python

FILES = Path(__file__).resolve().parent.parent / "tools" / "sglang_cpu"
SWITCH = "SGLANG_USE_CPU_ENGINE"


def run(program: str, switch: str | None) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name != SWITCH}
    if switch is not None:
        environment[SWITCH] = switch
    words = [sglang_python(), "-c", program]
    return subprocess.run(words, env=environment, capture_output=True, text=True, timeout=300)


def test_all_versions_are_pinned() -> None:
    lines = (FILES / "requirements.txt").read_text().splitlines()
    pins = [line for line in lines if not line.startswith("#")]
    assert all(re.fullmatch(r"[\w.-]+==[\w.]+", pin) for pin in pins)  # exact, and no local build
    assert {"torch", "sglang", "transformers"} <= {pin.split("==")[0] for pin in pins}


def test_the_environment_is_the_one_of_this_repository() -> None:
    """A stale one makes other tests fail in ways that nobody understands: run `make sglang-cpu`."""
    program = (
        "import json, sysconfig; from importlib.metadata import distributions as found; "
        "print(json.dumps([sysconfig.get_path('purelib'), {d.name: d.version for d in found()}]))"
    )
    folder, versions = json.loads(run(program, None).stdout)
    for line in (FILES / "requirements.txt").read_text().splitlines():
        if not line.startswith("#"):
            name, version = line.split("==")
            assert versions[name].partition("+")[0] == version, name
    for path in (FILES / "site_packages").rglob("*"):
        if path.suffix in (".py", ".pth"):
            assert Path(folder, path.relative_to(FILES / "site_packages")).read_text() == path.read_text()


def test_kernels_can_be_named_and_not_called() -> None:
    program = "import torchvision, sgl_kernel\nsgl_kernel.some_kernel(1, out=2)"
    assert "NotImplementedError: sgl_kernel.some_kernel needs a GPU" in run(program, "1").stderr


def test_without_the_variable_nothing_pretends() -> None:
    ended = run("import sys; print('torch' in sys.modules, sys.meta_path)\nimport sgl_kernel", None)
    assert ended.stdout.startswith("False") and "_DeclareOperators" not in ended.stdout
    assert f"ImportError: this environment is for CPUs only: set {SWITCH}=1" in ended.stderr
