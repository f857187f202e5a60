"""Whether a Hugging Face checkpoint is that of the model: every name, every shape."""

from __future__ import annotations

from apo_megatron.errors import WeightMappingError
from apo_megatron.weights.formats.safetensors_io import SafetensorsReader
from apo_megatron.weights.table import WeightTable


def check_checkpoint(reader: SafetensorsReader, table: WeightTable) -> list[str]:
    """Compare names and shapes of a checkpoint with the table; reads no tensor.

    Returns the names of tensors that no parameter takes, and none needs: rotary frequencies, which are
    computed, the copy of the embedding that some tied models have as lm_head, and layers that predict
    further ahead. Raises WeightMappingError naming what is missing, left over or of the wrong shape.
    """
    found = set(reader.names())
    wanted = {name for entry in table.entries() for name in entry.hf_names}
    unneeded = {name for name in found - wanted if _is_unneeded(name, table)}
    left_over = found - wanted - unneeded
    for problem, names in (("missing", wanted - found), ("left over, no parameter takes them", left_over)):
        if names:
            shown = ", ".join(sorted(names)[:8]) + (", ..." if len(names) > 8 else "")
            raise WeightMappingError(
                f"{reader.folder}: {len(names)} tensors {problem}: {shown}. config.json and weights are of "
                "different models, or the model has parts that are not supported"
            )
    for entry in table.entries():
        entry.check_hf_shapes([reader.shape(name) for name in entry.hf_names])
    return sorted(unneeded)


def _is_unneeded(name: str, table: WeightTable) -> bool:
    prediction_layers = range(table.num_layers, table.num_layers + table.num_prediction_layers)
    return (
        name.endswith("rotary_emb.inv_freq")
        or name == "lm_head.weight"
        or any(name.startswith(f"model.layers.{layer}.") for layer in prediction_layers)
    )
