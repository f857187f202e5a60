"""Names of TransformerEngine's modules against the weight table.

The local modules' names are tested with models (test_models.py); these are written out here, as Megatron's
TransformerEngine layer specs give them, because the tests run where TransformerEngine does not.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from apo_megatron.models.hf_config import read_architecture
from apo_megatron.weights.table import build_table, with_global_numbers
from tests.tiny_models import Family, make_tiny_model

Names = dict[str, tuple[str, ...]]  # TransformerEngine's name of a parameter -> names in checkpoints

ENDS: Names = {
    "embedding.word_embeddings.weight": ("model.embed_tokens.weight",),
    "decoder.final_layernorm.weight": ("model.norm.weight",),
    "output_layer.weight": ("lm_head.weight",),
}
# Below: of one layer, without "decoder.layers.0." and "model.layers.0.".
GROUPED_QUERY_ATTENTION: Names = {
    "self_attention.linear_proj.weight": ("self_attn.o_proj.weight",),
    "self_attention.linear_qkv.layer_norm_weight": ("input_layernorm.weight",),
    "self_attention.linear_qkv.weight": (
        "self_attn.q_proj.weight",
        "self_attn.k_proj.weight",
        "self_attn.v_proj.weight",
    ),
}
QKV_BIAS: Names = {
    "self_attention.linear_qkv.bias": (
        "self_attn.q_proj.bias",
        "self_attn.k_proj.bias",
        "self_attn.v_proj.bias",
    ),
}
QK_NORM: Names = {
    "self_attention.q_layernorm.weight": ("self_attn.q_norm.weight",),
    "self_attention.k_layernorm.weight": ("self_attn.k_norm.weight",),
}
LATENT_ATTENTION: Names = {
    "input_layernorm.weight": ("input_layernorm.weight",),
    "self_attention.linear_proj.weight": ("self_attn.o_proj.weight",),
    "self_attention.linear_kv_down_proj.weight": ("self_attn.kv_a_proj_with_mqa.weight",),
    "self_attention.linear_kv_up_proj.layer_norm_weight": ("self_attn.kv_a_layernorm.weight",),
    "self_attention.linear_kv_up_proj.weight": ("self_attn.kv_b_proj.weight",),
}
QUERIES: Names = {"self_attention.linear_q_proj.weight": ("self_attn.q_proj.weight",)}
LATENT_QUERIES: Names = {
    "self_attention.linear_q_down_proj.weight": ("self_attn.q_a_proj.weight",),
    "self_attention.linear_q_up_proj.layer_norm_weight": ("self_attn.q_a_layernorm.weight",),
    "self_attention.linear_q_up_proj.weight": ("self_attn.q_b_proj.weight",),
}
DENSE: Names = {
    "mlp.linear_fc1.layer_norm_weight": ("post_attention_layernorm.weight",),
    "mlp.linear_fc1.weight": ("mlp.gate_proj.weight", "mlp.up_proj.weight"),
    "mlp.linear_fc2.weight": ("mlp.down_proj.weight",),
}
NORM_OF_EXPERTS: Names = {"pre_mlp_layernorm.weight": ("post_attention_layernorm.weight",)}
BIAS_OF_EXPERTS: Names = {"mlp.router.expert_bias": ("mlp.gate.e_score_correction_bias",)}
SHARED_EXPERTS: Names = {
    "mlp.shared_experts.linear_fc1.weight": (
        "mlp.shared_experts.gate_proj.weight",
        "mlp.shared_experts.up_proj.weight",
    ),
    "mlp.shared_experts.linear_fc2.weight": ("mlp.shared_experts.down_proj.weight",),
}


def experts(
    count: int,
    router: str = "mlp.gate",
    prefix: str = "mlp.experts",
    projections: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj"),
) -> Names:
    gate, up, down = projections
    names: Names = {**NORM_OF_EXPERTS, "mlp.router.weight": (f"{router}.weight",)}
    for i in range(count):
        gate_and_up = (f"{prefix}.{i}.{gate}.weight", f"{prefix}.{i}.{up}.weight")
        names[f"mlp.experts.linear_fc1.weight{i}"] = gate_and_up
        names[f"mlp.experts.linear_fc2.weight{i}"] = (f"{prefix}.{i}.{down}.weight",)
    return names


V2_EXPERTS = {**experts(6), **SHARED_EXPERTS}
V3_EXPERTS = {**experts(8), **SHARED_EXPERTS, **BIAS_OF_EXPERTS}
MLA_V3 = {**LATENT_ATTENTION, **LATENT_QUERIES}
MIXTRAL_EXPERTS = experts(4, "block_sparse_moe.gate", "block_sparse_moe.experts", ("w1", "w3", "w2"))
LAYERS: dict[Family, list[Names]] = {  # two of each
    "llama3": [{**GROUPED_QUERY_ATTENTION, **DENSE}] * 2,
    "mistral": [{**GROUPED_QUERY_ATTENTION, **DENSE}] * 2,
    "qwen2": [{**GROUPED_QUERY_ATTENTION, **QKV_BIAS, **DENSE}] * 2,
    "qwen3": [{**GROUPED_QUERY_ATTENTION, **QK_NORM, **DENSE}] * 2,
    "mixtral": [{**GROUPED_QUERY_ATTENTION, **MIXTRAL_EXPERTS}] * 2,
    "qwen3_moe": [{**GROUPED_QUERY_ATTENTION, **QK_NORM, **experts(6)}] * 2,
    "qwen3_moe_mixed": [
        {**GROUPED_QUERY_ATTENTION, **QK_NORM, **DENSE},
        {**GROUPED_QUERY_ATTENTION, **QK_NORM, **experts(6)},
    ],
    "deepseek_v2": [
        {**LATENT_ATTENTION, **QUERIES, **DENSE},
        {**LATENT_ATTENTION, **QUERIES, **V2_EXPERTS},
    ],
    "deepseek_v3": [{**MLA_V3, **DENSE}, {**MLA_V3, **V3_EXPERTS}],
}


@pytest.mark.parametrize("family", LAYERS)
def test_names_of_transformer_engine_find_every_parameter_once(tmp_path: Path, family: Family) -> None:
    table = build_table(read_architecture(make_tiny_model(tmp_path, family, tokenizer=False)))
    expected = dict(ENDS)
    for layer, names in enumerate(LAYERS[family]):
        for name, hf_names in names.items():
            prefixed = tuple(f"model.layers.{layer}.{hf_name}" for hf_name in hf_names)
            expected[f"decoder.layers.{layer}.{name}"] = prefixed
    entries = {name: table.lookup(name) for name in expected}
    assert {name: entry.hf_names for name, entry in entries.items()} == expected
    assert sorted(e.megatron_name for e in entries.values()) == sorted(
        e.megatron_name for e in table.entries()
    )
    # Checkpoints use the same names, but for the experts, which they stack.
    for name, entry in entries.items():
        if not entry.is_expert:
            stored = (
                name.replace(f"layers.{entry.stored.index[0]}.", "layers.") if entry.stored.index else name
            )
            assert entry.stored.key == stored


@pytest.mark.parametrize(
    ("local", "expected"),
    [
        (
            "decoder.layers.1.mlp.experts.linear_fc2.weight3",
            "decoder.layers.5.mlp.experts.linear_fc2.weight11",
        ),
        (
            "decoder.layers.1.mlp.experts.local_experts.3.linear_fc2.weight",
            "decoder.layers.5.mlp.experts.local_experts.11.linear_fc2.weight",
        ),
        ("decoder.layers.0.mlp.linear_fc2.weight", "decoder.layers.4.mlp.linear_fc2.weight"),
    ],
)
def test_numbers_of_a_stage_and_an_expert_rank_become_global(local: str, expected: str) -> None:
    assert with_global_numbers(local, [4, 5], first_expert=8) == expected
