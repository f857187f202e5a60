"""Saves, goes on; loads in a new actor, of the same layout or another, and takes the same updates."""

from __future__ import annotations

import random
import threading
from pathlib import Path
from typing import Any

import numpy as np
import torch
from megatron.core import tensor_parallel

from apo_megatron.actor import sharded_state
from apo_megatron.actor.actor import MegatronActor
from apo_megatron.actor.checkpointer import Checkpointer
from apo_megatron.actor.micro_batches import MicroBatchSize
from apo_megatron.config import ObjectiveConfig, SFTConfig
from apo_megatron.data.collate import Batch, TrainingSequence, make_batch
from apo_megatron.errors import CheckpointError
from apo_megatron.objectives.objective import supervised_objective
from apo_megatron.parallel.state import ParallelContext, init_parallel
from apo_megatron.weights.digest import weights_digest

UPDATES_AFTER = 2


class Counter:
    """A part of the state: how many batches were drawn."""

    def __init__(self, count: int = 0) -> None:
        self.count = count

    def state_dict(self) -> dict[str, Any]:
        return {"count": self.count}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.count = state["count"]


def config(payload: dict[str, Any], layout: dict[str, Any], **checkpoint: Any) -> SFTConfig:
    """The configuration of a run on ``payload["model_path"]``."""
    return SFTConfig.model_validate(
        {
            "model": {
                "hf_path": payload["model_path"],
                "dtype": payload.get("dtype", "float32"),
                "make_vocab_size_divisible_by": 8,
            },
            "data": {"train_path": "unused"},
            "train": {"run_dir": "unused", "num_steps": 10},
            "parallel": layout,
            "optimizer": {"lr": 1e-2, "lr_warmup_steps": 3, "adam_eps": 1e-4, "weight_decay": 0.1},
            "checkpoint": checkpoint,
        }
    )


def actor_of(cfg: SFTConfig) -> MegatronActor:
    """A new actor in a new mesh."""
    parallel = init_parallel(cfg.parallel)
    return MegatronActor(
        cfg.model, cfg.optimizer, parallel, micro_batch_size=MicroBatchSize(2), num_updates=10
    )


def update(payload: dict[str, Any], actor: MegatronActor, step: int) -> None:
    actor.update(_batch(payload, actor.parallel, step).sequences, supervised_objective())
    actor.update_average()


def parameters(actor: MegatronActor) -> dict[str, torch.Tensor]:
    """The weights, and their moving average where there is one."""
    found = _tensors(actor)
    if actor.averaged_weights is not None:
        with actor.weights_from(actor.averaged_weights):
            found |= {f"average of {name}": tensor for name, tensor in _tensors(actor).items()}
    return found


def _tensors(actor: MegatronActor) -> dict[str, torch.Tensor]:
    return {name: t.float().clone() for bucket in actor.weight_source().buckets() for name, t in bucket}


def refusal(action: Any) -> str:
    """The message of the CheckpointError that ``action`` raises."""
    try:
        action()
    except CheckpointError as error:
        return str(error)
    return ""


def save_and_resume(payload: dict[str, Any]) -> list[dict[str, Any]]:
    """Per case the largest difference of any parameter, at the save and after further updates."""
    return [_save_and_resume(payload, case, index) for index, case in enumerate(payload["cases"])]


def save_in_background(payload: dict[str, Any]) -> dict[str, Any]:
    """Files that are written only after further updates hold the state at the time of the save."""
    outcome = {}
    for name, layout in payload["layouts"].items():
        cfg = config(payload, layout, async_save=True)
        actor, folder = _averaging(actor_of(cfg)), Path(payload["folder"], name)
        update(payload, actor, 0)
        saved = parameters(actor)
        may_write = threading.Event()
        _delay_writing(may_write)
        checkpointer = Checkpointer(folder, cfg, actor, {})
        checkpointer.save(1, {})
        update(payload, actor, 1)
        checkpointer.poll()  # not yet
        is_early = (folder / "latest").exists()
        may_write.set()
        expected = parameters(actor)
        checkpointer.finish()

        resumed = _averaging(actor_of(cfg))
        Checkpointer(folder, cfg, resumed, {}).load_latest(max_step=10)
        difference = _difference(parameters(resumed), saved)
        update(payload, resumed, 1)
        outcome[name] = (is_early, difference, _difference(parameters(resumed), expected))
    return outcome


def refusals(payload: dict[str, Any]) -> dict[str, str]:
    """What a checkpoint says to runs that it does not belong to."""
    cfg = config(payload, {}, async_save=False)
    actor, folder = actor_of(cfg), Path(payload["folder"])
    digest = weights_digest(actor.weight_source(), actor.parallel)
    parts = {"data": Counter()}
    Checkpointer(folder, cfg, actor, parts, digest).save(3, {})
    update(payload, actor, 0)
    other_digest = weights_digest(actor.weight_source(), actor.parallel)
    other_dtype = config(payload | {"dtype": "bfloat16"}, {})
    whole_optimizer = config(payload, {"distributed_optimizer": False})
    moved = config(payload | {"model_path": payload["moved_path"]}, {})
    attempts = {
        "dtype": Checkpointer(folder, other_dtype, actor, parts, digest),
        "optimizer": Checkpointer(folder, whole_optimizer, actor, parts, digest),
        "parts": Checkpointer(folder, cfg, actor, {"data": Counter(), "rollout": Counter()}, digest),
        "reference": Checkpointer(folder, cfg, actor, parts, other_digest),
        "moved": Checkpointer(folder, moved, actor, parts, digest),
    }
    found = {name: refusal(lambda c=c: c.load_latest(10)) for name, c in attempts.items()}
    found["beyond"] = refusal(lambda: Checkpointer(folder, cfg, actor, parts, digest).load_latest(2))
    found["accepted"] = refusal(lambda: Checkpointer(folder, cfg, actor, parts, digest).load_latest(3))
    found["learning_rate"] = str(_learning_rate_after_warmup(payload, cfg, folder, digest))
    return found


def _learning_rate_after_warmup(payload: dict[str, Any], cfg: SFTConfig, folder: Path, digest: str) -> float:
    """Of a run that goes on with a tenth of the learning rate."""
    lower = cfg.model_copy(
        update={"optimizer": cfg.optimizer.model_copy(update={"lr": cfg.optimizer.lr / 10})}
    )
    actor = actor_of(lower)
    Checkpointer(folder, lower, actor, {"data": Counter()}, digest).load_latest(10)
    for step in range(cfg.optimizer.lr_warmup_steps):
        update(payload, actor, step)
    return float(actor.optimizer.param_groups[0]["lr"])


def _batch(payload: dict[str, Any], parallel: ParallelContext, step: int) -> Batch:
    sequences = [TrainingSequence(tokens.numpy(), 2) for tokens in payload["sequences"]]
    return make_batch(sequences, ObjectiveConfig(), parallel, num_mini_batches=1, seed=(0, step))


def _difference(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    assert found.keys() == expected.keys()
    return max(float((found[name] - value).abs().max()) for name, value in expected.items())


def _draw() -> list[float]:
    """A number from every source of random numbers."""
    with tensor_parallel.get_cuda_rng_tracker().fork():
        stream = float(torch.rand(()))
    return [float(torch.rand(())), stream, float(np.random.random()), random.random()]


def _delay_writing(may_write: threading.Event) -> None:
    original = sharded_state._write_file

    def write(*values: Any) -> Any:
        may_write.wait()
        return original(*values)

    sharded_state._write_file = write  # type: ignore[assignment]


def _averaging(actor: MegatronActor, decay: float | None = 0.8) -> MegatronActor:
    if decay is not None:
        actor.start_average(decay)
    return actor


def _averages(actor: MegatronActor) -> list[torch.Tensor]:
    """Those of this rank's shards, which ``parameters`` rounds to the dtype of the model."""
    return [] if actor.averaged_weights is None else [a.clone() for _, a in actor.averaged_weights.averages]


def _save_and_resume(payload: dict[str, Any], case: dict[str, Any], index: int) -> dict[str, Any]:
    payload = payload | {"dtype": case["dtype"]}
    cfg = config(payload, case["layout"], async_save=case.get("async_save", False))
    folder, start = Path(payload["folder"], str(index)), case["updates_before"]
    actor, data = _averaging(actor_of(cfg), case.get("decay")), Counter(start)
    checkpointer = Checkpointer(folder, cfg, actor, {"data": data})
    for step in range(start):
        update(payload, actor, step)
    actor.consecutive_skips = 2
    checkpointer.save(start, {"loss": 1.5})
    drawn, saved, digest = _draw(), parameters(actor), weights_digest(actor.weight_source(), actor.parallel)
    averages = _averages(actor)
    for step in range(start, start + UPDATES_AFTER):
        update(payload, actor, step)
        data.count += 1
    checkpointer.finish()
    expected = parameters(actor)

    cfg = config(payload, case.get("other_layout", case["layout"]))
    resumed, data = _averaging(actor_of(cfg), case.get("decay")), Counter()
    restored = Checkpointer(folder, cfg, resumed, {"data": data}).load_latest(max_step=10)
    assert restored is not None and (restored.step, data.count, resumed.consecutive_skips) == (
        start,
        start,
        2,
    )
    same_draw, difference_loaded = _draw() == drawn, _difference(parameters(resumed), saved)
    assert weights_digest(resumed.weight_source(), resumed.parallel) == digest, case
    if restored.same_layout:
        assert all(map(torch.equal, _averages(resumed), averages)), case
    for step in range(start, start + UPDATES_AFTER):
        update(payload, resumed, step)
    return {
        "same_layout": restored.same_layout,
        "same_draw": same_draw,
        "difference_loaded": difference_loaded,
        "difference_after": _difference(parameters(resumed), expected),
    }
