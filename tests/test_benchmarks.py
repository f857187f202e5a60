"""The registry of benchmarks: every entry in its published columns, overrides, and what users get wrong."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import yaml
from pydantic import BaseModel
from transformers import PreTrainedTokenizerBase

from apo_megatron.config import RewardConfig, dump_config, load_config
from apo_megatron.config.benchmarks import BenchmarkConfig
from apo_megatron.config.section import FrozenList, Section
from apo_megatron.data.tokenizer import load_tokenizer
from apo_megatron.errors import ConfigError, DataError
from apo_megatron.evaluation.benchmarks import BENCHMARKS, LoadedBenchmark, load_benchmark
from apo_megatron.rewards.countdown import CountdownReward
from apo_megatron.rewards.interface import score_batch
from apo_megatron.rewards.math import MathReward
from apo_megatron.rewards.text import ExactMatchReward
from apo_megatron.types import Completion
from examples.countdown import prepare
from tests.test_data_sources import TEMPLATE, write_parquet
from tests.tiny_models import write_word_level_tokenizer

# Two rows of each benchmark in its published columns; what the first one's prompt begins with; gold answers.
PUBLISHED: dict[str, tuple[list[dict[str, Any]], str, list[str]]] = {
    "aime24": (
        [
            {
                "id": 60,
                "problem": "A 9 km walk.",
                "solution": "long",
                "answer": "204",
                "url": "u",
                "year": "2024",
            },
            {
                "id": 61,
                "problem": "Two logs.",
                "solution": "long",
                "answer": "033",
                "url": "u",
                "year": "2024",
            },
        ],
        "A 9 km walk.",
        ["204", "33"],
    ),
    "aime25": (
        [
            {"problem": "Bases b > 9.", "answer": "70", "id": "0"},
            {"problem": "A heptagon.", "answer": "588", "id": "1"},
        ],
        "Bases b > 9.",
        ["70", "588"],
    ),
    "amc23": (
        [
            {"id": 0, "answer": "27", "url": "u", "question": "Cities A and B."},
            {"id": 1, "answer": "36.0", "url": "u", "question": "What is x?"},
        ],
        "Cities A and B.",
        ["27", "36"],
    ),
    "math500": (
        [
            {
                "problem": f"Convert $(0,{n})$.",
                "solution": "We have ...",
                "answer": "\\left( 3, \\frac{\\pi}{2} \\right)",
                "subject": "Precalculus",
                "level": 2,
                "unique_id": f"test/precalculus/{n}.json",
            }
            for n in range(2)
        ],
        "Convert $(0,0)$.",
        ["(3, \\pi/2)"] * 2,
    ),
    "minerva": (
        [
            {"question": "Two telescopes.", "answer": "1.6"},
            {"question": "Energy?", "answer": "4e33"},
        ],
        "Two telescopes.",
        ["1.6", "4 \\times 10^{33}"],
    ),
    "olympiadbench": (
        [
            {
                "id": 1606 + n,
                "question": "Xenia and Sergey play.",
                "solution": ["Sergey can ..."],
                "final_answer": answer,
                "context": context,
                "image_1": None,
                "modality": "Text-only",
                "is_multiple_answer": n > 0,
                "unit": None,
                "answer_type": "Numerical",
                "error": None,
            }
            for n, (answer, context) in enumerate([(["2"], "Given."), (["$-1,3$"], None), (["$5$", "7"], "")])
        ],
        "Given.\nXenia and Sergey play.",
        ["2", "3, -1", "7 and 5"],
    ),
    "gsm8k": (
        [
            {"question": "Ducks lay 16 eggs.", "answer": "16 - 3 = <<16-3=13>>13\n#### 18"},
            {"question": "A house?", "answer": "#### Cost\nSo it is #1.\n#### 70,000"},
        ],
        "Ducks lay 16 eggs.",
        ["18", "70000"],
    ),
}


class Evaluation(Section):
    """As the command's configuration holds them."""

    benchmarks: FrozenList[BenchmarkConfig]


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
def no_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    def load_dataset(path: str, **options: Any) -> None:
        raise AssertionError(f"{path} would be downloaded")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)


def write_jsonl(path: Path, rows: Sequence[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def answered(text: str) -> Completion:
    return Completion(np.zeros(1, np.int32), np.zeros(1, np.float32), text, "stop", ((0, 1),))


def read(folder: Path, benchmarks: str, *overrides: str) -> tuple[BenchmarkConfig, ...]:
    (folder / "eval.yaml").write_text(f"benchmarks: {benchmarks}\n")
    return load_config(Evaluation, folder / "eval.yaml", overrides).benchmarks


@pytest.mark.parametrize("name", PUBLISHED)
def test_every_benchmark_is_read_in_its_published_columns(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase, name: str
) -> None:
    rows, problem, golds = PUBLISHED[name]
    files = (write_jsonl(tmp_path / "rows.jsonl", rows), str(write_parquet(tmp_path / "rows.parquet", rows)))
    for file in files:
        loaded = load_benchmark(BenchmarkConfig(name=name, path=file), tokenizer)
        assert (loaded.name, loaded.num_samples, len(loaded.prompts)) == (name, None, len(rows))
        asked = loaded.prompts[0].text
        assert asked.startswith(f"{problem}\n") and asked.endswith("within \\boxed{}.")
        assert isinstance(loaded.reward, MathReward)


def test_the_gold_answers_are_what_is_judged_right(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    loaded: list[LoadedBenchmark] = []
    for name, (rows, _, _) in PUBLISHED.items():
        path = write_jsonl(tmp_path / f"{name}.jsonl", rows)
        cfg = BenchmarkConfig(name=name, path=path)
        loaded.append(load_benchmark(cfg, tokenizer, settings=RewardConfig(timeout=60.0)))
    prompts = [prompt for benchmark in loaded for prompt in benchmark.prompts]
    golds = [gold for _, _, of_benchmark in PUBLISHED.values() for gold in of_benchmark]
    completions = [[answered(f"So $\\boxed{{{gold}}}$."), answered("$\\boxed{12345}$")] for gold in golds]
    rewards = score_batch(loaded[0].reward, prompts, completions)
    loaded[0].reward.close()  # type: ignore[attr-defined]
    assert [(prompts[i].fields["answer"], r) for i, r in enumerate(rewards) if r != [1.0, 0.0]] == []


def test_countdown_is_what_the_example_writes(
    tmp_path: Path, chat_tokenizer: PreTrainedTokenizerBase
) -> None:
    rows = list(prepare.problem_rows(prepare.held_out_problems(3, np.random.default_rng(0)), "heldout"))
    cfg = BenchmarkConfig(name="countdown", path=write_jsonl(tmp_path / "heldout.jsonl", rows), num_samples=8)
    loaded = load_benchmark(cfg, chat_tokenizer)
    assert loaded.num_samples == 8
    assert isinstance(loaded.reward, CountdownReward)
    assert [prompt.text for prompt in loaded.prompts] == [row["prompt"] for row in rows]  # no template
    with pytest.raises(
        ConfigError, match=r"'countdown' is not on the hub: name a local file as path .*prepare"
    ):
        load_benchmark(BenchmarkConfig(name="countdown"), chat_tokenizer)


def test_the_registry_is_whole() -> None:
    assert set(BENCHMARKS) == {*PUBLISHED, "countdown"}
    for name, benchmark in BENCHMARKS.items():
        assert "{problem}" in benchmark.prompt_template
        assert name in BenchmarkConfig.model_fields["name"].description  # type: ignore[operator]
        assert (benchmark.hub_id is None) == (name == "countdown")
        if benchmark.hub_id is not None:
            assert benchmark.split is not None and benchmark.num_problems is not None


def test_a_hub_set_of_another_size_is_warned_of(
    tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    asked: list[tuple[str, str | None, str]] = []

    def load_dataset(path: str, name: str | None, split: str) -> datasets.Dataset:
        asked.append((path, name, split))
        return datasets.Dataset.from_list(PUBLISHED["gsm8k"][0])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    for cfg in (
        BenchmarkConfig(name="gsm8k"),
        BenchmarkConfig(name="gsm8k", max_problems=1),
        BenchmarkConfig(name="gsm8k", split="train"),
    ):
        with caplog.at_level(logging.WARNING):
            load_benchmark(cfg, tokenizer)
    assert asked == [("openai/gsm8k", "main", "test")] * 2 + [("openai/gsm8k", "main", "train")]
    assert [record.getMessage() for record in caplog.records] == [
        "benchmark gsm8k: openai/gsm8k has 2 problems, expected 1319: it was changed, and results are not "
        "comparable with others"
    ]


def test_a_directory_is_read_as_the_hub_is(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()  # the real loader
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    rows = PUBLISHED["amc23"][0]
    write_parquet(tmp_path / "amc23" / "test-00000-of-00001.parquet", rows)
    loaded = load_benchmark(BenchmarkConfig(name="amc23", path=str(tmp_path / "amc23")), tokenizer)
    assert [prompt.prompt_id for prompt in loaded.prompts] == ["0", "1"]


def test_overrides(tmp_path: Path, chat_tokenizer: PreTrainedTokenizerBase) -> None:
    rows = [{"q": "w4", "key": n, "solution": f"so \\boxed{{{n}}}"} for n in range(3)]
    cfg = BenchmarkConfig(
        name="aime24",
        path=write_jsonl(tmp_path / "rows.jsonl", rows),
        max_problems=2,
        prompt_field="q",
        id_field="key",
        fields=(("answer", "solution"),),
        answer_extraction="boxed",
        prompt_template="w5 {problem} w6",
        reward="exact_match",
    )
    loaded = load_benchmark(cfg, chat_tokenizer)
    assert isinstance(loaded.reward, ExactMatchReward)
    assert [prompt.prompt_id for prompt in loaded.prompts] == ["0", "1"]
    assert [prompt.fields["answer"] for prompt in loaded.prompts] == ["0", "1"]
    assert loaded.prompts[0].text == "w2 w5 w4 w6 w3"  # the chat template, since there is one
    plain = load_benchmark(cfg.model_copy(update={"chat_template": False}), chat_tokenizer)
    assert plain.prompts[0].text == "w5 w4 w6"


def test_problems_of_ones_own(tmp_path: Path, chat_tokenizer: PreTrainedTokenizerBase) -> None:
    rows = [
        {"prompt": [{"role": "user", "content": "w4 {problem}"}], "answer": 3},
        {"prompt": "w5", "answer": 4},
    ]
    cfg = BenchmarkConfig(name="mine", path=write_jsonl(tmp_path / "m.jsonl", rows), reward="math_verify")
    loaded = load_benchmark(cfg, chat_tokenizer, settings=RewardConfig(answer_field="other", timeout=9.0))
    assert [prompt.text for prompt in loaded.prompts] == ["w2 w4 {problem} w3", "w2 w5 w3"]
    assert [prompt.fields["answer"] for prompt in loaded.prompts] == [3, 4]
    assert loaded.reward.required_fields == {"answer": object}
    assert loaded.reward._workers._timeout == 9.0  # type: ignore[attr-defined]


def test_a_function_of_ones_own_reads_the_extracted_answer(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    path = write_jsonl(tmp_path / "gsm8k.jsonl", PUBLISHED["gsm8k"][0])
    loaded = load_benchmark(BenchmarkConfig(name="gsm8k", path=path, reward="math:sqrt"), tokenizer)
    assert [prompt.fields["answer"] for prompt in loaded.prompts] == ["18", "70000"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "aime42"}, "benchmark 'aime42' is unknown: did you mean 'aime2.'"),
        ({"name": "MATH500"}, "benchmark 'MATH500' is unknown: did you mean 'math500'"),
        (
            {"name": "zzz"},
            "'zzz' is unknown: known are aime24, .*countdown; Problems of your own need a path",
        ),
        ({"name": "mine", "path": "FILE"}, "benchmark 'mine': reward=null: say what judges"),
        ({"name": "aime24", "path": "FILE", "reward": "exakt"}, "'exakt' is unknown: choose one of"),
        (
            {"name": "aime24", "path": "FILE", "chat_template": True},
            "chat_template=true, but the tokenizer of",
        ),
        ({"name": "aime24", "path": "data/none"}, "data/none: there is no such file or directory .*'aime24'"),
        ({"name": "aime24", "path": "FILE", "split": "test"}, "rows.jsonl: found split=test"),
        ({"name": "amc23", "path": "FILE"}, r"rows\.jsonl:1: column 'question' is missing, found columns"),
        (
            {"name": "aime24", "path": "FILE", "fields": (("answer", "gold"),)},
            r":1: column 'gold' \('answer'\)",
        ),
        (
            {"name": "aime24", "path": "FILE", "answer_extraction": "after_hashes"},
            r"rows\.jsonl:1: column 'answer' is a string .*204.*, in which there is no gold answer; expected "
            "a solution that ends with",
        ),
        ({"name": "aime24", "path": "FILE", "answer_extraction": "list"}, "expected a list of answers"),
        (
            {
                "name": "aime24",
                "path": "FILE",
                "answer_extraction": "boxed",
                "fields": (("answer", "solution"),),
            },
            r"rows\.jsonl:1: column 'solution' is a string .*answer in .boxed",
        ),
        (
            {"name": "aime24", "path": "FILE", "id_field": "year"},
            r"rows\.jsonl:2: id '2024' was used at .*:1",
        ),
        (
            {"name": "aime24", "path": "FILE", "reward": "multiple_choice"},
            r"rows\.jsonl:1: prompt '60': column 'answer' is '204', expected the letter",
        ),
        (
            {"name": "aime24", "path": "FILE", "prompt_field": "id"},
            r":1: column 'id' is an integer \(60\), which",
        ),
    ],
)
def test_what_users_get_wrong(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase, options: dict[str, Any], message: str
) -> None:
    file = write_jsonl(tmp_path / "rows.jsonl", PUBLISHED["aime24"][0])
    if options.get("path") == "FILE":
        options = {**options, "path": file}
    with pytest.raises((ConfigError, DataError), match=message):
        load_benchmark(BenchmarkConfig(**options), tokenizer)


@pytest.mark.parametrize("answer", [None, "", " ", True, float("nan"), ["3"], {"a": 1}])
def test_a_row_without_a_gold_answer_is_named(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase, answer: object
) -> None:
    rows = [PUBLISHED["aime25"][0][0], {**PUBLISHED["aime25"][0][1], "answer": answer}]
    file = write_jsonl(tmp_path / "rows.jsonl", rows)
    with pytest.raises(DataError, match=r"rows\.jsonl:2: column 'answer' is .*no gold answer; expected text"):
        load_benchmark(BenchmarkConfig(name="aime25", path=file), tokenizer)


@pytest.mark.parametrize("answer", [[], [""], ["2", None], "2", None])
def test_a_list_without_answers_is_named(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase, answer: object
) -> None:
    rows = [{**PUBLISHED["olympiadbench"][0][0], "final_answer": answer}]
    file = write_jsonl(tmp_path / "rows.jsonl", rows)
    with pytest.raises(
        DataError, match=r"rows\.jsonl:1: column 'final_answer' is .*expected a list of answers"
    ):
        load_benchmark(BenchmarkConfig(name="olympiadbench", path=file), tokenizer)


def test_no_problem_is_left_out(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    rows = [{"problem": "w4 " * n, "answer": 1} for n in (2, 40)]
    cfg = BenchmarkConfig(name="aime25", path=write_jsonl(tmp_path / "rows.jsonl", rows))
    longest = max(len(prompt.token_ids) for prompt in load_benchmark(cfg, tokenizer).prompts)
    assert len(load_benchmark(cfg, tokenizer, max_prompt_length=longest).prompts) == 2
    with pytest.raises(DataError, match=rf"rows\.jsonl:2: the prompt has {longest} tokens, more than"):
        load_benchmark(cfg, tokenizer, max_prompt_length=longest - 1)


def test_a_text_is_a_name(tmp_path: Path) -> None:
    aime, math = read(tmp_path, "[aime24, {name: math500, max_problems: 10, fields: {answer: a.b}}]")
    assert aime == BenchmarkConfig(name="aime24")
    assert (math.name, math.max_problems, math.fields) == ("math500", 10, (("answer", "a.b"),))
    assert read(tmp_path, "[gsm8k]", "benchmarks=[aime24]") == (aime,)
    cfg: BaseModel = Evaluation(benchmarks=(aime, math))
    dump_config(cfg, tmp_path / "resolved.yaml")
    assert load_config(Evaluation, tmp_path / "resolved.yaml") == cfg
    assert yaml.safe_load((tmp_path / "resolved.yaml").read_text())["benchmarks"][1]["fields"] == {
        "answer": "a.b"
    }


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "[{nam: aime24}]",
            r"eval.yaml:1: benchmarks\.0\.nam: unknown field, did you mean benchmarks\.0\.name",
        ),
        ("[{max_problems: 1}]", r"benchmarks\.0\.name: missing, expected text"),
        ("[7]", r"benchmarks\.0: found 7, expected list, each a section"),
        ("[../aime24]", r"name='\.\./aime24': files are named after it"),
        ("[{name: a, prompt_template: Solve it}]", r"prompt_template='Solve it' has no \{problem\}"),
        ("[{name: a, answer_extraction: eval}]", r"answer_extraction: found 'eval', expected one of as_is"),
        ("[{name: a, max_problems: 0}]", r"benchmarks\.0\.max_problems: found 0, expected whole number >= 1"),
    ],
)
def test_a_wrong_configuration_is_explained(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        read(tmp_path, text)
