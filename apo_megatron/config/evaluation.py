"""Settings of evaluations: what is measured, between the steps of a run and by the evaluation command."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from apo_megatron.config.data import PromptFormat
from apo_megatron.config.section import (
    FrozenList,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    Section,
    rule,
)


class MeasurementConfig(Section):
    """How problems are sampled, and what is computed from the samples."""

    num_samples: PositiveInt = Field(256, description="n: samples per problem.")
    ks: FrozenList[PositiveInt] = Field((1, 2, 4, 8, 16, 32, 64, 128, 256), description="K of Pass@K.")
    temperature: PositiveFloat = Field(1.0, description="T of evaluation samples.")
    top_p: Annotated[float, Field(gt=0, le=1)] = Field(1.0, description="Nucleus mass of evaluation samples.")
    bootstrap_samples: PositiveInt = Field(2000, description="Resamples of the problems for the intervals.")
    seed: NonNegativeInt = Field(1234, description="Seed of evaluation samples and bootstrap.")

    @rule
    def ks_fit_into_the_samples(self) -> str | None:
        """`num_samples` must be at least the largest of `ks`, and `ks` not empty: Pass@K needs n >= K."""
        if not self.ks:
            return "ks=[] leaves nothing to measure: name at least one K"
        if max(self.ks) > self.num_samples:
            return f"ks={list(self.ks)} needs num_samples >= {max(self.ks)}, found {self.num_samples}"
        return None


class EvaluationConfig(PromptFormat, MeasurementConfig):
    """Pass@K on held-out problems while a model trains."""

    data_path: str | None = Field(
        None, description="Held-out problems: file, directory or hub id; null = no evaluation."
    )
    max_problems: PositiveInt | None = Field(None, description="Use the first so many problems.")
    interval: NonNegativeInt = Field(0, description="Evaluate every so many steps; 0 = only at the ends.")
    interval_num_samples: PositiveInt = Field(32, description="n of the evaluations in between.")
    at_start: bool = Field(True, description="Evaluate the policy before the first step.")

    @rule
    def interval_needs_problems(self) -> str | None:
        """`interval` > 0 needs a `data_path`."""
        if self.interval and self.data_path is None:
            return f"interval={self.interval} without data_path: set data_path, or interval=0"
        return None


class GenerationsConfig(Section):
    """Generations of any system, in JSONL or Parquet: a row a sample, or a row a problem with a list."""

    path: str = Field(description="File, or a folder of JSONL files (generations/NAME of an evaluation).")
    problem_field: str = Field("problem", description="Column with the problem's id.")
    text_field: str = Field("text", description="Column with the answer's text, or a list of texts.")
    finish_field: str = Field(
        "finish_reason", description="Column that says length where an answer was cut, if there is one."
    )
    num_tokens_field: str = Field(
        "num_tokens", description="Column with an answer's tokens, if there is one."
    )
