"""Conversions that cannot be completed: a message, exit code 2, and nothing under the final name."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from apo_megatron.errors import CheckpointError
from apo_megatron.parallel.world import CPUWorld
from apo_megatron.weights.conversion.hf_to_megatron import hf_to_megatron
from apo_megatron.weights.conversion.megatron_to_hf import megatron_to_hf
from apo_megatron.weights.conversion.verify import verify_conversion
from checkpoints_convert import hf_to_megatron as hf_to_megatron_command
from checkpoints_convert import megatron_to_hf as megatron_to_hf_command
from tests.distributed import DistributedRun
from tests.tiny_models import Family, make_tiny_model

ONE = CPUWorld()


def tensors_of(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "model.safetensors")


def replace_tensors(folder: Path, tensors: dict[str, Tensor]) -> None:
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return make_tiny_model(tmp_path / "source", "qwen2")


@pytest.fixture
def megatron(source: Path, tmp_path: Path) -> Path:
    hf_to_megatron(source, tmp_path / "megatron", ONE)
    return tmp_path / "megatron"


def convert_both_ways(source: Path, megatron: Path, target: Path) -> Iterator[int]:
    """The exit code of each direction, into ``target``."""
    yield hf_to_megatron_command.main(["--hf-path", str(source), "--megatron-path", str(target)])
    yield megatron_to_hf_command.main(["--megatron-path", str(megatron), "--hf-path", str(target)])


# --- sources ---------------------------------------------------------------------------------------


def test_dtypes_that_cannot_share_a_tensor_are_named(source: Path, tmp_path: Path) -> None:
    tensors = tensors_of(source)
    name = "model.layers.1.self_attn.k_proj.weight"
    replace_tensors(source, tensors | {name: tensors[name].bfloat16()})
    with pytest.raises(CheckpointError, match=f"{name} is bfloat16 and .* float32.*linear_qkv.weight"):
        hf_to_megatron(source, tmp_path / "out", ONE)
    # A tensor of its own may have its own dtype.
    replace_tensors(source, tensors | {"model.norm.weight": tensors["model.norm.weight"].bfloat16()})
    hf_to_megatron(source, tmp_path / "out", ONE)
    megatron_to_hf(tmp_path / "out", tmp_path / "back", ONE)
    assert tensors_of(tmp_path / "back")["model.norm.weight"].dtype == torch.bfloat16
    assert verify_conversion(source, tmp_path / "out", ONE).is_proven


def test_tied_head_is_left_out_only_where_it_is_the_embedding(tmp_path: Path) -> None:
    family: Family = "llama3_tied"
    source = make_tiny_model(tmp_path / "source", family)
    tensors = tensors_of(source)
    head = tensors["model.embed_tokens.weight"].clone()
    replace_tensors(source, tensors | {"lm_head.weight": head})
    hf_to_megatron(source, tmp_path / "megatron", ONE)
    record = json.loads((tmp_path / "megatron" / "manifest.json").read_text())["tensors"]["lm_head.weight"]
    assert record["key"] is None
    assert verify_conversion(source, tmp_path / "megatron", ONE).is_proven
    megatron_to_hf(tmp_path / "megatron", tmp_path / "back", ONE)
    assert tensors_of(tmp_path / "back").keys() == tensors.keys()
    head[3, 2] += 1
    replace_tensors(source, tensors | {"lm_head.weight": head})
    with pytest.raises(CheckpointError, match="lm_head.weight differs from model.embed_tokens.weight"):
        hf_to_megatron(source, tmp_path / "other", ONE)
    assert not (tmp_path / "other").exists() and not list(tmp_path.glob(".*"))


# --- targets ---------------------------------------------------------------------------------------


def test_only_checkpoints_are_replaced(source: Path, megatron: Path, tmp_path: Path) -> None:
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter").write_text("1")
    for target, words in (
        (tmp_path / "thesis", "not a checkpoint"),
        (source, "would destroy the input"),
        (tmp_path, "would destroy the input"),  # holds it
        (source / "config.json" / "deep", "cannot be written"),
    ):
        with pytest.raises(CheckpointError, match=words):
            hf_to_megatron(source, target, ONE, overwrite=True)
    with pytest.raises(CheckpointError, match="would destroy the input"):
        megatron_to_hf(megatron, megatron / "hf", ONE, overwrite=True)
    assert (tmp_path / "thesis" / "chapter").exists()
    assert verify_conversion(source, megatron, ONE).is_proven


def test_too_little_space_is_seen_before_anything_is_written(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=10**5))
    with pytest.raises(CheckpointError, match=r"0\.00 GB needed, 0\.00 GB free on the disk"):
        hf_to_megatron(source, tmp_path / "deep" / "out", ONE)
    assert not (tmp_path / "deep").exists()


@contextmanager
def file_size_limit(num_bytes: int) -> Iterator[None]:
    """Writing beyond it fails as it does on a full disk, with another number."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, before[1]))
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_write_that_fails_half_way_leaves_nothing(
    source: Path, megatron: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    capsys.readouterr()
    with file_size_limit(100_000):
        for exit_code in convert_both_ways(source, megatron, tmp_path / "out"):
            error = capsys.readouterr().err
            assert exit_code == 2 and "error: File too large: " in error and ".out.partial/" in error
            assert "Traceback" not in error
            assert sorted(path.name for path in tmp_path.iterdir()) == ["megatron", "source"]


@contextmanager
def without_root_rights() -> Iterator[None]:
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


def test_a_directory_without_rights_is_named(
    source: Path, megatron: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = Path(tempfile.mkdtemp())  # pytest's own is closed to others
    try:
        shutil.copytree(source, folder / "source")
        shutil.copytree(megatron, folder / "megatron")
        (folder / "locked").mkdir()
        for path in (folder, *folder.rglob("*")):
            path.chmod(0o555 if path.is_dir() else 0o444)
        capsys.readouterr()
        with without_root_rights():
            target = folder / "locked" / "out"
            for exit_code in convert_both_ways(folder / "source", folder / "megatron", target):
                assert exit_code == 2
                assert f"{folder / 'locked'}: cannot be written" in capsys.readouterr().err
        assert not list((folder / "locked").iterdir())
    finally:
        for path in (folder, *folder.rglob("*")):
            path.chmod(0o755)
        shutil.rmtree(folder)


def test_a_killed_conversion_leaves_what_was_there(source: Path, megatron: Path, tmp_path: Path) -> None:
    old = tmp_path / "old"
    shutil.copytree(megatron, old)
    manifest = (old / "manifest.json").read_text()
    for direction in ("hf_to_megatron", "megatron_to_hf"):
        for target in (old, tmp_path / "new"):
            payload = {
                "direction": direction,
                "source": str(source if direction == "hf_to_megatron" else megatron),
                "target": str(target),
                "groups": 5,
            }
            with DistributedRun(1, "tests.workers.conversion:convert_and_die", payload) as run:
                assert run.exit_codes(60.0) == [-signal.SIGKILL]
            assert (tmp_path / f".{target.name}.partial").exists()
        assert not (tmp_path / "new").exists() and (old / "manifest.json").read_text() == manifest
        assert verify_conversion(source, old, ONE).is_proven
    hf_to_megatron(source, tmp_path / "new", ONE)  # the next one clears away what is left
    hf_to_megatron(source, old, ONE, overwrite=True)
    assert not list(tmp_path.glob(".*"))
    assert verify_conversion(source, tmp_path / "new", ONE).is_proven


def test_one_rank_that_fails_leaves_nothing(source: Path, tmp_path: Path) -> None:
    payload = {"source": str(source), "target": str(tmp_path / "out"), "limit": 50_000}
    with DistributedRun(2, "tests.workers.conversion:command_with_full_disk", payload) as run:
        exit_codes = run.exit_codes(60.0)
        assert 2 in exit_codes and 0 not in exit_codes
        assert any("error" in run.log(rank) and "File too large" in run.log(rank) for rank in range(2))
    assert not (tmp_path / "out").exists()
