"""Checks of how a run runs: its end, its updates, its time and its memory. Reasons: docs/run-report.md."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from apo_megatron.telemetry.run_report.findings import NOTE, PROBLEM, Check, Finding, ends, percent
from apo_megatron.telemetry.run_report.folders import STEP_SECONDS, RunRecord

SPIKE = 10.0  # times the median gradient norm
SPIKE_SHARE, FEWEST_SPIKES = 0.01, 3
SKIPPED_UPDATES = 0.01
ROLLOUT_SHARE = 0.70  # of a step without its evaluation
SYNC_SHARE = 0.20
MEMORY_GROWTH, MEMORY_GROWTH_GIB = 1.5, 2.0
FEW_STEPS = 20


def how_it_stands(run: RunRecord) -> Iterator[Finding]:
    kind, text = run.status.kind, run.status.text
    capital = text[:1].upper() + text[1:]
    if kind == "hung":
        yield Finding(
            PROBLEM,
            f"{capital}.",
            "The summary below names the rank that is behind; the files beside it have every rank's stack.",
            "hang/summary.txt",
        )
    elif kind == "silent":
        yield Finding(
            PROBLEM,
            f"{capital}.",
            "Look at the end of its log and at the machines; the same command with --resume auto goes on "
            "from the last checkpoint.",
            "docs/checkpoints.md, Stopping a run",
        )
    elif kind in ("failed", "interrupted"):
        yield Finding(
            PROBLEM if kind == "failed" else NOTE,
            f"{capital}.",
            "The same command with --resume auto goes on from the last checkpoint, once the cause is mended.",
            "docs/checkpoints.md, Stopping a run",
        )
    for text in run.unreadable:
        yield Finding(
            PROBLEM, f"{text}.", "What the file should show is missing on this page.", "docs/run-report.md"
        )


def gradient_spikes(run: RunRecord) -> Iterator[Finding]:
    steps, values = run.values("grad_norm")
    if len(values) < FEW_STEPS:
        return
    median = float(np.median(values))
    spikes = steps[values > SPIKE * median]
    if len(spikes) >= max(FEWEST_SPIKES, SPIKE_SHARE * len(values)):
        yield Finding(
            PROBLEM,
            f"The gradient norm was above {SPIKE:.0f} times its median ({median:.3g}) in {len(spikes)} "
            f"steps, first in step {spikes[0]:.0f}, {values.max():.3g} at most.",
            "Lower optimizer.lr or optimizer.clip_grad; look at the samples of such a step "
            f"(python -m tools.view_rollouts {run.folder} --step {spikes[0]:.0f}).",
            "docs/inspection.md",
        )


def skipped_updates(run: RunRecord) -> Iterator[Finding]:
    _, values = run.values("skipped_update")
    total = float(values.sum())
    if not total:
        return
    per_step = run.setting("train.num_mini_batches", 1)
    num_updates = len(values) * (per_step if isinstance(per_step, int) else 1)
    yield Finding(
        PROBLEM if total >= max(FEWEST_SPIKES, SKIPPED_UPDATES * num_updates) else NOTE,
        f"{total:.0f} of {num_updates:,} updates had a loss or gradient that is not finite and were skipped.",
        "One alone is harmless. More of them: lower optimizer.lr, or train in float32 to find out whether "
        "the dtype is the cause.",
        "docs/configuration.md, train.max_skipped_updates",
    )


def time_shares(run: RunRecord) -> Iterator[Finding]:
    _, step_seconds = run.values(STEP_SECONDS)
    total = float(step_seconds.sum())
    if len(step_seconds) < FEW_STEPS or not total:
        return
    rollout = float(run.values("time/rollout")[1].sum()) / total
    if rollout > ROLLOUT_SHARE:
        yield Finding(
            NOTE,
            f"{percent(rollout)} of the time goes into rollouts: the trainer mostly waits.",
            "More SGLang servers, rollout.asynchronous=true with max_staleness=1, or partial_rollouts where "
            "a few answers are far longer than the others.",
            "docs/rollouts.md, Topologies",
        )
    sync = float(run.values("time/weight_sync")[1].sum()) / total
    if sync > SYNC_SHARE:
        yield Finding(
            NOTE,
            f"{percent(sync)} of the time goes into sending weights to the engine.",
            "rollout.sglang.weight_transport=broadcast over a fast network, a larger rollout.bucket_mib, or "
            "more prompts a step (data.prompts_per_step).",
            "docs/rollouts.md, What happens in a step",
        )


def servers(run: RunRecord) -> Iterator[Finding]:
    started = {name: count for name, count in run.num_server_starts.items() if count > 1}
    if started:
        shown = ", ".join(f"{name} {count} times" for name, count in started.items())
        yield Finding(
            NOTE,
            f"Servers were started more than once: {shown}. Once is for each start of the run, the others "
            "are restarts.",
            "The logs in servers/ end with why: mostly memory (--mem-fraction-static in "
            "rollout.sglang.server_args).",
            "docs/rollouts.md, When something fails",
        )
    _, counts = run.values("num_servers")
    if len(counts) and counts.min() < counts.max():
        num_steps = int((counts < counts.max()).sum())
        yield Finding(
            NOTE,
            f"In {num_steps} of {len(counts):,} steps fewer than {counts.max():.0f} servers took the weights "
            f"({counts.min():.0f} at least).",
            "Look at the logs of the servers.",
            "docs/rollouts.md, When something fails",
        )


def memory(run: RunRecord) -> Iterator[Finding]:
    _, values = run.values("memory/host_gib")
    if len(values) < FEW_STEPS:
        return
    first, last = ends(values)
    if last > MEMORY_GROWTH * first and last - first > MEMORY_GROWTH_GIB:
        yield Finding(
            PROBLEM,
            f"Host memory of the largest rank grew from {first:.1f} to {last:.1f} GiB.",
            "It will end at the limit of the machine: resume from a checkpoint now and then, and report it.",
            "docs/run-report.md",
        )


MACHINE_CHECKS: tuple[Check, ...] = (
    how_it_stands,
    gradient_spikes,
    skipped_updates,
    time_shares,
    servers,
    memory,
)
