"""Leaves samples out of a step, by the filter that the configuration names (``sample_filters.py``)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from apo_megatron.config import RLConfig
from apo_megatron.data.collate import trained_samples
from apo_megatron.objectives.sample_filters import SAMPLE_FILTERS, FilterInputs
from apo_megatron.types import SampleGroup


def filter_samples(groups: Sequence[SampleGroup], cfg: RLConfig, step: int) -> dict[str, float]:
    """Mark what is left out of ``step`` (counted from 0), once advantages are assigned; its metric.

    Every rank holds all groups and marks the same samples, also after a resume. The filter sees them in an
    order drawn from the run's seed and the step: with rewards of 0 and 1 many advantages are equal, and those
    of early prompts would always be the ones it takes first.
    """
    in_order = [sample for _, sample in trained_samples(groups)]
    places = np.random.default_rng((cfg.train.seed, step)).permutation(len(in_order))
    samples = [in_order[place] for place in places]
    advantages = torch.tensor([sample.advantage for sample in samples], dtype=torch.float64)
    progress = step / max(1, cfg.train.num_steps - 1)
    keep = SAMPLE_FILTERS[cfg.rollout.sample_filter]
    for sample, is_kept in zip(
        samples, keep(FilterInputs(advantages, progress), cfg.rollout).tolist(), strict=True
    ):
        sample.is_filtered_out = not is_kept
    num_left_out = sum(sample.is_filtered_out for sample in samples)
    return {"rollout/num_samples_filtered_out": float(num_left_out)}
