"""The weight table: layouts to the last bit, checks, streams out of every layout."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from apo_megatron.errors import WeightMappingError
from apo_megatron.models.hf_config import read_architecture
from apo_megatron.weights.completeness import check_checkpoint
from apo_megatron.weights.formats.safetensors_io import SafetensorsReader
from apo_megatron.weights.layouts import (
    ColumnParallel,
    FusedGateUp,
    FusedQKV,
    Layout,
    Replicated,
    RowParallel,
    VocabParallel,
)
from apo_megatron.weights.table import build_table, with_global_numbers
from tests.layout_cases import BUCKET_BYTES, CASES, digest, reference, results
from tests.tiny_models import FAMILIES, Family, make_tiny_model

# --- layouts ---------------------------------------------------------------------------------------

LAYOUTS: list[tuple[Layout, int]] = [
    (Replicated((7,)), 4),
    (ColumnParallel((12, 5)), 4),
    (ColumnParallel((12,)), 4),
    (RowParallel((5, 12)), 4),
    (FusedQKV(num_heads=12, num_kv_heads=4, head_dim=3, input_size=7), 4),
    (FusedQKV(num_heads=12, num_kv_heads=4, head_dim=3, input_size=None), 2),
    (FusedQKV(num_heads=6, num_kv_heads=6, head_dim=5, input_size=11), 3),
    (FusedQKV(num_heads=5, num_kv_heads=1, head_dim=3, input_size=7), 1),
    (FusedGateUp(ffn_hidden_size=12, input_size=5), 4),
    (VocabParallel(vocab_size=13, padded_vocab_size=24, hidden_size=5), 4),  # the last rank: padding only
    (VocabParallel(vocab_size=13, padded_vocab_size=13, hidden_size=5), 1),
]


@pytest.mark.parametrize(("layout", "tp_size"), LAYOUTS)
def test_layout_round_trip_is_exact(layout: Layout, tp_size: int) -> None:
    full = [torch.randn(shape) for shape in layout.hf_shapes]
    for size in {1, tp_size}:
        shards = [layout.to_megatron(full, rank, size) for rank in range(size)]
        if size == 1:
            pieces = [piece.flatten() for piece in layout.pieces(full)]
            assert torch.equal(torch.cat(pieces), shards[0].flatten())
        assert all(tuple(shard.shape) == layout.local_shape(size) for shard in shards)
        for before, after in zip(full, layout.to_hf(shards), strict=True):
            assert torch.equal(before, after)


def test_fused_qkv_is_grouped_by_kv_head() -> None:
    layout = FusedQKV(num_heads=4, num_kv_heads=2, head_dim=1, input_size=None)
    query, key, value = torch.tensor([0.0, 1, 2, 3]), torch.tensor([10.0, 11]), torch.tensor([20.0, 21])
    assert layout.to_megatron([query, key, value], 0, 1).tolist() == [0, 1, 10, 20, 2, 3, 11, 21]
    assert layout.to_megatron([query, key, value], 1, 2).tolist() == [2, 3, 11, 21]


def test_gate_and_up_are_sharded_each_on_its_own() -> None:
    gate, up = torch.arange(4.0)[:, None], 10 + torch.arange(4.0)[:, None]
    assert FusedGateUp(4, 1).to_megatron([gate, up], 1, 2).flatten().tolist() == [2, 3, 12, 13]


def test_vocabulary_padding_is_zero_and_never_exported() -> None:
    layout = VocabParallel(vocab_size=3, padded_vocab_size=4, hidden_size=2)
    shards = [layout.to_megatron([torch.ones(3, 2)], rank, 2) for rank in range(2)]
    assert shards[1].tolist() == [[1, 1], [0, 0]]
    shards[1][1] = 9.0  # trained padding
    assert torch.equal(layout.to_hf(shards)[0], torch.ones(3, 2))


# --- table -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_table_covers_exactly_the_checkpoint(tmp_path: Path, family: Family) -> None:
    architecture = read_architecture(make_tiny_model(tmp_path, family, tokenizer=False))
    exported = [name for e in build_table(architecture).entries() if e.exported for name in e.hf_names]
    assert sorted(exported) == sorted(load_file(tmp_path / "model.safetensors"))


def test_tied_output_layer_is_loaded_from_the_embedding_and_not_exported(tmp_path: Path) -> None:
    table = build_table(read_architecture(make_tiny_model(tmp_path, "qwen2_tied", tokenizer=False)))
    entry = table.lookup("output_layer.weight")
    assert entry.hf_names == ("model.embed_tokens.weight",) and not entry.exported


def test_lookup_knows_transformer_engine_names_and_refuses_others(tmp_path: Path) -> None:
    table = build_table(read_architecture(make_tiny_model(tmp_path, tokenizer=False)))
    fused = table.lookup("decoder.layers.1.self_attention.linear_qkv.layer_norm_weight")
    assert fused == table.lookup("decoder.layers.1.input_layernorm.weight")
    assert fused.hf_names == ("model.layers.1.input_layernorm.weight",)
    for unknown in ("decoder.layers.1.mlp.router.weight", "decoder.layers.2.input_layernorm.weight"):
        with pytest.raises(WeightMappingError, match=unknown):
            table.lookup(unknown)


def test_local_layer_index_becomes_global() -> None:
    assert with_global_numbers("decoder.layers.1.mlp.linear_fc1.weight", [2, 3]) == (
        "decoder.layers.3.mlp.linear_fc1.weight"
    )
    assert with_global_numbers("output_layer.weight", [2, 3]) == "output_layer.weight"


def test_entry_names_the_parameter_of_a_wrong_shape(tmp_path: Path) -> None:
    entry = build_table(read_architecture(make_tiny_model(tmp_path, tokenizer=False))).lookup(
        "decoder.layers.0.self_attention.linear_proj.weight"
    )
    with pytest.raises(WeightMappingError, match=r"layers.0.self_attn.o_proj.weight.*\[64, 60\].*\[64, 64\]"):
        entry.to_megatron([torch.zeros(64, 60)], 0, 1)
    with pytest.raises(WeightMappingError, match=r"layers.0.self_attention.linear_proj.weight.*\[64, 64\]"):
        entry.to_hf([torch.zeros(64, 64)] * 2)
    with pytest.raises(WeightMappingError, match="tensor_parallel_size=3"):
        entry.to_megatron([torch.zeros(64, 64)], 0, 3)


# --- checks against a checkpoint --------------------------------------------------------------------


def test_missing_left_over_and_misshapen_tensors_are_named(tmp_path: Path) -> None:
    folder = make_tiny_model(tmp_path, "qwen2_tied", tokenizer=False)
    table = build_table(read_architecture(folder))
    good = load_file(folder / "model.safetensors")

    def check(tensors: dict[str, Tensor]) -> None:
        save_file(tensors, folder / "model.safetensors")
        with SafetensorsReader(folder) as reader:
            check_checkpoint(reader, table)

    tied_copy = {"lm_head.weight": good["model.embed_tokens.weight"].clone()}
    check(good | tied_copy | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)})
    with pytest.raises(WeightMappingError, match="1 tensors left over.*: model.layers.2.mlp.extra.weight"):
        check(good | {"model.layers.2.mlp.extra.weight": torch.ones(1)})
    with pytest.raises(WeightMappingError, match="1 tensors missing: model.norm.weight"):
        check({name: tensor for name, tensor in good.items() if name != "model.norm.weight"})
    with pytest.raises(WeightMappingError, match=r"model.norm.weight: shape \[63\] found, \[64\] expected"):
        check(good | {"model.norm.weight": torch.ones(63)})
    untied = build_table(replace(read_architecture(folder), tied=False))
    save_file(good, folder / "model.safetensors")
    with SafetensorsReader(folder) as reader, pytest.raises(WeightMappingError, match="lm_head.weight"):
        check_checkpoint(reader, untied)


# --- streams ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES, ids="-".join)
def test_stream_gives_every_rank_the_weights_of_the_file(case: tuple[Family, str, str]) -> None:
    dtype = getattr(torch, case[2])
    kept = ("e_score_correction_bias",)  # in float32 whatever the model's dtype
    expected = {
        name: digest(tensor if name.endswith(kept) else tensor.to(dtype))
        for name, tensor in reference(case[0]).tensors.items()
    }
    for rank in results()[case]:
        orders = []
        for bucket_bytes in BUCKET_BYTES:
            buckets = rank["streams"][bucket_bytes]
            found = [(name, value) for bucket in buckets for name, value, _ in bucket]
            assert sorted(found) == sorted(expected.items())
            orders.append(found)
            padding = 5 * 72 * 4 * 2  # bytes of padded vocabulary rows count towards the bucket too
            for bucket in buckets:
                num_bytes = sum(size for _, _, size in bucket)
                # One fused parameter, or one expert of each expert-parallel rank, may be larger.
                assert num_bytes <= bucket_bytes + padding or len(bucket) <= 4
        assert orders[0] == orders[1]
