"""The commands that the README gives exist, and the demo's whole chain runs (small)."""

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
from checkpoints_convert.command import COMMANDS as CONVERSIONS

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()
CONFIG_CLASSES: dict[str, Any] = {
    "apo_megatron.train": RLConfig,
    "apo_megatron.sft": SFTConfig,
    "apo_megatron.evaluate": EvalConfig,
}


def _commands(first_word: str) -> list[list[str]]:
    lines = re.findall(rf"^    ({first_word} .*)$", README.replace("\\\n", " "), re.MULTILINE)
    return [shlex.split(line.split("  #")[0].split(" [")[0]) for line in lines]


def test_make_targets_exist() -> None:
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    commands = _commands("make")
    assert [command[1] for command in commands[:2]] == ["demo", "test"]
    assert {command[1] for command in commands} <= targets


def test_scripts_modules_and_configurations_exist() -> None:
    commands = [*_commands("python"), *_commands("torchrun")]
    assert len(commands) >= 4
    for command in commands:
        if "-m" not in command:
            assert (ROOT / command[1]).exists(), command
            continue
        module = command[command.index("-m") + 1]
        assert find_spec(module) is not None, command
        if module in CONFIG_CLASSES:
            load_config(CONFIG_CLASSES[module], ROOT / command[command.index("--config") + 1])


def test_console_scripts_exist_and_know_their_options() -> None:
    scripts = dict(re.findall(r'"(apo-[\w-]+) = ([\w.]+):main"', (ROOT / "setup.py").read_text()))
    commands = [*_commands(r"apo-[\w-]+"), *_commands("torchrun")]
    seen = set()
    for command in commands:
        if command[0] == "apo-convert":
            module = CONVERSIONS[command[1]]
        else:
            module = scripts.get(command[0]) or command[command.index("-m") + 1]
        source = Path(ROOT, *module.split(".")).with_suffix(".py").read_text()
        if module.startswith("checkpoints_convert"):
            seen.add(module)
            options = [word for word in command[1:] if re.match(r"--(hf|megatron|logits)", word)]
            assert options and all(f'"{option}"' in source for option in options), command
    assert len(seen) == 3


def test_overrides_of_the_text_are_accepted() -> None:
    overrides = re.findall(r"\b(?:objective|parallel|train)\.\w+=\w+", README)
    assert len(overrides) >= 3
    load_config(RLConfig, ROOT / "examples/countdown/apo.yaml", overrides)


def test_linked_files_exist() -> None:
    links = re.findall(r"\]\((?!http)([^)#]+)", README)
    assert links and all((ROOT / link).exists() for link in links)


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
