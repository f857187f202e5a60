"""tools/prepare_data.py: what is removed, what is kept and said, and that files appear whole."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from pyarrow import parquet

from apo_megatron.config import RLConfig, load_config
from apo_megatron.config.data import PrepareConfig, PromptDataset, PromptFormat
from apo_megatron.data.decontamination import NgramIndex, split_words
from apo_megatron.data.prompts import load_prompts
from apo_megatron.data.tokenizer import load_tokenizer
from apo_megatron.errors import ConfigError, DataError
from tests.tiny_models import write_word_level_tokenizer
from tools.prepare_data import main, prepare, report_text

INSTRUCTION = "Solve the following problem step by step and write the answer on the last line of all"
PAGE = Path(__file__).resolve().parent.parent / "docs" / "data.md"


def chat(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def row(number: int, text: str, answer: str = "1") -> dict[str, Any]:
    return {
        "prompt": chat(text),
        "reward_model": {"ground_truth": answer},
        "extra_info": {"index": f"i{number}"},
    }


@pytest.fixture
def source(tmp_path: Path) -> PromptDataset:
    rows = [
        row(0, "How many  roads must\na man walk down"),
        row(0, "How many roads must a man walk down"),  # the same but for white space
        row(1, "What is two plus two"),
        row(2, "what is two plus two"),  # case may matter to a problem: another one
        row(1, "What is two plus two", answer="5"),
        row(3, "A train leaves at noon with ten cars, and each of the cars has four doors."),
        row(4, "long " * 20),
    ]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "raw.parquet")
    return PromptDataset(
        path=str(tmp_path / "raw.parquet"),
        id_field="extra_info.index",
        fields=(("answer", "reward_model.ground_truth"),),
    )


@pytest.fixture
def held_out(tmp_path: Path) -> PromptDataset:
    path = tmp_path / "held_out.jsonl"
    problem = "Each of the cars has FOUR doors; how many doors are there?"
    path.write_text(json.dumps({"problem": problem}) + "\n")
    return PromptDataset(path=str(path), prompt_field="problem")


def config(tmp_path: Path, source: PromptDataset, **changes: Any) -> PrepareConfig:
    return PrepareConfig(source=source, output_path=str(tmp_path / "out" / "clean.jsonl"), **changes)


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_what_is_removed_is_counted_and_the_rest_can_be_trained_on(
    tmp_path: Path, source: PromptDataset, held_out: PromptDataset
) -> None:
    write_word_level_tokenizer(tmp_path / "model", 107)
    cfg = config(
        tmp_path,
        source,
        against=(held_out,),
        ngram=7,
        tokenizer=str(tmp_path / "model"),
        max_prompt_length=15,
    )
    source = source.model_copy(update={"chat_template": True})
    (tmp_path / "model" / "chat_template.jinja").write_text("{{ messages[0].content }}")
    cfg = cfg.model_copy(update={"source": source})
    report = prepare(cfg)
    assert (report.num_rows, report.num_kept, report.num_duplicates, report.num_too_long) == (7, 3, 2, 1)
    assert report.num_contaminated == {held_out.path: 1}
    assert report.num_contradictions == 1
    text = report_text(report)
    assert "raw.parquet: row 5 against " in text and "raw.parquet: row 3" in text
    assert (
        "raw.parquet: row 6 with " in text and "held_out.jsonl:1: 'each of the cars has four doors'" in text
    )

    written = read(Path(cfg.output_path))
    assert [values["id"] for values in written] == ["i0", "i1", "i2"]
    assert written[1]["prompt"] == chat("What is two plus two")
    assert written[1]["answer"] == "1"
    form = PromptFormat(chat_template=True)
    prompts = load_prompts(
        cfg.output_path, load_tokenizer(cfg.tokenizer or ""), form, required_fields={"answer": str}
    )
    assert [prompt.prompt_id for prompt in prompts] == ["i0", "i1", "i2"]


def test_the_same_input_gives_the_same_file(tmp_path: Path, source: PromptDataset) -> None:
    cfg = config(tmp_path, source)
    prepare(cfg)
    first = Path(cfg.output_path).read_bytes()
    prepare(cfg)
    assert Path(cfg.output_path).read_bytes() == first
    again = PromptDataset(path=cfg.output_path, fields=(("answer", "answer"),))
    report = prepare(config(tmp_path, again))  # over its own input, which is clean
    assert report.num_kept == report.num_rows == 5
    assert Path(cfg.output_path).read_bytes() == first


def test_an_error_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    raw, out = tmp_path / "raw.jsonl", tmp_path / "out"
    out.mkdir()
    (out / "clean.jsonl").write_text("old")
    good = json.dumps({"prompt": "a", "id": 1})
    for bad, message in (
        (
            json.dumps({"prompt": "b", "id": 1}),
            r"raw\.jsonl:2: id '1' was used at .*:1 already, by another prompt",
        ),
        (json.dumps({"prompt": 5}), r"raw\.jsonl:2: column 'prompt' is an integer"),
        ('{"prompt": "c", "score": NaN}', r"raw\.jsonl:2: column 'score' cannot be written as JSON"),
        ("{", r"raw\.jsonl:2: malformed JSON"),
    ):
        raw.write_text(f"{good}\n{bad}\n")
        with pytest.raises(DataError, match=message):
            prepare(config(tmp_path, PromptDataset(path=str(raw))))
    raw.write_text(good + "\n")
    copy = PromptDataset(path=str(raw))
    with pytest.raises(DataError, match=r"raw\.jsonl: nothing is left of it(.|\n)*1 removed: an overlap"):
        prepare(config(tmp_path, copy, against=(copy,)))
    assert [path.name for path in out.iterdir()] == ["clean.jsonl"]
    assert (out / "clean.jsonl").read_text() == "old"


# --- overlaps -------------------------------------------------------------------------------------


def index(*texts: str, n: int = 4) -> NgramIndex:
    return NgramIndex(texts, [f"e{i}" for i in range(len(texts))], n)


def test_words_are_compared_without_case_punctuation_and_forms_of_characters() -> None:
    assert split_words("Find $x_1$, the ﬁrst ROOT of x²=2!") == [
        "find",
        "x",
        "1",
        "the",
        "first",
        "root",
        "of",
        "x2",
        "2",
    ]


def test_n_words_in_a_row_overlap_and_fewer_do_not() -> None:
    problems = index("one two three four five", "red green blue black")
    found = problems.overlap("zero Two three, four five six")
    assert found is not None and (found.place, found.words) == ("e0", "two three four five")
    assert problems.overlap("two three four six five") is None
    assert problems.overlap("two three four") is None
    found = problems.overlap("x red green blue black")
    assert found is not None and found.place == "e1"


def test_a_short_evaluation_prompt_must_be_met_as_a_whole() -> None:
    problems = index("solve x squared")
    assert problems.overlap("Solve x squared!") is not None
    assert problems.overlap("now solve x squared") is None


def test_instructions_that_evaluation_prompts_share_are_no_overlap() -> None:
    texts = [f"{INSTRUCTION}: Let n{i} be a number of kind k{i} and size s{i}" for i in range(30)]
    texts += [f"{INSTRUCTION}: x{i} squared" for i in range(30)]
    problems = NgramIndex(texts, map(str, range(60)), 13)
    assert problems.overlap(f"{INSTRUCTION}: Let us find out what a triangle is") is None
    assert problems.overlap(f"{INSTRUCTION}: y1 squared") is None
    found = problems.overlap(f"{INSTRUCTION}: x7 squared")
    assert found is not None and found.place == "37"
    ten = NgramIndex(texts, map(str, range(60)), 10)  # "Let" stands after the instruction in half of them
    found = ten.overlap("Assume this: n4 be a number of kind k4 and size s4")
    assert found is not None and found.place == "4"


def test_a_repeated_evaluation_prompt_is_no_instruction() -> None:
    """Some evaluation sets hold each problem many times."""
    problems = index(*["one two three four five"] * 32)
    assert problems.num_prompts == 1
    assert problems.overlap("one two three four") is not None


# --- the command ----------------------------------------------------------------------------------


def test_the_command(
    tmp_path: Path, source: PromptDataset, held_out: PromptDataset, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "prepare.yaml"
    path.write_text(
        f"source: {{path: {source.path}, fields: {{answer: reward_model.ground_truth}}}}\n"
        f"against: [{{path: {held_out.path}, prompt_field: problem}}]\n"
        f"output_path: {tmp_path / 'clean.jsonl'}\n"
    )
    assert main(["--config", str(path), "ngram=7"]) == 0
    shown = capsys.readouterr().out
    assert "7 rows read" in shown and "4 rows kept" in shown and "written to" in shown
    assert [values["id"] for values in read(tmp_path / "clean.jsonl")] == ["row-1", "row-3", "row-4", "row-7"]
    assert main(["--config", str(path), "source.path=missing.parquet"]) == 2
    assert "missing.parquet: cannot be read" in capsys.readouterr().err


def test_a_tokenizer_and_a_length_go_together(tmp_path: Path) -> None:
    path = tmp_path / "prepare.yaml"
    path.write_text("source: {path: a}\noutput_path: b\n")
    with pytest.raises(ConfigError, match="tokenizer without max_prompt_length"):
        load_config(PrepareConfig, path, ["tokenizer=model"])
    with pytest.raises(ConfigError, match="max_prompt_length without tokenizer"):
        load_config(PrepareConfig, path, ["max_prompt_length=9"])
    with pytest.raises(ConfigError, match="tokenizer=.*missing: no tokenizer"):
        prepare(load_config(PrepareConfig, path, [f"tokenizer={tmp_path}/missing", "max_prompt_length=9"]))


def test_the_configurations_of_the_page_load(tmp_path: Path) -> None:
    examples = re.findall(r"```yaml\n(.*?)```", PAGE.read_text(), re.DOTALL)
    assert len(examples) == 5
    for example in examples:
        path = tmp_path / "example.yaml"
        if example.startswith("data:"):
            path.write_text("model: {hf_path: m}\ntrain: {run_dir: r, num_steps: 1}\n" + example)
            load_config(RLConfig, path)
        else:
            path.write_text(example)
            load_config(PrepareConfig, path)
