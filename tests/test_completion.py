"""The completion script, in a real bash."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from apo_megatron import doctor
from apo_megatron.diagnosis.completion_command import SHELLS, completion_script


@pytest.fixture(scope="module")
def script(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("completion") / "script"
    path.write_text(completion_script("bash"))
    return path


def completed(script: Path, *words: str) -> list[str]:
    program = (
        'source "$1"; shift; COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); _apo_complete 2>/dev/null; '
        'printf "%s\\n" "${COMPREPLY[@]}"'
    )
    shell = shutil.which("bash")
    if shell is None:
        pytest.skip("no bash")
    result = subprocess.run(
        [shell, "-c", program, "bash", str(script), *words], capture_output=True, text=True, check=True
    )
    return result.stdout.split()


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (("apo-train", "--c"), ["--config"]),
        (("bin/apo-train", "--config", "x.yaml", "objective.apo_pu"), None),
        (("apo-train", "model.dt"), ["model.dtype="]),
        (("apo-train", "model.dtype", "="), ["float32", "bfloat16"]),
        (("apo-train", "model.dtype", "=", "b"), ["bfloat16"]),
        (("apo-train", "data.shuffle", "=", "f"), ["false"]),
        (("apo-eval", "evaluation.num_s"), ["evaluation.num_samples="]),
        (("apo-ray", "--num"), ["--num-trainers"]),
        (("apo-doctor", "pl"), ["plan"]),
        (("apo-doctor", "plan", "--dev"), ["--device-memory-gib"]),
        (("apo-doctor", "check", "--sg"), ["--sglang-python"]),
        (("apo-convert", "v"), ["verify"]),
        (("apo-convert", "verify", "--log"), ["--logits"]),
        (("apo-sft", "rollout."), []),
    ],
)
def test_words_are_completed(words: tuple[str, ...], expected: list[str] | None, script: Path) -> None:
    found = completed(script, *words)
    if expected is None:
        assert set(found) == {"objective.apo_push_coeff=", "objective.apo_pull_coeff="}
    else:
        assert found == expected


@pytest.mark.parametrize("shell", SHELLS)
def test_command_prints_the_script(shell: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert doctor.main(["completion", shell]) == 0
    assert capsys.readouterr().out == completion_script(shell)
