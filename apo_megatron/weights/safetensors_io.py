"""Reading and writing Hugging Face checkpoints: safetensors, one file or several with an index."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from apo_megatron.errors import CheckpointError

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
# Files beside the weights that make a checkpoint usable on its own (config.json is rewritten).
_COPIED_FILES = (
    "generation_config.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "chat_template*",
)


class SafetensorsReader:
    """Names, shapes and tensors of a checkpoint directory.

    Headers of all files are read and checked at once; a tensor's bytes are mapped from disk and read only
    where they are touched, so slicing reads the slice. Use as a context manager.

    Raises CheckpointError, naming the file, where files are missing, truncated or contradict the index.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self._file_of: dict[str, Any] = {}
        self._opened: list[Any] = []
        for file, indexed_names in self._files().items():
            handle = self._open(self.folder / file)
            names = set(handle.keys())
            if indexed_names is not None and (missing := sorted(indexed_names - names)):
                raise CheckpointError(
                    f"{self.folder / file}: {INDEX_FILE} says it holds {', '.join(missing[:5])}, but it does "
                    f"not ({len(missing)} missing): the files are of different versions; fetch them again"
                )
            self._file_of.update(dict.fromkeys(names, handle))

    def _files(self) -> dict[str, set[str] | None]:
        """File name -> the tensor names that the index promises (None without an index)."""
        index = self.folder / INDEX_FILE
        if not index.exists():
            if not (self.folder / SINGLE_FILE).exists():
                raise CheckpointError(
                    f"{self.folder}: neither {SINGLE_FILE} nor {INDEX_FILE} found; weights must be in "
                    "safetensors format"
                )
            return {SINGLE_FILE: None}
        try:
            weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        except (ValueError, KeyError, TypeError) as error:
            raise CheckpointError(f"{index}: not a safetensors index ({error!r})") from None
        files: dict[str, set[str] | None] = {}
        for file in sorted(set(weight_map.values())):
            if Path(file).name != file or not (self.folder / file).exists():
                raise CheckpointError(
                    f"{self.folder / file}: listed in {INDEX_FILE} but missing; fetch the checkpoint again"
                )
            files[file] = {name for name, where in weight_map.items() if where == file}
        return files

    def _open(self, path: Path) -> Any:
        try:
            # The context is entered here and left in close(): tensors stay readable until then.
            handle = safe_open(path, framework="pt", device="cpu").__enter__()
        except (SafetensorError, OSError) as error:
            raise CheckpointError(
                f"{path}: cannot be read as safetensors ({error}; {path.stat().st_size} bytes): the file is "
                "truncated or corrupt; fetch or save it again"
            ) from None
        self._opened.append(handle)
        return handle

    def names(self) -> list[str]:
        """All tensor names, sorted."""
        return sorted(self._file_of)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape from the header, without reading the tensor."""
        return tuple(self._handle(name).get_slice(name).get_shape())

    def tensor(self, name: str) -> Tensor:
        """The tensor on the CPU, in the dtype of the file; read lazily."""
        return self._handle(name).get_tensor(name)

    def _handle(self, name: str) -> Any:
        if name not in self._file_of:
            raise CheckpointError(f"{self.folder}: no tensor named {name} in the checkpoint")
        return self._file_of[name]

    def close(self) -> None:
        while self._opened:
            self._opened.pop().__exit__(None, None, None)

    def __enter__(self) -> SafetensorsReader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


def write_hf_checkpoint(
    folder: str | Path,
    tensors: Iterable[tuple[str, Tensor]],
    config_source_dir: str | Path,
    max_shard_bytes: int = 4 * 2**30,
) -> Path:
    """Write a complete Hugging Face checkpoint: weights, index, config.json, tokenizer.

    Everything is written beside ``folder`` and put in its place at the end, so ``folder`` is never half a
    checkpoint; one that exists is replaced. Holds at most ``max_shard_bytes`` of tensors (or the largest
    one) at a time. config.json's dtype is set to that of the weights.
    """
    folder, source = Path(folder), Path(config_source_dir)
    aside = folder.with_name(folder.name + ".writing")
    if aside.exists():
        shutil.rmtree(aside)
    aside.mkdir(parents=True)
    dtypes = _write_shards(aside, tensors, max_shard_bytes)
    _copy_config(source / "config.json", aside / "config.json", dtypes)
    for pattern in _COPIED_FILES:
        for path in source.glob(pattern):
            if path.is_file():
                shutil.copyfile(path, aside / path.name)
    previous = folder.with_name(folder.name + ".previous")
    if folder.exists():
        folder.rename(previous)
    aside.rename(folder)
    if previous.exists():
        shutil.rmtree(previous)
    return folder


def _write_shards(
    folder: Path, tensors: Iterable[tuple[str, Tensor]], max_shard_bytes: int
) -> set[torch.dtype]:
    """Write numbered files, then give them their final names, which hold their total number."""
    shards: list[list[str]] = []
    held: dict[str, Tensor] = {}
    num_bytes = total_bytes = 0
    dtypes = set()

    def flush() -> None:
        save_file(held, folder / f"part-{len(shards)}", metadata={"format": "pt"})
        shards.append(list(held))
        held.clear()

    for name, tensor in tensors:
        size = tensor.numel() * tensor.element_size()
        if held and num_bytes + size > max_shard_bytes:
            flush()
            num_bytes = 0
        # A copy of its own: the stream may reuse its buffer, and a view would be written with its base.
        held[name] = tensor.detach().to("cpu", copy=True).contiguous()
        dtypes.add(tensor.dtype)
        num_bytes += size
        total_bytes += size
    flush()
    if len(shards) == 1:
        (folder / "part-0").rename(folder / SINGLE_FILE)
        return dtypes
    weight_map = {}
    for number, names in enumerate(shards):
        file = f"model-{number + 1:05d}-of-{len(shards):05d}.safetensors"
        (folder / f"part-{number}").rename(folder / file)
        weight_map.update(dict.fromkeys(names, file))
    index = {"metadata": {"total_size": total_bytes}, "weight_map": weight_map}
    (folder / INDEX_FILE).write_text(json.dumps(index, indent=2, sort_keys=True), encoding="utf-8")
    return dtypes


def _copy_config(source: Path, target: Path, dtypes: set[torch.dtype]) -> None:
    config = json.loads(source.read_text(encoding="utf-8"))
    if len(dtypes) == 1:
        key = "dtype" if "dtype" in config else "torch_dtype"
        config[key] = str(next(iter(dtypes))).removeprefix("torch.")
    target.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
