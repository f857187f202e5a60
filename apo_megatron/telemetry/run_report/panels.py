"""The curves of the report: what each shows, in words that a reader knows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from apo_megatron.telemetry.run_report.folders import (
    EVALUATION_PREFIX,
    STEP_SECONDS,
    TOKENS_PER_SECOND,
    RunRecord,
    ks_on_the_way,
)


@dataclass(frozen=True)
class Panel:
    """One metric against steps."""

    group: str
    key: str
    title: str
    note: str
    unit: str = ""  # "%": values are shares in [0, 1]
    points: bool = False  # few values (evaluations): markers, no smoothing


LEARNING, SPACE, STABILITY, ANSWERS, SPEED = "Learning", "The space", "Stability", "Answers", "Speed"

PANELS = (
    Panel(LEARNING, "reward", "Reward", "mean over the samples of a step, training prompts"),
    Panel(LEARNING, "shaped_reward", "Shaped reward", "with the punishment of overlong answers"),
    Panel(LEARNING, "mixed_group_share", "Groups with mixed rewards", "only they teach something", "%"),
    Panel(LEARNING, "loss", "Loss", "exact weighted loss of the mini-batches"),
    Panel(SPACE, "entropy", "Entropy", "nats per trained token"),
    Panel(SPACE, "support_coverage", "Coverage", "policy's mass of the reference's first choices, A < 0"),
    Panel(SPACE, "anchor_mass", "Anchor mass", "policy's mass of the anchor support, A < 0"),
    Panel(
        SPACE,
        "anchor_ratio_p50",
        "Anchor ratio, median",
        "policy over reference, on the anchor support, A < 0",
    ),
    Panel(
        SPACE, "kl_old_to_reference", "KL to the reference", "k3 in nats, policy that drew the samples, A < 0"
    ),
    Panel(SPACE, "kl_reference", "KL to the reference, all tokens", "k3 in nats"),
    Panel(SPACE, "pull_fraction", "Where the pull acted", "share of the tokens with A < 0", "%"),
    Panel(STABILITY, "grad_norm", "Gradient norm", "before clipping, mean over the updates of a step"),
    Panel(STABILITY, "clip_fraction_low", "Clipped below", "share of all trained tokens", "%"),
    Panel(STABILITY, "clip_fraction_high", "Clipped above", "share of all trained tokens", "%"),
    Panel(STABILITY, "rectified_clip_fraction", "Clipped, A < 0", "share of the tokens with A < 0", "%"),
    Panel(STABILITY, "bound_fraction_low", "Held at the lower bound", "share of all trained tokens", "%"),
    Panel(STABILITY, "bound_fraction_high", "Held at the upper bound", "share of all trained tokens", "%"),
    Panel(STABILITY, "soft_gate", "Opening of the soft gate", "mean over the trained tokens; 1 is open"),
    Panel(STABILITY, "sequence_weight", "Weight of answers", "mean over the trained tokens; 1 at r = 1"),
    Panel(STABILITY, "off_policy_masked_share", "Off-policy mask", "share of all trained tokens", "%"),
    Panel(STABILITY, "ess", "Effective sample size", "share of the mini-batch's tokens; 1: all ratios equal"),
    Panel(STABILITY, "bapo_low", "BAPO's lower bound", "of the ratio, mean over the updates of a step"),
    Panel(STABILITY, "bapo_high", "BAPO's upper bound", "of the ratio, mean over the updates of a step"),
    Panel(STABILITY, "covariance_share", "Held for covariance", "share of all trained tokens", "%"),
    Panel(STABILITY, "uncertain_fraction", "Uncertain tokens", "share of all trained tokens", "%"),
    Panel(STABILITY, "dmpo_distance", "Distance to the rewards", "of a prompt's answers, mean over prompts"),
    Panel(STABILITY, "target_distance", "Distance to the target", "of the ratio, mean over trained tokens"),
    Panel(STABILITY, "topk_forward_kl", "KL on the reference's Top-K", "nats per trained token"),
    Panel(STABILITY, "apo/push_coeff", "Push", "APO's lambda, where it moves"),
    Panel(STABILITY, "apo/pull_coeff", "Pull", "APO's beta, where it moves"),
    Panel(STABILITY, "kl_old", "KL within a step", "from the policy that drew the samples, nats"),
    Panel(
        STABILITY,
        "mismatch/log_prob_gap_mean",
        "Engine against trainer",
        "mean gap of log-probs, nats per token",
    ),
    Panel(
        STABILITY, "mismatch/corrected_share", "Corrected for mismatch", "share of tokens cut or masked", "%"
    ),
    Panel(STABILITY, "learning_rate", "Learning rate", "mean over the updates of a step"),
    Panel(STABILITY, "skipped_update", "Skipped updates", "not finite; a step"),
    Panel(STABILITY, "skipped_step", "Steps without signal", "every group all right or all wrong"),
    Panel(ANSWERS, "response_length", "Response length", "tokens, mean of a step"),
    Panel(ANSWERS, "truncation_rate", "Answers cut off", "share of samples at the length limit", "%"),
    Panel(ANSWERS, "unjudged_share", "Not judged", "share of samples that the verifier gave up on", "%"),
    Panel(SPEED, STEP_SECONDS, "Seconds per step", "without evaluations", "s"),
    Panel(SPEED, TOKENS_PER_SECOND, "Tokens per second", "tokens of responses, whole step"),
    Panel(SPEED, "time/weight_sync", "Weight sync", "seconds of a step", "s"),
    Panel(SPEED, "time/waiting_for_engine", "Waiting for the engine", "seconds of a step, main rank", "s"),
    Panel(SPEED, "memory/gpu_peak_gib", "GPU memory", "peak of a step, largest rank, GiB"),
    Panel(SPEED, "memory/host_gib", "Host memory", "resident, largest rank, GiB"),
    Panel(SPEED, "rollout/staleness", "Staleness", "versions behind the policy, mean over tokens"),
    Panel(SPEED, "rollout/num_refills", "Further rounds of drawing", "a step"),
    Panel(SPEED, "num_servers", "Servers", "that took the weights"),
)


def panels_of(runs: Sequence[RunRecord]) -> list[Panel]:
    """Those of which some run has values; first reward and the evaluations between the ends."""
    keys = {key for run in runs for line in run.history for key in line}
    ks = ks_on_the_way(runs)
    evaluations = [
        Panel(
            LEARNING,
            f"{EVALUATION_PREFIX}{k}",
            f"Pass@{k}, held out",
            "evaluations on the way",
            "%",
            points=True,
        )
        for k in dict.fromkeys([*ks[:1], *ks[-1:]])
    ]
    first, *others = PANELS
    return [panel for panel in (first, *evaluations, *others) if panel.key in keys]
