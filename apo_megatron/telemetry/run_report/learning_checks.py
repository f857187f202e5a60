"""Checks of what a policy learns: the thresholds stand at the top, the reasons in docs/run-report.md."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from apo_megatron.telemetry.run_report.findings import (
    NOTE,
    PROBLEM,
    Check,
    Finding,
    ends,
    late,
    percent,
    standard_error,
)
from apo_megatron.telemetry.run_report.folders import EVALUATION_PREFIX, RunRecord, ks_on_the_way

PASS_AT_1_RISE = 0.02
PASS_AT_K_FALL, PASS_AT_K_FALL_NOTE = 0.10, 0.05
COVERAGE_FALL = 0.30  # of what it was
ENTROPY_LEFT = 0.20  # of what it was
FEW_STEPS = 20  # fewer show no trend
FLAT_REWARD_STEPS = 100
HIGH_REWARD = 0.9  # beyond it there is little left to learn
MIXED_GROUPS = 0.30
SKIPPED_STEPS = 0.05
CLIPPED_TOKENS = 0.30
TRUNCATED, TRUNCATED_RISE = 0.10, 0.05
UNJUDGED = 0.02
LARGE_GAP, GAP_GROWTH = 0.05, 3.0  # nats; times what it was


@dataclass(frozen=True)
class _Ends:
    """Pass@1 and Pass@K, K the largest there is, as (first, last)."""

    k: int
    ones: tuple[float, float]
    many: tuple[float, float]
    source: str
    noise: float  # a fall of Pass@K that may be chance; infinite where that is not known


def contraction(run: RunRecord) -> Iterator[Finding]:
    """Pass@1 rises while the largest K that both ends have falls: fewer problems can be solved at all."""
    found = _ends_of_run(run) or _ends_on_the_way(run)
    if found is None:
        return
    (first_one, last_one), (first, last) = found.ones, found.many
    fall = first - last
    may_be_chance = np.isfinite(found.noise) and fall <= found.noise
    if last_one - first_one < PASS_AT_1_RISE or fall < PASS_AT_K_FALL_NOTE or may_be_chance:
        return
    is_large = fall >= PASS_AT_K_FALL and np.isfinite(found.noise)
    yield Finding(
        PROBLEM if is_large else NOTE,
        f"Pass@{found.k} fell from {percent(first)} to {percent(last)} while Pass@1 rose from "
        f"{percent(first_one)} to {percent(last_one)} ({found.source}): "
        + ("the space is contracting." if is_large else "some of the space was lost."),
        "A larger objective.apo_pull_coeff, or a lower optimizer.lr, holds more of it."
        if run.setting("objective.loss_mode") == "apo_ratio"
        else "Anchor the policy: objective.loss_mode=apo_ratio pulls wrong answers back to what the "
        "reference finds likely.",
        "docs/objective.md, One token; docs/evaluation.md, Two checkpoints",
    )


def _ends_of_run(run: RunRecord) -> _Ends | None:
    if run.start is None or run.final is None:
        return None
    start, final = run.start.values, run.final.values
    ks = sorted(set(start) & set(final))
    if len(ks) < 2 or ks[0] != 1:
        return None
    k = ks[-1]
    first, last = start[k], final[k]
    noise = (first[0] - first[1]) + (last[2] - last[0])  # above it the intervals are apart
    return _Ends(k, (start[1][0], final[1][0]), (first[0], last[0]), "start and end", noise)


def _ends_on_the_way(run: RunRecord) -> _Ends | None:
    """Of the evaluations between the ends, which have no intervals: noise is two standard errors of a
    difference of two shares of the problems, which is more than that of a paired one."""
    ks = ks_on_the_way([run])
    if len(ks) < 2 or ks[0] != 1:
        return None
    steps, ones = run.values(f"{EVALUATION_PREFIX}1")
    _, many = run.values(f"{EVALUATION_PREFIX}{ks[-1]}")
    if min(len(ones), len(many)) < 2:
        return None
    source = f"evaluations after steps {steps[0]:.0f} and {steps[-1]:.0f}"
    known = run.start or run.final
    share = float(many[0] + many[-1]) / 2
    num_problems = 0 if known is None else known.num_problems
    noise = 2 * np.sqrt(2 * share * (1 - share) / num_problems) if num_problems else np.inf
    return _Ends(ks[-1], (ones[0], ones[-1]), (many[0], many[-1]), source, float(noise))


def coverage(run: RunRecord) -> Iterator[Finding]:
    """The policy leaves what the reference finds likely, while its reward rises."""
    _, values = run.values("support_coverage")
    _, rewards = run.values("reward")
    if min(len(values), len(rewards)) < FEW_STEPS:
        return
    first, last = ends(values)
    first_reward, last_reward = ends(rewards)
    if last < (1 - COVERAGE_FALL) * first and last_reward > first_reward:
        yield Finding(
            PROBLEM,
            f"Coverage of the reference's first choices fell by {100 * (1 - last / first):.0f} % (from "
            f"{first:.3f} to {last:.3f}) while the reward rose: the space is contracting.",
            "Compare Pass@K of start and end (evaluation.data_path). objective.loss_mode=apo_ratio with a "
            "larger objective.apo_pull_coeff, or a lower optimizer.lr, keeps the policy nearer.",
            "docs/objective.md, Metrics",
        )


def entropy(run: RunRecord) -> Iterator[Finding]:
    _, values = run.values("entropy")
    if len(values) < FEW_STEPS or not _is_rl(run):
        return
    first, last = ends(values)
    if last < ENTROPY_LEFT * first:
        yield Finding(
            PROBLEM,
            f"Entropy collapsed: {last:.3f} nats per token, {100 * last / first:.0f} % of the {first:.3f} at "
            "the start. Samples of a group become alike, and then teach nothing.",
            "Raise objective.clip_high or objective.apo_pull_coeff, lower optimizer.lr, or add "
            "objective.entropy_coeff; an earlier checkpoint may be the better one.",
            "docs/objective.md, Regularizers",
        )


def flat_reward(run: RunRecord) -> Iterator[Finding]:
    """No rise beyond two standard errors between the first and the last fifth."""
    steps, values = run.values("reward")
    if len(steps) < FLAT_REWARD_STEPS:
        return
    length = len(values) // 5
    noise = np.hypot(standard_error(values[:length]), standard_error(values[-length:]))
    first, last = ends(values)
    if last - first > 2 * noise or first > HIGH_REWARD:
        return
    yield Finding(
        PROBLEM,
        f"The reward did not rise in {len(steps):,} steps: {first:.3f} in the first fifth, {last:.3f} in the "
        "last.",
        "Look at samples (python -m tools.view_rollouts) for what the reward refuses; then at the share of "
        "groups with mixed rewards, and at optimizer.lr.",
        "docs/inspection.md; docs/rewards.md",
    )


def signal(run: RunRecord) -> Iterator[Finding]:
    """Groups of equal rewards, and steps of nothing else, teach nothing."""
    _, skipped = run.values("skipped_step")
    if len(skipped) and skipped.mean() > SKIPPED_STEPS:
        yield Finding(
            PROBLEM,
            f"{skipped.sum():.0f} of {len(skipped):,} steps had no group to learn from and changed nothing.",
            "Choose problems that are solved sometimes, or set rollout.drop_zero_spread=true with "
            "rollout.oversampling > 1.",
            "docs/rollouts.md, Topologies",
        )
    mixed, reward = late(run, "mixed_group_share"), late(run, "reward")
    if mixed is not None and reward is not None and mixed < MIXED_GROUPS:
        why = "mostly solved" if reward > 0.5 else "mostly not solved"
        yield Finding(
            NOTE,
            f"Only {percent(mixed)} of the groups have mixed rewards in the last fifth ({why}, mean reward "
            f"{reward:.2f}): most samples teach nothing.",
            f"{'Harder' if reward > 0.5 else 'Easier'} problems, a larger rollout.group_size, or "
            "rollout.drop_zero_spread=true.",
            "docs/rollouts.md, Topologies; docs/data.md",
        )


def clipping(run: RunRecord) -> Iterator[Finding]:
    low, high = late(run, "clip_fraction_low"), late(run, "clip_fraction_high")
    clipped = (low or 0.0) + (high or 0.0)
    if clipped > CLIPPED_TOKENS:
        yield Finding(
            PROBLEM,
            f"{percent(clipped)} of the tokens are clipped ({percent(low or 0.0)} below, "
            f"{percent(high or 0.0)} above) and have no gradient.",
            "Lower optimizer.lr or train.num_mini_batches; with apo_ratio, apo_push_coeff and apo_pull_coeff "
            "set where the ratio starts.",
            "docs/objective.md, One token",
        )


def answers(run: RunRecord) -> Iterator[Finding]:
    """Answers that are cut, and answers that the verifier gave up on."""
    _, truncated = run.values("truncation_rate")
    if len(truncated):
        first, last = ends(truncated)
        if last > TRUNCATED and last > first + TRUNCATED_RISE:
            yield Finding(
                PROBLEM,
                f"More and more answers are cut at the length limit: {percent(first)} at first, "
                f"{percent(last)} in the last fifth.",
                "Raise rollout.max_new_tokens where there is room; else rollout.mask_truncated or "
                "reward.overlong_buffer.",
                "docs/objective.md, Answers at the length limit",
            )
        elif last > TRUNCATED:
            yield Finding(
                NOTE,
                f"{percent(last)} of the answers are cut at the length limit.",
                "Raise rollout.max_new_tokens where there is room.",
                "docs/objective.md, Answers at the length limit",
            )
    unjudged = late(run, "unjudged_share")
    if unjudged is not None and unjudged > UNJUDGED:
        yield Finding(
            PROBLEM,
            f"{percent(unjudged)} of the samples could not be judged and are left out.",
            "Raise reward.timeout or reward.num_workers, or mend the reward function.",
            "docs/rewards.md, Workers and deadlines",
        )


def mismatch(run: RunRecord) -> Iterator[Finding]:
    """The engine's log-probs and the trainer's drift apart."""
    _, values = run.values("mismatch/log_prob_gap_mean")
    if not len(values):
        return
    first, last = ends(values)
    is_growing = len(values) >= FEW_STEPS and last > GAP_GROWTH * first and last > LARGE_GAP / 10
    if last <= LARGE_GAP and not is_growing:
        return
    trend = f"grew from {first:.2g} to {last:.2g}" if is_growing else f"is {last:.2g}"
    yield Finding(
        PROBLEM,
        f"The gap between the log-probs of engine and trainer {trend} nats per token: samples are no longer "
        "quite the policy's.",
        "Set objective.mismatch_correction=tis; then look for the cause (dtype, a kernel, stale weights).",
        "docs/objective.md, The engine is not quite the policy",
    )


def evaluation(run: RunRecord) -> Iterator[Finding]:
    if _is_rl(run) and run.config and not run.setting("evaluation.data_path"):
        yield Finding(
            NOTE,
            "Nothing is evaluated: the reward on training prompts alone shows neither overfitting nor "
            "contraction.",
            "Name held-out problems in evaluation.data_path.",
            "docs/evaluation.md",
        )


def _is_rl(run: RunRecord) -> bool:
    return any("reward" in line for line in run.history)


LEARNING_CHECKS: tuple[Check, ...] = (
    contraction,
    coverage,
    entropy,
    flat_reward,
    signal,
    clipping,
    answers,
    mismatch,
    evaluation,
)
