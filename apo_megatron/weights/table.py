"""The one correspondence between Megatron parameters and Hugging Face tensors. Pure.

Loading, online weight sync, export and conversion all read this table; a name without a rule is an error
everywhere. The rules themselves are in ``families/``.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence

from apo_megatron.errors import WeightMappingError
from apo_megatron.weights.architecture import Architecture
from apo_megatron.weights.families import family_of
from apo_megatron.weights.rules import LAYER, ParamRule, WeightEntry

_LAYER_NUMBER = re.compile(r"^decoder\.layers\.(\d+)\.")
# The local layers number the modules of experts, TransformerEngine's grouped ones their weights.
_EXPERT_NUMBER = re.compile(r"(?<=\.experts\.local_experts\.)\d+|(?<=\.experts\.linear_fc[12]\.weight)\d+$")


class WeightTable:
    """Rules by Megatron name, TransformerEngine's names included."""

    def __init__(
        self, rules: Sequence[ParamRule], num_layers: int, stacked: bool, num_prediction_layers: int = 0
    ) -> None:
        self.rules = tuple(rules)
        self.num_layers = num_layers
        self.num_prediction_layers = num_prediction_layers  # after them, which no rule takes
        self.stacked = stacked  # alike layers share their keys in checkpoints
        self.num_experts = max(rule.num_experts for rule in self.rules)  # of a layer; 0 = dense
        self._by_name: Mapping[str, list[ParamRule]] = _by_name(self.rules)

    def lookup(self, megatron_name: str) -> WeightEntry:
        """The entry of a parameter named with its global numbers. Raises WeightMappingError."""
        key, layer, expert = _split_numbers(megatron_name)
        for rule in self._by_name.get(key, ()):
            has_layer = layer is None or layer in (rule.layers or range(self.num_layers))
            has_expert = expert is None or expert < rule.num_experts
            if has_layer and has_expert:
                return rule.entry(layer, expert, self.num_layers, self.stacked)
        raise WeightMappingError(
            f"{megatron_name}: no rule for this parameter in a model of {self.num_layers} layers; "
            "expected one of " + ", ".join(sorted(self._by_name))
        )

    def entries(self) -> Iterator[WeightEntry]:
        """Every parameter of the whole model, layer by layer."""
        by_layer: dict[int, list[WeightEntry]] = {layer: [] for layer in range(self.num_layers)}
        for rule in self.rules:
            if not rule.is_per_layer:
                yield from rule.entries(self.num_layers, self.stacked)
                continue
            for entry in rule.entries(self.num_layers, self.stacked):
                match = _LAYER_NUMBER.match(entry.megatron_name)
                assert match is not None
                by_layer[int(match[1])].append(entry)
        for entries in by_layer.values():
            yield from entries


def _by_name(rules: Sequence[ParamRule]) -> dict[str, list[ParamRule]]:
    by_name: dict[str, list[ParamRule]] = {}
    for rule in rules:
        for name in {rule.megatron_name, rule.te_name or rule.megatron_name}:
            by_name.setdefault(name, []).append(rule)
    return by_name


def _split_numbers(name: str) -> tuple[str, int | None, int | None]:
    """A name with slots in place of its layer and expert number, and the two numbers."""
    layer = expert = None
    if match := _EXPERT_NUMBER.search(name):
        expert = int(match[0])
        name = f"{name[: match.start()]}{{expert}}{name[match.end() :]}"
    if match := _LAYER_NUMBER.match(name):
        layer = int(match[1])
        name = LAYER + name[match.end() :]
    return name, layer, expert


def with_global_numbers(local_name: str, global_layers: Sequence[int], first_expert: int = 0) -> str:
    """A parameter's name with global numbers in place of those of a pipeline stage and expert rank.

    ``global_layers`` are the global numbers (from 0) of the stage's layers, ``first_expert`` is that of the
    rank's first expert.
    """
    name, layer, expert = _split_numbers(local_name)
    return name.format(
        layer=None if layer is None else global_layers[layer],
        expert=None if expert is None else first_expert + expert,
    )


def build_table(architecture: Architecture, padded_vocab_size: int | None = None) -> WeightTable:
    """The rules of a model whose Megatron embedding has ``padded_vocab_size`` rows (default: no padding)."""
    rules = family_of(architecture.model_type).rules(
        architecture, padded_vocab_size or architecture.vocab_size
    )
    return WeightTable(
        list(rules),
        architecture.num_layers,
        architecture.layers_are_alike,
        architecture.num_prediction_layers,
    )
