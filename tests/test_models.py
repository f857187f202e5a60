"""The policy model: config.json to logits and gradients, against transformers, in every layout."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from torch import Tensor
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from apo_megatron.config.model import ModelConfig
from apo_megatron.config.parallel import ParallelConfig
from apo_megatron.errors import ConfigError
from apo_megatron.models.build import build_policy_model
from apo_megatron.models.hf_config import read_architecture
from apo_megatron.models.layout import padded_vocab_size
from apo_megatron.models.transformer_config import build_transformer_config
from apo_megatron.parallel.dims import ParallelDims
from apo_megatron.weights.layouts import Replicated, VocabParallel
from apo_megatron.weights.table import build_table
from tests.layout_cases import CASES, LAYOUTS, VOCAB_SIZE, checkpoint, reference, results, unpack
from tests.tiny_models import Family, with_config

CPU = torch.device("cpu")
FP32_CASES = [case for case in CASES if case[2] == "float32"]


@pytest.mark.parametrize("case", CASES, ids="-".join)
def test_logits_of_masked_rows_equal_transformers(case: tuple[Family, str, str]) -> None:
    family, layout, dtype = case
    expected = reference(family).logits
    tolerance = 1e-5 if dtype == "float32" else 0.25  # the logits' standard deviation is about 1.5
    last_stage = LAYOUTS[layout].get("pipeline_parallel_size", 1) - 1
    for rank in results()[case]:
        if rank["pipeline_rank"] != last_stage:
            assert rank["logits"] == []
            continue
        for logits, rows in zip(rank["logits"], expected, strict=True):
            assert logits.shape == (rows.shape[0], padded_vocab_size(VOCAB_SIZE, 8, 2))
            torch.testing.assert_close(logits[:, :VOCAB_SIZE].float(), rows, rtol=0, atol=tolerance)


@pytest.mark.parametrize("case", FP32_CASES, ids="-".join)
def test_gradients_equal_transformers(case: tuple[Family, str, str]) -> None:
    """After the sums that Megatron's finalisation makes: over SP and QK-norm parts, over the ranks that hold
    an expert, and over the tied copies."""
    family, layout, _ = case
    found: dict[str, Tensor] = {}
    for name, gradient in _full_gradients(family, layout, results()[case]):
        found[name] = found[name] + gradient if name in found else gradient
    expected = reference(family).gradients
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        scale = gradient.abs().max()
        torch.testing.assert_close(found[name] / scale, gradient / scale, rtol=0, atol=1e-5, msg=name)


def _full_gradients(family: Family, layout: str, ranks: list[dict[str, Any]]) -> list[tuple[str, Tensor]]:
    table = build_table(read_architecture(checkpoint(family)), padded_vocab_size(VOCAB_SIZE, 8, 2))
    sizes = LAYOUTS[layout]
    # Every data-parallel rank saw the same micro-batches.
    num_data = 4 // sizes.get("tensor_parallel_size", 1) // sizes.get("pipeline_parallel_size", 1)
    full = []
    gradients = [dict(zip(r["gradient_names"], unpack(r["gradients"]), strict=True)) for r in ranks]
    for name in {name: None for of_rank in gradients for name in of_rank}:
        entry = table.lookup(name)
        axis = "expert_tensor_rank" if entry.is_expert else "tensor_rank"
        shards: dict[int, Tensor] = {}  # summed over the ranks that hold the same
        for rank, of_rank in zip(ranks, gradients, strict=True):
            if name in of_rank:
                shards[rank[axis]] = shards.get(rank[axis], 0) + of_rank[name] / num_data
        parts = [shards[index] for index in sorted(shards)]
        if isinstance(entry.layout, Replicated):
            is_partial = sizes.get("sequence_parallel", False) or "self_attention" in name
            parts = [torch.stack(parts).sum(0)] if is_partial else parts[:1]
        full += entry.to_hf(parts)
    return full


@pytest.mark.parametrize("case", FP32_CASES, ids="-".join)
def test_checkpoints_of_megatron_have_every_parameter_where_the_table_says(
    case: tuple[Family, str, str],
) -> None:
    family = case[0]
    stored: dict[str, Tensor] = {}
    for rank in results()[case]:
        places, packed = rank["stored"]
        for (key, shape, offset), part in zip(places, unpack(packed), strict=True):
            whole = stored.setdefault(key, torch.full(shape, torch.nan))
            part = part.view(*[1] * (whole.dim() - part.dim()), *part.shape)
            whole[tuple(slice(o, o + n) for o, n in zip(offset, part.shape, strict=True))] = part
    table = build_table(read_architecture(checkpoint(family)))  # without padding of the vocabulary
    tensors = reference(family).tensors
    entries = list(table.entries())
    assert stored.keys() == {entry.stored.key for entry in entries if entry.exported}
    for entry in entries:
        if not entry.exported:
            continue
        whole, place = stored[entry.stored.key], entry.stored
        expected = entry.to_megatron([tensors[name] for name in entry.hf_names], 0, 1)
        assert tuple(whole.shape[: len(place.counts)]) == place.counts
        found = whole[place.index]
        if isinstance(entry.layout, VocabParallel):
            found = found[:VOCAB_SIZE]
        assert torch.equal(found, expected), entry.megatron_name


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_llama3_rotary_frequencies_equal_transformers(factor: float) -> None:
    scaling = {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": factor,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    config = LlamaConfig(hidden_size=1024, num_attention_heads=8, rope_parameters=scaling)
    expected, attention_scale = ROPE_INIT_FUNCTIONS["llama3"](config, CPU)
    rotary = RotaryEmbedding(
        128,
        1.0,
        rotary_base=500000.0,
        rope_scaling=True,
        rope_scaling_factor=factor,
        use_cpu_initialization=True,
        cp_group=SimpleNamespace(size=lambda: 1),
    )
    assert attention_scale == 1.0
    torch.testing.assert_close(rotary.inv_freq, expected, rtol=1e-6, atol=0)


# --- fitting model and mesh ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dims", "words"),
    [
        (ParallelDims(world=8, tensor=8), ["tensor_parallel_size=8", "num_attention_heads=4"]),
        (ParallelDims(world=4, tensor=4), ["tensor_parallel_size=4", "num_key_value_heads=2"]),
        (ParallelDims(world=4, pipeline=4), ["pipeline_parallel_size=4", "num_hidden_layers=2"]),
        (ParallelDims(world=2, pipeline=2, virtual_pipeline=2), ["= 4 must divide", "num_hidden_layers=2"]),
    ],
)
def test_mesh_that_cannot_divide_the_model(tmp_path: Path, dims: ParallelDims, words: list[str]) -> None:
    architecture = read_architecture(with_config(tmp_path))
    with pytest.raises(ConfigError) as error:
        build_transformer_config(architecture, ModelConfig(hf_path=str(tmp_path)), dims, CPU)
    assert all(word in str(error.value) for word in words)


@pytest.mark.parametrize(
    ("family", "changes", "dims", "words"),
    [
        ("qwen2", {}, ParallelDims(2, expert=2), ["expert_parallel_size=2", "qwen2 model has no experts"]),
        ("qwen3_moe", {}, ParallelDims(4, expert=4), ["expert_parallel_size=4", "num_experts=6"]),
        ("qwen3_moe", {}, ParallelDims(2, tensor=2), ["tensor_parallel_size=2", "sequence_parallel=true"]),
        ("qwen3_moe", {}, ParallelDims(3, expert_tensor=3), ["expert_tensor_parallel_size=3", "size=40"]),
        ("qwen3_moe", {"num_experts_per_tok": 1}, ParallelDims(1), ["num_experts_per_tok=1"]),
        (
            "deepseek_v3",
            {"num_experts_per_tok": 3},
            ParallelDims(1),
            ["num_experts_per_tok=3", "topk_group=2"],
        ),
    ],
)
def test_experts_that_megatron_cannot_run_are_refused(
    tmp_path: Path, family: Family, changes: dict[str, Any], dims: ParallelDims, words: list[str]
) -> None:
    architecture = read_architecture(with_config(tmp_path, family, **changes))
    with pytest.raises(ConfigError) as error:
        build_transformer_config(architecture, ModelConfig(hf_path=str(tmp_path)), dims, CPU)
    assert all(word in str(error.value) for word in words)


def test_groups_that_exclude_no_expert_are_left_out(tmp_path: Path) -> None:
    all_groups = {"topk_group": 4, "num_experts_per_tok": 3}  # which Megatron would rank otherwise
    architecture = read_architecture(with_config(tmp_path, "deepseek_v3", **all_groups))
    config = build_transformer_config(architecture, ModelConfig(hf_path=""), ParallelDims(1), CPU)
    assert config.moe_router_num_groups is None and config.moe_router_group_topk is None


def test_expert_axes_must_divide_the_processes() -> None:
    cfg = ParallelConfig(pipeline_parallel_size=2, expert_parallel_size=2, expert_tensor_parallel_size=2)
    assert ParallelDims.from_config(cfg, world=8).expert_model == 8
    with pytest.raises(ConfigError, match="= 8 must divide the 4 processes"):
        ParallelDims.from_config(cfg, world=4)


def test_transformer_engine_is_refused_without_a_gpu(tmp_path: Path) -> None:
    architecture = read_architecture(with_config(tmp_path))
    cfg = ModelConfig(hf_path=str(tmp_path), transformer_impl="transformer_engine")
    with pytest.raises(ConfigError, match="transformer_impl=transformer_engine needs a GPU"):
        build_policy_model(architecture, cfg, SimpleNamespace(device=CPU))  # type: ignore[arg-type]


def test_vocabulary_is_padded_to_a_multiple_of_tensor_parallel_size() -> None:
    assert padded_vocab_size(107, 8, 2) == 112
    assert padded_vocab_size(112, 8, 2) == 112
    assert padded_vocab_size(151936, 128, 4) == 152064
