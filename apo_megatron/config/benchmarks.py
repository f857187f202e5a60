"""Settings of one benchmark: which problems, and what is to differ from the registry."""

from __future__ import annotations

import re
from typing import Any, Literal

from pydantic import Field, model_validator

from apo_megatron.config.section import FrozenMapping, PositiveInt, Section, rule

AnswerExtraction = Literal["as_is", "after_hashes", "boxed", "list"]

_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")


class BenchmarkConfig(Section):
    """One benchmark; its name alone will do. null = what the registry says (docs/evaluation.md)."""

    name: str = Field(
        description="aime24, aime25, amc23, math500, minerva, olympiadbench, gsm8k, countdown, or a name for "
        "problems of your own."
    )
    path: str | None = Field(
        None,
        description="Local JSONL or Parquet file, or directory, instead of the hub: nothing is downloaded. "
        "Needed for problems of your own.",
    )
    max_problems: PositiveInt | None = Field(None, description="Use the first so many problems; null = all.")
    num_samples: PositiveInt | None = Field(
        None, description="n: samples per problem; null = as the other benchmarks."
    )
    subset: str | None = Field(None, description="Subset of the hub id or directory.")
    split: str | None = Field(None, description="Split of the hub id or directory.")
    prompt_field: str | None = Field(
        None, description="Column with the problem: text, or a list of chat messages."
    )
    id_field: str | None = Field(None, description="Column with the problem's id.")
    fields: FrozenMapping = Field(
        (), description="Columns under another name: what the reward reads -> column (answer: solution)."
    )
    answer_extraction: AnswerExtraction | None = Field(
        None, description="How the gold answer lies in its column (docs/evaluation.md)."
    )
    prompt_template: str | None = Field(
        None, description="The text around a problem, which comes where {problem} stands."
    )
    chat_template: bool | None = Field(
        None, description="Apply the tokenizer's chat template; null = where it has one."
    )
    reward: str | None = Field(
        None,
        description="What judges the answers: a name as reward.name. Needed for problems of your own.",
    )

    @model_validator(mode="before")
    @classmethod
    def _a_text_is_a_name(cls, value: Any) -> Any:
        return {"name": value} if isinstance(value, str) else value

    @rule
    def name_can_name_a_file(self) -> str | None:
        """`name` is made of letters, digits, "_", "-" and ".": files are named after it."""
        if not _NAME.fullmatch(self.name):
            return (
                f'name={self.name!r}: files are named after it, so only letters, digits, "_", "-" and "." '
                "may be in it, no dot or dash first: name a file by path"
            )
        return None

    @rule
    def reward_knows_what_is_right(self) -> str | None:
        """`reward` cannot be `format`, which knows no right answer."""
        if self.reward == "format":
            return (
                "reward=format: it looks at the form of an answer, and Pass@K counts right ones; name another"
            )
        return None

    @rule
    def template_has_a_place_for_the_problem(self) -> str | None:
        """`prompt_template` has `{problem}` in it."""
        if self.prompt_template is not None and "{problem}" not in self.prompt_template:
            return f"prompt_template={self.prompt_template!r} has no {{problem}}: write it where that belongs"
        return None
