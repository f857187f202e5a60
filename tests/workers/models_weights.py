"""What each rank does for tests/layout_cases.py: every layout in one set of processes."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.tensor_parallel import gather_from_tensor_model_parallel_region
from torch import Tensor

from apo_megatron.config.model import ModelConfig
from apo_megatron.config.parallel import ParallelConfig
from apo_megatron.models.build import build_policy_model
from apo_megatron.models.hf_config import read_architecture
from apo_megatron.models.policy_model import PolicyModel
from apo_megatron.parallel.state import ParallelContext, init_parallel
from apo_megatron.weights.load import load_hf_weights, named_entries, table_of
from apo_megatron.weights.source import WeightSource
from tests.layout_cases import column_weights, digest, pack


def check_layouts(payload: dict[str, Any]) -> list[dict[str, Any]]:
    """Run every case of ``payload["cases"]``: load, forward, one small gradient, stream the weights back."""
    results = []
    layout = None
    for case in payload["cases"]:
        if case["layout"] != layout:  # neighbours share a layout: creating its groups takes longest
            layout = case["layout"]
            parallel = init_parallel(ParallelConfig(**layout))
        cfg = ModelConfig(hf_path=case["hf_path"], dtype=case["dtype"], make_vocab_size_divisible_by=8)
        architecture = read_architecture(cfg.hf_path)
        chunks = build_policy_model(architecture, cfg, parallel)
        load_hf_weights(chunks, architecture, cfg.hf_path, parallel)
        result: dict[str, Any] = {
            "tensor_rank": parallel.tensor_rank,
            "pipeline_rank": parallel.pipeline_rank,
            "expert_rank": parallel.expert_rank,
            "expert_tensor_rank": parallel.expert_tensor_rank,
            "streams": {},
            "stored": stored_shards(chunks),
        }
        for bucket_bytes in case["bucket_bytes"]:
            source = WeightSource(chunks, architecture, parallel, bucket_bytes)
            result["streams"][bucket_bytes] = [
                [(name, digest(tensor), tensor.nbytes) for name, tensor in bucket]
                for bucket in source.buckets()
            ]
        result["logits"] = run_schedule(chunks, parallel, payload["micro_batches"])
        gradients = {
            entry.megatron_name: weight.grad
            for entry, weight in named_entries(chunks, table_of(chunks, architecture), parallel)
            if weight.grad is not None
        }
        result["gradient_names"], result["gradients"] = list(gradients), pack(list(gradients.values()))
        results.append(result)
    return results


def stored_shards(chunks: list[PolicyModel]) -> tuple[list[tuple[str, Any, Any]], Any]:
    """(key, shape of the whole, offset) of all that this rank writes to a distributed checkpoint, and it."""
    shards: list[ShardedTensor] = []
    for chunk in chunks:
        for value in chunk.sharded_state_dict(metadata={"singleton_local_shards": False}).values():
            if isinstance(value, ShardedTensorFactory):
                shards += value.build()
            elif isinstance(value, ShardedTensor):
                shards.append(value)
    places = [(shard.key, shard.global_shape, shard.global_offset) for shard in shards]
    return places, pack([shard.data for shard in shards])


def run_schedule(
    chunks: list[PolicyModel],
    parallel: ParallelContext,
    micro_batches: list[dict[str, Tensor]],
) -> list[Tensor]:
    """Logits [T, padded V] of each micro-batch on the last stage; the loss is their weighted sum."""

    def forward_step(iterator: Any, model: PolicyModel) -> Any:
        batch = next(iterator)
        positions = torch.arange(batch["tokens"].shape[1]).expand_as(batch["tokens"])
        local = model(batch["tokens"], positions, None, loss_mask=batch["loss_mask"])

        def loss(output: Tensor) -> Any:
            logits = gather_from_tensor_model_parallel_region(output, group=parallel.tensor_group)
            return (
                (logits * column_weights(logits.shape[1])).sum(),
                torch.tensor(1),
                {"logits": logits.detach()},
            )

        return local, loss

    iterators = [iter(micro_batches) for _ in chunks]
    outputs = get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=iterators if len(chunks) > 1 else iterators[0],
        model=chunks if len(chunks) > 1 else chunks[0],
        num_microbatches=len(micro_batches),
        seq_length=micro_batches[0]["tokens"].shape[1],
        micro_batch_size=micro_batches[0]["tokens"].shape[0],
        forward_only=False,
    )
    return [output["logits"] for output in outputs]
