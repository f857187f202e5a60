"""Model, optimizer and moving average in Megatron's distributed checkpoint format.

They are written on threads and read back. Megatron's own writer forks processes off the rank and starts one
more that outlives a killed rank. Threads need no fork in a process that runs gloo or CUDA, end with the rank,
and report their errors.
"""

from __future__ import annotations

import queue
import warnings
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.core import CheckpointingConfig, CheckpointingException, save_config
from megatron.core.dist_checkpointing.dict_utils import extract_matching_values
from megatron.core.dist_checkpointing.mapping import ShardedObject
from megatron.core.dist_checkpointing.optimizer import (
    get_param_id_to_sharded_param_map,
    make_sharded_optimizer_tensor,
)
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.strategies.base import StrategyAction, register_default_strategy
from megatron.core.dist_checkpointing.strategies.common import TorchCommonSaveStrategy
from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy
from torch.distributed.checkpoint.api import CheckpointException

from apo_megatron.actor.actor import MegatronActor
from apo_megatron.actor.adam_state import initialise_adam_state, load_optimizer_state
from apo_megatron.actor.snapshot import AveragedWeights
from apo_megatron.errors import CheckpointError
from apo_megatron.weights.formats.torch_dist_format import COMMON_FILE

# fully_reshardable: the optimizer state may be loaded at another TP / PP / DP. mem_efficient: only the first
# data-parallel rank, which writes it, gathers it.
_SHARDING = {
    "distrib_optim_sharding_type": "fully_reshardable",
    "distrib_optim_fully_reshardable_mem_efficient": True,
    "singleton_local_shards": False,
    "chained_optim_avoid_prefix": True,
}
# What reading a damaged shard can end in, under torch's wrapper or before it.
_READ_ERRORS = (CheckpointingException, CheckpointException, RuntimeError, KeyError, OSError, EOFError)


class ShardedWrite:
    """Model and optimizer of ``actor`` on their way into ``folder`` (new and empty). Collective to make.

    What is written is the state as it was when this was made: whatever shares memory with the actor has been
    copied to host memory by then.
    """

    def __init__(self, actor: MegatronActor, folder: Path) -> None:
        actor.complete_weights()
        # Nothing is put there, but without a queue Megatron starts a process to hold one.
        filesystem_async._results_queue = queue.Queue()
        self._folder, self._planned, self._common = folder, _PlannedSave(), _CommonSave()
        register_default_strategy(StrategyAction.SAVE_COMMON, "torch", 1, self._common)
        request = dist_checkpointing.save(
            _sharded_state(actor, is_loading=False), str(folder), self._planned, async_sharded_save=True
        )
        self._writes: list[Future[Any]] = []
        if request.async_fn is None:  # this rank has nothing to write
            return
        transforms, live = request.async_fn.args[0], _storages(actor)
        buckets = [_staged(bucket, live) for bucket in request.async_fn_args[1]]
        pool = ThreadPoolExecutor(len(buckets), "checkpoint")
        self._writes = [pool.submit(_write_file, transforms, i, bucket) for i, bucket in enumerate(buckets)]
        pool.shutdown(wait=False)

    def is_done(self) -> bool:
        """Whether this rank's files are written, or have failed."""
        return all(write.done() for write in self._writes)

    def wait(self) -> list[Any]:
        """Wait for this rank's files; what lies where in them.

        Raises CheckpointError where one could not be written.
        """
        if self._common.problem is not None:
            raise CheckpointError(self._common.problem)
        for write in self._writes:
            error = write.exception()
            if error is not None:
                raise CheckpointError(str(_system_error(error))) from error
        return [result for write in self._writes for result in write.result()]

    def finish(self, results: list[list[Any]]) -> None:
        """Write Megatron's metadata, on the main rank, from what ``wait`` returned on each. Raises OSError.

        Megatron's own way to do so is collective, and leaves the others waiting where the main rank fails.
        """
        self._planned.writer.finish(self._planned.metadata, results)
        save_config(CheckpointingConfig(self._planned.backend, self._planned.version), str(self._folder))


class _PlannedSave(TorchDistSaveShardedStrategy):
    """Megatron's writer, with what it needs to write .metadata in the end."""

    def __init__(self) -> None:
        super().__init__("torch_dist", 1)
        self.writer: Any = None
        self.metadata: Any = None  # on the main rank

    def _get_save_and_finalize_callbacks(self, writer: Any, save_state_dict_ret: Any) -> Any:
        self.writer, self.metadata, *_ = save_state_dict_ret
        return super()._get_save_and_finalize_callbacks(writer, save_state_dict_ret)


class _CommonSave(TorchCommonSaveStrategy):
    """Keeps what goes wrong with common.pt for later: the other ranks are in the middle of an exchange."""

    def __init__(self) -> None:
        super().__init__("torch", 1)
        self.problem: str | None = None

    def save_common(self, common_state_dict: Any, checkpoint_dir: Any) -> None:
        try:
            super().save_common(common_state_dict, checkpoint_dir)
        except (OSError, RuntimeError) as error:  # torch raises either
            self.problem = f"{Path(checkpoint_dir) / COMMON_FILE}: {_system_error(error)}"


def load_sharded_state(actor: MegatronActor, folder: Path) -> None:
    """Bring back model and optimizer from ``folder``, whose ``.metadata`` has been checked. Collective.

    Raises CheckpointError where they do not fit the actor's, or cannot be read.
    """
    state = _sharded_state(actor, is_loading=True)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # Megatron calls what torch has deprecated
            loaded = dist_checkpointing.load(state, str(folder))
    except _READ_ERRORS as error:
        raise CheckpointError(f"{folder} cannot be loaded into this model: {_cause(error)}") from error
    for index, chunk in enumerate(actor.model_chunks):
        model = chunk.module
        extra = {name: None for name in model.state_dict() if name.endswith("_extra_state")}
        model.load_state_dict(loaded[f"model{index}"] | extra, strict=True)
    load_optimizer_state(actor.optimizer, loaded["optimizer"])
    if actor.averaged_weights is not None:
        for number, (_, average) in enumerate(actor.averaged_weights.averages):
            average.copy_(loaded["average"][number])
        actor.averaged_weights.refresh()


def _sharded_state(actor: MegatronActor, *, is_loading: bool) -> dict[str, Any]:
    initialise_adam_state(actor.optimizer)
    state: dict[str, Any] = {}
    for index, chunk in enumerate(actor.model_chunks):  # of the model inside DDP, whose names are plain
        everything = chunk.module.sharded_state_dict(metadata=dict(_SHARDING))
        # Objects are pickles. They are the scales of FP8 layers, which there are none of.
        _, state[f"model{index}"] = extract_matching_values(
            everything, lambda value: isinstance(value, ShardedObject)
        )
    models = dict(state)
    # The optimizer looks through all chunks; merged they would overwrite each other's local layer names.
    state["optimizer"] = actor.optimizer.sharded_state_dict(
        models, is_loading=is_loading, metadata=dict(_SHARDING)
    )
    for part in (state["optimizer"], *state["optimizer"].values()):  # one optimizer, or several by number
        if isinstance(part, dict):
            if "param_state" in part and part["param_state"] is None:
                del part["param_state"]  # of a rank that gathers nothing; Megatron warns of the difference
            if not any(part.get("fp32_from_fp16_params", [True])):
                del part["fp32_from_fp16_params"]  # empty lists do not merge with those of another stage
    if actor.averaged_weights is not None:
        state["average"] = _sharded_average(actor.averaged_weights, models)
    return state


def _sharded_average(averaged: AveragedWeights, models: dict[str, Any]) -> dict[int, Any]:
    """The moving average in the shards of the parameters, as Megatron does with what belongs to one each.

    By number of the parameter on this rank; ``models`` are the sharded states of the chunks.
    """
    parameters, averages = zip(*averaged.averages, strict=True)
    sharded = get_param_id_to_sharded_param_map(models, parameters)
    return {
        number: make_sharded_optimizer_tensor(sharded[number], average, prefix="average")
        for number, average in enumerate(averages)
    }


def _storages(actor: MegatronActor) -> set[int]:
    """Addresses of the memory that updates change in place."""
    tensors = [p for chunk in actor.model_chunks for p in (*chunk.parameters(), *chunk.module.buffers())]
    if actor.averaged_weights is not None:
        tensors += [average for _, average in actor.averaged_weights.averages]
    for part in getattr(actor.optimizer, "chained_optimizers", [actor.optimizer]):
        tensors += [p for group in part.optimizer.param_groups for p in group["params"]]
        tensors += [
            value
            for state in part.optimizer.state.values()
            for value in state.values()
            if isinstance(value, torch.Tensor)
        ]
    return {tensor.untyped_storage().data_ptr() for tensor in tensors}


def _staged(bucket: Any, live: set[int]) -> Any:
    """One of Megatron's write buckets with its tensors in host memory that nothing else writes to."""
    path, name, (objects, tensors) = bucket
    staged = [
        (item, tensor.to("cpu", copy=tensor.untyped_storage().data_ptr() in live)) for item, tensor in tensors
    ]
    return path, name, (objects, staged)


def _write_file(transforms: Sequence[Any], index: int, bucket: Any) -> Any:
    """Write one file; Megatron's list of what lies where in it."""
    results: queue.Queue[Any] = queue.Queue()
    running: queue.Queue[int] = queue.Queue()
    running.put(index)
    filesystem_async.FileSystemWriterAsync.write_preloaded_data(
        transforms, index, bucket, results, running, use_fsync=True
    )
    _, outcome = results.get()
    if isinstance(outcome, Exception):
        raise outcome
    return outcome


def _system_error(error: BaseException) -> BaseException:
    """What the operating system said, where that is behind ``error``, which is torch's."""
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, OSError):
        cause = cause.__context__
    return error if cause is None else cause


def _cause(error: BaseException) -> str:
    """The first line of what went wrong, out of torch's collection of the failures of all ranks."""
    if isinstance(error, CheckpointException) and error.failures:
        rank, (failure, _) = next(iter(error.failures.items()))
        return f"rank {rank}: {type(failure).__name__}: {str(failure).splitlines()[0]}"
    return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
