"""What the viewer of samples shows, marks, selects and refuses."""

from __future__ import annotations

import gzip
import os
import pty
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from transformers import PreTrainedTokenizerFast

from apo_megatron.config import RLConfig, dump_config
from apo_megatron.data.tokenizer import decode_each
from apo_megatron.rollout.gathering import SampleColumns
from apo_megatron.rollout.sample_records import step_path, write_step
from apo_megatron.rollout.sampler import StepSamples
from apo_megatron.telemetry.terminal import escaped, escaped_line
from apo_megatron.types import Completion, Prompt, Sample, SampleGroup
from tools.view_rollouts import main

ROOT = Path(__file__).resolve().parent.parent


def _byte_tokenizer() -> PreTrainedTokenizerFast:
    """A token a byte, and <end>: characters take up to four tokens."""
    alphabet = sorted(ByteLevel.alphabet())
    backend = Tokenizer(BPE({char: i for i, char in enumerate(alphabet)}, []))
    backend.pre_tokenizer = ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<end>")


TOKENIZER = _byte_tokenizer()


def _ids(text: str) -> list[int]:
    return TOKENIZER(text, add_special_tokens=False)["input_ids"]


def _raw(data: bytes) -> list[int]:
    """Ids of bytes that may not be UTF-8."""
    latin = {byte: _ids(bytes([byte]).decode())[0] for byte in range(128)}
    shown = {b: i for char in "éß中𝄞" for b, i in zip(char.encode(), _ids(char), strict=True)}
    return [(latin | shown)[byte] for byte in data]


def test_tokens_join_to_the_text_and_a_character_belongs_to_its_last_token() -> None:
    ids = _ids("a é中!𝄞") + [TOKENIZER.eos_token_id]
    texts = decode_each(TOKENIZER, ids)
    assert texts == ["a", " ", "", "é", "", "", "中", "!", "", "", "", "𝄞", "<end>"]
    for data in (b"\xc3", b"ab\xe4\xb8", b"\xc3\xc3\xc3\xc3\xc3\xc3a", b"\xb8\xadx\xf0\x9d\x84b"):
        texts = decode_each(TOKENIZER, _raw(data))
        assert len(texts) == len(data) and "".join(texts) == TOKENIZER.decode(_raw(data)), data
    assert decode_each(TOKENIZER, []) == []


def test_no_control_character_gets_through() -> None:
    # Colours, title, cursor, carriage return, C1, right-to-left override, zero width, line separator.
    hostile = "\x1b[31m \x1b]0;t\x07 \x08 \r \x9b2J \u202e \u200b \u2028 \x00"
    assert escaped_line("p0\n#0\tx\x1b") == "p0\\n#0\\tx\\x1b"
    assert escaped(hostile).isprintable() and "\\x1b[31m" in escaped(hostile)
    assert escaped("a\tb\nc é中 \\frac") == "a\tb\nc é中 \\frac"


def _sample(text: str, reward: float, advantage: float | None) -> Sample:
    ids = np.array([*_ids(text), TOKENIZER.eos_token_id], np.int32)
    versions = ((3, len(ids)),) if "two" not in text else ((3, 2), (4, len(ids) - 2))
    return Sample(Completion(ids, np.zeros(len(ids), np.float32), text, "stop", versions), reward, advantage)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    TOKENIZER.save_pretrained(folder / "model")
    cfg: dict[str, Any] = {
        "model": {"hf_path": str(folder / "model")},
        "data": {"train_path": "x"},
        "train": {"run_dir": str(folder), "num_steps": 9},
    }
    dump_config(RLConfig.model_validate(cfg), folder / "config.yaml")
    groups = [
        SampleGroup(
            Prompt("p0", "1 + 1\n= ?", np.arange(3, dtype=np.int32)),
            [
                _sample("ab é\n\ncd", 0.0, -0.75),
                _sample("two", 1.0, 1.5),
                _sample("\x1b[2J[red]x", float("nan"), None),
            ],
        ),
        SampleGroup(
            Prompt("p1", "2 + 2", np.arange(3, dtype=np.int32)),
            [_sample("five", 0.0, 0.0), _sample("six", 0.0, 0.0)],
        ),
    ]
    dropped = [(Prompt("p2", "3 + 3", np.arange(3, dtype=np.int32)), SampleColumns.of(groups[1].samples))]
    #            a  b  _  é  é \n \n  c  d <end>
    marks = {0: [0, 1, 1, 0, 1, 1, 0, 1, 0, 1], 1: [0, 0, 0, 0]}
    pulled = {number: np.array(bits, bool) for number, bits in marks.items()}
    (folder / "rollouts").mkdir()
    write_step(folder / "rollouts", 4, StepSamples(groups, {}, None, dropped), pulled, keep=0)
    write_step(folder / "rollouts", 2, StepSamples(groups[1:], {}), {}, keep=0)
    return folder


def _shown(capsys: pytest.CaptureFixture[str], *words: Any) -> str:
    assert main(list(map(str, words))) == 0
    return capsys.readouterr().out


def test_plain_text_marks_tokens_with_signs(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert (
        _shown(capsys, run)
        == """\
marked: ⟦tokens⟧ on which APO's pull acted in their update

  > 1 + 1
  > = ?
step 4  p0 #0  wrong  reward 0  A -0.750  10 tokens  stopped  version 3  6 pulled
  | a⟦b⟧ ⟦é↵⟧
  |
  | ⟦c⟧d⟦<end>⟧
step 4  p0 #1  right  reward 1  A +1.500  4 tokens  stopped  version 3 (2 tokens), 4 (2 tokens)
  | two<end>
step 4  p0 #2  unjudged  11 tokens  stopped  version 3  not trained on (could not be judged)
  | \\x1b[2J[red]x<end>

  > 2 + 2
step 4  p1 #0  wrong  reward 0  5 tokens  stopped  version 3  not trained on (group of equal rewards)
  | five<end>
step 4  p1 #1  wrong  reward 0  4 tokens  stopped  version 3  not trained on (group of equal rewards)
  | six<end>

  > 3 + 3
step 4  p2 #0  wrong  reward 0  5 tokens  stopped  version 3  dropped (group that teaches nothing)
  | five
step 4  p2 #1  wrong  reward 0  4 tokens  stopped  version 3  dropped (group that teaches nothing)
  | six

7 samples, 16.7 % right (1 right, 5 wrong, 1 unjudged), mean length 6.1 tokens
the pull acted on 6 of 10 tokens with A < 0 (60.0 %)
2 not trained on (group of equal rewards)
2 dropped (group that teaches nothing)
1 not trained on (could not be judged)
"""
    )


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--reward", "right"], ["p0 #1"]),
        (["--reward", "unjudged"], ["p0 #2"]),
        (["--reward", "wrong", "--trained"], ["p0 #0"]),
        (["--min-length", "5", "--max-length", "9"], ["p1 #0", "p2 #0"]),
        (["--problem", "p1", "p0", "--max-length", "4"], ["p0 #1", "p1 #1"]),
        (["--step", "2", "4", "--problem", "p1", "--min-length", "5"], ["step 2  p1 #0", "step 4  p1 #0"]),
        (["--problem", "p7"], []),
    ],
)
def test_filters(
    options: list[str], expected: list[str], run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shown = _shown(capsys, run, *options)
    headers = [line for line in shown.splitlines() if line.startswith("step ")]
    assert len(headers) == len(expected)
    assert all(place in header for place, header in zip(expected, headers, strict=True))
    assert ("no sample is like that" in shown) == (not expected)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["{run}", "--step", "3"], "rollouts: no samples of step 3; there are 2 steps from 2 to 4"),
        (["{run}/model"], "model/rollouts: no samples found"),
        (["{run}", "--tokenizer", "{run}/rollouts"], "--tokenizer={run}/rollouts: no tokenizer"),
        (["{bad}"], "step_000001.jsonl.gz:2: malformed JSON"),
    ],
)
def test_errors_name_what_is_wrong(
    words: list[str], message: str, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "rollouts").mkdir()
    (tmp_path / "config.yaml").write_text((run / "config.yaml").read_text())
    good = gzip.decompress(step_path(run / "rollouts", 2).read_bytes())
    step_path(tmp_path / "rollouts", 1).write_bytes(gzip.compress(good.splitlines(True)[0] + b"{\n"))
    places = {"run": str(run), "bad": str(tmp_path)}
    assert main([word.format(**places) for word in words]) == 2
    assert message.format(**places) in capsys.readouterr().err


def _command(run: Path, *options: str) -> list[str]:
    return [sys.executable, "-m", "tools.view_rollouts", str(run), *options]


def test_a_terminal_gets_colours_through_the_pager(run: Path) -> None:
    controller, terminal = pty.openpty()
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TERM": "xterm-256color", "COLUMNS": "60"}
    environment |= {"PAGER": "sed s/marked:/paged:/"}
    environment.pop("NO_COLOR", None)
    process = subprocess.Popen(
        _command(run, "--trained"), cwd=ROOT, env=environment, stdin=terminal, stdout=terminal
    )
    os.close(terminal)
    shown = b""
    try:
        while chunk := os.read(controller, 65536):
            shown += chunk
    except OSError:  # what Linux says at the end of a terminal
        pass
    assert process.wait(60) == 0
    os.close(controller)
    text = shown.decode()
    assert text.startswith("paged:") and "\x1b[4;36mb" in text and "⟦" not in text
    assert "60.0 %" in text


def test_interrupting_the_pager_s_search_leaves_nobody_behind(run: Path, tmp_path: Path) -> None:
    ended = tmp_path / "ended"
    pager = f"""bash -c 'trap "sleep 1; touch {ended}; exit" INT; cat; echo at-the-prompt; sleep 60 & wait'"""
    controller, terminal = pty.openpty()
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TERM": "xterm-256color", "PAGER": pager}
    process = subprocess.Popen(
        _command(run), cwd=ROOT, env=environment, stdin=terminal, stdout=terminal, start_new_session=True
    )
    os.close(terminal)
    shown = b""
    while b"at-the-prompt" not in shown:
        shown += os.read(controller, 65536)
    os.killpg(process.pid, signal.SIGINT)  # what the terminal does at Ctrl-C
    assert process.wait(60) == 0 and ended.exists()
    os.close(controller)


def test_a_reader_may_leave_early(run: Path) -> None:
    words = f"{sys.executable} -m tools.view_rollouts {run} | true"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    result = subprocess.run(
        ["bash", "-o", "pipefail", "-c", words], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert (result.returncode, result.stderr) == (0, "")
