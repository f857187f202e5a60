"""The code of docs/extending.md runs, in the modules that the page puts it into."""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

from apo_megatron.config import EvalConfig, ObjectiveConfig, RewardConfig, load_config
from apo_megatron.config.benchmarks import BenchmarkConfig
from apo_megatron.config.rollout import RolloutConfig
from apo_megatron.evaluation import benchmarks
from apo_megatron.objectives import (
    AdvantageInputs,
    LossInputs,
    Objective,
    advantage_registry,
    advantages,
    registry,
    sample_filters,
)
from apo_megatron.objectives.policy_losses import clipped
from apo_megatron.rewards import registry as rewards
from apo_megatron.rewards import text as reward_module
from apo_megatron.rollout import embedded
from apo_megatron.rollout.engine import RolloutEngine, SampleRequest, SamplingParams
from apo_megatron.types import Completion, Prompt

PAGE = (Path(__file__).resolve().parent.parent / "docs" / "extending.md").read_text()
SAMPLING = SamplingParams(
    num_samples=2, temperature=1.0, top_p=1.0, top_k=0, max_new_tokens=4, stop_token_ids=(), seed=0
)


def block(beginning: str, language: str = "python") -> str:
    """The block of the page that begins so."""
    blocks = re.findall(rf"```{language}\n(.*?)```", PAGE, re.DOTALL)
    (found,) = [text for text in blocks if text.startswith(beginning)]
    return found


def run_in(module: ModuleType, *blocks: str, **names: object) -> dict[str, Any]:
    """Execute blocks with what the module has imported; the names that there are then."""
    namespace: dict[str, Any] = {**vars(module), **names}
    for code in blocks:
        exec(compile(code, "docs/extending.md", "exec"), namespace)
    return namespace


def completion(text: str) -> Completion:
    return Completion(np.array([1], np.int32), np.zeros(1, np.float32), text, "stop", ((0, 1),))


def test_every_block_of_code_is_run_here() -> None:
    beginnings = re.findall(r"```python\n(?:def |class )?(\w+)", PAGE)
    assert beginnings == [
        "unclipped",
        "POLICY_LOSSES",
        "median_advantages",
        "ADVANTAGE_ESTIMATORS",
        "keep_positive",
        "SAMPLE_FILTERS",
        "KeywordReward",
        "_REWARDS",
        "BENCHMARKS",
        "FixedEngine",
    ]


def test_the_loss() -> None:
    losses = dict(registry.POLICY_LOSSES)
    function = run_in(clipped, block("def unclipped"))["unclipped"]
    run_in(registry, block("POLICY_LOSSES["), POLICY_LOSSES=losses, unclipped=function)
    log_probs = torch.tensor([-1.0, -2.0], requires_grad=True)
    inputs = LossInputs(
        log_probs=log_probs,
        old_log_probs=torch.tensor([-1.0, -1.0]),
        advantages=torch.tensor([1.0, -2.0]),
        entropy=torch.zeros(2),
        sequence_ids=torch.zeros(2, dtype=torch.int64),
    )
    objective = Objective(losses["unclipped"], ObjectiveConfig(support_telemetry=False))
    loss, metrics = objective(inputs, torch.full((2,), 0.5))
    ratio = torch.tensor([1.0, math.exp(-1.0)])
    assert loss.item() == pytest.approx((0.5 * torch.tensor([-1.0, 2.0]) * ratio).sum().item())
    assert "entropy" in metrics
    loss.backward()
    torch.testing.assert_close(log_probs.grad, 0.5 * torch.tensor([-1.0, 2.0]) * ratio)


def test_the_advantage_estimator() -> None:
    estimators = dict(advantage_registry.ADVANTAGE_ESTIMATORS)
    function = run_in(advantages, block("def median_advantages"))["median_advantages"]
    run_in(
        advantage_registry,
        block("ADVANTAGE_ESTIMATORS["),
        ADVANTAGE_ESTIMATORS=estimators,
        median_advantages=function,
    )
    rewards = torch.tensor([[0.0, 1.0, 1.0, math.nan], [0.1, 0.1, 0.1, 0.1]])
    inputs = AdvantageInputs(rewards, torch.ones(2, 4, dtype=torch.int64), rewards >= 1)
    found = estimators["median"].function(inputs, ObjectiveConfig())
    assert found.tolist() == [[-1.0, 0.0, 0.0, 0.0], [0.0] * 4]


def test_the_filter() -> None:
    filters = dict(sample_filters.SAMPLE_FILTERS)
    function = run_in(sample_filters, block("def keep_positive"))["keep_positive"]
    run_in(sample_filters, block("SAMPLE_FILTERS["), SAMPLE_FILTERS=filters, keep_positive=function)
    inputs = sample_filters.FilterInputs(torch.tensor([0.5, -1.0, 0.0]), progress=0.0)
    assert filters["positive"](inputs, RolloutConfig()).tolist() == [True, False, False]


def test_the_reward(monkeypatch: pytest.MonkeyPatch) -> None:
    known = dict(rewards._REWARDS)
    kind = run_in(reward_module, block("class KeywordReward"))["KeywordReward"]
    run_in(rewards, block("_REWARDS["), _REWARDS=known, KeywordReward=kind)
    monkeypatch.setattr(rewards, "_REWARDS", known)
    reward = rewards.build_reward(RewardConfig(name="keyword"))
    assert reward.required_fields == {"keyword": str}
    prompt = Prompt("p", "Say it.", np.array([1], np.int32), {"keyword": "yes"})
    assert reward.score(prompt, [completion("oh yes"), completion("no")]) == [1.0, 0.0]


def test_the_benchmark_without_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = block("model:", "yaml")
    row = re.search(r"# (\{.*\})", settings)
    assert row is not None
    monkeypatch.chdir(tmp_path)
    Path("capitals.jsonl").write_text(row[1] + "\n")
    Path("evaluate.yaml").write_text(settings)
    cfg = load_config(EvalConfig, "evaluate.yaml")
    loaded = benchmarks.load_benchmark(cfg.benchmarks[0], tokenizer=None)
    (prompt,) = loaded.prompts
    assert prompt.text == "Capital of Peru?\nPut your final answer within \\boxed{}."
    answers = [completion(r"It is \boxed{Lima}."), completion(r"\boxed{Quito}")]
    assert loaded.reward.score(prompt, answers) == [1.0, 0.0]


def test_the_benchmark_for_everybody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    known = dict(benchmarks.BENCHMARKS)
    run_in(benchmarks, block("BENCHMARKS["), BENCHMARKS=known)
    monkeypatch.setattr(benchmarks, "BENCHMARKS", known)
    copy = tmp_path / "copy.jsonl"
    copy.write_text('{"question": "Capital of Peru?", "answer": "Lima"}\n')
    loaded = benchmarks.load_benchmark(BenchmarkConfig(name="capitals", path=str(copy)), tokenizer=None)
    assert loaded.prompts[0].text.startswith("Capital of Peru?\nPlease reason step by step")
    assert loaded.reward.score(loaded.prompts[0], [completion(r"\boxed{Lima}")]) == [1.0]


class _Weights:
    num_buckets_read = 0

    def buckets(self) -> Iterator[list[tuple[str, torch.Tensor]]]:
        for _ in range(3):
            self.num_buckets_read += 1
            yield [("model.norm.weight", torch.ones(2))]


def test_the_engine() -> None:
    kind = run_in(embedded, block("class FixedEngine"))["FixedEngine"]
    for name, method in inspect.getmembers(RolloutEngine, inspect.isfunction):
        if not name.startswith("_"):
            assert inspect.signature(getattr(kind, name)) == inspect.signature(method) or name == "start"
    engine = kind([5, 6], "five six")
    weights = _Weights()
    assert engine.update_weights(weights, version=3) == {} and weights.num_buckets_read == 3
    prompt = Prompt("p", "?", np.array([1], np.int32))
    generation = engine.start([SampleRequest(prompt, 2), SampleRequest(prompt, 1)], SAMPLING)
    assert generation.wait(1.0) and generation.num_finished() == 2
    assert [len(answers) for answers in generation.results()] == [2, 1]
    assert engine.generate([prompt], SAMPLING)[0][0].policy_version == 3
