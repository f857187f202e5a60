"""The processes of a program that needs no mesh and no GPU: the converter's ranks."""

from __future__ import annotations

import atexit
import os
from dataclasses import dataclass
from datetime import timedelta
from typing import Protocol

import torch
import torch.distributed as dist

from apo_megatron.errors import ConfigError


class World(Protocol):
    """What collectives over all ranks need to know; a ParallelContext is one too."""

    @property
    def rank(self) -> int: ...

    @property
    def world(self) -> int: ...

    @property
    def is_main(self) -> bool: ...

    @property
    def device(self) -> torch.device: ...

    @property
    def world_group(self) -> dist.ProcessGroup | None: ...


@dataclass(frozen=True)
class CPUWorld:
    """Ranks that talk over gloo, whatever devices the machine has."""

    rank: int = 0
    world: int = 1
    world_group: dist.ProcessGroup | None = None  # None where there is one rank
    device: torch.device = torch.device("cpu")

    @property
    def is_main(self) -> bool:
        """The rank that prints and writes what exists once."""
        return self.rank == 0


def join_cpu_world(timeout_minutes: float = 600.0) -> CPUWorld:
    """This process among those that torchrun started; alone without torchrun.

    The time-out is how long a rank waits for the slowest one. Raises ConfigError where torchrun's
    environment is incomplete.
    """
    rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    if world == 1:
        return CPUWorld()
    if "MASTER_ADDR" not in os.environ:
        raise ConfigError("WORLD_SIZE is set without MASTER_ADDR: start the ranks with torchrun")
    if not dist.is_initialized():
        dist.init_process_group(
            "gloo", rank=rank, world_size=world, timeout=timedelta(minutes=timeout_minutes)
        )
        atexit.register(_leave)
    return CPUWorld(rank, world, dist.group.WORLD)


def _leave() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()
