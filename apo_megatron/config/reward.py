"""The section ``reward``: what makes an answer right, and how that is found out."""

from __future__ import annotations

import re

from pydantic import Field

from apo_megatron.config.section import FrozenList, NonNegativeInt, PositiveFloat, PositiveInt, Section, rule


class RewardTerm(Section):
    """One of several rewards."""

    name: str = Field(description="As reward.name.")
    weight: float = Field(1.0, description="What its reward is multiplied by.")


class VerifierConfig(Section):
    """How rewards run that need processes of their own."""

    num_workers: PositiveInt = Field(
        2, description="Processes per rank that verify (math_verify, format) and can be killed."
    )
    timeout: PositiveFloat = Field(
        5.0, description="Seconds for one answer in a worker; a later one is not judged, and counted."
    )


class RewardConfig(VerifierConfig):
    """What makes an answer right."""

    name: str = Field(
        "countdown",
        description="countdown, exact_match, format, math_verify, multiple_choice, or a function of your own "
        "as package.module:function (docs/rewards.md).",
    )
    rewards: FrozenList[RewardTerm] = Field(
        (), description="Several rewards instead of name, each with name and weight; they are added up."
    )
    answer_field: str = Field("answer", description="Column with the gold answer.")
    format_pattern: str | None = Field(
        None, description="Regular expression that must match a whole answer, for the format reward."
    )
    overlong_buffer: NonNegativeInt = Field(
        0, description="Soft overlong punishment in the last so many tokens of max_new_tokens; 0 = none."
    )
    overlong_penalty: PositiveFloat = Field(1.0, description="What the longest answer loses by it (DAPO).")

    @rule
    def format_needs_a_pattern(self) -> str | None:
        """The format reward needs `format_pattern`, a regular expression."""
        names = [term.name for term in self.rewards] or [self.name]
        if self.format_pattern is None:
            return "format_pattern=null: the format reward needs one" if "format" in names else None
        try:
            re.compile(self.format_pattern)
        except re.error as error:
            return f"format_pattern={self.format_pattern!r} is no regular expression: {error}"
        return None
