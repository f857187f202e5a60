"""Hugging Face -> Megatron -> Hugging Face is exact for every family, and what is not exact is found."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from apo_megatron.errors import CheckpointError, ConfigError, WeightMappingError
from apo_megatron.models.hf_config import read_architecture
from apo_megatron.parallel.world import CPUWorld
from apo_megatron.weights.conversion.hf_to_megatron import hf_to_megatron
from apo_megatron.weights.conversion.megatron_to_hf import megatron_to_hf
from apo_megatron.weights.conversion.verify import require_proof, verify_conversion
from checkpoints_convert import hf_to_megatron as hf_to_megatron_command
from checkpoints_convert import megatron_to_hf as megatron_to_hf_command
from checkpoints_convert import verify as verify_command
from tests.distributed import run_distributed
from tests.tiny_models import FAMILIES, Family, make_tiny_model

ONE = CPUWorld()


def _tensors(folder: Path) -> dict[str, Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def _assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor), name


def _change_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.fixture
def converted(tmp_path: Path) -> tuple[Path, Path]:
    """A checkpoint and its conversion."""
    source = make_tiny_model(tmp_path / "source", "qwen2")
    hf_to_megatron(source, tmp_path / "megatron", ONE)
    return source, tmp_path / "megatron"


@pytest.mark.parametrize("family", FAMILIES)
def test_round_trip_is_exact_and_complete(tmp_path: Path, family: Family) -> None:
    source = make_tiny_model(tmp_path / "source", family)
    hf_to_megatron(source, tmp_path / "megatron", ONE)
    found = verify_conversion(source, tmp_path / "megatron", ONE)
    assert found.is_proven and found.has_manifest and found.num_tensors == len(_tensors(source))
    megatron_to_hf(tmp_path / "megatron", tmp_path / "back", ONE)
    _assert_same(_tensors(tmp_path / "back"), _tensors(source))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "back").state_dict()
    _assert_same(loaded, AutoModelForCausalLM.from_pretrained(source).state_dict())
    assert AutoTokenizer.from_pretrained(tmp_path / "back")("w5 w7")["input_ids"] == [5, 7]


def test_half_precision_is_kept_or_chosen(tmp_path: Path) -> None:
    source = make_tiny_model(tmp_path / "source", "qwen3")
    halves = {name: tensor.bfloat16() for name, tensor in _tensors(source).items()}
    save_file(halves, source / "model.safetensors", metadata={"format": "pt"})
    hf_to_megatron(source, tmp_path / "megatron", ONE)
    megatron_to_hf(tmp_path / "megatron", tmp_path / "back", ONE)
    _assert_same(_tensors(tmp_path / "back"), halves)
    megatron_to_hf(tmp_path / "megatron", tmp_path / "wide", ONE, dtype=torch.float32)
    _assert_same(_tensors(tmp_path / "wide"), {name: half.float() for name, half in halves.items()})
    config = json.loads((tmp_path / "wide" / "config.json").read_text())
    assert config.get("dtype", config.get("torch_dtype")) == "float32"


def test_ranks_share_the_work(tmp_path: Path) -> None:
    paths = []
    families: tuple[Family, ...] = ("llama3_tied", "qwen3_moe_mixed")
    for family in families:
        source = make_tiny_model(tmp_path / family, family)
        names = ("hf", source), ("megatron", tmp_path / f"{family}-m"), ("back", tmp_path / f"{family}-b")
        paths.append({name: str(path) for name, path in names})
    results = run_distributed(3, "tests.workers.conversion:there_and_back", {"paths": paths})
    assert results == [[True, True]] * 3
    for path in paths:
        assert len(list(Path(path["megatron"]).glob("*.distcp"))) == 3
        assert len(list(Path(path["back"]).glob("*.safetensors"))) > 3
        _assert_same(_tensors(Path(path["back"])), _tensors(Path(path["hf"])))


def test_source_that_changed_after_the_conversion_is_found(converted: tuple[Path, Path]) -> None:
    source, megatron = converted
    tensors = _tensors(source)
    tensors["model.norm.weight"][3] += 1e-3
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    found = verify_conversion(source, megatron, ONE)
    assert found.changed_sources == ("model.norm.weight",)
    assert found.differing == ("model.norm.weight (other values)",)
    with pytest.raises(CheckpointError, match=r"1 of \d+ tensors of .*source are not what was converted"):
        require_proof(found, source, megatron)
    (megatron / "manifest.json").unlink()  # as in the checkpoint of a training run
    found = verify_conversion(source, megatron, ONE)
    assert not found.has_manifest and found.differing == ("model.norm.weight (other values)",)


def test_damage_of_the_right_size_is_found(converted: tuple[Path, Path], tmp_path: Path) -> None:
    source, megatron = converted
    (file,) = megatron.glob("*.distcp")
    content = bytearray(file.read_bytes())
    value = _tensors(source)["model.layers.1.mlp.down_proj.weight"].numpy().tobytes()[:64]
    content[content.index(value)] ^= 1
    file.write_bytes(content)
    assert verify_conversion(source, megatron, ONE).differing == (
        "model.layers.1.mlp.down_proj.weight (other values)",
    )
    with pytest.raises(CheckpointError, match="down_proj.weight .* is not what was converted"):
        megatron_to_hf(megatron, tmp_path / "back", ONE)
    assert not (tmp_path / "back").exists() and not list(tmp_path.glob(".*"))


def _drop(name: str) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    return lambda tensors: {key: tensor for key, tensor in tensors.items() if key != name}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (_drop("model.norm.weight"), "1 tensors missing: model.norm.weight"),
        (lambda t: t | {"model.extra.weight": torch.ones(1)}, "left over.*model.extra.weight"),
        (lambda t: t | {"model.norm.weight": torch.ones(63)}, r"model.norm.weight: shape \[63\]"),
        (
            lambda t: t | {"model.norm.weight": torch.ones(64).to(torch.float8_e4m3fn)},
            "model.norm.weight has the dtype F8_E4M3",
        ),
    ],
)
def test_wrong_sources_are_refused_before_anything_is_written(
    tmp_path: Path, change: Callable[[dict[str, Tensor]], dict[str, Tensor]], words: str
) -> None:
    source = make_tiny_model(tmp_path / "source", "qwen2")
    save_file(change(_tensors(source)), source / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises((CheckpointError, WeightMappingError), match=words):
        hf_to_megatron(source, tmp_path / "out" / "megatron", ONE)
    assert not (tmp_path / "out").exists()


def _commands(source: Path, megatron: Path, back: Path) -> list[tuple[Callable[..., int], list[str]]]:
    return [
        (hf_to_megatron_command.main, ["--hf-path", str(source), "--megatron-path", str(megatron)]),
        (verify_command.main, ["--hf-path", str(source), "--megatron-path", str(megatron)]),
        (megatron_to_hf_command.main, ["--megatron-path", str(megatron), "--hf-path", str(back)]),
    ]


def test_commands_there_and_back(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = make_tiny_model(tmp_path / "source", "mistral")
    for main, words in _commands(source, tmp_path / "megatron", tmp_path / "back"):
        assert main(words) == 0
    shown = capsys.readouterr()
    assert "bit for bit equal" in shown.out and "GB/s" in shown.err
    _assert_same(_tensors(tmp_path / "back"), _tensors(source))
    for main, words in _commands(source, tmp_path / "megatron", tmp_path / "back"):  # once more
        is_conversion = main is not verify_command.main
        assert main(words) == (2 if is_conversion else 0)
        if is_conversion:
            assert "exists already" in capsys.readouterr().err
            assert main([*words, "--overwrite"]) == 0


def test_commands_name_what_is_wrong(
    converted: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, megatron = converted

    def fails(main: Callable[..., int], words: list[str], expected: str) -> None:
        assert main(words) == 2
        error = capsys.readouterr().err
        assert expected in error and "Traceback" not in error, error

    back = ["--hf-path", str(tmp_path / "back")]
    fails(
        megatron_to_hf_command.main,
        ["--megatron-path", str(tmp_path / "absent"), *back],
        "not a Megatron distributed checkpoint",
    )
    fails(megatron_to_hf_command.main, ["--megatron-path", str(source), *back], "metadata.json is missing")
    fails(
        hf_to_megatron_command.main,
        ["--hf-path", str(tmp_path / "absent"), "--megatron-path", str(tmp_path / "m")],
        "not a directory",
    )

    (megatron / "manifest.json").write_text(json.dumps({"format_version": 99}))
    fails(megatron_to_hf_command.main, ["--megatron-path", str(megatron), *back], "format_version 99")
    (megatron / "manifest.json").unlink()
    (file,) = megatron.glob("*.distcp")
    content = file.read_bytes()
    file.write_bytes(content[:-1000])
    fails(megatron_to_hf_command.main, ["--megatron-path", str(megatron), *back], "truncated")
    file.write_bytes(content)
    shutil.rmtree(megatron / "hf")
    fails(megatron_to_hf_command.main, ["--megatron-path", str(megatron), *back], "--config-from")
    other = make_tiny_model(tmp_path / "other", "qwen3")
    fails(
        megatron_to_hf_command.main,
        ["--megatron-path", str(megatron), *back, "--config-from", str(other)],
        "another model",
    )
    assert not (tmp_path / "back").exists()


def test_layout_without_logits_is_refused(
    converted: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    source, megatron = converted
    words = ["--hf-path", str(source), "--megatron-path", str(megatron), "--tensor-parallel-size", "2"]
    assert verify_command.main(words) == 2
    assert "--logits, which is not given" in capsys.readouterr().err


def test_verify_compares_logits(converted: tuple[Path, Path], tmp_path: Path) -> None:
    source, megatron = converted
    changed = make_tiny_model(tmp_path / "changed", "qwen2")
    tensors = _tensors(changed)
    tensors["model.layers.1.self_attn.o_proj.weight"] *= 1.001
    save_file(tensors, changed / "model.safetensors", metadata={"format": "pt"})
    payload = {"hf": str(source), "changed": str(changed), "megatron": str(megatron)}
    for result in run_distributed(2, "tests.workers.conversion:verify_with_logits", payload):
        assert result["exit_code"] == 0
        assert result["same"]["agrees"] and result["same"]["difference"] > 0
        assert not result["changed"]["agrees"]


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("mistral", {"sliding_window": 16}),
        ("qwen3", {"rope_scaling": {"type": "yarn", "factor": 4.0}, "hidden_act": "gelu"}),
        ("deepseek_v2", {"topk_method": "group_limited_greedy", "rms_norm_eps": 1e-5}),
    ],
)
def test_what_only_changes_the_computation_is_converted(
    tmp_path: Path, family: Family, changes: dict[str, Any]
) -> None:
    source = make_tiny_model(tmp_path / "source", family)
    _change_config(source, **changes)
    with pytest.raises(ConfigError):
        read_architecture(source)
    hf_to_megatron(source, tmp_path / "megatron", ONE)
    megatron_to_hf(tmp_path / "megatron", tmp_path / "back", ONE)
    _assert_same(_tensors(tmp_path / "back"), _tensors(source))


def test_layers_that_predict_further_ahead_are_left_out_by_name(tmp_path: Path) -> None:
    source = make_tiny_model(tmp_path / "source", "deepseek_v3")
    num_layers = read_architecture(source).num_layers
    tensors = _tensors(source)
    extra = f"model.layers.{num_layers}.eh_proj.weight"
    save_file(tensors | {extra: torch.ones(3)}, source / "model.safetensors", metadata={"format": "pt"})
    _change_config(source, num_nextn_predict_layers=0)
    with pytest.raises(WeightMappingError, match=extra):
        hf_to_megatron(source, tmp_path / "megatron", ONE)
    _change_config(source, num_nextn_predict_layers=1)
    hf_to_megatron(source, tmp_path / "megatron", ONE)
    manifest = json.loads((tmp_path / "megatron" / "manifest.json").read_text())["tensors"]
    assert [name for name, record in manifest.items() if record["key"] is None] == [extra]
    assert verify_conversion(source, tmp_path / "megatron", ONE).is_proven
    megatron_to_hf(tmp_path / "megatron", tmp_path / "back", ONE)
    _assert_same(_tensors(tmp_path / "back"), tensors)


def test_selection_bias_stays_in_float32(tmp_path: Path) -> None:
    source = make_tiny_model(tmp_path / "source", "deepseek_v3")
    hf_to_megatron(source, tmp_path / "megatron", ONE)
    megatron_to_hf(tmp_path / "megatron", tmp_path / "back", ONE, dtype=torch.bfloat16)
    kept = {name for name, tensor in _tensors(tmp_path / "back").items() if tensor.dtype == torch.float32}
    assert kept and all(name.endswith("e_score_correction_bias") for name in kept)
    config = json.loads((tmp_path / "back" / "config.json").read_text())
    assert config.get("dtype", config.get("torch_dtype")) == "bfloat16"


def test_overwriting_replaces_checkpoints_only(converted: tuple[Path, Path], tmp_path: Path) -> None:
    source, megatron = converted
    project = tmp_path / "project"
    (project / "src").mkdir(parents=True)
    (project / "config.json").write_text("{}")
    for _ in range(2):  # without weights, and with them but also with other things
        with pytest.raises(CheckpointError, match="not a checkpoint and nothing else"):
            megatron_to_hf(megatron, project, ONE, overwrite=True)
        shutil.copy(source / "model.safetensors", project)
    assert (project / "src").is_dir()
    megatron_to_hf(megatron, tmp_path / "back", ONE)
    megatron_to_hf(megatron, tmp_path / "back", ONE, overwrite=True)
    with pytest.raises(CheckpointError, match="would destroy the input"):
        megatron_to_hf(megatron, megatron, ONE, overwrite=True)


def test_a_replacement_that_was_killed_half_way_is_undone(
    converted: tuple[Path, Path], tmp_path: Path
) -> None:
    source, megatron = converted
    megatron.rename(tmp_path / ".megatron.replaced")  # as between the two renames

    def is_killed(_num_bytes: int, _total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        hf_to_megatron(source, megatron, ONE, overwrite=True, progress=is_killed)
    assert verify_conversion(source, megatron, ONE).is_proven
    assert sorted(path.name for path in tmp_path.iterdir()) == ["megatron", "source"]
