"""A Hugging Face checkpoint around its tensors: index, config.json, tokenizer."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from pathlib import Path

import torch
from torch import Tensor

from apo_megatron.parallel.world import CPUWorld
from apo_megatron.weights.formats.output_directory import written_aside
from apo_megatron.weights.formats.safetensors_io import INDEX_FILE
from apo_megatron.weights.formats.safetensors_writer import ShardPlan, ShardWriter, TensorSpec, plan_shards

MAX_SHARD_BYTES = 4 * 2**30
# Files beside config.json and the weights that make a checkpoint usable on its own.
_COMPANIONS = (
    "generation_config.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "chat_template*",
)


def copy_model_files(source_dir: str | Path, folder: Path) -> None:
    """Everything but the weights: config.json, generation config, tokenizer."""
    for pattern in ("config.json", *_COMPANIONS):
        for path in Path(source_dir).glob(pattern):
            if path.is_file():
                shutil.copyfile(path, folder / path.name)


def finish_hf_checkpoint(
    folder: str | Path, plans: Sequence[ShardPlan], config_source_dir: str | Path
) -> None:
    """Add to the planned files in ``folder`` what makes a checkpoint of them: index, config, tokenizer.

    config.json's dtype is set to that of the weights; where they have several, to that of most bytes.
    """
    folder = Path(folder)
    if len(plans) > 1:
        index = {
            "metadata": {"total_size": sum(plan.num_bytes for plan in plans)},
            "weight_map": {spec.name: plan.file for plan in plans for spec in plan.specs},
        }
        (folder / INDEX_FILE).write_text(json.dumps(index, indent=2, sort_keys=True), encoding="utf-8")
    copy_model_files(config_source_dir, folder)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    num_bytes: Counter[torch.dtype] = Counter()
    for plan in plans:
        for spec in plan.specs:
            num_bytes[spec.dtype] += spec.num_bytes
    key = "dtype" if "dtype" in config else "torch_dtype"
    config[key] = str(num_bytes.most_common(1)[0][0]).removeprefix("torch.")
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def write_hf_checkpoint(
    folder: str | Path,
    specs: Iterable[TensorSpec],
    tensors: Iterable[tuple[str, Tensor]],
    config_source_dir: str | Path,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> Path:
    """Write a complete checkpoint of ``tensors``, which are ``specs`` in any order. By one process.

    Everything is written beside ``folder`` and put in its place at the end, so ``folder`` is never half a
    checkpoint; one that exists is replaced. Tensors are written as they come, none is kept.
    """
    folder = Path(folder)
    plans = plan_shards(([spec] for spec in specs), max_shard_bytes)
    file_of = {spec.name: plan.file for plan in plans for spec in plan.specs}
    with written_aside(folder, CPUWorld()) as partial, ExitStack() as stack:
        writers = {plan.file: stack.enter_context(ShardWriter(partial / plan.file, plan)) for plan in plans}
        for name, tensor in tensors:
            writers[file_of[name]].write(name, tensor)
        finish_hf_checkpoint(partial, plans, config_source_dir)
    return folder
