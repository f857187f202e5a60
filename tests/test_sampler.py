"""How a step's groups come about: every strategy, many steps, on one rank and on three."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from apo_megatron.config import ObjectiveConfig, RewardConfig
from apo_megatron.data.prompts import PromptLoader
from apo_megatron.errors import CheckpointError, RolloutError
from apo_megatron.parallel.world import CPUWorld
from apo_megatron.rollout.draws import Draw
from apo_megatron.rollout.groups import assign_advantages, group_metrics
from apo_megatron.rollout.sampler import GroupSampler
from apo_megatron.types import Completion, Prompt, Sample, SampleGroup
from tests.distributed import run_distributed
from tests.workers.sampler import (
    PROMPTS_PER_STEP,
    STRATEGIES,
    ScriptedEngine,
    ScriptedReward,
    check_prompts,
    check_step,
    drive,
    make_config,
    make_prompts,
)

ALONE = CPUWorld()
SOURCE: Any = object()  # the script has no weights


def make_sampler(
    engine: ScriptedEngine, reward: ScriptedReward | None = None, **rollout: Any
) -> GroupSampler:
    loader = PromptLoader(make_prompts(), PROMPTS_PER_STEP, seed=0, shuffle=False)
    return GroupSampler(engine, loader, reward or ScriptedReward(), make_config(**rollout), ALONE)


def total(metrics: list[dict[str, float]], name: str) -> float:
    return sum(values[f"rollout/{name}"] for values in metrics)


# --- many steps -----------------------------------------------------------------------------------


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_no_prompt_is_lost_or_drawn_twice(strategy: str) -> None:
    run = drive(strategy, ALONE, range(40))
    check_prompts(run["trained"], run["metrics"], run["state"])
    cfg = make_config(**STRATEGIES[strategy]).rollout
    assert (run["cut"] > 0) == (cfg.oversampling > 1 or cfg.partial_rollouts)
    assert (run["continued"] > 0) == cfg.partial_rollouts
    assert (total(run["metrics"], "num_groups_zero_spread") > 0) == cfg.drop_zero_spread
    if not cfg.asynchronous:  # there a skipped update makes what was drawn ahead two versions old
        assert (total(run["metrics"], "num_refills") > 0) == cfg.drop_zero_spread
    else:
        assert total(run["metrics"], "staleness") > 20
    if cfg.partial_rollouts and cfg.oversampling > 1:  # also after steps that were skipped
        assert total(run["metrics"][20:], "num_samples_carried") > 0
    if strategy == "plain":
        assert run["state"]["sampler"] == {"pending": []}
        assert run["trained"][1] == ["p4", "p5", "p6", "p7"]
        assert run["seeds"] == list(range(40))  # as before there were strategies
        assert total(run["metrics"], "num_prompts_drawn") == 160
        assert run["told"] == 160 * 4
    again = drive(strategy, ALONE, range(40))
    assert again == run


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_resumed_run_draws_first_what_was_under_way(strategy: str) -> None:
    first = drive(strategy, ALONE, range(11))
    pending = first["state"]["sampler"]["pending"]
    second = drive(strategy, ALONE, range(11, 30), first["state"])
    trained, metrics = first["trained"] + second["trained"], first["metrics"] + second["metrics"]
    check_prompts(trained, metrics, second["state"])
    later = {prompt_id for step in second["trained"][:4] for prompt_id in step}
    assert all(prompt_id in later for prompt_id in pending if int(prompt_id[1:]) % 3)


def test_ranks_draw_together() -> None:
    """One world of three: the same steps on every rank, resumed from one rank and continued on one."""
    alone = {name: drive(name, ALONE, range(3)) for name in STRATEGIES}
    payload = {
        "states": {},
        "failures": [{"where": where, "rank": rank} for where, rank in FAILURES],
    }
    ranks = run_distributed(3, "tests.workers.sampler:run_all", payload)
    for strategy in STRATEGIES:
        first, second = ranks[0][strategy]["first"], ranks[0][strategy]["second"]
        for other in ranks[1:]:
            for part in ("first", "second"):
                for name in ("trained", "metrics", "state"):
                    assert other[strategy][part][name] == ranks[0][strategy][part][name]
        third = drive(strategy, ALONE, range(14, 30), second["state"])
        runs = (first, second, third)
        trained, metrics = ([x for run in runs for x in run[name]] for name in ("trained", "metrics"))
        check_prompts(trained, metrics, third["state"])
        if strategy == "plain":
            assert first["trained"][:3] == alone[strategy]["trained"]
    for case, (where, rank) in enumerate(FAILURES):
        error = (
            "RewardError: {}the judge is gone" if where == "score" else "RolloutError: {}the server is gone"
        )
        expected = error.format("" if rank == 0 else f"rank {rank}: ")
        assert [found["errors"][case] for found in ranks] == [expected] * 3


FAILURES = [("wait", 0), ("wait", 2), ("start", 1), ("score", 1)]


@pytest.mark.parametrize("partial_rollouts", [False, True])
def test_what_was_stopped_comes_first(partial_rollouts: bool) -> None:
    engine = ScriptedEngine(lengths=lambda row, sample: 9 if row in (0, 1) else 2)
    sampler = make_sampler(engine, oversampling=1.5, max_staleness=1, partial_rollouts=partial_rollouts)
    first = sampler.next_groups(0, SOURCE)
    assert [group.prompt.prompt_id for group in first.groups] == ["p2", "p3", "p4", "p5"]
    assert sampler.state_dict() == {"pending": ["p0", "p1"]}
    num_requests = len(engine.requests)
    with sampler.settled():
        engine.update_weights(None, 1)
    sampler.next_groups(1, SOURCE)
    asked = dict.fromkeys(request.prompt.prompt_id for request in engine.requests[num_requests:])
    assert list(asked) == ["p0", "p1", "p6", "p7", "p8", "p9"]


def test_what_was_stopped_before_its_first_token_is_still_one_request() -> None:
    draw = Draw(0, make_prompts(1)[0], owner=0, num_samples=4)
    tokens, nothing = np.array([7], np.int32), np.empty(0, np.int32)

    def stopped(token_ids: np.ndarray) -> Completion:
        log_probs = np.zeros(len(token_ids), np.float32)
        return Completion(token_ids, log_probs, "", "abort", ((3, len(token_ids)),))

    draw.replace_begun([stopped(tokens), stopped(nothing), stopped(tokens), stopped(nothing)])
    requests = draw.requests()
    assert [(r.num_samples, r.begun is None, r.first) for r in requests] == [
        (2, True, 0),
        (1, False, 2),
        (1, False, 3),
    ]


# --- versions -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("lag", "max_staleness", "expected"),
    [(1, 0, "[2], expected 3"), (-1, 0, "[4], expected 3"), (2, 1, "[1], expected 2 to 3")],
)
def test_samples_of_other_weights_are_refused(lag: int, max_staleness: int, expected: str) -> None:
    engine = ScriptedEngine(policy_version=3, lag=lambda row: lag)
    sampler = make_sampler(engine, max_staleness=max_staleness)
    with pytest.raises(RolloutError) as caught:
        sampler.next_groups(3, SOURCE)
    assert f"prompt 'p0': completions of policy versions {expected}" in str(caught.value)


def test_samples_that_are_too_old_are_drawn_again_where_weights_change_meanwhile() -> None:
    engine = ScriptedEngine(policy_version=5)
    engine.lag = lambda row: 2 if row == 1 and len(engine.generations) == 1 else 0
    sampler = make_sampler(engine, asynchronous=True, max_staleness=1)
    samples = sampler.next_groups(5, SOURCE)
    assert samples.metrics["rollout/num_samples_stale"] == 4
    assert samples.metrics["rollout/max_staleness"] == 0
    assert [group.prompt.prompt_id for group in samples.groups] == ["p0", "p2", "p3", "p1"]
    check_step(samples, 5, make_config())


def test_an_engine_that_stays_behind_ends_the_run() -> None:
    engine = ScriptedEngine(policy_version=5, lag=lambda row: 2)
    sampler = make_sampler(engine, asynchronous=True, max_staleness=1)
    with pytest.raises(RolloutError, match="not one of 4 groups.*16 samples were drawn with weights older"):
        sampler.next_groups(5, SOURCE)


# --- engines that get lost ------------------------------------------------------------------------


def test_engines_get_the_weights_while_the_ranks_wait() -> None:
    engine = ScriptedEngine(is_lost=True)

    def come_back(source: Any) -> bool:
        assert source is SOURCE
        engine.is_lost = False
        return True

    engine.recover = come_back  # type: ignore[method-assign]
    assert len(make_sampler(engine).next_groups(0, SOURCE).groups) == PROMPTS_PER_STEP


@pytest.mark.parametrize("partial_rollouts", [False, True])
def test_an_engine_lost_while_the_trainer_has_gone_on_is_not_waited_for(partial_rollouts: bool) -> None:
    """Its weights are gone for good: what it was drawing is drawn with the next ones."""
    engine = ScriptedEngine()
    sampler = make_sampler(engine, asynchronous=True, max_staleness=1, partial_rollouts=partial_rollouts)
    sampler.next_groups(0, SOURCE)
    engine.is_lost = True
    with sampler.settled():
        engine.update_weights(None, 1)
    samples = sampler.next_groups(1, SOURCE)
    assert [group.prompt.prompt_id for group in samples.groups] == ["p4", "p5", "p6", "p7"]
    assert samples.metrics["rollout/num_groups_unfinished"] == (0 if partial_rollouts else 4)
    assert samples.metrics["rollout/max_staleness"] == 0


def test_samples_that_the_engine_cuts_off_never_reach_training() -> None:
    engine = ScriptedEngine(lengths=lambda row, sample: 1 + 4 * (row % 2))

    def cut() -> None:
        generation = engine.generations[0]
        generation.is_stopped = generation.num_finished() > 0

    engine.on_wait = cut
    samples = make_sampler(engine).next_groups(0, SOURCE)
    assert [group.prompt.prompt_id for group in samples.groups] == ["p0", "p2", "p1", "p3"]
    check_step(samples, 0, make_config())
    engine = ScriptedEngine()
    engine.on_wait = lambda: engine.generations[0].stop()
    with pytest.raises(RolloutError, match="not one of 4 groups.*0 samples.*cut off by the engine"):
        make_sampler(engine).next_groups(0, SOURCE)


# --- dynamic sampling -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("is_mixed", "num_refilled"),
    [("1100", 4), ("0111", 2), ("0100", 4), ("0000", 4)],  # missing / rate, at most a step's prompts
)
def test_refills_follow_the_measured_rate(is_mixed: str, num_refilled: int) -> None:
    engine = ScriptedEngine()
    reward = ScriptedReward(lambda row: row >= len(is_mixed) or is_mixed[row] == "1")
    sampler = make_sampler(engine, reward, drop_zero_spread=True)
    samples = sampler.next_groups(0, SOURCE)
    assert [len(generation.running) for generation in engine.generations] == [4, num_refilled]
    mixed = [f"p{row}" for row in range(8) if row > 3 or is_mixed[row] == "1"]
    assert [group.prompt.prompt_id for group in samples.groups] == mixed[:4]
    assert len(set(engine.seeds)) == 2


def test_a_step_is_filled_up_where_refills_find_nothing() -> None:
    engine = ScriptedEngine()
    sampler = make_sampler(engine, ScriptedReward(lambda row: row == 5), drop_zero_spread=True, max_refills=2)
    samples = sampler.next_groups(0, SOURCE)
    assert [group.prompt.prompt_id for group in samples.groups] == ["p0", "p1", "p2", "p5"]
    assert samples.metrics["rollout/num_refills"] == 2
    assert samples.metrics["rollout/num_groups_filled_up"] == 3
    assert samples.metrics["rollout/num_groups_zero_spread"] == 8
    assert samples.note is not None and "3 of 4 groups" in samples.note
    assert [prompt.prompt_id for prompt, _ in samples.dropped] == [f"p{row}" for row in (3, 4, *range(6, 12))]
    assert all(len(columns.texts) == len(columns.rewards) > 0 for _, columns in samples.dropped)
    assert sampler.next_groups(1, SOURCE).note is None  # said once


# --- state ----------------------------------------------------------------------------------------


def test_a_prompt_that_the_data_lacks_is_refused() -> None:
    with pytest.raises(CheckpointError, match="'p999'.*data.train_path"):
        make_sampler(ScriptedEngine()).load_state_dict({"pending": ["p1", "p999"]})


def test_what_is_drawn_ahead_counts_for_the_step_that_trains_on_it() -> None:
    engine = ScriptedEngine()
    sampler = make_sampler(engine, asynchronous=True, max_staleness=1)
    sampler.next_groups(0, SOURCE)
    while not engine.generations[-1].wait(0):
        pass
    with sampler.settled():
        engine.update_weights(None, 1)
    told: list[tuple[int, int]] = []
    sampler.next_groups(1, SOURCE, lambda n, tokens: told.append((n, tokens)))
    assert told[0][0] == 16 and told[0][1] > 16


# --- groups ---------------------------------------------------------------------------------------


def test_overlong_answers_lose_a_part_of_their_reward_only_in_advantages() -> None:
    def group(lengths: list[int], rewards: list[float]) -> SampleGroup:
        samples = [
            Sample(Completion(np.zeros(n, np.int32), np.zeros(n, np.float32), "", "stop", ((0, n),)), reward)
            for n, reward in zip(lengths, rewards, strict=True)
        ]
        return SampleGroup(Prompt("p", "", np.zeros(1, np.int32)), samples)

    groups = [group([2, 10, 8], [1, 1, 0]), group([1, 1, 10], [0, 1, math.nan])]
    cfg = make_config(max_new_tokens=10)
    shaping = RewardConfig(overlong_buffer=4, overlong_penalty=0.5)
    objective = ObjectiveConfig(advantage_estimator="dr_grpo")
    shaped = cfg.model_copy(update={"reward": shaping, "objective": objective})
    assign_advantages(groups, shaped)
    # Shaped: 1, 0.5, -0.25 and 0, 1.
    found = [[sample.advantage for sample in group.samples] for group in groups]
    assert found[0] == pytest.approx([1 - 1.25 / 3, 0.5 - 1.25 / 3, -0.25 - 1.25 / 3])
    assert found[1] == [-0.5, 0.5, None]
    metrics = group_metrics(groups, shaped)
    assert metrics["reward"] == pytest.approx(3 / 5)
    assert metrics["shaped_reward"] == pytest.approx(2.25 / 5)
    assert "shaped_reward" not in group_metrics(groups, cfg)
