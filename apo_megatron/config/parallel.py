"""The section ``parallel``: how ranks share the work, and what that asks of the length of sequences."""

from __future__ import annotations

from pydantic import Field

from apo_megatron.config.section import NonNegativeFloat, PositiveFloat, PositiveInt, Section, rule


class ParallelConfig(Section):
    """How the ranks of one torchrun job are divided. Data parallel size is what remains."""

    tensor_parallel_size: PositiveInt = Field(1, description="TP: ranks that share every layer.")
    pipeline_parallel_size: PositiveInt = Field(1, description="PP: stages that share the layers.")
    virtual_pipeline_parallel_size: PositiveInt | None = Field(
        None, description="VPP: model chunks per stage (interleaved schedule); needs PP > 1."
    )
    context_parallel_size: PositiveInt = Field(1, description="CP: ranks that share one sequence.")
    expert_parallel_size: PositiveInt = Field(1, description="EP: ranks that divide the experts.")
    expert_tensor_parallel_size: PositiveInt = Field(1, description="ETP: ranks that share every expert.")
    sequence_parallel: bool = Field(False, description="SP: shard norms and dropout over TP; needs TP > 1.")
    distributed_optimizer: bool = Field(True, description="Shard the optimizer state over data parallel.")
    overlap_grad_reduce: bool = Field(
        False, description="Reduce gradients over data parallel while the last backward goes on."
    )
    overlap_param_gather: bool = Field(
        False,
        description="Gather updated weights while the next forward goes on; needs distributed_optimizer and "
        "overlap_grad_reduce.",
    )
    timeout_minutes: PositiveFloat = Field(30.0, description="Time-out of a collective.")
    stall_minutes: NonNegativeFloat | None = Field(
        None,
        description="A training run in which no rank makes progress for so long says which rank is behind, "
        "and ends; null = two thirds of timeout_minutes, 0: it waits for the time-out.",
    )

    @property
    def patience_minutes(self) -> float:
        """``stall_minutes``, or what its default stands for."""
        return 2 / 3 * self.timeout_minutes if self.stall_minutes is None else self.stall_minutes

    @rule
    def stalls_end_before_timeout(self) -> str | None:
        """`stall_minutes` is less than `timeout_minutes`: a time-out says nothing about the other ranks."""
        if self.stall_minutes is not None and self.stall_minutes >= self.timeout_minutes:
            return (
                f"stall_minutes={self.stall_minutes:g} must be less than timeout_minutes="
                f"{self.timeout_minutes:g}, or the time-out comes first: lower stall_minutes (0 = off) or "
                "raise timeout_minutes"
            )
        return None

    @rule
    def sequence_parallel_needs_tensor_parallel(self) -> str | None:
        """`sequence_parallel` needs `tensor_parallel_size` > 1: it shards over the tensor axis."""
        if self.sequence_parallel and self.tensor_parallel_size == 1:
            return (
                "sequence_parallel=true needs tensor_parallel_size > 1, found 1: "
                "set sequence_parallel=false or raise tensor_parallel_size"
            )
        return None

    @rule
    def param_gather_overlaps_with_both(self) -> str | None:
        """`overlap_param_gather` needs `distributed_optimizer` and `overlap_grad_reduce`."""
        if self.overlap_param_gather and not (self.distributed_optimizer and self.overlap_grad_reduce):
            found = f"{self.distributed_optimizer} and {self.overlap_grad_reduce}".lower()
            return (
                "overlap_param_gather=true needs distributed_optimizer=true and overlap_grad_reduce=true, "
                f"found {found}: set both to true, or overlap_param_gather=false"
            )
        return None

    @rule
    def virtual_pipeline_needs_pipeline(self) -> str | None:
        """`virtual_pipeline_parallel_size` > 1 needs `pipeline_parallel_size` > 1."""
        if self.virtual_pipeline_parallel_size not in (None, 1) and self.pipeline_parallel_size == 1:
            return (
                f"virtual_pipeline_parallel_size={self.virtual_pipeline_parallel_size} needs "
                "pipeline_parallel_size > 1, found 1: set it to null or raise pipeline_parallel_size"
            )
        return None


def sequence_multiple(context: int) -> int:
    """What the tokens of a sequence must be a multiple of: context ranks have two equal chunks."""
    return 2 * context if context > 1 else 1


def token_multiple(tensor: int, context: int, sequence_parallel: bool) -> int:
    """What the tokens of a micro-batch must be a multiple of, for its ranks to have equally many."""
    return sequence_multiple(context) * (tensor if sequence_parallel else 1)
