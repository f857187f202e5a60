"""Prompts from Parquet files, directories and JSONL: one reader, column mapping, chat templates, errors."""

from __future__ import annotations

import datetime
import json
import logging
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pytest
from pyarrow import parquet
from transformers import PreTrainedTokenizerBase

from apo_megatron.config.data import PromptFormat
from apo_megatron.data.prompts import load_prompts
from apo_megatron.data.sources import read_source
from apo_megatron.data.tokenizer import load_tokenizer
from apo_megatron.errors import ConfigError, DataError
from tests.tiny_models import write_word_level_tokenizer

TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'tool' %}{{ raise_exception('no tools') }}{% endif %}"
    "w2 {{ m.content }} {% endfor %}{% if add_generation_prompt %}w3{% endif %}"
)
DAPO_FORMAT = PromptFormat(
    id_field="extra_info.index", fields=(("answer", "reward_model.ground_truth"),), chat_template=True
)


def dapo_row(number: int, **changes: Any) -> dict[str, Any]:
    """A row of the schema of DAPO-Math-17k."""
    return {
        "data_source": "math_dapo",
        "prompt": [{"content": f"w{10 + number} w5", "role": "user"}],
        "ability": "MATH",
        "reward_model": {"ground_truth": str(number), "style": "rule-lighteval/MATH_v2"},
        "extra_info": {"index": f"id-{number}"},
        **changes,
    }


def write_parquet(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    return path


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerBase:
    folder = tmp_path_factory.mktemp("tokenizer")
    write_word_level_tokenizer(folder, 107)
    return load_tokenizer(folder)


@pytest.fixture(scope="module")
def chat_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerBase:
    folder = tmp_path_factory.mktemp("chat_tokenizer")
    write_word_level_tokenizer(folder, 107)
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return load_tokenizer(folder)


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


def test_the_schema_of_dapo_math_through_the_mapping(
    tmp_path: Path, chat_tokenizer: PreTrainedTokenizerBase
) -> None:
    path = write_parquet(tmp_path / "dapo.parquet", [dapo_row(n) for n in range(3)])
    prompts = load_prompts(path, chat_tokenizer, DAPO_FORMAT, required_fields={"answer": str})
    assert [prompt.prompt_id for prompt in prompts] == ["id-0", "id-1", "id-2"]
    assert prompts[1].text == "w2 w11 w5 w3"
    assert prompts[1].token_ids.tolist() == [2, 11, 5, 3]
    assert prompts[1].fields["answer"] == "1"
    assert prompts[1].fields["data_source"] == "math_dapo"
    assert "prompt" not in prompts[1].fields


def test_one_reader_gives_the_same_prompts_from_every_form(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    rows = [{"problem": f"w{n + 4}", "answer": n} for n in range(5)]
    form = PromptFormat(prompt_field="problem")
    file = write_parquet(tmp_path / "rows.parquet", rows)
    lines = tmp_path / "rows.jsonl"
    lines.write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name, part in (("train-0", rows[:3]), ("train-1", rows[3:]), ("test-0", rows[:1])):
        write_parquet(tmp_path / "folder" / "data" / f"{name}.parquet", part)

    def load(path: Path, split: str | None = None) -> list[tuple[list[int], Any]]:
        own_form = form.model_copy(update={"split": split})
        prompts = load_prompts(path, tokenizer, own_form, required_fields={"answer": int})
        return [(prompt.token_ids.tolist(), prompt.fields) for prompt in prompts]

    expected = [([n + 4], {"answer": n}) for n in range(5)]
    assert load(file) == load(lines) == load(tmp_path / "folder") == expected
    assert load(tmp_path / "folder", "test") == expected[:1]


def test_a_hub_id_is_loaded_by_datasets_and_a_local_name_goes_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[str, dict[str, Any]]] = []

    def load_dataset(path: str, **options: Any) -> datasets.Dataset:
        asked.append((path, options))
        return datasets.Dataset.from_list([{"a": 1}])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    (row,) = read_source("owner/name", subset="main", split="test")
    assert asked == [("owner/name", {"name": "main", "split": "test"})]  # and nothing that would run code
    assert (row.place, row.values) == ("owner/name (main, test): row 1", {"a": 1})
    monkeypatch.chdir(tmp_path)
    write_parquet(tmp_path / "owner" / "rows.parquet", [{"a": 2}])
    (tmp_path / "owner" / "name").write_text('{"a": 3}\n')
    assert [row.values["a"] for row in read_source("owner/rows.parquet")] == [2]
    assert [row.values["a"] for row in read_source("owner/name")] == [3]
    assert len(asked) == 1


def test_rows_of_a_directory_are_named_with_their_split(tmp_path: Path) -> None:
    write_parquet(tmp_path / "folder" / "test.parquet", [{"a": 1}])
    (row,) = read_source(tmp_path / "folder", split="test")
    assert (row.place, row.name) == (f"{tmp_path / 'folder'} (test): row 1", "row-1")
    with pytest.raises(DataError, match=r"row 1: column 'b' is missing, found columns: 'a'"):
        row.column("b")


def test_values_that_json_does_not_have_are_named(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "rows.parquet", [{"a": datetime.date(2026, 1, 31), "b": b"x"}])
    (row,) = read_source(path)
    with pytest.raises(DataError, match=r"parquet: row 1: column 'a' is date .*2026.*expected a string"):
        row.column("a", str)
    with pytest.raises(DataError, match=r"column 'b' is bytes .*expected a string or an integer"):
        row.column("b", str | int)


def test_a_column_with_dots_in_its_own_name_goes_first(tmp_path: Path) -> None:
    (row,) = read_source(write_parquet(tmp_path / "rows.parquet", [{"a.b": 1, "a": {"b": 2, "c": 3}}]))
    assert (row.column("a.b"), row.column("a.c")) == (1, 3)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"reward_model": {"style": "rule"}},
            r"column 'reward_model\.ground_truth' \('answer'\) is (missing, found columns in 'reward_model': "
            r"'style'|null)",
        ),
        ({"reward_model": None}, r"column 'reward_model\.ground_truth' \('answer'\) is missing, found null"),
        (
            {"extra_info": {"index": None}},
            r"column 'extra_info\.index' is None, expected a string or an integer",
        ),
        ({"extra_info": {"index": "id-0"}}, r"id 'id-0' was used at .*(: row |:)1 already.*prepare_data"),
        ({"prompt": []}, r"column 'prompt' is a list \(\[\]\), expected a string or a list of chat messages"),
        (
            {"prompt": [{"role": "user", "content": None}]},
            r"message 1 in column 'prompt' is an object .* expected an object with the texts",
        ),
        (
            {"prompt": [{"role": "tool", "content": "w4"}]},
            r"the tokenizer's chat template refuses the messages in 'prompt' \(no tools\)",
        ),
        ({"prompt": [{"role": "user", "content": "w4 " * 9}] * 2}, ""),  # long, but not wrong
    ],
)
def test_bad_rows_are_named(
    tmp_path: Path, chat_tokenizer: PreTrainedTokenizerBase, changes: dict[str, Any], message: str
) -> None:
    path = write_parquet(tmp_path / "dapo.parquet", [dapo_row(0), dapo_row(1, **changes)])
    lines = tmp_path / "dapo.jsonl"
    lines.write_text("".join(json.dumps(row) + "\n" for row in (dapo_row(0), dapo_row(1, **changes))))
    for source, place in ((path, r"dapo\.parquet: row 2: "), (lines, r"dapo\.jsonl:2: ")):
        if not message:
            assert len(load_prompts(source, chat_tokenizer, DAPO_FORMAT, max_length=15)) == 1
            continue
        with pytest.raises(DataError, match=place + message):
            load_prompts(source, chat_tokenizer, DAPO_FORMAT, required_fields={"answer": str})


def test_long_prompts_are_counted_with_their_template(
    tmp_path: Path, chat_tokenizer: PreTrainedTokenizerBase, caplog: pytest.LogCaptureFixture
) -> None:
    rows = [dapo_row(0), dapo_row(1, prompt=[{"role": "user", "content": "w4 w4 w4"}])]
    path = write_parquet(tmp_path / "dapo.parquet", rows)
    with caplog.at_level(logging.WARNING):
        assert len(load_prompts(path, chat_tokenizer, DAPO_FORMAT, max_length=4)) == 1
    assert "left out 1 of 2 prompts, longer than 4 tokens" in caplog.text


def test_chat_templates_are_asked_for(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase, chat_tokenizer: PreTrainedTokenizerBase
) -> None:
    messages = write_parquet(tmp_path / "messages.parquet", [dapo_row(0)])
    text = write_parquet(tmp_path / "text.parquet", [{"prompt": "w4"}])
    with pytest.raises(DataError, match="row 1: column 'prompt' is a list of chat messages.*chat_template"):
        load_prompts(messages, chat_tokenizer, PromptFormat())
    with pytest.raises(ConfigError, match="chat_template=true, but the tokenizer of .* has no chat template"):
        load_prompts(messages, tokenizer, PromptFormat(chat_template=True))
    assert load_prompts(text, chat_tokenizer, PromptFormat())[0].text == "w4"
    assert load_prompts(text, chat_tokenizer, PromptFormat(chat_template=True))[0].text == "w2 w4 w3"


def test_what_cannot_be_read_is_named(tmp_path: Path) -> None:
    damaged = write_parquet(tmp_path / "damaged.parquet", [dapo_row(n) for n in range(50)])
    damaged.write_bytes(damaged.read_bytes()[:-20])
    (tmp_path / "empty").mkdir()
    write_parquet(tmp_path / "folder" / "train.parquet", [{"a": 1}])
    nothing = tmp_path / "nothing.parquet"
    parquet.write_table(pyarrow.table({"prompt": pyarrow.array([], pyarrow.string())}), nothing)
    for path, split, message in (
        (tmp_path / "missing.parquet", None, r"missing\.parquet: cannot be read .*check the path"),
        (damaged, None, r"damaged\.parquet: cannot be read after row 0 .*expected a Parquet file"),
        (nothing, None, r"nothing\.parquet: holds no rows"),
        (tmp_path / "empty", None, r"empty \(train\): cannot be read .*check the path"),
        (tmp_path / "folder", "test", r"folder \(test\): cannot be read .*test.*check the path, subset"),
        (tmp_path / "none.jsonl", "test", r"none\.jsonl: found split=test.*for a file"),
        ("nobody-here/no-such-data", "test", r"nobody-here/no-such-data \(test\): cannot be read"),
    ):
        with pytest.raises(DataError, match=message):
            list(read_source(path, split=split))
