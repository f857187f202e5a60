"""Which rank does what: the only place that names a device or a communication backend."""

from __future__ import annotations

import atexit
import os
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from apo_megatron.config.parallel import ParallelConfig
from apo_megatron.errors import ConfigError
from apo_megatron.parallel import collective_log, cpu
from apo_megatron.parallel.dims import ParallelDims

Group = dist.ProcessGroup


@dataclass(frozen=True)
class ParallelContext:
    """This rank's place in the mesh, its groups and its device."""

    dims: ParallelDims
    rank: int
    device: torch.device
    backend: str
    tensor_rank: int
    pipeline_rank: int
    context_rank: int
    data_rank: int
    expert_rank: int
    expert_tensor_rank: int
    world_group: Group
    tensor_group: Group
    pipeline_group: Group
    context_group: Group
    data_group: Group
    data_context_group: Group
    expert_group: Group
    expert_tensor_group: Group

    @property
    def world(self) -> int:
        return self.dims.world

    @property
    def is_main(self) -> bool:
        """The rank that prints and writes."""
        return self.rank == 0

    @property
    def is_last_stage(self) -> bool:
        """The stage that owns logits, losses and their metrics."""
        return self.pipeline_rank == self.dims.pipeline - 1

    @property
    def last_stage_rank(self) -> int:
        """Global rank of the last stage of this rank's pipeline."""
        return dist.get_global_rank(self.pipeline_group, self.dims.pipeline - 1)


def init_parallel(cfg: ParallelConfig, seed: int = 0) -> ParallelContext:
    """Start torch.distributed and Megatron's groups from torchrun's environment.

    Without torchrun it is a world of one. Raises ConfigError before anything is started where the layout
    does not fit the number of processes.
    """
    rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    dims = ParallelDims.from_config(cfg, world)
    # Megatron overlaps gradient reduction with backward only where kernels are queued in one order.
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    use_cuda = torch.cuda.is_available()
    backend = "nccl" if use_cuda else "gloo"
    if use_cuda:
        device = _cuda_device()
        torch.cuda.set_device(device)
    else:
        device = torch.device("cpu")
        local_world = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // local_world))
        cpu.install()
    collective_log.install()
    if not dist.is_initialized():
        _init_process_group(backend, rank, world, cfg.timeout_minutes)
    return _megatron_context(dims, device, backend, seed, cfg.timeout_minutes)


def _cuda_device() -> torch.device:
    """This rank's own GPU."""
    local_rank, count = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
    if local_rank >= count:
        processes = os.environ.get("LOCAL_WORLD_SIZE", "1")
        raise ConfigError(
            f"{processes} processes were started where torch sees {count} GPU(s): start one process per GPU, "
            "or hide the GPUs with CUDA_VISIBLE_DEVICES= to run on the CPU"
        )
    return torch.device("cuda", local_rank)


def _init_process_group(backend: str, rank: int, world: int, timeout_minutes: float) -> None:
    store = None
    if "MASTER_ADDR" not in os.environ:  # not under torchrun
        if world != 1:
            raise ConfigError("WORLD_SIZE is set without MASTER_ADDR: start the ranks with torchrun")
        store = dist.HashStore()
    dist.init_process_group(
        backend,
        rank=rank,
        world_size=world,
        store=store,
        timeout=timedelta(minutes=timeout_minutes),
    )
    atexit.register(shut_down)


def _megatron_context(
    dims: ParallelDims, device: torch.device, backend: str, seed: int, timeout_minutes: float
) -> ParallelContext:
    from megatron.core import parallel_state as mpu  # after cpu.install()
    from megatron.core import tensor_parallel

    if mpu.model_parallel_is_initialized():
        mpu.destroy_model_parallel()
    mpu.initialize_model_parallel(
        tensor_model_parallel_size=dims.tensor,
        pipeline_model_parallel_size=dims.pipeline,
        virtual_pipeline_model_parallel_size=dims.virtual_pipeline,
        context_parallel_size=dims.context,
        expert_model_parallel_size=dims.expert,
        expert_tensor_parallel_size=dims.expert_tensor,
        create_gloo_process_groups=True,
        distributed_timeout_minutes=max(1, round(timeout_minutes)),
    )
    tensor_parallel.model_parallel_cuda_manual_seed(seed, force_reset_rng=True)
    world_group = dist.group.WORLD
    assert world_group is not None
    return ParallelContext(
        dims=dims,
        rank=dist.get_rank(),
        device=device,
        backend=backend,
        tensor_rank=mpu.get_tensor_model_parallel_rank(),
        pipeline_rank=mpu.get_pipeline_model_parallel_rank(),
        context_rank=mpu.get_context_parallel_rank(),
        data_rank=mpu.get_data_parallel_rank(),
        expert_rank=mpu.get_expert_model_parallel_rank(),
        expert_tensor_rank=mpu.get_expert_tensor_parallel_rank(),
        world_group=world_group,
        tensor_group=mpu.get_tensor_model_parallel_group(),
        pipeline_group=mpu.get_pipeline_model_parallel_group(),
        context_group=mpu.get_context_parallel_group(),
        data_group=mpu.get_data_parallel_group(),
        data_context_group=mpu.get_data_parallel_group(with_context_parallel=True),
        expert_group=mpu.get_expert_model_parallel_group(),
        expert_tensor_group=mpu.get_expert_tensor_parallel_group(),
    )


def shut_down() -> None:
    """Leave the process groups; safe to call twice."""
    if dist.is_initialized():
        dist.destroy_process_group()
