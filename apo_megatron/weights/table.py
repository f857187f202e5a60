"""The one correspondence between Megatron parameters and Hugging Face tensors.

A rule per parameter. Loading, online weight sync, export and conversion all read this table; a name
without a rule is an error everywhere. Megatron names carry the *global* layer index here.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from apo_megatron.errors import WeightMappingError
from apo_megatron.weights.architecture import Architecture
from apo_megatron.weights.layouts import (
    FusedGateUp,
    FusedQKV,
    Layout,
    Replicated,
    RowParallel,
    Shape,
    VocabParallel,
)

_LAYER = re.compile(r"^decoder\.layers\.(\d+)\.")
_LAYER_SLOT = "decoder.layers.{layer}."


@dataclass(frozen=True)
class ParamRule:
    """One kind of parameter. ``{layer}`` in a name stands for the layer index."""

    megatron_name: str
    hf_names: tuple[str, ...]
    layout: Layout
    aliases: tuple[str, ...] = ()  # the same parameter's name under another layer implementation
    exported: bool = True  # False: a copy of another parameter, left out of Hugging Face weights

    @property
    def is_per_layer(self) -> bool:
        return "{layer}" in self.megatron_name


@dataclass(frozen=True)
class WeightEntry:
    """A rule applied to one parameter: what to read, how to cut it, how to put it together."""

    megatron_name: str
    hf_names: tuple[str, ...]
    layout: Layout
    exported: bool

    def check_hf_shapes(self, shapes: Sequence[Shape]) -> None:
        """Raises WeightMappingError naming the first tensor whose shape is not the expected one."""
        for name, found, expected in zip(self.hf_names, shapes, self.layout.hf_shapes, strict=True):
            if tuple(found) != expected:
                raise WeightMappingError(
                    f"{name}: shape {list(found)} found, {list(expected)} expected from config.json "
                    f"(it becomes {self.megatron_name}): config.json and weights are of different models"
                )

    def local_shape(self, tp_size: int) -> Shape:
        """Shape of one rank's shard; WeightMappingError where ``tp_size`` cannot divide it."""
        units = self.layout.num_units
        if units is not None and units % tp_size != 0:
            raise WeightMappingError(
                f"{self.megatron_name}: {type(self.layout).__name__} with {units} parts cannot be divided "
                f"over tensor_parallel_size={tp_size}"
            )
        return self.layout.local_shape(tp_size)

    def check_local_shape(self, shape: Shape, tp_size: int) -> None:
        """Raises WeightMappingError where a shard's shape is not the expected one."""
        expected = self.local_shape(tp_size)
        if tuple(shape) != expected:
            raise WeightMappingError(
                f"{self.megatron_name}: local shape {list(shape)} found, {list(expected)} expected at "
                f"tensor_parallel_size={tp_size}: the model was built for another architecture or layout"
            )

    def to_megatron(self, hf_tensors: Sequence[Tensor], tp_rank: int, tp_size: int) -> Tensor:
        """This rank's shard of the full tensors, given in the order of ``hf_names``."""
        self.check_hf_shapes([tuple(t.shape) for t in hf_tensors])
        self.local_shape(tp_size)
        return self.layout.to_megatron(hf_tensors, tp_rank, tp_size)

    def to_hf(self, shards: Sequence[Tensor]) -> list[tuple[str, Tensor]]:
        """(name, full tensor) pairs from the shards of all ranks, in rank order."""
        for shard in shards:
            self.check_local_shape(tuple(shard.shape), len(shards))
        return list(zip(self.hf_names, self.layout.to_hf(shards), strict=True))


class WeightTable:
    """Rules by Megatron name, aliases included."""

    def __init__(self, rules: Sequence[ParamRule], num_layers: int) -> None:
        self.rules = tuple(rules)
        self.num_layers = num_layers
        self._by_name: Mapping[str, ParamRule] = {
            name: rule for rule in self.rules for name in (rule.megatron_name, *rule.aliases)
        }

    def lookup(self, megatron_name: str) -> WeightEntry:
        """The entry of a parameter named with its global layer index. Raises WeightMappingError."""
        match = _LAYER.match(megatron_name)
        layer = int(match[1]) if match else None
        key = megatron_name if match is None else _LAYER_SLOT + megatron_name[match.end() :]
        rule = self._by_name.get(key)
        if rule is None or (layer is not None and layer >= self.num_layers):
            raise WeightMappingError(
                f"{megatron_name}: no rule for this parameter in a model of {self.num_layers} layers; "
                "expected one of " + ", ".join(sorted(self._by_name))
            )
        return _entry(rule, layer)

    def entries(self) -> Iterator[WeightEntry]:
        """Every parameter of the whole model, layer by layer."""
        for rule in self.rules:
            if not rule.is_per_layer:
                yield _entry(rule, None)
        for layer in range(self.num_layers):
            for rule in self.rules:
                if rule.is_per_layer:
                    yield _entry(rule, layer)


def _entry(rule: ParamRule, layer: int | None) -> WeightEntry:
    return WeightEntry(
        megatron_name=rule.megatron_name.format(layer=layer),
        hf_names=tuple(name.format(layer=layer) for name in rule.hf_names),
        layout=rule.layout,
        exported=rule.exported,
    )


def with_global_layer(local_name: str, global_layers: Sequence[int]) -> str:
    """Replace a pipeline stage's own layer index in a parameter name by the global one (both from 0)."""
    match = _LAYER.match(local_name)
    if match is None:
        return local_name
    return _LAYER_SLOT.format(layer=global_layers[int(match[1])]) + local_name[match.end() :]


def build_table(architecture: Architecture, padded_vocab_size: int | None = None) -> WeightTable:
    """The rules of a model whose Megatron embedding has ``padded_vocab_size`` rows (default: no padding)."""
    hidden = architecture.hidden_size
    vocab = VocabParallel(architecture.vocab_size, padded_vocab_size or architecture.vocab_size, hidden)
    embedding = "model.embed_tokens.weight"
    tied = architecture.tied
    rules = [
        ParamRule("embedding.word_embeddings.weight", (embedding,), vocab),
        ParamRule("decoder.final_layernorm.weight", ("model.norm.weight",), Replicated((hidden,))),
        ParamRule(
            "output_layer.weight", (embedding if tied else "lm_head.weight",), vocab, exported=not tied
        ),
        *_attention_rules(architecture),
        *_mlp_rules(architecture),
    ]
    return WeightTable(rules, architecture.num_layers)


def _attention_rules(a: Architecture) -> Iterator[ParamRule]:
    megatron, hf = _LAYER_SLOT + "self_attention.", "model.layers.{layer}.self_attn."
    qkv = ("q_proj", "k_proj", "v_proj")

    def fused(input_size: int | None) -> FusedQKV:
        return FusedQKV(a.num_heads, a.num_kv_heads, a.head_dim, input_size)

    yield ParamRule(
        _LAYER_SLOT + "input_layernorm.weight",
        ("model.layers.{layer}.input_layernorm.weight",),
        Replicated((a.hidden_size,)),
        aliases=(megatron + "linear_qkv.layer_norm_weight",),
    )
    yield ParamRule(
        megatron + "linear_qkv.weight", tuple(f"{hf}{name}.weight" for name in qkv), fused(a.hidden_size)
    )
    if a.qkv_bias:
        yield ParamRule(megatron + "linear_qkv.bias", tuple(f"{hf}{name}.bias" for name in qkv), fused(None))
    if a.qk_norm:
        for name in ("q", "k"):
            yield ParamRule(
                megatron + f"{name}_layernorm.weight",
                (hf + f"{name}_norm.weight",),
                Replicated((a.head_dim,)),
            )
    projection = RowParallel((a.hidden_size, a.num_heads * a.head_dim))
    yield ParamRule(megatron + "linear_proj.weight", (hf + "o_proj.weight",), projection)


def _mlp_rules(a: Architecture) -> Iterator[ParamRule]:
    megatron, hf = _LAYER_SLOT + "mlp.", "model.layers.{layer}.mlp."
    yield ParamRule(
        _LAYER_SLOT + "pre_mlp_layernorm.weight",
        ("model.layers.{layer}.post_attention_layernorm.weight",),
        Replicated((a.hidden_size,)),
        aliases=(megatron + "linear_fc1.layer_norm_weight",),
    )
    yield ParamRule(
        megatron + "linear_fc1.weight",
        (hf + "gate_proj.weight", hf + "up_proj.weight"),
        FusedGateUp(a.ffn_hidden_size, a.hidden_size),
    )
    down = RowParallel((a.hidden_size, a.ffn_hidden_size))
    yield ParamRule(megatron + "linear_fc2.weight", (hf + "down_proj.weight",), down)
