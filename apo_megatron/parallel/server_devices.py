"""What a server that the trainer starts is told about devices and about the world it is not part of."""

from __future__ import annotations

import os
from collections.abc import Mapping

import torch

from apo_megatron.errors import ConfigError

_VISIBLE = "CUDA_VISIBLE_DEVICES"
# Where torch.distributed finds these it joins the trainer's world (torchrun's store) instead of the server's
# own. The last one slows down what does not overlap communication the way Megatron does.
_OF_THE_TRAINER = (
    *("RANK", "LOCAL_RANK", "GROUP_RANK", "ROLE_RANK", "ROLE_NAME"),
    *("WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_WORLD_SIZE", "ROLE_WORLD_SIZE"),
    *("MASTER_ADDR", "MASTER_PORT", "TORCH_NCCL_ASYNC_ERROR_HANDLING", "CUDA_DEVICE_MAX_CONNECTIONS"),
)


def without_trainer(environment: Mapping[str, str]) -> dict[str, str]:
    """``environment`` without what torchrun and ``init_parallel`` set for the trainer's ranks."""
    return {
        name: value
        for name, value in environment.items()
        if name not in _OF_THE_TRAINER and not name.startswith("TORCHELASTIC_")
    }


def devices_for_servers(
    num_servers: int, gpus_per_server: int, num_trainer_gpus: int, colocated: bool
) -> list[dict[str, str]]:
    """By server, the variables that show it its GPUs and no others: those after the trainer's on this
    machine, or, ``colocated``, the trainer's own from the first one on.

    Raises ConfigError where the machine has too few.
    """
    visible = os.environ.get(_VISIBLE, "").split(",")
    if visible == [""]:
        visible = [str(index) for index in range(torch.cuda.device_count())]
    first = 0 if colocated else num_trainer_gpus
    if first + num_servers * gpus_per_server > len(visible):
        raise ConfigError(
            f"rollout.sglang: num_servers={num_servers} x tensor_parallel_size={gpus_per_server} GPUs"
            + ("" if colocated else f" beside the trainer's {num_trainer_gpus}")
            + f" are more than the {len(visible)} of this machine: start fewer servers or trainer ranks"
            + ("" if colocated else ", or set colocated=true")
        )
    starts = range(first, first + num_servers * gpus_per_server, gpus_per_server)
    return [{_VISIBLE: ",".join(visible[start : start + gpus_per_server])} for start in starts]
