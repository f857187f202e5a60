"""A Megatron checkpoint as the Hugging Face tensors that it holds, whichever layout wrote it."""

from __future__ import annotations

from pathlib import Path
from types import TracebackType

import torch
from torch import Tensor

from apo_megatron.errors import CheckpointError
from apo_megatron.models.hf_config import read_architecture, resolve_model_path
from apo_megatron.weights.conversion.manifest import Manifest, load_manifest
from apo_megatron.weights.formats.safetensors_writer import TensorSpec
from apo_megatron.weights.formats.torch_dist_io import TorchDistReader
from apo_megatron.weights.rules import WeightEntry
from apo_megatron.weights.table import build_table

HF_FOLDER = "hf"  # in a Megatron checkpoint: config.json and tokenizer of its model


class MegatronSource:
    """A converted checkpoint, or one of a training run. Use as a context manager.

    config.json is that of ``config_from`` or, without it, of the checkpoint's ``hf`` folder. Raises
    ConfigError or CheckpointError where there is none, and where the checkpoint is damaged, not complete or
    of another model; no tensor is read for that.
    """

    def __init__(self, folder: str | Path, config_from: str | Path | None = None) -> None:
        self.folder = Path(folder)
        self.reader = TorchDistReader(self.folder)
        self.config_dir = self._config_dir(config_from)
        self.architecture = read_architecture(self.config_dir, weights_only=True)
        table = build_table(self.architecture)  # without padding: that is not part of the model
        self.entries = [entry for entry in table.entries() if entry.exported]
        for entry in self.entries:
            self.reader.check(entry.stored, entry.local_shape(1))
        self.manifest = load_manifest(self.folder)
        if self.manifest is not None:
            self._check_manifest(self.manifest)

    def _config_dir(self, config_from: str | Path | None) -> Path:
        if config_from is not None:
            return resolve_model_path(config_from)
        if not (self.folder / HF_FOLDER).is_dir():
            raise CheckpointError(
                f"{self.folder}: no folder {HF_FOLDER} with config.json and tokenizer in it: give the model "
                "that training started from with --config-from HF_DIR"
            )
        return self.folder / HF_FOLDER

    def _check_manifest(self, manifest: Manifest) -> None:
        converted = {name for name, record in manifest.tensors.items() if record.key is not None}
        wanted = {name for entry in self.entries for name in entry.hf_names}
        if manifest.model_type != self.architecture.model_type or converted != wanted:
            differing = sorted(converted ^ wanted)
            raise CheckpointError(
                f"{self.folder}: the manifest is of another model (model_type {manifest.model_type}, "
                f"config.json has {self.architecture.model_type}; {len(differing)} names are in one only"
                f"{': ' + ', '.join(differing[:5]) if differing else ''})"
            )

    def specs(self, entry: WeightEntry, dtype: torch.dtype) -> list[TensorSpec]:
        """The Hugging Face tensors of a parameter, in the stored dtype or another."""
        return [
            TensorSpec(name, shape, dtype)
            for name, shape in zip(entry.hf_names, entry.layout.hf_shapes, strict=True)
        ]

    def is_one_piece(self, entry: WeightEntry) -> bool:
        """Whether reading a parameter puts nothing together."""
        return self.reader.num_chunks(entry.stored) == 1

    def read(self, entry: WeightEntry) -> Tensor:
        """The whole parameter, as Megatron has it. Raises CheckpointError where it is damaged."""
        return self.reader.read(entry.stored, entry.local_shape(1))

    def __enter__(self) -> MegatronSource:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.reader.close()
