"""The commands that the README gives are right, the demo's whole chain runs (small), and so does the walk."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from apo_megatron.config import EvalConfig, RLConfig, SFTConfig, load_config
from tests.test_project import entry_points

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
CONFIG_CLASSES: dict[str, Any] = {
    "apo_megatron.train": RLConfig,
    "apo_megatron.sft": SFTConfig,
    "apo_megatron.evaluate": EvalConfig,
    "apo_megatron.launch.entry": RLConfig,
}
OVERRIDE = re.compile(r"[a-z_.]+=\S+")


def _commands(text: str = README) -> list[list[str]]:
    """Every indented line of ``text``, as words."""
    lines = re.findall(r"^    (\S.*)$", text.replace("\\\n", " "), re.MULTILINE)
    return [shlex.split(line.split("  #")[0]) for line in lines]


def _module_of(command: list[str]) -> str | None:
    """The module that a command runs, where it runs one."""
    modules = {script: module for script, module, _ in entry_points()}
    return command[command.index("-m") + 1] if "-m" in command else modules.get(command[0])


def test_make_targets_exist() -> None:
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    commands = [command for command in _commands() if command[0] == "make"]
    assert [command[1] for command in commands] == ["demo", "test"]
    assert {command[1] for command in commands} <= targets


def test_every_command_exists_and_its_settings_are_accepted() -> None:
    num_configs = 0
    for command in _commands():
        module = _module_of(command)
        if module is None:
            for word in command:
                if word.startswith("examples/"):
                    assert (ROOT / word).exists(), command
            assert command[0] in ("make", "python", "python3.11", ".", "pip", "sbatch") or "/" in command[0]
            continue
        assert module == "venv" or find_spec(module) is not None, command
        if module in CONFIG_CLASSES:
            overrides = [word for word in command if OVERRIDE.fullmatch(word)]
            config = ROOT / command[command.index("--config") + 1]
            load_config(CONFIG_CLASSES[module], config, overrides)
            num_configs += 1
    assert num_configs >= 4


def test_overrides_of_the_text_are_accepted() -> None:
    overrides = re.findall(r"`((?:objective|parallel|train)\.\w+=\w+)`", README)
    assert len(overrides) >= 3
    for override in overrides:
        load_config(RLConfig, ROOT / "examples/countdown/grpo.yaml", [override])


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    out = tmp_path_factory.mktemp("demo") / "demo"
    result = subprocess.run(
        [sys.executable, "examples/countdown/demo.py", "--quick", "--out", str(out)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    return out, result.stdout


def test_quick_demo_writes_results_and_says_where(demo: tuple[Path, str]) -> None:
    out, shown = demo
    methods = json.loads((out / "results.json").read_text())["methods"]
    assert methods.keys() == {"base", "grpo", "apo"}
    for result in methods.values():
        assert result["pass_at_k"].keys() == result["ci95"].keys() == {"1", "2", "4", "8", "16"}
    assert (out / "comparison.png").read_bytes().startswith(b"\x89PNG")
    assert "comparison.png" in shown and "--nproc-per-node 2" in shown


def test_the_walk_runs_as_printed(demo: tuple[Path, str], tmp_path: Path) -> None:
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "demo").symlink_to(demo[0])
    for folder in ("examples", "tools"):
        (tmp_path / folder).symlink_to(ROOT / folder)
    environment = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "CUDA_VISIBLE_DEVICES": "",
    }
    walk = _commands(README.partition("## A walk")[2].partition("\n## ")[0])
    assert len(walk) == 7
    shown = []
    for command in walk:
        result = subprocess.run(
            command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=600
        )
        assert result.returncode == 0, (command, result.stdout[-2000:], result.stderr[-2000:])
        shown.append(result.stdout)
    assert "going on after step 3" in shown[3] and "step 6/6" in shown[3]
    metrics = (tmp_path / "runs/walk/apo/metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in metrics] == [1, 2, 3, 4, 5, 6]
    results = json.loads((tmp_path / "runs/walk/evaluation/results.json").read_text())
    assert "countdown" in json.dumps(results)
    assert "step 6 of 6" in (tmp_path / "runs/walk/report.html").read_text(encoding="utf-8")
    assert (tmp_path / "runs/walk/apo/report.html").exists()
