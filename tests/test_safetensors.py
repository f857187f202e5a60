"""Hugging Face checkpoints on the disk: written tensor by tensor, read back, refused where damaged."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from apo_megatron.errors import CheckpointError
from apo_megatron.weights.conversion.streaming import divide_by_size, read_ahead
from apo_megatron.weights.formats.hf_checkpoint import write_hf_checkpoint
from apo_megatron.weights.formats.safetensors_io import INDEX_FILE, SafetensorsReader
from apo_megatron.weights.formats.safetensors_writer import ShardWriter, TensorSpec, plan_shards
from tests.tiny_models import Family, make_tiny_model


def tensors_of(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "model.safetensors")


def specs_of(tensors: Mapping[str, Tensor]) -> list[TensorSpec]:
    return [TensorSpec(name, tuple(t.shape), t.dtype) for name, t in tensors.items()]


def sharded(tmp_path: Path, family: Family = "qwen2") -> Path:
    source = make_tiny_model(tmp_path / "source", family)
    tensors = tensors_of(source)
    return write_hf_checkpoint(
        tmp_path / "sharded", specs_of(tensors), tensors.items(), source, max_shard_bytes=60_000
    )


# --- writing ---------------------------------------------------------------------------------------


def test_checkpoint_written_in_shards_is_complete(tmp_path: Path) -> None:
    folder = sharded(tmp_path)
    weight_map = json.loads((folder / INDEX_FILE).read_text())["weight_map"]
    assert len(set(weight_map.values())) > 2 and not (folder / "model.safetensors").exists()
    expected = tensors_of(tmp_path / "source")
    with SafetensorsReader(folder) as reader:
        assert reader.names() == sorted(expected)
        for name, tensor in expected.items():
            assert reader.shape(name) == tuple(tensor.shape) and reader.num_bytes(name) == tensor.nbytes
            assert torch.equal(reader.tensor(name), tensor) and torch.equal(reader.read(name), tensor)
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert torch.equal(model.state_dict()["model.norm.weight"], expected["model.norm.weight"])
    assert AutoTokenizer.from_pretrained(folder)("w5 w7")["input_ids"] == [5, 7]
    assert (folder / "generation_config.json").exists()


def test_a_file_of_all_dtypes_and_shapes_is_read_by_safetensors(tmp_path: Path) -> None:
    """Aligned, too: with these odd sizes a narrow tensor before a wide one would not leave it so."""
    tensors = {
        "half": torch.randn(3).half(),
        "scalar": torch.tensor(2.5),
        "empty": torch.zeros(0, 4),
        "brain": torch.randn(5, 7).bfloat16(),
        "view": torch.randn(6, 4)[:, 1:3],
        "wide": torch.randn(2, 3, 5),
    }
    (plan,) = plan_shards([specs_of(tensors)], 10**9)
    with ShardWriter(tmp_path / plan.file, plan) as writer:
        for name in sorted(tensors, reverse=True):  # not the order of the plan
            writer.write(name, tensors[name])
    with safe_open(tmp_path / plan.file, framework="pt") as file:
        assert set(file.keys()) == set(tensors) and file.metadata() == {"format": "pt"}
        for name, tensor in tensors.items():
            assert torch.equal(file.get_tensor(name), tensor) and file.get_tensor(name).dtype == tensor.dtype
    start = len(plan.header)
    header = json.loads(plan.header[8:])
    for name, tensor in tensors.items():
        assert (start + header[name]["data_offsets"][0]) % tensor.element_size() == 0


def test_groups_stay_together_and_shards_are_bounded() -> None:
    def spec(name: str, size: int) -> TensorSpec:
        return TensorSpec(name, (size,), torch.bfloat16)

    groups = [[spec("a", 10), spec("b", 10)], [spec("c", 10)], [spec("d", 99), spec("e", 1)], [spec("f", 1)]]
    plans = plan_shards(groups, max_shard_bytes=60)
    assert [[s.name for s in plan.specs] for plan in plans] == [["a", "b", "c"], ["d", "e"], ["f"]]
    assert [plan.file for plan in plans][0] == "model-00001-of-00003.safetensors"


def test_a_tensor_that_was_not_written_is_noticed(tmp_path: Path) -> None:
    (plan,) = plan_shards([specs_of({"a": torch.ones(2), "b": torch.ones(2)})], 100)
    with pytest.raises(AssertionError, match="never written.*'b'"):
        with ShardWriter(tmp_path / plan.file, plan) as writer:
            writer.write("a", torch.ones(2))


def test_written_config_names_the_dtype_of_the_weights(tmp_path: Path) -> None:
    source = make_tiny_model(tmp_path / "source")
    halves = {name: tensor.bfloat16() for name, tensor in tensors_of(source).items()}
    folder = write_hf_checkpoint(tmp_path / "copy", specs_of(halves), halves.items(), source)
    assert json.loads((folder / "config.json").read_text())["torch_dtype"] == "bfloat16"


def test_an_interrupted_write_leaves_the_old_checkpoint(tmp_path: Path) -> None:
    source = make_tiny_model(tmp_path / "source")
    tensors = tensors_of(source)
    folder = write_hf_checkpoint(tmp_path / "copy", specs_of(tensors), tensors.items(), source)
    norm = {"model.norm.weight": torch.zeros(64)}

    def breaks_off() -> Iterator[tuple[str, Tensor]]:
        yield from norm.items()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_hf_checkpoint(folder, specs_of(norm), breaks_off(), source)
    assert tensors_of(folder).keys() == tensors.keys()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["copy", "source"]
    write_hf_checkpoint(folder, specs_of(norm), norm.items(), source)  # the next one succeeds
    assert list(tensors_of(folder)) == ["model.norm.weight"]


# --- reading ---------------------------------------------------------------------------------------


def test_truncated_and_missing_files_are_named(tmp_path: Path) -> None:
    folder = sharded(tmp_path)
    first, second = sorted(folder.glob("model-*.safetensors"))[:2]
    content = first.read_bytes()
    for length in (len(content) - 100, 5, 0):
        first.write_bytes(content[:length])
        with pytest.raises(CheckpointError, match=f"{first.name}: cannot be read.*truncated"):
            SafetensorsReader(folder)
    first.write_bytes(content)
    second.unlink()
    with pytest.raises(CheckpointError, match=f"{second.name}: listed in {INDEX_FILE} but missing"):
        SafetensorsReader(folder)
    second.write_bytes(content)  # a file of the right name with other tensors
    with pytest.raises(CheckpointError, match=f"{second.name}.*says it holds"):
        SafetensorsReader(folder)
    with pytest.raises(CheckpointError, match="neither model.safetensors nor"):
        SafetensorsReader(tmp_path)


def test_a_tensor_in_two_files_is_refused(tmp_path: Path) -> None:
    folder = sharded(tmp_path)
    first, second = sorted(folder.glob("model-*.safetensors"))[:2]
    both = load_file(second) | {"model.embed_tokens.weight": load_file(first)["model.embed_tokens.weight"]}
    save_file(both, second)
    with pytest.raises(CheckpointError, match=f"embed_tokens.weight is in {first.name} too"):
        SafetensorsReader(folder)


@pytest.mark.parametrize("content", ["[]", "{", '{"weight_map": {"a": 3}}', '{"weight_map": []}', "{}"])
def test_an_index_that_is_none_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / INDEX_FILE).write_text(content)
    with pytest.raises(CheckpointError, match=INDEX_FILE):
        SafetensorsReader(tmp_path)


def test_a_file_cut_while_it_is_read_is_noticed(tmp_path: Path) -> None:
    folder = make_tiny_model(tmp_path)
    with SafetensorsReader(folder) as reader:
        with (folder / "model.safetensors").open("rb+") as file:
            file.truncate(1000)
        with pytest.raises(CheckpointError, match="ended before"):
            reader.read(reader.names()[-1])


# --- streaming -------------------------------------------------------------------------------------


def test_read_ahead_keeps_order_and_bound() -> None:
    held, most, lock = 0, 0, threading.Lock()

    def read(size: int) -> int:
        nonlocal held, most
        with lock:
            held += size
            most = max(most, held)
        return size

    sizes = [3, 1, 9, 2, 2, 2, 5, 1] * 20  # one of them alone is above the bound
    found = []
    for size in read_ahead(sizes, read, lambda size: size, max_bytes=8):
        found.append(size)
        with lock:
            held -= size
    assert found == sizes and 6 <= most <= 9


def test_read_ahead_raises_what_reading_raised_and_can_be_left() -> None:
    def read(item: int) -> int:
        if item == 3:
            raise CheckpointError("three")
        return item

    found = []
    with pytest.raises(CheckpointError, match="three"):
        for item in read_ahead(range(6), read, lambda item: 1, max_bytes=10):
            found.append(item)
    assert found == [0, 1, 2]
    iterator = read_ahead(range(10**6), read, lambda item: 1, max_bytes=2)
    next(iterator)
    iterator.close()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("read-ahead")]


def test_work_is_divided_evenly_and_in_order() -> None:
    parts = divide_by_size([5, 1, 9, 3, 4, 2], lambda size: size, 2)
    assert parts == [[9, 3], [5, 1, 4, 2]] and divide_by_size([1], lambda size: size, 3) == [[1], [], []]
