"""A scripted engine, and the sampler driven by it step after step, for tests/test_sampler.py.

The script stands for timing only: a tick passes with every look at a generation, and every completion that
runs gets one token in it. Real servers are tested elsewhere.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import numpy as np

from apo_megatron.config import ParallelConfig, RLConfig
from apo_megatron.data.prompts import PromptLoader
from apo_megatron.errors import RewardError, RolloutError
from apo_megatron.parallel.state import init_parallel
from apo_megatron.parallel.world import World
from apo_megatron.rollout.engine import Progress, SampleRequest, SamplingParams
from apo_megatron.rollout.sampler import GroupSampler, StepSamples
from apo_megatron.types import Completion, Prompt

GROUP_SIZE = 4
PROMPTS_PER_STEP = 4
NUM_PROMPTS = 400  # no run here comes to their end
MAX_WAITS = 2000


def make_prompts(num_prompts: int = NUM_PROMPTS) -> list[Prompt]:
    return [Prompt(f"p{i}", "", np.array([i], np.int32), {"row": i}) for i in range(num_prompts)]


def make_config(**rollout: Any) -> RLConfig:
    return RLConfig.model_validate(
        {
            "model": {"hf_path": "model"},
            "data": {"train_path": "train.jsonl", "prompts_per_step": PROMPTS_PER_STEP, "shuffle": False},
            "train": {"run_dir": "run", "num_steps": 1000},
            "rollout": {"engine": "sglang", "group_size": GROUP_SIZE, **rollout},
        }
    )


@dataclass
class _Running:
    prompt: Prompt
    length: int  # tokens when it is done
    versions: list[int]  # of each token so far

    def completion(self, policy_version: int) -> Completion:
        done = len(self.versions) == self.length
        found = sorted(set(self.versions))
        return Completion(
            np.array([self.prompt.fields["row"] * 100 + i for i in range(len(self.versions))], np.int32),
            np.zeros(len(self.versions), np.float32),
            self.prompt.prompt_id,
            "stop" if done else "abort",
            tuple((version, self.versions.count(version)) for version in found) or ((policy_version, 0),),
        )


class ScriptedGeneration:
    def __init__(self, engine: ScriptedEngine, running: list[list[_Running]], progress: Progress) -> None:
        self._engine, self.running, self._progress = engine, running, progress
        self.is_stopped = False

    def wait(self, seconds: float) -> bool:
        self._engine.on_wait()
        self._engine.num_waits += 1
        assert self._engine.num_waits < MAX_WAITS, "this never ends"
        for one in (one for of_request in self.running for one in of_request):
            if not self.is_stopped and not self._engine.is_lost and len(one.versions) < one.length:
                lag = self._engine.lag(one.prompt.fields["row"])
                one.versions.append(self._engine.policy_version - lag)
                if len(one.versions) == one.length:
                    self._progress(1, one.length)
        return self.is_stopped or self.num_finished() == len(self.running)

    def num_finished(self) -> int:
        return sum(all(len(r.versions) == r.length for r in of_request) for of_request in self.running)

    def stop(self) -> None:
        self.is_stopped = True

    def results(self) -> list[list[Completion]]:
        assert self.is_stopped or self.num_finished() == len(self.running)
        version = self._engine.policy_version
        return [[one.completion(version) for one in of_request] for of_request in self.running]


def _uneven(row: int, sample: int) -> int:
    return 1 + (row * 5) % 7 + sample % 3


@dataclass
class ScriptedEngine:
    """``lengths(row, sample)`` tokens for a prompt's sample; may be lost, late with its weights, or fail."""

    lengths: Callable[[int, int], int] = _uneven
    on_wait: Callable[[], None] = lambda: None
    on_start: Callable[[], None] = lambda: None
    is_lost: bool = False  # nothing moves until the next update
    lag: Callable[[int], int] = lambda row: 0  # versions that the weights are behind for this prompt
    policy_version: int = 0
    generations: list[ScriptedGeneration] = field(default_factory=list)
    requests: list[SampleRequest] = field(default_factory=list)
    seeds: list[int] = field(default_factory=list)
    num_waits: int = 0

    def start(
        self, requests: Sequence[SampleRequest], sampling: SamplingParams, progress: Progress | None = None
    ) -> ScriptedGeneration:
        self.on_start()
        running = []
        for request in requests:
            row, begun = request.prompt.fields["row"], request.begun
            if begun is None:
                lengths = [self.lengths(row, sample) for sample in range(request.num_samples)]
                running.append([_Running(request.prompt, length, []) for length in lengths])
            else:
                assert request.num_samples == 1 and begun.finish_reason == "abort" and len(begun.token_ids)
                versions = [version for version, count in begun.versions for _ in range(count)]
                length = max(self.lengths(row, 0), len(versions) + 1)
                running.append([_Running(request.prompt, length, versions)])
        assert progress is not None
        self.requests += requests
        self.seeds.append(sampling.seed)
        self.generations.append(ScriptedGeneration(self, running, progress))
        return self.generations[-1]

    def generate(self, *values: Any) -> list[list[Completion]]:
        raise NotImplementedError

    def update_weights(self, source: Any, version: int, probe: Any = None) -> dict[str, float]:
        assert all(g.is_stopped or g.num_finished() == len(g.running) for g in self.generations)
        self.policy_version, self.is_lost = version, False
        return {}

    def recover(self, source: Any) -> bool:
        return not self.is_lost

    def sleep(self) -> None: ...

    def close(self) -> None: ...


class ScriptedReward:
    """Half of the samples are right, or all of them where the prompt's row is not mixed."""

    required_fields: Mapping[str, type] = MappingProxyType({})

    def __init__(self, is_mixed: Callable[[int], bool] = lambda row: True) -> None:
        self._is_mixed = is_mixed

    def score(self, prompt: Prompt, completions: Sequence[Completion]) -> list[float]:
        assert all(c.text == prompt.prompt_id and c.finish_reason == "stop" for c in completions)
        mixed = self._is_mixed(prompt.fields["row"])
        return [float(i % 2 if mixed else 1) for i in range(len(completions))]


STRATEGIES: dict[str, dict[str, Any]] = {
    "plain": {},
    "oversampling": {"oversampling": 1.5},
    "oversampling, surplus kept": {"oversampling": 1.5, "max_staleness": 1},
    "partial": {"oversampling": 1.5, "partial_rollouts": True, "max_staleness": 1},
    "partial, longer": {"oversampling": 2.0, "partial_rollouts": True, "max_staleness": 3},
    "dynamic": {"drop_zero_spread": True, "max_refills": 9},
    "dynamic, oversampling": {"drop_zero_spread": True, "oversampling": 1.5, "max_staleness": 2},
    "asynchronous": {"asynchronous": True, "max_staleness": 1},
    "asynchronous, oversampling": {"asynchronous": True, "oversampling": 2.0, "max_staleness": 1},
    "asynchronous, partial": {"asynchronous": True, "partial_rollouts": True, "max_staleness": 1},
    "everything": {
        "asynchronous": True,
        "partial_rollouts": True,
        "drop_zero_spread": True,
        "oversampling": 1.6,
        "max_staleness": 2,
        "max_refills": 1,
    },
}


def is_mixed(row: int) -> bool:
    return row % 3 != 0


def drive(
    strategy: str,
    parallel: World,
    steps: range,
    state: dict[str, Any] | None = None,
    ticks_of_training: int = 3,
) -> dict[str, Any]:
    """Run the loop with a strategy, check every step, and say what was trained and what is pending."""
    cfg, prompts = make_config(**STRATEGIES[strategy]), make_prompts()
    engine = ScriptedEngine(policy_version=steps.start)
    loader = PromptLoader(prompts, PROMPTS_PER_STEP, seed=0, shuffle=False)
    sampler = GroupSampler(engine, loader, ScriptedReward(is_mixed), cfg, parallel)
    if state is not None:
        loader.load_state_dict(state["data"])
        sampler.load_state_dict(state["sampler"])
    told: list[int] = []
    trained, metrics = [], []
    for step in steps:
        samples = sampler.next_groups(step, None, lambda n, tokens: told.append(n))  # type: ignore[arg-type]
        check_step(samples, engine.policy_version, cfg)
        trained.append([group.prompt.prompt_id for group in samples.groups])
        metrics.append({k: v for k, v in samples.metrics.items() if k != "time/waiting_for_engine"})
        for generation in engine.generations[-1:]:  # servers go on while the ranks train
            for _ in range(ticks_of_training if cfg.rollout.asynchronous else 0):
                generation.wait(0)
        if step % 5 != 3:  # else a step with nothing to learn from: no update
            with sampler.settled():
                engine.update_weights(None, engine.policy_version + 1)
    return {
        "trained": trained,
        "metrics": metrics,
        "state": {"data": loader.state_dict(), "sampler": sampler.state_dict()},
        "seeds": engine.seeds,
        "continued": sum(request.begun is not None for request in engine.requests),
        "cut": sum(
            c.finish_reason == "abort" for g in engine.generations[:-1] for r in g.results() for c in r
        ),
        "told": sum(told),
    }


def check_step(samples: StepSamples, policy_version: int, cfg: RLConfig) -> None:
    assert len(samples.groups) == PROMPTS_PER_STEP
    rows = [group.prompt.fields["row"] for group in samples.groups]
    for row, group in zip(rows, samples.groups, strict=True):
        assert len(group.samples) == GROUP_SIZE
        assert sum(sample.reward or 0.0 for sample in group.samples) in (2, 4)
        for sample in group.samples:
            completion = sample.completion
            tokens = completion.token_ids.tolist()
            assert completion.finish_reason == "stop"
            assert tokens == list(range(row * 100, row * 100 + len(tokens)))
            assert sum(count for _, count in completion.versions) == len(tokens) == len(completion.log_probs)
            versions = [version for version, _ in completion.versions]
            assert policy_version - cfg.rollout.max_staleness <= min(versions)
            assert max(versions) <= policy_version


def check_prompts(trained: Sequence[Sequence[str]], metrics: Sequence[dict[str, float]], state: Any) -> None:
    """Every prompt that was taken was trained on once, dropped once, or is pending once."""
    used = [prompt_id for step in trained for prompt_id in step]
    pending = state["sampler"]["pending"]
    num_dropped = sum(values["rollout/num_groups_zero_spread"] for values in metrics)
    taken = {f"p{i}" for i in range(state["data"]["position"])}
    seen = [*used, *pending]
    assert len(set(seen)) == len(seen) and set(seen) <= taken
    assert len(taken) - len(seen) == num_dropped
    assert all(not is_mixed(int(prompt_id[1:])) for prompt_id in taken - set(seen))


def run_all(payload: dict[str, Any]) -> dict[str, Any]:
    """Every strategy on this world, half of the steps each with a resumed sampler; then what must fail."""
    parallel = init_parallel(ParallelConfig())
    outcome: dict[str, Any] = {}
    for strategy in STRATEGIES:
        first = drive(strategy, parallel, range(0, 8), payload["states"].get(strategy))
        second = drive(strategy, parallel, range(8, 14), first["state"])
        outcome[strategy] = {"first": first, "second": second}
    outcome["errors"] = [_failure(parallel, **case) for case in payload["failures"]]
    return outcome


def _failure(parallel: World, where: str, rank: int) -> str:
    """The error on this rank where ``rank`` fails in the second step."""
    counter = {"calls": 0}

    def fail() -> None:
        counter["calls"] += 1
        if parallel.rank == rank and counter["calls"] > 3:
            raise RewardError("the judge is gone") if where == "score" else RolloutError("the server is gone")

    engine, reward = ScriptedEngine(), ScriptedReward()
    if where == "wait":
        engine.on_wait = fail
    elif where == "start":
        engine.on_start = fail
    else:
        reward.score = lambda prompt, completions: fail() or [1.0] * len(completions)  # type: ignore[method-assign,func-returns-value]
    loader = PromptLoader(make_prompts(), PROMPTS_PER_STEP, seed=0, shuffle=False)
    sampler = GroupSampler(engine, loader, reward, make_config(), parallel)
    try:
        for step in range(10):
            sampler.next_groups(step, None)  # type: ignore[arg-type]
            with sampler.settled():
                engine.update_weights(None, step + 1)
    except (RolloutError, RewardError) as error:
        return f"{type(error).__name__}: {error}"
    return ""
