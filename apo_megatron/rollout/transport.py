"""How the trainer's weights reach SGLang servers."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from apo_megatron.config.rollout import SGLangConfig
from apo_megatron.errors import ConfigError
from apo_megatron.parallel.state import ParallelContext
from apo_megatron.rollout.event_loop import EventLoopThread
from apo_megatron.rollout.sglang_client import SGLangClient
from apo_megatron.rollout.transports.broadcast import BroadcastTransport
from apo_megatron.rollout.transports.disk import DiskTransport
from apo_megatron.rollout.transports.tensors import TensorTransport
from apo_megatron.weights.source import WeightSource


class WeightTransport(Protocol):
    """Brings weights into servers that are paused."""

    def push(self, source: WeightSource, servers: Sequence[SGLangClient], label: str) -> dict[str, str]:
        """Give ``servers`` the weights of ``source``; they show ``label`` once they have all of them.

        Collective, with the same servers on every rank. Returns {server name: problem} for those that did
        not take everything, the same on every rank: such a server may have a part of the weights, under its
        old label. A server's failure raises nothing, and holds the push up for at most
        ``sglang.update_timeout`` in each call. No cache is flushed.
        """
        ...

    def close(self) -> None:
        """Free what the transport holds. Not collective."""
        ...


def build_transport(
    cfg: SGLangConfig, parallel: ParallelContext, loop: EventLoopThread, folder: Path, same_machine: bool
) -> WeightTransport:
    """The transport that ``sglang.weight_transport`` asks for. Collective.

    ``folder``, in the run's own, is where the disk transport writes, unless ``sglang.weight_folder`` says
    otherwise; ``same_machine`` whether the servers run where ranks do, which decides what "auto" is. Raises
    ConfigError for a transport that cannot work.
    """
    name = cfg.weight_transport
    can_share_memory = parallel.device.type == "cpu" or cfg.colocated
    if name == "auto":
        is_near = same_machine or cfg.colocated
        name = "tensors" if is_near and can_share_memory else "broadcast"
    if name == "tensors":
        if not can_share_memory:
            raise ConfigError(
                "rollout.sglang.weight_transport=tensors with servers on GPUs of their own, which cannot map "
                "memory of the trainer's: set broadcast (or auto), or rollout.sglang.colocated=true"
            )
        return TensorTransport(parallel, loop, cfg.update_timeout, cfg.tensor_parallel_size)
    if name == "broadcast":
        if cfg.colocated and parallel.device.type != "cpu":
            raise ConfigError(
                "rollout.sglang.weight_transport=broadcast with colocated=true: a communicator cannot have "
                "the same GPU twice. Set tensors (or auto)"
            )
        return BroadcastTransport(parallel, loop, cfg.update_timeout, cfg.tensor_parallel_size)
    if cfg.weight_folder is not None:
        run = folder.absolute().parent
        digest = hashlib.sha256(str(run).encode()).hexdigest()[:8]
        folder = Path(cfg.weight_folder, f"{run.name}-{digest}")  # other runs may share the folder
    if parallel.is_main:  # what is there was left when this run was killed
        shutil.rmtree(folder, ignore_errors=True)
    return DiskTransport(parallel, loop, cfg.update_timeout, folder)
