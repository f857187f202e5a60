"""Updates with a nap before each of them, beside updates without."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor

from apo_megatron.actor.actor import MegatronActor
from apo_megatron.actor.checkpointer import Checkpointer
from apo_megatron.actor.forward_step import run_forward_backward
from apo_megatron.actor.micro_batches import MicroBatchSize
from apo_megatron.config import SFTConfig
from tests.workers.checkpoints import actor_of, config, parameters, update

NUM_UPDATES = 3


def take_naps(payload: dict[str, Any]) -> list[dict[str, Any]]:
    """What naps change and free, per case of ``payload``."""
    return [
        _take_naps(payload | case, Path(payload["folder"], str(i))) for i, case in enumerate(payload["cases"])
    ]


def _take_naps(payload: dict[str, Any], folder: Path) -> dict[str, Any]:
    cfg = config(payload, payload["layout"], async_save=False)
    offloading, held_in_backward = _with_optimizer_offloaded(payload, cfg)
    sleepless = actor_of(cfg)
    for step in range(NUM_UPDATES):
        update(payload, sleepless, step)

    actor = actor_of(cfg)
    naps = []
    for step in range(NUM_UPDATES):
        naps.append(_nap(payload, actor))
        update(payload, actor, step)
    same_after_naps = _same(_state(actor), _state(sleepless))
    same_with_offload = _same(_state(offloading), _state(sleepless))
    actor.sleep()
    refusal = ""
    try:
        update(payload, actor, NUM_UPDATES)
    except AssertionError as error:
        refusal = str(error)
    actor.wake()
    resumed = _resumed_after_a_nap(cfg, actor, folder)
    for each in (actor, sleepless, resumed):
        update(payload, each, NUM_UPDATES)
    return {
        "naps": naps,
        "refusal": refusal,
        "same_after_naps": same_after_naps,
        "same_with_offload": same_with_offload,
        "held_in_backward": held_in_backward,
        "same_at_the_end": _same(_state(actor), _state(sleepless)),
        "same_after_resume": _same(_state(resumed), _state(sleepless)),
    }


def _with_optimizer_offloaded(
    payload: dict[str, Any], cfg: SFTConfig
) -> tuple[MegatronActor, list[dict[str, int]]]:
    """An actor with ``optimizer.offload`` after the updates, and what it held in their backward."""
    optimizer = cfg.optimizer.model_copy(update={"offload": True})
    actor = actor_of(cfg.model_copy(update={"optimizer": optimizer}))
    held: list[dict[str, int]] = []

    def watched(*arguments: Any) -> None:
        held.append(_bytes_held(actor))
        run_forward_backward(*arguments)

    with mock.patch("apo_megatron.actor.actor.run_forward_backward", watched):
        for step in range(NUM_UPDATES):
            update(payload, actor, step)
    return actor, held


def _nap(payload: dict[str, Any], actor: MegatronActor) -> dict[str, Any]:
    """Bytes before and during, and whether the weights can be used meanwhile."""
    sequences = [tokens.numpy() for tokens in payload["sequences"]]
    scores, weights = actor.score(sequences), parameters(actor)
    state, awake = _state(actor), _bytes_held(actor)
    actor.sleep()
    actor.sleep()  # no effect
    nap = {
        "awake": awake,
        "asleep": _bytes_held(actor),
        "host_copies": sorted(copy.data_ptr() for _, copy in actor._offload._moved),
        "scores_work": all(map(np.array_equal, actor.score(sequences), scores)),
        "weights_are_there": _same(list(parameters(actor).values()), list(weights.values())),
    }
    actor.wake()
    actor.wake()
    return nap | {"same_state": _same(_state(actor), state), "after": _bytes_held(actor)}


def _resumed_after_a_nap(cfg: SFTConfig, actor: MegatronActor, folder: Path) -> MegatronActor:
    """Saved and loaded right after a nap."""
    actor.sleep()
    actor.wake()
    Checkpointer(folder, cfg, actor, {}).save(NUM_UPDATES, {})
    resumed = MegatronActor(
        cfg.model, cfg.optimizer, actor.parallel, micro_batch_size=MicroBatchSize(2), num_updates=10
    )
    resumed.sleep()
    resumed.wake()
    assert Checkpointer(folder, cfg, resumed, {}).load_latest(max_step=10) is not None
    return resumed


def _optimizer_tensors(actor: MegatronActor) -> list[Tensor]:
    tensors = []
    for part in getattr(actor._optimizer, "chained_optimizers", [actor._optimizer]):
        for group in part.optimizer.param_groups:
            for parameter in group["params"]:
                state = part.optimizer.state[parameter] if parameter in part.optimizer.state else {}
                tensors += [parameter, *(state[name] for name in sorted(state))]
    return tensors


def _state(actor: MegatronActor) -> list[Tensor]:
    """Copies of all that training changes."""
    weights = [p for chunk in actor.model_chunks for p in chunk.parameters()]
    return [tensor.detach().clone() for tensor in (*weights, *_optimizer_tensors(actor))]


def _same(found: list[Tensor], expected: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def _bytes_held(actor: MegatronActor) -> dict[str, int]:
    """Bytes behind the weights, behind what the optimizer has beside them, and behind the gradients."""
    weights = _storages([p for chunk in actor.model_chunks for p in chunk.parameters()])
    buffers = [b for chunk in actor.model_chunks for b in (*chunk.buffers, *chunk.expert_parallel_buffers)]
    optimizer = _storages(_optimizer_tensors(actor))
    return {
        "weights": sum(weights.values()),
        "optimizer": sum(size for address, size in optimizer.items() if address not in weights),
        "gradients": sum(_storages([buffer.grad_data for buffer in buffers]).values()),
    }


def _storages(tensors: list[Tensor]) -> dict[int, int]:
    """Address -> bytes."""
    storages = [tensor.untyped_storage() for tensor in tensors]
    return {storage.data_ptr(): storage.nbytes() for storage in storages}
