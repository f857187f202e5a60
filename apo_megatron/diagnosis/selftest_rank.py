"""One rank of the self-test: python -m apo_megatron.diagnosis.selftest_rank FOLDER RANK

Takes part in each world of FOLDER/worlds.json that has its rank, one after the other: starting Python and
importing everything takes longer than all updates. Rank 0 writes the results of a world to
FOLDER/results_SIZE.pt.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch

from apo_megatron.actor.actor import MegatronActor
from apo_megatron.actor.micro_batches import MicroBatchSize
from apo_megatron.config import ModelConfig, ObjectiveConfig, OptimizerConfig, ParallelConfig
from apo_megatron.diagnosis.one_step import run_one_step
from apo_megatron.diagnosis.tiny_model import make_sequences
from apo_megatron.parallel.state import init_parallel, shut_down

NUM_MINI_BATCHES, SEED = 2, 11
# A large epsilon: where a gradient is nearly 0, Adam's step is otherwise the sign of its rounding error.
OPTIMIZER = OptimizerConfig(lr=1e-3, adam_eps=1e-4, weight_decay=0.1, clip_grad=1.0)
OBJECTIVE = ObjectiveConfig(
    loss_mode="apo_ratio", apo_topk=8, apo_pull_coeff=0.15, loss_aggregation="token-mean"
)
_MINUTES = 2.0  # a collective that hangs ends the test


def main(folder: Path, rank: int) -> None:
    """Every layout of every world in turn, in the same processes."""
    for world in json.loads((folder / "worlds.json").read_text()):
        if rank < world["size"]:
            os.environ |= _environment(rank, world["size"], world["port"])
            results = [_run_layout(folder / "model", layout) for layout in world["layouts"]]
            if rank == 0:
                torch.save(results, folder / f"results_{world['size']}.pt")
            shut_down()


def _environment(rank: int, size: int, port: int) -> dict[str, str]:
    """What torchrun would set."""
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(size),
        "LOCAL_WORLD_SIZE": str(size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",  # the store is there: every rank is a client
    }


def _run_layout(model: Path, layout: dict[str, Any]) -> dict[str, Any]:
    """The result of ``run_one_step``, with the backend."""
    parallel = init_parallel(ParallelConfig(**layout, timeout_minutes=_MINUTES), SEED)
    actor = MegatronActor(
        ModelConfig(
            hf_path=str(model),
            dtype="float32",
            make_vocab_size_divisible_by=8,
            # TransformerEngine multiplies fp32 in TF32, and has no fp32 attention for context parallelism:
            # its layouts would differ by more than rounding.
            transformer_impl="local",
        ),
        OPTIMIZER,
        parallel,
        MicroBatchSize(2, None),
        num_updates=10,
    )
    result = run_one_step(actor, parallel, OBJECTIVE, make_sequences(), NUM_MINI_BATCHES, SEED)
    return {**result, "backend": parallel.backend}


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
