"""What the rollout engine takes of a rank's device and host memory, and the weights on their way to it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from apo_megatron.config.rollout import RolloutConfig
from apo_megatron.parallel.dims import ParallelDims
from apo_megatron.planning.activations import FP32
from apo_megatron.planning.memory import StageMemory
from apo_megatron.planning.parameters import num_parameters
from apo_megatron.planning.workload import Workload
from apo_megatron.weights.architecture import Architecture

# What SGLang takes for weights and KV cache where server_args do not say: it decides by itself, about this.
ASSUMED_MEM_FRACTION = 0.85
_MEM_FRACTION = "--mem-fraction-static"


@dataclass(frozen=True)
class RolloutMemory:
    """One rank, bytes."""

    beside_updates: float  # on the device while the trainer works
    during_rollout: float  # all that is on the device while samples are drawn
    reference: float  # host memory, pinned: the reference weights
    moved_out: float  # host memory, pinned: the optimizer state while it is not on the device


def rollout_memory(
    cfg: RolloutConfig,
    architecture: Architecture,
    dims: ParallelDims,
    workload: Workload,
    stages: Sequence[StageMemory],
    itemsize: int,
    device_bytes: float,
    has_reference: bool,
    averages_reference: bool,
    offloads_optimizer: bool,
) -> RolloutMemory:
    """Of the stage that needs most.

    An embedded engine is a whole model on every rank, always; while it draws it has a KV cache of the
    longest sequences and two fp32 rows of logits for each. Colocated servers take their fraction of the
    device, beside the trainer's weights; the optimizer state is then in host memory and the gradients are
    gone. Other servers have devices of their own. Weights travel in buckets of gathered tensors.
    """
    weights = max(stage.weights for stage in stages)
    state = max(stage.state for stage in stages)
    bucket = max(
        cfg.bucket_mib * 2**20, dims.tensor * itemsize * max(stage.parameters.largest for stage in stages)
    )
    reference = weights if has_reference else 0.0
    if averages_reference:  # beside what takes the place of the weights
        reference += weights / itemsize * FP32
    moved_out = max(stage.optimizer for stage in stages)
    if not (offloads_optimizer or (cfg.engine == "sglang" and cfg.sglang.colocated)):
        moved_out = 0.0
    if cfg.engine == "embedded":
        copy = float(num_parameters(architecture) * itemsize)
        at_once = min(cfg.max_batch_size, -(-workload.num_sequences // dims.world))
        cache = at_once * workload.sequence_length * _cache_numbers(architecture) * itemsize
        logits = 2 * at_once * architecture.vocab_size * FP32
        return RolloutMemory(copy, state + copy + max(bucket, cache + logits), reference, moved_out)
    if cfg.sglang.colocated:
        server = memory_fraction(cfg) * device_bytes
        return RolloutMemory(0.0, weights + bucket + server, reference, moved_out)
    return RolloutMemory(0.0, state + bucket, reference, moved_out)


def memory_fraction(cfg: RolloutConfig) -> float:
    """Share of the device that a server takes for weights and KV cache."""
    words = [part for word in cfg.sglang.server_args for part in word.split("=", 1)]
    if _MEM_FRACTION in words[:-1]:
        try:
            return float(words[words.index(_MEM_FRACTION) + 1])
        except ValueError:  # the server will say what is wrong with it
            pass
    return ASSUMED_MEM_FRACTION


def _cache_numbers(architecture: Architecture) -> int:
    """Keys and values of one token, as transformers keeps them: those of latent attention in full."""
    mla = architecture.latent_attention
    if mla is None:
        return 2 * architecture.num_layers * architecture.num_kv_heads * architecture.head_dim
    per_head = mla.qk_nope_head_dim + mla.qk_rope_head_dim + mla.v_head_dim
    return architecture.num_layers * architecture.num_heads * per_head
