"""What is kept of a step's samples: gzipped JSONL, a line a sample, a file a step (docs/inspection.md)."""

from __future__ import annotations

import gzip
import io
import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import orjson
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from apo_megatron.data.collate import trained_samples
from apo_megatron.data.jsonl import read_jsonl
from apo_megatron.errors import DataError
from apo_megatron.files import written_aside
from apo_megatron.rollout.groups import is_mixed
from apo_megatron.rollout.sampler import StepSamples
from apo_megatron.types import FinishReason, Sample, SampleGroup

ROLLOUTS_FOLDER = "rollouts"  # in run_dir
LOG_PROB_DECIMALS = 4
_STEP_FILE = re.compile(r"step_(\d{6,})\.jsonl\.gz")
# Of zlib's levels 1 to 9 the one beyond which it takes twice the time to save a few percent.
_GZIP_LEVEL = 4
_BUFFER_BYTES = 2**20  # compressed at a time, while other threads run

# Why a sample is not trained on: its group has equal rewards; it has not, but the estimator gives the group,
# or this sample alone, advantage 0 and leaves it out; the group teaches nothing and was dropped for another;
# it could not be judged; it was cut at rollout.max_new_tokens (rollout.mask_truncated); it was left out by
# rollout.sample_filter.
NotTrained = Literal["equal_rewards", "zero_advantage", "dropped", "unjudged", "truncated", "filtered_out"]


class SampleRecord(BaseModel):
    """One line of a file. R = num_tokens, the response with its stop token."""

    model_config = ConfigDict(frozen=True, strict=True, extra="ignore")

    step: int  # counted from 1, as in metrics.jsonl
    problem: str  # id of the prompt
    sample: int  # number in its group
    prompt: str
    text: str  # the response, decoded without the stop token
    reward: float | None  # null: could not be judged
    advantage: float | None  # null: not trained on
    not_trained: NotTrained | None  # why; null: trained on
    finish_reason: FinishReason
    num_tokens: int
    # [policy version, tokens drawn with it], in order
    versions: list[Annotated[tuple[int, int], Field(strict=False)]]
    token_ids: list[int] | None  # [R]; null for dropped groups
    log_probs: list[float] | None  # [R], of the engine; null for dropped groups
    pulled: str | None  # [R] of 0 and 1; null: not trained on, or a loss without a pull

    @model_validator(mode="after")
    def _lengths_agree(self) -> SampleRecord:
        for name in ("token_ids", "log_probs", "pulled"):
            values = getattr(self, name)
            if values is not None and len(values) != self.num_tokens:
                raise ValueError(f"{name} has {len(values)} entries, num_tokens is {self.num_tokens}")
        if self.pulled is not None and set(self.pulled) - {"0", "1"}:
            raise ValueError("pulled holds other characters than 0 and 1")
        return self


def step_path(folder: Path, step: int) -> Path:
    """The file of ``step`` (counted from 1) in the folder of the files."""
    return folder / f"step_{step:06d}.jsonl.gz"


def step_paths(folder: Path) -> dict[int, Path]:
    """The files in ``folder`` by step, in order; {} where there is no folder."""
    names = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
    matches = [match for name in names if (match := _STEP_FILE.fullmatch(name))]
    return {int(m[1]): folder / m[0] for m in sorted(matches, key=lambda m: int(m[1]))}


def write_step(
    folder: Path, step: int, samples: StepSamples, pulled: Mapping[int, np.ndarray], keep: int
) -> None:
    """Write the file of ``step``, whole or not at all; then only the ``keep`` newest stay (0: all).

    ``pulled``: [R] bool by number in ``trained_samples(samples.groups)``, where the pull acted.
    """
    folder.mkdir(exist_ok=True)
    with written_aside(step_path(folder, step)) as file:
        # No name and no time: equal samples give equal bytes.
        with gzip.GzipFile("", "wb", _GZIP_LEVEL, file, mtime=0) as packed:
            with io.BufferedWriter(packed, _BUFFER_BYTES) as buffered:
                for row in _rows(step, samples, pulled):
                    buffered.write(orjson.dumps(row, option=orjson.OPT_SERIALIZE_NUMPY) + b"\n")
    if keep:
        for old in list(step_paths(folder).values())[:-keep]:
            old.unlink(missing_ok=True)


def read_step(path: Path) -> Iterator[SampleRecord]:
    """The samples of one file, in order. Raises DataError, naming file and line, for one that is damaged."""
    for row in read_jsonl(path):
        try:
            yield SampleRecord.model_validate(row.values)
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            name = ".".join(map(str, first["loc"]))
            raise DataError(
                f"{row.place}: {name + ': ' if name else ''}{first['msg']}; expected a line as in "
                "docs/inspection.md: was the file changed, or written by another version?"
            ) from error


def _rows(step: int, samples: StepSamples, pulled: Mapping[int, np.ndarray]) -> Iterator[dict[str, Any]]:
    numbers = {id(sample): number for number, (_, sample) in enumerate(trained_samples(samples.groups))}
    for group in samples.groups:
        about = {"step": step, "problem": group.prompt.prompt_id, "prompt": group.prompt.text}
        for i, sample in enumerate(group.samples):
            number = numbers.get(id(sample))
            completion = sample.completion
            yield about | {
                "sample": i,
                "text": completion.text,
                "reward": _judged(sample.reward),
                "advantage": None if number is None else sample.advantage,
                "not_trained": None if number is not None else _reason(sample, group),
                "finish_reason": completion.finish_reason,
                "num_tokens": len(completion.token_ids),
                "versions": completion.versions,
                "token_ids": np.ascontiguousarray(completion.token_ids),
                "log_probs": np.round(completion.log_probs, LOG_PROB_DECIMALS),
                "pulled": None if number is None else _digits(pulled.get(number)),
            }
    for prompt, columns in samples.dropped:
        about = {"step": step, "problem": prompt.prompt_id, "prompt": prompt.text}
        nothing: dict[str, Any] = dict.fromkeys(("advantage", "token_ids", "log_probs", "pulled"))
        for i, length in enumerate(columns.lengths):
            yield (
                about
                | nothing
                | {
                    "sample": i,
                    "text": columns.texts[i],
                    "reward": _judged(columns.rewards[i]),
                    "not_trained": "dropped",
                    "finish_reason": columns.finish_reasons[i],
                    "num_tokens": length,
                    "versions": columns.versions[i],
                }
            )


def _reason(sample: Sample, group: SampleGroup) -> NotTrained:
    if _judged(sample.reward) is None:
        return "unjudged"
    if sample.advantage is None:
        return "truncated"
    if sample.is_filtered_out:
        return "filtered_out"
    return "zero_advantage" if is_mixed(group) else "equal_rewards"


def _judged(reward: float | None) -> float | None:
    return None if reward is None or math.isnan(reward) else reward


def _digits(bits: np.ndarray | None) -> str | None:
    return None if bits is None else (bits.astype(np.uint8) + ord("0")).tobytes().decode("ascii")
