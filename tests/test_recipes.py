"""Recipes of methods: files to build on, without a model and without data."""

from __future__ import annotations

from pathlib import Path

import pytest

from apo_megatron.config import RLConfig, load_config
from apo_megatron.config.base_files import read_with_bases
from apo_megatron.objectives import build_objective

RECIPES = Path(__file__).resolve().parent.parent / "examples" / "recipes"
OWN = """
base: {base}
model: {{hf_path: model}}
data: {{train_path: train.jsonl, prompts_per_step: 8}}
train: {{run_dir: run, num_steps: 2}}
"""


def built_on(name: str, folder: Path) -> RLConfig:
    file = folder / "run.yaml"
    file.write_text(OWN.format(base=RECIPES / f"{name}.yaml"))
    return load_config(RLConfig, file)


@pytest.mark.parametrize("file", sorted(RECIPES.glob("*.yaml")), ids=lambda path: path.stem)
def test_a_recipe_says_how_to_train_and_not_what(file: Path, tmp_path: Path) -> None:
    assert set(read_with_bases(file).values) <= {"objective", "rollout", "reward"}
    text = file.read_text()
    assert "arXiv" in text and f"base: recipes/{file.name}" in text
    cfg = built_on(file.stem, tmp_path)
    assert build_objective(cfg.objective).reference_scope == "none"


def test_dapo_has_its_four_parts(tmp_path: Path) -> None:
    cfg = built_on("dapo", tmp_path)
    assert (cfg.objective.clip_low, cfg.objective.clip_high) == (0.2, 0.28)
    assert cfg.objective.loss_aggregation == "token-mean"
    assert cfg.rollout.drop_zero_spread and not cfg.rollout.mask_truncated
    assert cfg.reward.overlong_buffer == 4096 and cfg.rollout.max_new_tokens == 5 * 4096


def test_dr_grpo_divides_by_no_length_and_no_std(tmp_path: Path) -> None:
    cfg = built_on("dr_grpo", tmp_path)
    assert cfg.objective.advantage_estimator == "dr_grpo"
    assert cfg.objective.loss_aggregation_constant == cfg.rollout.max_new_tokens
