"""GBPO in a step: its second signal from the rewards to the loss, and its updates on every layout."""

from __future__ import annotations

import math
import statistics
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from apo_megatron.config import RLConfig
from apo_megatron.data.collate import make_batch, trained_sequences
from apo_megatron.rollout.groups import assign_advantages
from tests.test_advantages_in_steps import config as step_config
from tests.test_advantages_in_steps import group_of
from tests.tiny_models import make_tiny_model
from tests.update_cases import (
    AGGREGATIONS,
    DEFAULTS,
    LAYOUTS,
    check_updates,
    make_sequences,
    plain_update,
)

NAN = math.nan
ONE_RANK: Any = SimpleNamespace(dims=SimpleNamespace(data=1), data_rank=0)


def config_of(loss_mode: str) -> RLConfig:
    values = step_config("grpo").model_dump()
    values["objective"] |= {"loss_mode": loss_mode}
    return RLConfig.model_validate(values)


@pytest.mark.parametrize("loss_mode", ["gbpo", "vanilla"])
def test_targets_go_with_their_samples_where_the_loss_wants_them(loss_mode: str) -> None:
    groups = [group_of([1.0, 0.0, 0.0, NAN]), group_of([0.0, 1.0, 1.0, 1.0])]
    assign_advantages(groups, config_of(loss_mode))
    sequences = trained_sequences(groups)
    batch = make_batch(sequences, config_of(loss_mode).objective, ONE_RANK, 2, seed=(0, 0)).sequences
    if loss_mode == "vanilla":
        assert batch.target_advantages is None and all(s.target_advantage is None for s in sequences)
        return
    scale = 1 / (statistics.stdev([1.0, 0.0, 0.0]) + 1e-6)
    assert sorted({s.target_advantage or 0.0 for s in sequences}) == pytest.approx(
        [-1 / (0.5 + 1e-6), 0.0, scale], rel=1e-6
    )
    assert batch.target_advantages is not None and (batch.target_advantages[~batch.loss_mask] == 0).all()
    positions = batch.loss_mask.flatten().nonzero()[:, 0]
    picked = batch.tokens_at(positions)
    assert picked.target_advantages is not None
    right = picked.advantages > 0
    assert (picked.target_advantages[right] >= 0).all() and (picked.target_advantages[~right] <= 0).all()
    assert np.isclose(picked.target_advantages.max().item(), scale, rtol=1e-6)


GBPO = {**DEFAULTS, **AGGREGATIONS["token-mean"], "loss_mode": "gbpo"}


def test_update_equals_plain_torch_on_every_layout(tmp_path: Path) -> None:
    path = make_tiny_model(tmp_path, "qwen2", num_layers=4)
    targets = np.random.default_rng(3).normal(size=13).tolist()
    sequences = [s | {"target_advantage": z} for s, z in zip(make_sequences(), targets, strict=True)]
    objective = GBPO | {"gbpo": {"clip_low": 0.02, "clip_high": 0.03, "temperature": 0.5}}
    layouts = [({}, None), (LAYOUTS["tp2"], None), (LAYOUTS["pp2"], 40), (LAYOUTS["cp2"], 40)]
    cases = [
        {
            "model_path": path,
            "layout": layout,
            "micro_batch_size": size,
            "max_tokens": tokens,
            "objective": objective,
        }
        for size, (layout, tokens) in enumerate(layouts, start=1)
    ]
    check_updates(2, sequences, cases, [plain_update(path, sequences, objective)] * len(cases))
