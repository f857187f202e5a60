"""The parts that families are put together from, each a few rules."""

from __future__ import annotations

from collections.abc import Iterator

from apo_megatron.weights.architecture import Architecture
from apo_megatron.weights.layouts import (
    ColumnParallel,
    FusedGateUp,
    FusedQKV,
    Replicated,
    RowParallel,
    VocabParallel,
)
from apo_megatron.weights.rules import EXPERT, LAYER, ParamRule

HF_LAYER = "model.layers.{layer}."
ATTENTION, HF_ATTENTION = LAYER + "self_attention.", HF_LAYER + "self_attn."
MLP = LAYER + "mlp."


def ends(a: Architecture, padded_vocab_size: int) -> Iterator[ParamRule]:
    """Embedding, final norm, output layer."""
    vocab = VocabParallel(a.vocab_size, padded_vocab_size, a.hidden_size)
    embedding = "model.embed_tokens.weight"
    yield ParamRule("embedding.word_embeddings.weight", (embedding,), vocab)
    yield ParamRule("decoder.final_layernorm.weight", ("model.norm.weight",), Replicated((a.hidden_size,)))
    output = embedding if a.tied else "lm_head.weight"
    yield ParamRule("output_layer.weight", (output,), vocab, exported=not a.tied)


def attention(a: Architecture) -> Iterator[ParamRule]:
    """Norm and grouped-query attention; bias and norm of queries and keys where the architecture has them."""
    projections = ("q_proj", "k_proj", "v_proj")

    def fused(input_size: int | None) -> FusedQKV:
        return FusedQKV(a.num_heads, a.num_kv_heads, a.head_dim, input_size)

    def names(kind: str) -> tuple[str, ...]:
        return tuple(f"{HF_ATTENTION}{projection}.{kind}" for projection in projections)

    yield ParamRule(
        LAYER + "input_layernorm.weight",
        (HF_LAYER + "input_layernorm.weight",),
        Replicated((a.hidden_size,)),
        te_name=ATTENTION + "linear_qkv.layer_norm_weight",
    )
    yield ParamRule(ATTENTION + "linear_qkv.weight", names("weight"), fused(a.hidden_size))
    if a.qkv_bias:
        yield ParamRule(ATTENTION + "linear_qkv.bias", names("bias"), fused(None))
    if a.qk_norm:
        for name in ("q", "k"):
            yield ParamRule(
                ATTENTION + f"{name}_layernorm.weight",
                (HF_ATTENTION + f"{name}_norm.weight",),
                Replicated((a.head_dim,)),
            )
    projection = RowParallel((a.hidden_size, a.num_heads * a.head_dim))
    yield ParamRule(ATTENTION + "linear_proj.weight", (HF_ATTENTION + "o_proj.weight",), projection)


def latent_attention(a: Architecture) -> Iterator[ParamRule]:
    """Norm and multi-head latent attention; the projections to the latents are on every rank."""
    mla = a.latent_attention
    assert mla is not None
    query_size = a.num_heads * (mla.qk_nope_head_dim + mla.qk_rope_head_dim)
    yield ParamRule(
        LAYER + "input_layernorm.weight",
        (HF_LAYER + "input_layernorm.weight",),
        Replicated((a.hidden_size,)),
    )
    if mla.q_lora_rank is None:
        yield _linear("linear_q_proj", "q_proj", ColumnParallel((query_size, a.hidden_size)))
    else:
        yield _linear("linear_q_down_proj", "q_a_proj", Replicated((mla.q_lora_rank, a.hidden_size)))
        yield _latent_norm("q", "q_a_layernorm", mla.q_lora_rank)
        yield _linear("linear_q_up_proj", "q_b_proj", ColumnParallel((query_size, mla.q_lora_rank)))
    latent_size = mla.kv_lora_rank + mla.qk_rope_head_dim
    yield _linear("linear_kv_down_proj", "kv_a_proj_with_mqa", Replicated((latent_size, a.hidden_size)))
    yield _latent_norm("kv", "kv_a_layernorm", mla.kv_lora_rank)
    key_value_size = a.num_heads * (mla.qk_nope_head_dim + mla.v_head_dim)
    yield _linear("linear_kv_up_proj", "kv_b_proj", ColumnParallel((key_value_size, mla.kv_lora_rank)))
    yield _linear("linear_proj", "o_proj", RowParallel((a.hidden_size, a.num_heads * mla.v_head_dim)))


def _linear(name: str, hf_name: str, layout: ColumnParallel | RowParallel | Replicated) -> ParamRule:
    return ParamRule(f"{ATTENTION}{name}.weight", (f"{HF_ATTENTION}{hf_name}.weight",), layout)


def _latent_norm(name: str, hf_name: str, size: int) -> ParamRule:
    return ParamRule(
        f"{ATTENTION}{name}_layernorm.weight",
        (f"{HF_ATTENTION}{hf_name}.weight",),
        Replicated((size,)),
        te_name=f"{ATTENTION}linear_{name}_up_proj.layer_norm_weight",
    )


def dense_mlp(a: Architecture, layers: tuple[int, ...] | None = None) -> Iterator[ParamRule]:
    """Norm and SwiGLU of the dense ``layers`` (None: all)."""
    hf = HF_LAYER + "mlp."
    yield ParamRule(
        LAYER + "pre_mlp_layernorm.weight",
        (HF_LAYER + "post_attention_layernorm.weight",),
        Replicated((a.hidden_size,)),
        te_name=MLP + "linear_fc1.layer_norm_weight",
        layers=layers,
    )
    yield from _swiglu(MLP, hf, a.ffn_hidden_size, a.hidden_size, layers)


def dense_or_expert_mlp(a: Architecture) -> Iterator[ParamRule]:
    """Experts in the layers that have them, one dense network in the others."""
    assert a.experts is not None
    dense = tuple(layer for layer, has_experts in enumerate(a.experts.layers) if not has_experts)
    if dense:
        yield from dense_mlp(a, dense)
    yield from expert_mlp(a)


def expert_mlp(
    a: Architecture,
    hf_router: str = "mlp.gate",
    hf_experts: str = "mlp.experts",
    hf_projections: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj"),
) -> Iterator[ParamRule]:
    """Norm, router, routed and shared experts of the layers that have them."""
    experts = a.experts
    assert experts is not None
    layers = tuple(layer for layer, has_experts in enumerate(experts.layers) if has_experts)
    yield ParamRule(  # not fused into a projection, which here are many
        LAYER + "pre_mlp_layernorm.weight",
        (HF_LAYER + "post_attention_layernorm.weight",),
        Replicated((a.hidden_size,)),
        layers=layers,
    )
    router = Replicated((experts.num_experts, a.hidden_size))
    yield ParamRule(MLP + "router.weight", (f"{HF_LAYER}{hf_router}.weight",), router, layers=layers)
    if experts.selection_bias:
        yield ParamRule(
            MLP + "router.expert_bias",
            (f"{HF_LAYER}{hf_router}.e_score_correction_bias",),
            Replicated((experts.num_experts,)),
            layers=layers,
            keeps_dtype=True,
        )
    gate, up, down = (f"{HF_LAYER}{hf_experts}.{{expert}}.{name}.weight" for name in hf_projections)
    size = experts.ffn_hidden_size
    for name, hf_names, layout in (
        ("linear_fc1", (gate, up), FusedGateUp(size, a.hidden_size)),
        ("linear_fc2", (down,), RowParallel((a.hidden_size, size))),
    ):
        yield ParamRule(
            f"{EXPERT}{name}.weight",
            hf_names,
            layout,
            te_name=f"{MLP}experts.{name}.weight{{expert}}",
            stored_name=f"{MLP}experts.experts.{name}.weight",
            layers=layers,
            num_experts=experts.num_experts,
        )
    if experts.shared_ffn_hidden_size:
        hf = HF_LAYER + "mlp.shared_experts."
        yield from _swiglu(MLP + "shared_experts.", hf, experts.shared_ffn_hidden_size, a.hidden_size, layers)


def _swiglu(
    prefix: str, hf: str, ffn_hidden_size: int, hidden_size: int, layers: tuple[int, ...] | None
) -> Iterator[ParamRule]:
    yield ParamRule(
        prefix + "linear_fc1.weight",
        (hf + "gate_proj.weight", hf + "up_proj.weight"),
        FusedGateUp(ffn_hidden_size, hidden_size),
        layers=layers,
    )
    down = RowParallel((hidden_size, ffn_hidden_size))
    yield ParamRule(prefix + "linear_fc2.weight", (hf + "down_proj.weight",), down, layers=layers)
