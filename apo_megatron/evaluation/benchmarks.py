r"""The benchmarks there are, and how one becomes prompts and a reward. A new one is an entry in BENCHMARKS.

docs/evaluation.md says where hub ids, splits and columns were looked up.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from apo_megatron.config.benchmarks import AnswerExtraction, BenchmarkConfig
from apo_megatron.config.data import PromptFormat
from apo_megatron.config.reward import RewardConfig
from apo_megatron.data.chat import check_chat_template
from apo_megatron.data.prompts import PromptRow, encode_rows, read_unique_rows
from apo_megatron.data.rows import describe
from apo_megatron.errors import ConfigError, DataError
from apo_megatron.evaluation.gold import extracted_answer
from apo_megatron.rewards.registry import Reward, build_reward
from apo_megatron.types import Prompt

logger = logging.getLogger(__name__)

STEP_BY_STEP = "{problem}\nPlease reason step by step, and put your final answer within \\boxed{}."
ANSWER = "answer"  # what rewards call the gold answer
_OVERRIDES = (
    "subset",
    "split",
    "prompt_field",
    "id_field",
    "answer_extraction",
    "prompt_template",
    "chat_template",
    "reward",
)


@dataclass(frozen=True)
class Benchmark:
    """Where the problems of a benchmark are, how they are asked, and what judges the answers."""

    reward: str
    hub_id: str | None = None
    subset: str | None = None
    split: str | None = None
    num_problems: int | None = None  # in the whole split
    prompt_field: str = "prompt"
    context_field: str | None = None  # column whose text, where a row has some, comes before the problem
    id_field: str | None = None
    fields: Mapping[str, str] = field(default_factory=dict)  # what the reward reads -> column
    answer_extraction: AnswerExtraction = "as_is"
    prompt_template: str = "{problem}"
    chat_template: bool | None = None  # None: where the tokenizer has one


@dataclass(frozen=True)
class LoadedBenchmark:
    """All that an evaluation needs of a benchmark."""

    name: str
    prompts: list[Prompt]  # the gold answer, where there is one, is fields["answer"]
    reward: Reward
    num_samples: int | None  # None: as the other benchmarks


BENCHMARKS: Mapping[str, Benchmark] = MappingProxyType(
    {
        # American Invitational Mathematics Examination, MAA: both contests of a year, answers 0 to 999.
        "aime24": Benchmark(
            hub_id="HuggingFaceH4/aime_2024",
            split="train",
            num_problems=30,
            prompt_field="problem",
            prompt_template=STEP_BY_STEP,
            reward="math_verify",
        ),
        "aime25": Benchmark(
            hub_id="math-ai/aime25",
            split="test",
            num_problems=30,
            prompt_field="problem",
            prompt_template=STEP_BY_STEP,
            reward="math_verify",
        ),
        # American Mathematics Competitions 12 of 2023, MAA: the problems whose answer is a number.
        "amc23": Benchmark(
            hub_id="math-ai/amc23",
            split="test",
            num_problems=40,
            prompt_field="question",
            prompt_template=STEP_BY_STEP,
            reward="math_verify",
        ),
        # Lightman et al. 2023, arXiv 2305.20050: 500 test problems of MATH (Hendrycks et al. 2021, arXiv
        # 2103.03874).
        "math500": Benchmark(
            hub_id="HuggingFaceH4/MATH-500",
            split="test",
            num_problems=500,
            prompt_field="problem",
            id_field="unique_id",
            prompt_template=STEP_BY_STEP,
            reward="math_verify",
        ),
        # Lewkowycz et al. 2022, arXiv 2206.14858: OCWCourses, university science and mathematics.
        "minerva": Benchmark(
            hub_id="math-ai/minervamath",
            split="test",
            num_problems=272,
            prompt_field="question",
            prompt_template=STEP_BY_STEP,
            reward="math_verify",
        ),
        # He et al. 2024, arXiv 2402.14008: open-ended, text only, mathematics, English, competitions.
        "olympiadbench": Benchmark(
            hub_id="Hothan/OlympiadBench",
            subset="OE_TO_maths_en_COMP",
            split="train",
            num_problems=674,
            prompt_field="question",
            context_field="context",
            fields={ANSWER: "final_answer"},
            answer_extraction="list",
            prompt_template=STEP_BY_STEP,
            reward="math_verify",
        ),
        # Cobbe et al. 2021, arXiv 2110.14168.
        "gsm8k": Benchmark(
            hub_id="openai/gsm8k",
            subset="main",
            split="test",
            num_problems=1319,
            prompt_field="question",
            answer_extraction="after_hashes",
            prompt_template=STEP_BY_STEP,
            reward="math_verify",
        ),
        # examples/countdown/prepare.py writes the problems. Sets of that name on the hub are another game:
        # all numbers, brackets and division.
        "countdown": Benchmark(reward="countdown", chat_template=False),
    }
)


def load_benchmark(
    cfg: BenchmarkConfig,
    tokenizer: PreTrainedTokenizerBase | None,
    *,
    settings: RewardConfig | None = None,
    max_prompt_length: int | None = None,
) -> LoadedBenchmark:
    """The problems of a benchmark as prompts, in their order, and the reward that judges answers to them.

    Without a ``tokenizer`` prompts have texts as they are and no tokens: answers are there already.
    ``settings`` says how the reward runs (num_workers, timeout, format_pattern); what it judges by is the
    benchmark's. No problem is left out: one of more than ``max_prompt_length`` tokens is an error.

    Raises ConfigError for a name that is unknown (the nearest known one is named), problems that are nowhere
    and a chat template that the tokenizer lacks; DataError naming source, row and column for anything in the
    problems that cannot be used. With ``cfg.path`` nothing is downloaded.
    """
    benchmark = _resolve(cfg)
    reward = _build_reward(benchmark, settings or RewardConfig())
    form = _prompt_format(cfg, benchmark, tokenizer)
    if form.chat_template and tokenizer is not None:
        check_chat_template(tokenizer)
    source = cfg.path if cfg.path is not None else benchmark.hub_id
    assert source is not None, "_resolve sees to it"
    rows = [
        _prepared(row, benchmark, reward)
        for row in read_unique_rows(source, form, reward.required_fields, cfg.max_problems)
    ]
    prompts = _without_tokens(rows) if tokenizer is None else encode_rows(rows, tokenizer, form)
    for row, prompt in zip(rows, prompts, strict=True):
        _check(row, prompt, reward, max_prompt_length)
    if cfg.path is None and cfg.max_problems is None:
        _check_size(cfg, len(prompts))
    return LoadedBenchmark(cfg.name, prompts, reward, cfg.num_samples)


def _without_tokens(rows: Sequence[PromptRow]) -> list[Prompt]:
    texts = [row.prompt if isinstance(row.prompt, str) else json.dumps(row.prompt) for row in rows]
    return [
        Prompt(row.prompt_id, text, np.empty(0, np.int32), row.fields)
        for row, text in zip(rows, texts, strict=True)
    ]


def _resolve(cfg: BenchmarkConfig) -> Benchmark:
    """What the registry says, with the overrides of ``cfg``."""
    known = BENCHMARKS.get(cfg.name)
    if cfg.path is None and (known is None or known.hub_id is None):
        raise ConfigError(_no_problems(cfg.name))
    if cfg.path is not None and not Path(cfg.path).exists():
        raise DataError(
            f"{cfg.path}: there is no such file or directory (path of benchmark {cfg.name!r}): correct it, "
            "or leave path out to take a known benchmark from the hub"
        )
    if known is None:
        if cfg.reward is None:
            raise ConfigError(
                f"benchmark {cfg.name!r}: reward=null: say what judges answers to problems of your own, such "
                "as math_verify or exact_match (docs/rewards.md)"
            )
        known = Benchmark(reward=cfg.reward)
    overrides: dict[str, Any] = {
        name: value for name in _OVERRIDES if (value := getattr(cfg, name)) is not None
    }
    return replace(known, **overrides, fields={**known.fields, **dict(cfg.fields)})


def _no_problems(name: str) -> str:
    if name in BENCHMARKS:
        return (
            f"benchmark {name!r} is not on the hub: name a local file as path (python "
            "examples/countdown/prepare.py --out DIR writes DIR/heldout.jsonl)"
        )
    near = get_close_matches(name.lower(), BENCHMARKS, n=1)
    advice = f"did you mean {near[0]!r}?" if near else f"known are {', '.join(BENCHMARKS)};"
    return f"benchmark {name!r} is unknown: {advice} Problems of your own need a path"


def _build_reward(benchmark: Benchmark, settings: RewardConfig) -> Reward:
    return build_reward(
        settings.model_copy(update={"name": benchmark.reward, "rewards": (), "answer_field": ANSWER})
    )


def _prompt_format(
    cfg: BenchmarkConfig, benchmark: Benchmark, tokenizer: PreTrainedTokenizerBase | None
) -> PromptFormat:
    is_file = cfg.path is not None and Path(cfg.path).is_file()
    chat_template = benchmark.chat_template
    return PromptFormat(
        subset=cfg.subset if is_file else benchmark.subset,  # a file has neither; one that was asked for is
        split=cfg.split if is_file else benchmark.split,  # refused when it is read
        prompt_field=benchmark.prompt_field,
        id_field=benchmark.id_field,
        fields=tuple(benchmark.fields.items()),
        chat_template=bool(tokenizer and tokenizer.chat_template) if chat_template is None else chat_template,
    )


def _prepared(row: PromptRow, benchmark: Benchmark, reward: Reward) -> PromptRow:
    """The row as the model is asked and the reward reads it."""
    fields = dict(row.fields)
    extraction = benchmark.answer_extraction
    if ANSWER in reward.required_fields or extraction != "as_is":  # functions of users read it, too
        column = benchmark.fields.get(ANSWER, ANSWER)
        fields[ANSWER] = extracted_answer(fields.get(ANSWER), extraction, column, row.place)
    prompt = row.prompt
    if isinstance(prompt, str):
        context = fields.get(benchmark.context_field) if benchmark.context_field is not None else None
        if isinstance(context, str) and context.strip():
            prompt = f"{context}\n{prompt}"
        prompt = benchmark.prompt_template.replace("{problem}", prompt)
    elif benchmark.prompt_template != "{problem}":
        raise DataError(
            f"{row.place}: column {benchmark.prompt_field!r} is {describe(prompt)}, which the benchmark's "
            'prompt_template cannot take: name the column of the text, or set prompt_template to "{problem}"'
        )
    return replace(row, prompt=prompt, fields=fields)


def _check(row: PromptRow, prompt: Prompt, reward: Reward, max_prompt_length: int | None) -> None:
    """Find now what would otherwise stop the evaluation when the problem's turn comes."""
    if max_prompt_length is not None and len(prompt.token_ids) > max_prompt_length:
        raise DataError(
            f"{row.place}: the prompt has {len(prompt.token_ids)} tokens, more than {max_prompt_length}, and "
            "no problem of a benchmark is left out: lower rollout.max_new_tokens, or take a model with more "
            "context"
        )
    try:
        reward.score(prompt, [])
    except DataError as error:
        raise DataError(f"{row.place}: {error}") from error


def _check_size(cfg: BenchmarkConfig, num_found: int) -> None:
    known = BENCHMARKS[cfg.name]
    is_other_part = cfg.subset not in (None, known.subset) or cfg.split not in (None, known.split)
    if not is_other_part and num_found != known.num_problems:
        logger.warning(
            "benchmark %s: %s has %d problems, expected %s: it was changed, and results are not comparable "
            "with others",
            cfg.name,
            known.hub_id,
            num_found,
            known.num_problems,
        )
