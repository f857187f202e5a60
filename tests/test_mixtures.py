"""Mixtures of data sets: shares, epochs, exact positions, ids, and checkpoints of other data refused."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from apo_megatron.config import RLConfig
from apo_megatron.data.mixture import MixtureOrder, MixturePart
from apo_megatron.data.prompts import PromptLoader
from apo_megatron.errors import CheckpointError, DataError
from apo_megatron.training_data import TrainingData, load_training_data
from tests.tiny_models import make_tiny_model

PARTS = [MixturePart("a", 7, 3.0), MixturePart("b", 5, 1.0), MixturePart("c", 7, 0.5)]


def drawn_parts(rows: np.ndarray, parts: list[MixturePart]) -> np.ndarray:
    starts = np.cumsum([part.num_rows for part in parts])
    return np.searchsorted(starts, rows, side="right")


def test_every_prefix_has_the_shares_of_the_weights() -> None:
    rng = np.random.default_rng(0)
    for _ in range(20):
        weights = rng.uniform(0.1, 10, size=rng.integers(2, 6))
        parts = [MixturePart(str(i), 11, float(weight)) for i, weight in enumerate(weights)]
        drawn = drawn_parts(MixtureOrder(parts, 0, True).take(500), parts)
        counts = np.cumsum(drawn[:, None] == np.arange(len(parts)), axis=0)
        shares = np.arange(1, 501)[:, None] * weights / weights.sum()
        assert np.abs(counts - shares).max() <= 1


def test_each_part_has_epochs_of_its_own() -> None:
    rows = MixtureOrder(PARTS, 3, True).take(900)
    parts = drawn_parts(rows, PARTS)
    assert Counter(parts.tolist()) == {0: 600, 1: 200, 2: 100}
    for i, (start, part) in enumerate(zip((0, 7, 12), PARTS, strict=True)):
        own = rows[parts == i] - start
        epochs = [own[j : j + part.num_rows].tolist() for j in range(0, len(own), part.num_rows)][:-1]
        assert all(sorted(epoch) == list(range(part.num_rows)) for epoch in epochs)
        assert epochs[0] != epochs[1]
    # a and c have as many rows, and a shuffle of their own
    assert (rows[parts == 0][:7]).tolist() != (rows[parts == 2][:7] - 12).tolist()


@pytest.mark.parametrize("num_before", [0, 1, 13, 77])
def test_the_position_is_exact(num_before: int) -> None:
    whole = MixtureOrder(PARTS, 3, True).take(num_before + 50)
    first = MixtureOrder(PARTS, 3, True)
    pieces = [first.take(1) for _ in range(num_before)]  # however the draws are divided
    assert [int(piece[0]) for piece in pieces] == whole[:num_before].tolist()
    state = json.loads(json.dumps(first.state_dict()))
    second = MixtureOrder(PARTS, 3, True)
    second.take(9)  # what was drawn before must not matter
    second.load_state_dict(state)
    assert second.take(50).tolist() == whole[num_before:].tolist()
    assert MixtureOrder(PARTS, 4, True).take(50).tolist() != MixtureOrder(PARTS, 3, True).take(50).tolist()


def test_checkpoints_of_other_data_are_refused() -> None:
    state = MixtureOrder(PARTS, 3, True).state_dict()
    heavier = [PARTS[0], PARTS[1], MixturePart("c", 7, 0.75)]
    shorter = [PARTS[0], PARTS[1], MixturePart("c", 6, 0.5)]
    for other, found in (
        (
            MixtureOrder(heavier, 3, True),
            r"c \(7 prompts, weight 0\.5\).*run.*c \(7 prompts, weight 0\.75\)",
        ),
        (MixtureOrder(shorter, 3, True), r"c \(7 prompts.*this run.*c \(6 prompts"),
        (MixtureOrder(PARTS[:2], 3, True), r"data\.sources and seed"),
        (MixtureOrder(PARTS, 4, True), r"seed=3.*this run.*seed=4"),
        (MixtureOrder(PARTS, 3, False), r"shuffle=True.*this run.*shuffle=False"),
    ):
        with pytest.raises(CheckpointError, match=found):
            other.load_state_dict(state)


def write_rows(path: Path, first_word: int, count: int) -> Path:
    rows = ({"q": f"w{first_word + i}", "id": i, "n": [1, 2, 3], "target": 6} for i in range(count))
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def load(folder: Path, data: dict[str, Any]) -> TrainingData:
    values = {
        "model": {"hf_path": str(folder / "model")},
        "data": {"prompts_per_step": 4, **data},
        "train": {"run_dir": str(folder), "num_steps": 1},
        "rollout": {"max_new_tokens": 4},
    }
    return load_training_data(RLConfig.model_validate(values))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("mixture")
    make_tiny_model(folder / "model", "qwen2")
    write_rows(folder / "easy.jsonl", 10, 6)
    write_rows(folder / "hard.jsonl", 20, 4)
    return folder


FORMAT = {"prompt_field": "q", "fields": {"numbers": "n"}}


def test_sources_of_a_configuration(folder: Path) -> None:
    sources = [
        {"path": str(folder / "easy.jsonl"), **FORMAT},
        {"path": str(folder / "hard.jsonl"), "name": "olympiad", "weight": 3, **FORMAT},
    ]
    prompts = load(folder, {"sources": sources}).prompts
    ids = [prompt.prompt_id for prompt in prompts.take(16)]
    assert Counter(prompt_id.split("/")[0] for prompt_id in ids) == {"easy": 4, "olympiad": 12}
    assert len(set(ids)) == 8  # both files have the ids 0, 1, ...: four of one, all four of the other
    assert prompts.first(1)[0].prompt_id == "easy/0"
    assert prompts.with_ids(["olympiad/3"])[0].text == "w23"
    assert prompts.with_ids(["olympiad/3"])[0].fields["numbers"] == [1, 2, 3]
    with pytest.raises(CheckpointError, match="'3'.*data.sources"):
        prompts.with_ids(["3"])


def test_a_new_process_goes_on_where_the_last_one_stopped(folder: Path) -> None:
    sources = [{"path": str(folder / f"{name}.jsonl"), **FORMAT} for name in ("easy", "hard")]
    whole = [prompt.prompt_id for prompt in load(folder, {"sources": sources}).prompts.take(40)]
    first = load(folder, {"sources": sources}).prompts
    first.take(13)
    second = load(folder, {"sources": sources}).prompts
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert [prompt.prompt_id for prompt in second.take(27)] == whole[13:]


def test_one_path_keeps_its_ids_and_its_state(folder: Path) -> None:
    """Checkpoints of runs with a train_path go on as they did before there were mixtures."""
    prompts = load(folder, {"train_path": str(folder / "easy.jsonl"), **FORMAT}).prompts
    assert sorted(prompt.prompt_id for prompt in prompts.take(6)) == list("012345")
    assert prompts.state_dict() == {"position": 6, "num_rows": 6, "seed": 0, "shuffle": True}
    mixture = load(folder, {"sources": [{"path": str(folder / "easy.jsonl"), **FORMAT}]}).prompts
    with pytest.raises(CheckpointError, match=r"data is one data set \(data\.train_path\); that of this run"):
        mixture.load_state_dict(prompts.state_dict())
    with pytest.raises(CheckpointError, match="the checkpoint's data is a mixture"):
        prompts.load_state_dict(mixture.state_dict())


def test_a_field_that_the_reward_needs_is_looked_for_through_the_mapping(folder: Path) -> None:
    path = str(folder / "easy.jsonl")
    with pytest.raises(DataError, match=r"easy\.jsonl:1: column 'numbers' is missing"):
        load(folder, {"train_path": path, "prompt_field": "q"})
    with pytest.raises(DataError, match=r"easy\.jsonl:1: column 'id' \('numbers'\) is an integer .*a list"):
        load(folder, {"sources": [{"path": path, "prompt_field": "q", "fields": {"numbers": "id"}}]})


def test_too_few_prompts_over_all_sources(folder: Path) -> None:
    sources = [{"path": str(folder / f"{name}.jsonl"), **FORMAT} for name in ("easy", "hard")]
    assert isinstance(load(folder, {"sources": sources, "prompts_per_step": 10}).prompts, PromptLoader)
    with pytest.raises(DataError, match=r"10 usable prompts.*data\.prompts_per_step=11"):
        load(folder, {"sources": sources, "prompts_per_step": 11})
