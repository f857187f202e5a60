"""One parameter's correspondence: its names on both sides, its layout, its place in a checkpoint. Pure.

A rule speaks of one kind of parameter; an entry is a rule applied to one layer and expert. Megatron names
carry the *global* layer and expert numbers here.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from torch import Tensor

from apo_megatron.errors import WeightMappingError
from apo_megatron.weights.layouts import Layout, Shape

LAYER = "decoder.layers.{layer}."
EXPERT = LAYER + "mlp.experts.local_experts.{expert}."


@dataclass(frozen=True)
class StoredTensor:
    """Where a parameter lies in a Megatron distributed checkpoint.

    The checkpoint's tensor ``key`` has the shape [*counts, *shape of the whole parameter]; the parameter is
    its slice at ``index``. Megatron stacks alike layers, and experts, under one key.
    """

    key: str
    index: tuple[int, ...]
    counts: tuple[int, ...]


@dataclass(frozen=True)
class ParamRule:
    """One kind of parameter. ``{layer}`` and ``{expert}`` in a name stand for their numbers."""

    megatron_name: str  # with the local layers
    hf_names: tuple[str, ...]
    layout: Layout
    # With TransformerEngine's layers, where that differs; Megatron's checkpoints use this name for both.
    te_name: str | None = None
    stored_name: str | None = None  # in checkpoints, where it is neither of the two
    layers: tuple[int, ...] | None = None  # the layers that have it; None = all, or not in a layer
    num_experts: int = 0  # so many of them in a layer, divided over the expert axes of the mesh
    exported: bool = True  # False: a copy of another parameter, left out of Hugging Face weights
    keeps_dtype: bool = False  # float32 in a model of any dtype

    @property
    def is_per_layer(self) -> bool:
        return "{layer}" in self.megatron_name

    def entries(self, num_layers: int, stacked: bool) -> Iterator[WeightEntry]:
        """The rule for each of its layers and experts; ``stacked``: layers share checkpoint keys."""
        layers = self.layers if self.layers is not None else range(num_layers)
        for layer in layers if self.is_per_layer else [None]:
            for expert in range(self.num_experts) if self.num_experts else [None]:
                yield self.entry(layer, expert, num_layers, stacked)

    def entry(self, layer: int | None, expert: int | None, num_layers: int, stacked: bool) -> WeightEntry:
        """The rule for one layer and expert (None where it has none)."""
        numbers = {"layer": layer, "expert": expert}
        stored_name = self.stored_name or self.te_name or self.megatron_name
        index, counts = [], []
        if layer is not None and stacked:
            stored_name = stored_name.replace("{layer}.", "")
            index.append(layer)
            counts.append(num_layers)
        if expert is not None:
            index.append(expert)
            counts.append(self.num_experts)
        return WeightEntry(
            megatron_name=self.megatron_name.format(**numbers),
            hf_names=tuple(name.format(**numbers) for name in self.hf_names),
            layout=self.layout,
            stored=StoredTensor(stored_name.format(**numbers), tuple(index), tuple(counts)),
            is_expert=expert is not None,
            exported=self.exported,
            keeps_dtype=self.keeps_dtype,
        )


@dataclass(frozen=True)
class WeightEntry:
    """One parameter of the model: what to read, how to cut it, how to put it together."""

    megatron_name: str
    hf_names: tuple[str, ...]
    layout: Layout
    stored: StoredTensor
    is_expert: bool  # cut over the expert-tensor axis, held by one expert-parallel rank
    exported: bool
    keeps_dtype: bool

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
            field = "expert_tensor_parallel_size" if self.is_expert else "tensor_parallel_size"
            raise WeightMappingError(
                f"{self.megatron_name}: {type(self.layout).__name__} with {units} parts cannot be divided "
                f"over {field}={tp_size}"
            )
        return self.layout.local_shape(tp_size)

    def check_local_shape(self, shape: Shape, tp_size: int) -> None:
        """Raises WeightMappingError where a shard's shape is not the expected one."""
        expected = self.local_shape(tp_size)
        if tuple(shape) != expected:
            field = "expert_tensor_parallel_size" if self.is_expert else "tensor_parallel_size"
            raise WeightMappingError(
                f"{self.megatron_name}: local shape {list(shape)} found, {list(expected)} expected at "
                f"{field}={tp_size}: the model was built for another architecture or layout"
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
