"""Prompts and demonstrations: errors with file and line, exact tokens, reproducible order."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from apo_megatron.config.data import PromptFormat
from apo_megatron.data import demonstrations as demonstrations_module
from apo_megatron.data.demonstrations import DemonstrationLoader, load_demonstrations
from apo_megatron.data.prompts import PromptLoader, load_prompts
from apo_megatron.data.tokenizer import check_tokenizer, load_tokenizer
from apo_megatron.errors import CheckpointError, ConfigError, DataError
from apo_megatron.types import Prompt

WORDS = ["<s>", "</s>", *"abcdefghij"]
GOOD = b'{"prompt": "a b", "answer": 1}\n'


def word_tokenizer(**special_tokens: str) -> PreTrainedTokenizerBase:
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=backend, **special_tokens)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return word_tokenizer(eos_token="</s>")


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_prompts_keep_order_ids_and_other_columns(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(
        b'\xef\xbb\xbf{"prompt": "a b", "n": 5}\n\n{"prompt": "c", "id": "x"}\r\n{"prompt": "d", "id": 7}'
    )
    prompts = load_prompts(path, tokenizer, PromptFormat())
    assert [p.prompt_id for p in prompts] == ["line-1", "x", "7"]
    assert [p.text for p in prompts] == ["a b", "c", "d"]
    assert [p.token_ids.tolist() for p in prompts] == [[2, 3], [4], [5]]
    assert all(p.token_ids.dtype == np.int32 for p in prompts)
    assert prompts[0].fields == {"n": 5}
    assert [p.prompt_id for p in load_prompts(path, tokenizer, PromptFormat(), max_rows=2)] == ["line-1", "x"]


def test_long_prompts_are_left_out_and_counted(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase, caplog: pytest.LogCaptureFixture
) -> None:
    path = write(tmp_path / "rows.jsonl", [{"prompt": "a " * n} for n in (1, 5, 2, 4, 3)])
    with caplog.at_level(logging.WARNING):
        prompts = load_prompts(path, tokenizer, PromptFormat(), max_length=3)
    assert [len(p.token_ids) for p in prompts] == [1, 2, 3]
    assert "left out 2 of 5 prompts" in caplog.text
    with pytest.raises(DataError, match=r"all 5 prompts.*max_prompt_length=0"):
        load_prompts(path, tokenizer, PromptFormat(), max_length=0)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (GOOD + b'{"prompt": "a"', r"rows\.jsonl:2: malformed JSON"),
        (GOOD + GOOD[:-1] + GOOD, r"rows\.jsonl:2: malformed JSON"),  # two objects in a line
        (GOOD + b"[" * 100_000, r"rows\.jsonl:2: malformed JSON"),
        (GOOD + b'{"prompt": "a", "answer": ' + b"9" * 5_000 + b"}", r"rows\.jsonl:2: malformed JSON"),
        (GOOD + b'\n["a"]\n', r"rows\.jsonl:3: found a list .*expected an object"),
        (GOOD + b'{"prompt": "\xff"}\n', r"rows\.jsonl:2: not UTF-8"),
        (
            GOOD + b'{"question": "a"}\n',
            r"rows\.jsonl:2: column 'prompt' is missing, found columns: 'question'",
        ),
        (
            GOOD + b'{"prompt": 5, "answer": 1}\n',
            r"rows\.jsonl:2: column 'prompt' is an integer .*a string or a list",
        ),
        (GOOD + b'{"prompt": "a"}\n', r"rows\.jsonl:2: column 'answer' is missing"),
        (GOOD + b'{"prompt": "a", "answer": true}\n', r"rows\.jsonl:2: column 'answer' is true or false"),
        (GOOD + b'{"prompt": "a", "answer": null}\n', r"rows\.jsonl:2: column 'answer' is null .*an integer"),
        (GOOD + b'{"prompt": " ", "answer": 1}\n', r"rows\.jsonl:2: column 'prompt' has no tokens"),
        (GOOD + b'{"prompt": "a zz", "answer": 1}\n', r"rows\.jsonl:2: the tokenizer cannot encode 'a zz'"),
        (GOOD + b'{"prompt": "\\ud800", "answer": 1}\n', r"rows\.jsonl:2: the tokenizer cannot encode"),
        (GOOD + b'{"prompt": "a", "answer": 1, "id": 1.5}\n', r"rows\.jsonl:2: column 'id' is 1\.5"),
        (
            b'{"prompt": "a", "answer": 1, "id": 3}\n' * 2,
            r"rows\.jsonl:2: id '3' was used at .*rows\.jsonl:1 already",
        ),
        (b"", r"rows\.jsonl: holds no rows"),
        (b"\n \n", r"rows\.jsonl: holds no rows"),
    ],
)
def test_bad_rows_are_named(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase, content: bytes, message: str
) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(content)
    with pytest.raises(DataError, match=message):
        load_prompts(path, tokenizer, PromptFormat(), required_fields={"answer": int})


def test_missing_file_is_named(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    for path in (tmp_path / "none.jsonl", tmp_path):
        with pytest.raises(DataError, match=rf"{path}( \(train\))?: cannot be read .*check the path"):
            load_prompts(path, tokenizer, PromptFormat())
        with pytest.raises(DataError, match=f"{path}: cannot be read"):
            load_demonstrations(path, tokenizer, "prompt", "response", 9)


def test_tokenizer_must_fit_the_model(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    check_tokenizer(tokenizer, len(WORDS), "here")
    with pytest.raises(ConfigError, match=r"here: .*up to 11, the model's vocab_size is 11"):
        check_tokenizer(tokenizer, len(WORDS) - 1, "here")
    with pytest.raises(ConfigError, match="here: the tokenizer has no EOS token"):
        check_tokenizer(word_tokenizer(), len(WORDS), "here")
    with pytest.raises(ConfigError, match="no tokenizer could be loaded"):
        load_tokenizer(tmp_path / "none")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match="no tokenizer found"):
        load_tokenizer(tmp_path / "empty")


def make_prompts(count: int) -> list[Prompt]:
    return [Prompt(f"p{i}", "a", np.zeros(1, np.int32)) for i in range(count)]


def draw(loader: PromptLoader, num_batches: int) -> list[list[str]]:
    return [[prompt.prompt_id for prompt in loader.take(4)] for _ in range(num_batches)]


def test_prompt_order_is_seeded_and_visits_every_prompt_once_per_epoch() -> None:
    prompts = make_prompts(10)
    batches = draw(PromptLoader(prompts, 4, seed=3, shuffle=True), 5)  # 20 prompts: two epochs, one straddled
    drawn = [prompt_id for batch in batches for prompt_id in batch]
    everyone = sorted(prompt.prompt_id for prompt in prompts)
    assert sorted(drawn[:10]) == sorted(drawn[10:]) == everyone
    assert drawn[:10] != drawn[10:]
    assert batches == draw(PromptLoader(prompts, 4, seed=3, shuffle=True), 5)
    assert batches != draw(PromptLoader(prompts, 4, seed=4, shuffle=True), 5)
    in_file_order = draw(PromptLoader(prompts, 4, seed=3, shuffle=False), 5)
    assert [prompt_id for batch in in_file_order for prompt_id in batch] == [f"p{i}" for i in range(10)] * 2


@pytest.mark.parametrize("num_before", [0, 1, 2, 5, 11])
def test_prompt_order_resumes(num_before: int) -> None:
    prompts = make_prompts(10)
    whole = draw(PromptLoader(prompts, 4, seed=3, shuffle=True), num_before + 6)
    first = PromptLoader(prompts, 4, seed=3, shuffle=True)
    draw(first, num_before)
    state = json.loads(json.dumps(first.state_dict()))
    second = PromptLoader(prompts, 4, seed=3, shuffle=True)
    draw(second, 3)  # what was drawn before must not matter
    second.load_state_dict(state)
    assert draw(second, 6) == whole[num_before:]


def test_prompt_loader_refuses_other_data_and_too_few_prompts() -> None:
    state = PromptLoader(make_prompts(10), 4, seed=3, shuffle=True).state_dict()
    with pytest.raises(CheckpointError, match="num_rows=10, this run has num_rows=9"):
        PromptLoader(make_prompts(9), 4, seed=3, shuffle=True).load_state_dict(state)
    with pytest.raises(CheckpointError, match="seed=3"):
        PromptLoader(make_prompts(10), 4, seed=4, shuffle=True).load_state_dict(state)
    with pytest.raises(DataError, match=r"3 usable prompts.*data\.prompts_per_step=4"):
        PromptLoader(make_prompts(3), 4, seed=3, shuffle=True)


def random_demonstrations(count: int) -> list[dict[str, Any]]:
    rng = np.random.default_rng(0)

    def text(shortest: int) -> str:
        return " ".join(rng.choice(WORDS[2:], rng.integers(shortest, 7)))

    return [{"prompt": text(1), "response": text(0)} for _ in range(count)]


def test_demonstrations_equal_row_by_row_tokens(
    tmp_path: Path,
    tokenizer: PreTrainedTokenizerBase,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(demonstrations_module, "_ROWS_PER_CHUNK", 64)  # several chunks, the last one short
    rows = random_demonstrations(200)
    expected = []
    for row in rows:
        prompt = tokenizer(row["prompt"], add_special_tokens=False)["input_ids"]
        response = tokenizer(row["response"], add_special_tokens=False)["input_ids"]
        if len(prompt) + len(response) + 1 <= 10:
            expected.append(([*prompt, *response, tokenizer.eos_token_id], len(prompt)))
    path = write(tmp_path / "rows.jsonl", rows)
    with caplog.at_level(logging.WARNING):
        loaded = load_demonstrations(path, tokenizer, "prompt", "response", max_length=10)
    assert [
        (tokens.tolist(), length) for tokens, length in map(loaded.__getitem__, range(len(loaded)))
    ] == expected
    assert 0 < len(expected) < 200
    assert f"left out {200 - len(expected)} of 200 examples" in caplog.text
    assert loaded.tokens.dtype == np.int32


def test_bad_demonstrations_are_named(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(demonstrations_module, "_ROWS_PER_CHUNK", 2)
    good = {"prompt": "a", "response": "b"}
    for bad, message in (
        ({"prompt": "a"}, "column 'response' is missing"),
        ({"prompt": "", "response": "b"}, "column 'prompt' has no tokens"),
        ({"prompt": "a", "response": "zz"}, "the tokenizer cannot encode 'zz'"),
    ):
        path = write(tmp_path / "rows.jsonl", [good, good, good, bad])
        with pytest.raises(DataError, match=rf"rows\.jsonl:4: {message}"):
            load_demonstrations(path, tokenizer, "prompt", "response", 9)
    with pytest.raises(DataError, match=r"all 1 examples are longer than max_length=2"):
        load_demonstrations(write(tmp_path / "rows.jsonl", [good]), tokenizer, "prompt", "response", 2)


def test_demonstration_batches_are_reproducible_and_resume(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    path = write(tmp_path / "rows.jsonl", random_demonstrations(50))
    rows = load_demonstrations(path, tokenizer, "prompt", "response", 99)

    def batches(loader: DemonstrationLoader, count: int) -> list[list[tuple[list[int], int]]]:
        return [[(tokens.tolist(), length) for tokens, length in loader.next_batch()] for _ in range(count)]

    whole = batches(DemonstrationLoader(rows, 16, seed=0, shuffle=True), 8)
    first = DemonstrationLoader(rows, 16, seed=0, shuffle=True)
    assert batches(first, 5) == whole[:5]
    second = DemonstrationLoader(rows, 16, seed=0, shuffle=True)
    second.load_state_dict(first.state_dict())
    assert batches(second, 3) == whole[5:]
    with pytest.raises(DataError, match=r"50 usable examples.*train\.batch_size=51"):
        DemonstrationLoader(rows, 51, seed=0, shuffle=True)
