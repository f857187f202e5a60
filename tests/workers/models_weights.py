"""What each rank does for tests/test_models.py and tests/test_weights.py: all layouts in one set of processes."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.tensor_parallel import gather_from_tensor_model_parallel_region
from torch import Tensor

from apo_megatron.config.schema import ModelConfig, ParallelConfig
from apo_megatron.models.build import build_policy_model
from apo_megatron.models.hf_config import read_architecture
from apo_megatron.models.policy_model import PolicyModel
from apo_megatron.parallel.state import ParallelContext, init_parallel
from apo_megatron.weights.load import load_hf_weights
from apo_megatron.weights.source import WeightSource


def check_layouts(payload: dict[str, Any]) -> list[dict[str, Any]]:
    """Run every case of ``payload["cases"]``: load, forward, one small gradient, stream the weights back."""
    results = []
    for case in payload["cases"]:
        parallel = init_parallel(ParallelConfig(**case["layout"]))
        cfg = ModelConfig(hf_path=case["hf_path"], dtype=case["dtype"], make_vocab_size_divisible_by=8)
        architecture = read_architecture(cfg.hf_path)
        chunks = build_policy_model(architecture, cfg, parallel)
        load_hf_weights(chunks, architecture, cfg.hf_path, parallel)
        result: dict[str, Any] = {"streams": {}}
        for bucket_bytes in case["bucket_bytes"]:
            source = WeightSource(chunks, architecture, parallel, bucket_bytes)
            buckets = [[(name, t.clone()) for name, t in bucket] for bucket in source.buckets()]
            result["streams"][bucket_bytes] = buckets
        if case["forward"]:
            result["logits"] = run_schedule(chunks, parallel, payload["micro_batches"], forward_only=True)
            run_schedule(chunks, parallel, payload["micro_batches"], forward_only=False)
            result["gradients"] = {
                name: parameter.grad
                for chunk in chunks
                for name, parameter in chunk.named_parameters()
                if name in ("embedding.word_embeddings.weight", "output_layer.weight")
            }
        results.append(result)
    return results


def run_schedule(
    chunks: list[PolicyModel],
    parallel: ParallelContext,
    micro_batches: list[dict[str, Tensor]],
    forward_only: bool,
) -> list[Tensor]:
    """Logits [T, padded V] of each micro-batch on the last stage; the loss is their weighted sum."""

    def forward_step(iterator: Any, model: PolicyModel) -> Any:
        batch = next(iterator)
        positions = torch.arange(batch["tokens"].shape[1]).expand_as(batch["tokens"])
        local = model(batch["tokens"], positions, None, loss_mask=batch["loss_mask"])

        def loss(output: Tensor) -> Any:
            logits = gather_from_tensor_model_parallel_region(output, group=parallel.tensor_group)
            columns = torch.arange(logits.shape[1]) % 5 - 2.0
            return (logits * columns).sum(), torch.tensor(1), {"logits": logits.detach()}

        return local, loss

    iterators = [iter(micro_batches) for _ in chunks]
    outputs = get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=iterators if len(chunks) > 1 else iterators[0],
        model=chunks if len(chunks) > 1 else chunks[0],
        num_microbatches=len(micro_batches),
        seq_length=micro_batches[0]["tokens"].shape[1],
        micro_batch_size=micro_batches[0]["tokens"].shape[0],
        forward_only=forward_only,
    )
    return [output["logits"] for output in outputs]
