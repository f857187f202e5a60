"""Sizes of the mesh, and whether they fit the number of processes. Pure."""

from __future__ import annotations

from dataclasses import dataclass

from apo_megatron.config.parallel import ParallelConfig, sequence_multiple, token_multiple
from apo_megatron.errors import ConfigError


@dataclass(frozen=True)
class ParallelDims:
    """Sizes of the mesh axes; ``data`` is what the others leave of ``world``.

    Experts are divided over axes of their own: ``expert`` x ``expert_tensor`` ranks of one pipeline stage,
    whichever tensor and data coordinates those have, hold one copy of the stage's experts.
    """

    world: int
    tensor: int = 1
    pipeline: int = 1
    virtual_pipeline: int | None = None
    context: int = 1
    expert: int = 1
    expert_tensor: int = 1
    sequence_parallel: bool = False
    distributed_optimizer: bool = True
    overlap_grad_reduce: bool = False
    overlap_param_gather: bool = False

    @property
    def model(self) -> int:
        """Ranks that share one copy of the model."""
        return self.tensor * self.pipeline * self.context

    @property
    def expert_model(self) -> int:
        """Ranks that share one copy of all experts."""
        return self.expert * self.expert_tensor * self.pipeline

    @property
    def data(self) -> int:
        return self.world // self.model

    @property
    def sequence_multiple(self) -> int:
        """What the tokens of a sequence must be a multiple of."""
        return sequence_multiple(self.context)

    @property
    def token_multiple(self) -> int:
        """What the tokens of a micro-batch must be a multiple of."""
        return token_multiple(self.tensor, self.context, self.sequence_parallel)

    @staticmethod
    def from_config(cfg: ParallelConfig, world: int) -> ParallelDims:
        """Raises ConfigError where the axes do not divide the number of processes."""
        virtual = cfg.virtual_pipeline_parallel_size
        dims = ParallelDims(
            world=world,
            tensor=cfg.tensor_parallel_size,
            pipeline=cfg.pipeline_parallel_size,
            virtual_pipeline=None if virtual in (None, 1) else virtual,
            context=cfg.context_parallel_size,
            expert=cfg.expert_parallel_size,
            expert_tensor=cfg.expert_tensor_parallel_size,
            sequence_parallel=cfg.sequence_parallel,
            distributed_optimizer=cfg.distributed_optimizer,
            overlap_grad_reduce=cfg.overlap_grad_reduce,
            overlap_param_gather=cfg.overlap_param_gather,
        )
        if world % dims.model != 0:
            raise ConfigError(
                f"parallel: tensor_parallel_size={dims.tensor} x pipeline_parallel_size={dims.pipeline} x "
                f"context_parallel_size={dims.context} = {dims.model} must divide the {world} processes that "
                f"were started: start a multiple of {dims.model} (torchrun --nproc-per-node), or change them"
            )
        if world % dims.expert_model != 0:
            raise ConfigError(
                f"parallel: expert_parallel_size={dims.expert} x expert_tensor_parallel_size="
                f"{dims.expert_tensor} x pipeline_parallel_size={dims.pipeline} = {dims.expert_model} must "
                f"divide the {world} processes that were started: start a multiple of {dims.expert_model} "
                "(torchrun --nproc-per-node), or change them"
            )
        return dims
