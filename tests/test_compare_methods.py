"""The methods that compare.py knows: equal budgets, problems that stay apart, two real steps of each."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from types import ModuleType
from typing import get_args

import pytest

from apo_megatron.config import RLConfig, load_config
from apo_megatron.config.advantages import AdvantageEstimatorName
from apo_megatron.config.policy_losses import PolicyLossName
from tests.countdown_base import COUNTDOWN
from tests.pretended_commands import FakeExecutor, settings_of


@pytest.fixture(scope="module")
def compare(example_module: Callable[[str], ModuleType]) -> ModuleType:
    return example_module("compare")


def test_every_loss_and_every_estimator_is_compared(compare: ModuleType) -> None:
    objectives = [load(method.settings).objective for method in compare.METHODS.values()]
    losses = {objective.loss_mode for objective in objectives}
    assert losses == set(get_args(PolicyLossName)), "examples/countdown/methods.py lists every loss"
    estimators = {objective.advantage_estimator for objective in objectives}
    assert estimators == set(get_args(AdvantageEstimatorName)), "examples/countdown/methods.py lists each"
    baselines = {"grpo", "grpo_kl", "kl_on_wrong", "dr_grpo", "dapo", "apo"}
    assert baselines <= compare.METHODS.keys()
    labels = [method.label for method in compare.METHODS.values()]
    assert len(set(labels)) == len(labels)


def test_every_method_has_the_same_number_of_trials_around_its_own_setting(compare: ModuleType) -> None:
    for name, method in compare.METHODS.items():
        tried = compare.trials(method)
        configs = [load((*method.settings, *trial.words(method))) for trial in tried]
        assert len({json.dumps(config.model_dump(mode="json"), sort_keys=True) for config in configs}) == 6
        assert len({trial.name(method) for trial in tried}) == 6, name
        assert load(method.settings) in configs, name  # as configured is among them
        if method.tuned is not None:
            rates = [trial.learning_rate for trial in tried]
            assert sorted(rates) == [1e-4] * 3 + [2e-4] * 3, name
            assert len({trial.coefficient for trial in tried} - {None}) == 3, name


def test_who_follows_the_sign_of_the_ratio_has_exact_old_log_probs(compare: ModuleType) -> None:
    of_method = {name: load(method.settings) for name, method in compare.METHODS.items()}
    exact = {name for name, config in of_method.items() if config.objective.old_log_probs == "recompute"}
    assert exact == {"gbpo", "kl_cov"}


def load(settings: Sequence[str]) -> RLConfig:
    return load_config(RLConfig, COUNTDOWN / "compare.yaml", list(settings))


# --- all of them, for two steps ---------------------------------------------------------------------


@pytest.fixture(scope="module")
def quick(compare: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A real run of every method, and of one that its rules refuse."""
    from methods import LOSS, Method

    out = tmp_path_factory.mktemp("compare")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(compare.METHODS, "broken", Method("Broken", LOSS, ("optimizer.lr=-1",)))
        patch.setattr(compare.signal, "signal", lambda *_: None)
        assert compare.main(["--quick", "--seeds", "0", "--jobs", "1", "--out", str(out)]) == 0
        yield out


def test_every_method_runs_and_one_that_fails_stops_no_other(compare: ModuleType, quick: Path) -> None:
    results = json.loads((quick / "results.json").read_text())
    assert results["methods"].keys() == compare.METHODS.keys()
    for name, found in results["methods"].items():
        if name == "broken":
            continue
        assert found["failed"] is None, f"{name}: {found['failed']}"
        assert found["pass_at_k"].keys() == {"1", "2", "4", "8", "16"}
        run = found["seeds"]["0"]
        assert len(run["num_correct"]) == 8 and run["seconds"] > 0
        assert len(run["curves"]["reward"]) == 2, name
        # So few right answers are above no quantile: every bundle is like the others to RiskPO.
        assert name == "riskpo" or max(run["curves"]["grad_norm"]) > 0, name
    broken = results["methods"]["broken"]
    assert broken["failed"].startswith("seed 0: ") and "optimizer.lr" in broken["failed"]
    table = (quick / "table.md").read_text()
    assert "| Broken | **failed** |" in table and "Broken failed: seed 0: " in table
    assert all(f"| {method.label} |" in table for method in compare.METHODS.values())
    assert (quick / "frontier.png").stat().st_size > 30_000
    left = {path.name for path in (quick / "seed0" / "grpo").iterdir()}
    assert {"metrics.jsonl", "evaluation_final.json"} <= left
    assert left.isdisjoint({"report.html", "training_curves.png", "hf", "tensorboard"})


def test_a_run_can_be_repeated_alone(quick: Path) -> None:
    first = (quick / "seed0" / "apo.log").read_text().splitlines()[0]
    assert (
        first.startswith("$ ") and " -m apo_megatron.train --config examples/countdown/compare.yaml " in first
    )


def test_only_what_failed_is_tried_again(
    compare: ModuleType, quick: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = FakeExecutor(lambda settings: [1] * 8)
    monkeypatch.setattr(compare, "make_executor", lambda num_slots: nullcontext(fake))
    assert compare.main(["--quick", "--seeds", "0", "--jobs", "1", "--out", str(quick)]) == 0
    assert [Path(settings_of(c)["train.run_dir"]).name for c in fake.commands] == ["broken"]


# --- the problems ------------------------------------------------------------------------------------


def test_validation_and_test_problems_are_apart_from_all_others(compare: ModuleType, tmp_path: Path) -> None:
    from prepare import prepare

    sizes = {"num_demonstrations": 2000, "num_train": 2000, "num_heldout": 400}
    prepare(tmp_path, 0, 2, **sizes, num_validation=400, num_test=400)
    known: dict[tuple[int, ...], str] = {}
    for name in ("train", "heldout", "validation", "test"):
        rows = [json.loads(line) for line in (tmp_path / f"{name}.jsonl").read_text().splitlines()]
        assert len(rows) >= 400
        for row in rows:
            key = (*sorted(row["numbers"]), row["target"])
            assert known.setdefault(key, name) == name
    assert sum(name != "train" for name in known.values()) == 1200
