"""The tensors of a transformers model under the names that its checkpoints use."""

from __future__ import annotations

from torch import Tensor
from transformers import PreTrainedModel

# transformers keeps the experts of a layer in two parameters, checkpoints have three tensors per expert:
# gate, up and down projection.
_EXPERT_NAMES = ("gate_proj", "up_proj", "down_proj")
_EXPERT_NAMES_BY_MODEL_TYPE = {"mixtral": ("w1", "w3", "w2")}
# Modules that checkpoints call otherwise, by model type.
_RENAMED_MODULES = {"mixtral": (".mlp.", ".block_sparse_moe.")}


def weight_views(model: PreTrainedModel) -> dict[str, Tensor]:
    """Checkpoint name -> the tensor, or the part of one, that a checkpoint's tensor is copied into.

    Every parameter and persistent buffer is covered exactly once; tied parameters appear under both names.
    Fused experts ``gate_up_proj`` [E, 2 I, H] and ``down_proj`` [E, H, I] appear expert by expert.
    """
    model_type = model.config.model_type
    gate_name, up_name, down_name = _EXPERT_NAMES_BY_MODEL_TYPE.get(model_type, _EXPERT_NAMES)
    old, new = _RENAMED_MODULES.get(model_type, ("", ""))
    views: dict[str, Tensor] = {}
    for name, tensor in model.state_dict().items():
        prefix, _, last = name.replace(old, new).rpartition(".")
        if last == "gate_up_proj" and tensor.dim() == 3:
            for expert, (gate, up) in enumerate(part.chunk(2) for part in tensor):
                views[f"{prefix}.{expert}.{gate_name}.weight"] = gate
                views[f"{prefix}.{expert}.{up_name}.weight"] = up
        elif last == "down_proj" and tensor.dim() == 3:
            for expert, down in enumerate(tensor):
                views[f"{prefix}.{expert}.{down_name}.weight"] = down
        else:
            views[f"{prefix}.{last}"] = tensor
    return views
