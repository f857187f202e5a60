"""Megatron's checkpoint format: what is written is torch's, what is read is nothing but tensors."""

from __future__ import annotations

import json
import os
import pickle
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed import checkpoint as torch_checkpoint

from apo_megatron.errors import CheckpointError
from apo_megatron.models.hf_config import read_architecture
from apo_megatron.parallel.world import CPUWorld
from apo_megatron.weights.conversion.hf_to_megatron import hf_to_megatron
from apo_megatron.weights.conversion.megatron_to_hf import megatron_to_hf
from apo_megatron.weights.conversion.verify import verify_conversion
from apo_megatron.weights.formats.mapped_file import map_tensor
from apo_megatron.weights.formats.torch_archive import ArchiveError, map_saved_tensor
from apo_megatron.weights.formats.torch_dist_format import (
    CONFIG_FILE,
    METADATA_FILE,
    read_chunks,
    write_metadata,
)
from apo_megatron.weights.formats.torch_dist_io import TorchDistReader, TorchDistWriter
from apo_megatron.weights.rules import StoredTensor
from apo_megatron.weights.table import build_table
from tests.distributed import run_distributed
from tests.tiny_models import Family, make_tiny_model

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
TP2 = {"tensor_parallel_size": 2}


def write(folder: Path, tensors: dict[StoredTensor, Tensor]) -> Path:
    folder.mkdir()
    with TorchDistWriter(folder / "__0_0.distcp") as writer:
        for stored, tensor in tensors.items():
            rows = tensor.split(2) if tensor.dim() > 1 else [tensor]  # as layouts give it, in pieces
            writer.write(stored, tuple(tensor.shape), rows)
    write_metadata(folder, writer.chunks)
    return folder


def map_file(path: Path) -> Tensor:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        return map_saved_tensor(descriptor, 0, path.stat().st_size)
    finally:
        os.close(descriptor)


# --- one tensor ------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_written_is_what_torch_loads(tmp_path: Path, dtype: torch.dtype) -> None:
    """Also with torch's own reader of the whole format, as Megatron uses it."""
    stored = {
        StoredTensor("layers.weight", (layer,), (3,)): torch.randn(5, 7).to(dtype) for layer in range(3)
    } | {StoredTensor("norm.weight", (), ()): torch.randn(11).to(dtype)}
    folder = write(tmp_path / "checkpoint", stored)
    whole = {
        "layers.weight": torch.zeros(3, 5, 7, dtype=dtype),
        "norm.weight": torch.zeros(11, dtype=dtype),
    }
    torch_checkpoint.load(whole, checkpoint_id=folder, no_dist=True)
    for place, tensor in stored.items():
        found = whole[place.key][place.index]
        assert torch.equal(found, tensor)
        assert torch.equal(TorchDistReader(folder).read(place, tuple(tensor.shape)), tensor)
    chunk = read_chunks(folder)["layers.weight"][1]
    content = (folder / chunk.file).read_bytes()[chunk.offset : chunk.offset + chunk.num_bytes]
    (tmp_path / "one.pt").write_bytes(content)
    assert torch.equal(torch.load(tmp_path / "one.pt", weights_only=True)[0], list(stored.values())[1])


@pytest.mark.parametrize("dtype", DTYPES)
def test_mapped_is_what_torch_saved(tmp_path: Path, dtype: torch.dtype) -> None:
    base = torch.randn(6, 8).to(dtype)
    for tensor in (base, base.t(), base[2:4, 1:5], torch.zeros(0, 3, dtype=dtype), base[0, 0]):
        torch.save(tensor, tmp_path / "saved.pt")
        found = map_file(tmp_path / "saved.pt")
        assert torch.equal(found, tensor) and found.dtype == dtype and found.stride() == tensor.stride()


class _Harmful:
    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, ("echo this must never run > ran",)


@pytest.mark.parametrize(
    "content",
    [_Harmful(), {"a": torch.ones(2)}, [1, 2], torch.nn.Parameter(torch.ones(2)), torch.ones(2).int()],
)
def test_what_is_not_a_plain_tensor_is_refused(
    tmp_path: Path, content: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save(content, "saved.pt")
    with pytest.raises(ArchiveError):
        map_file(tmp_path / "saved.pt")
    assert not Path("ran").exists()


def test_damaged_archives_end_in_the_one_error(tmp_path: Path) -> None:
    """Whatever byte is wrong: a tensor of that size (its values have no checksum), or ArchiveError."""
    path = tmp_path / "saved.pt"
    torch.save(torch.arange(9.0), path)
    good = path.read_bytes()
    generator = random.Random(0)
    refused = 0
    for _ in range(300):
        bad = bytearray(good)
        for _ in range(generator.randint(1, 3)):
            bad[generator.randrange(len(bad))] = generator.randrange(256)
        path.write_bytes(bad[: generator.randrange(len(bad))] if generator.random() < 0.2 else bad)
        try:
            map_file(path)
        except ArchiveError:
            refused += 1
    assert 60 < refused < 300


def test_mapped_memory_is_given_back_with_the_tensor(tmp_path: Path) -> None:
    def resident_kib() -> int:
        status = Path("/proc/self/status").read_text()
        return int(status.split("RssFile:")[1].split()[0])

    path, num_bytes = tmp_path / "bytes", 48 * 2**20
    path.write_bytes(bytes(num_bytes))
    with path.open("rb") as file:
        before = resident_kib()
        tensor = map_tensor(file.fileno(), 0, num_bytes, torch.float32, (num_bytes // 4,))
        assert resident_kib() - before > 40 * 2**10
        del tensor
        assert resident_kib() - before < 8 * 2**10
        odd = map_tensor(file.fileno(), 4097, 8, torch.float32, (2,))  # aligned in memory, not in the file
        assert odd.tolist() == [0.0, 0.0] and odd.data_ptr() % 4 == 0
        with pytest.raises(EOFError):
            map_tensor(file.fileno(), num_bytes - 4, 8, torch.float32, (2,))


# --- the whole format ------------------------------------------------------------------------------


def test_metadata_that_names_anything_else_is_not_opened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    folder = write(tmp_path / "checkpoint", {StoredTensor("a", (), ()): torch.ones(2)})
    (folder / METADATA_FILE).write_bytes(pickle.dumps(_Harmful()))
    with pytest.raises(CheckpointError, match=r"names posix\.system"):
        TorchDistReader(folder)
    assert not Path("ran").exists()


def test_damaged_metadata_ends_in_the_one_error(tmp_path: Path) -> None:
    folder = write(tmp_path / "checkpoint", {StoredTensor("a", (), ()): torch.ones(2)})
    good = (folder / METADATA_FILE).read_bytes()
    generator = random.Random(0)
    for _ in range(300):
        bad = bytearray(good)
        bad[generator.randrange(len(bad))] = generator.randrange(256)
        (folder / METADATA_FILE).write_bytes(bad)
        try:
            reader = TorchDistReader(folder)
            reader.check(StoredTensor("a", (), ()), (2,))
        except CheckpointError:
            pass


def test_files_outside_the_folder_are_refused(tmp_path: Path) -> None:
    folder = write(tmp_path / "checkpoint", {StoredTensor("a", (), ()): torch.ones(2)})
    content = (folder / METADATA_FILE).read_bytes()
    (folder / METADATA_FILE).write_bytes(content.replace(b"__0_0.distcp", b"../0_.distcp"))
    with pytest.raises(CheckpointError, match="outside the folder"):
        TorchDistReader(folder)


@pytest.mark.parametrize("change", [{"sharded_backend": "zarr"}, {"sharded_backend_version": 2}])
def test_other_formats_are_refused(tmp_path: Path, change: dict[str, Any]) -> None:
    folder = write(tmp_path / "checkpoint", {StoredTensor("a", (), ()): torch.ones(2)})
    config = json.loads((folder / CONFIG_FILE).read_text())
    (folder / CONFIG_FILE).write_text(json.dumps(config | change))
    with pytest.raises(CheckpointError, match="metadata.json: format"):
        TorchDistReader(folder)


def test_missing_layers_and_other_shapes_are_named(tmp_path: Path) -> None:
    layers = {StoredTensor("a", (layer,), (3,)): torch.ones(4, 2) for layer in (0, 2)}
    reader = TorchDistReader(write(tmp_path / "checkpoint", layers))
    reader.check(StoredTensor("a", (2,), (3,)), (4, 2))
    reader.check(StoredTensor("a", (2,), (3,)), (3, 2))  # a padded vocabulary
    for stored, shape, words in (
        (StoredTensor("a", (1,), (3,)), (4, 2), r"a at \[1\]: 0 of 8 elements"),
        (StoredTensor("a", (0,), (3,)), (5, 2), r"shape \[3, 4, 2\], \[3, 5, 2\] expected"),
        (StoredTensor("a", (0,), (3,)), (4, 1), r"shape \[3, 4, 2\]"),
        (StoredTensor("a", (0,), (2,)), (4, 2), r"shape \[3, 4, 2\]"),
        (StoredTensor("b", (), ()), (4, 2), "no tensor b; .* It has a"),
    ):
        with pytest.raises(CheckpointError, match=words):
            reader.check(stored, shape)


def test_checkpoints_that_megatron_wrote_at_other_layouts_are_read(tmp_path: Path) -> None:
    """Training checkpoints: many chunks a parameter, a padded vocabulary, optimizer state beside it."""
    cases: list[tuple[Family, dict[str, Any]]] = [
        ("qwen2_tied", TP2),
        ("qwen3", {"pipeline_parallel_size": 2}),
        ("qwen3_moe", TP2 | {"sequence_parallel": True, "expert_parallel_size": 2}),
        ("deepseek_v3", {"expert_parallel_size": 2}),
    ]
    payload = []
    for family, layout in cases:
        source = make_tiny_model(tmp_path / family, family)
        payload.append(
            {"model_path": str(source), "layout": layout, "folder": str(tmp_path / f"{family}-run")}
        )
    saved = run_distributed(2, "tests.workers.conversion:save_training_checkpoints", {"cases": payload})[0]
    for (family, _), folder in zip(cases, saved, strict=True):
        source = tmp_path / family
        found = verify_conversion(source, folder, CPUWorld())
        assert found.is_proven and not found.has_manifest, found
        megatron_to_hf(folder, tmp_path / f"{family}-back", CPUWorld(), max_shard_bytes=50_000)
        back = hf_to_megatron(tmp_path / f"{family}-back", tmp_path / f"{family}-m", CPUWorld())
        assert back == found.num_bytes
        assert verify_conversion(source, tmp_path / f"{family}-m", CPUWorld()).is_proven
    entries = list(build_table(read_architecture(tmp_path / "qwen2_tied")).entries())
    reader = TorchDistReader(saved[0])
    assert max(reader.num_chunks(e.stored) for e in entries if e.exported) > 2  # the test tests something
