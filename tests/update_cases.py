"""One RL step of two updates on any layout, and what plain torch makes of it: what the layout tests share.

A case is a dict: ``model_path``, ``layout`` (fields of ``parallel``), ``objective``, and how micro-batches
are made and computed (``micro_batch_size``, ``max_tokens``, ``max_logits_mib``, ``recompute``, ``dtype``).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from apo_megatron.diagnosis.differences import relative_differences
from tests.distributed import run_distributed
from tests.plain_reference import run_plain

VOCAB_SIZE, SEED, NUM_MINI_BATCHES = 107, 11, 2
# Adam divides a gradient by its size: one that is rounding must stay small beside eps.
OPTIMIZER = {"lr": 1e-3, "adam_eps": 1e-4, "weight_decay": 0.1, "clip_grad": 1.0}
RELATIVE_BOUND = 1e-5
BOUNDS = dict.fromkeys(("loss", "grad_norm", "parameters"), RELATIVE_BOUND)

LAYOUTS: dict[str, dict[str, Any]] = {
    "one": {},
    "tp2": {"tensor_parallel_size": 2},
    "tp2_sp": {"tensor_parallel_size": 2, "sequence_parallel": True},
    "pp2": {"pipeline_parallel_size": 2},
    "pp2_vpp2": {"pipeline_parallel_size": 2, "virtual_pipeline_parallel_size": 2},
    "tp2_pp2": {"tensor_parallel_size": 2, "pipeline_parallel_size": 2},
    "cp2": {"context_parallel_size": 2},
}
AGGREGATIONS: dict[str, dict[str, Any]] = {
    "token-mean": {"loss_aggregation": "token-mean"},
    "seq-mean-token-mean": {"loss_aggregation": "seq-mean-token-mean"},
    "seq-mean-token-sum-norm": {
        "loss_aggregation": "seq-mean-token-sum-norm",
        "loss_aggregation_constant": 16,
    },
}
DEFAULTS = {"apo_topk": 8, "apo_push_coeff": 1.05, "apo_pull_coeff": 0.1, "clip_low": 0.2, "clip_high": 0.28}
APO = {**DEFAULTS, **AGGREGATIONS["token-mean"], "loss_mode": "apo_ratio", "apo_pull_coeff": 0.15}

Update = dict[str, Any]  # losses, grad_norms, parameters


def make_sequences() -> list[dict[str, Any]]:
    """13 answers of up to 9 tokens to prompts of 2 to 8."""
    rng = np.random.default_rng(5)
    return [
        {
            "tokens": rng.integers(0, VOCAB_SIZE, prompt + response).tolist(),
            "prompt_length": prompt,
            "advantage": float(advantage),
        }
        for prompt, response, advantage in zip(
            rng.integers(2, 9, 13).tolist(), rng.integers(1, 10, 13).tolist(), _advantages(rng), strict=True
        )
    ]


def _advantages(rng: np.random.Generator) -> np.ndarray:
    # Four wrong answers, nine right ones: a loss near 0 would have no meaningful relative difference.
    return np.where(np.arange(13) % 4 == 1, -1.0, 1.0) * rng.uniform(0.5, 1.5, 13)


def plain_update(
    model_path: str | Path, sequences: Sequence[dict[str, Any]], objective: Mapping[str, Any]
) -> Update:
    """By ``plain_reference.py``."""
    return run_plain(str(model_path), list(sequences), dict(objective), OPTIMIZER, NUM_MINI_BATCHES, SEED)


def payload_of(sequences: Sequence[dict[str, Any]], cases: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """For the functions of ``workers/layout_invariance.py``."""
    return {
        "sequences": list(sequences),
        "optimizer": OPTIMIZER,
        "num_mini_batches": NUM_MINI_BATCHES,
        "seed": SEED,
        "cases": [{"micro_batch_size": 2, **case, "model_path": str(case["model_path"])} for case in cases],
    }


def updates(
    world: int, sequences: Sequence[dict[str, Any]], cases: Sequence[dict[str, Any]], use_gpu: bool = False
) -> list[Update]:
    """By the actor, on ``world`` processes: what the layout leaves of them is data parallel."""
    torch.set_num_threads(1)
    payload = payload_of(sequences, cases)
    found: list[Update] = run_distributed(
        world, "tests.workers.layout_invariance:run_cases", payload, use_gpu=use_gpu
    )[0]
    return found


def check_updates(
    world: int,
    sequences: Sequence[dict[str, Any]],
    cases: Sequence[dict[str, Any]],
    expected: Sequence[Update],
    bounds: Mapping[str, float] = BOUNDS,
) -> None:
    """Each of ``cases`` gives the update ``expected`` at its place; a line for each is printed."""
    failures = []
    for case, found, plain in zip(cases, updates(world, sequences, cases), expected, strict=True):
        differences = relative_differences(found, plain)
        shown = ", ".join(f"{name} {value:.1e}" for name, value in differences.items())
        how = {name: value for name, value in case.items() if name not in ("objective", "model_path")}
        family, loss = Path(case["model_path"]).name, case["objective"]["loss_mode"]
        line = f"{world} processes, {family}, {loss}, {how}: {shown}"
        print(line)
        if not all(differences[name] <= bound for name, bound in bounds.items()):
            failures.append(line)
    assert not failures, "\n".join(failures)
