"""Five sequences of tokens with the logits of three policies, as the actor would pass them."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, Literal

import torch
from torch import Tensor

from apo_megatron.config import ObjectiveConfig
from apo_megatron.objectives import LossInputs, LossOutputs, MetricSums, build_objective, sequence_weights

VOCAB = 11
LENGTHS = torch.tensor([4, 0, 3, 6, 5])
ADVANTAGES = torch.tensor([-1.3, 1.0, 0.7, -0.4, 0.0], dtype=torch.float64)
MODES: tuple[Literal["apo_ratio", "vanilla"], ...] = ("apo_ratio", "vanilla")


@dataclasses.dataclass(frozen=True)
class Case:
    """Logits of three policies for the response tokens of five sequences."""

    logits: Tensor  # grad
    old_log_probs: Tensor
    reference: Tensor  # [T, V] log-probs
    targets: Tensor
    sequence_ids: Tensor

    @property
    def advantages(self) -> Tensor:
        return ADVANTAGES[self.sequence_ids]

    def support(self, cfg: ObjectiveConfig) -> Tensor:
        """S as a [T, V] bool."""
        chosen = torch.zeros_like(self.reference, dtype=torch.bool)
        chosen.scatter_(1, self.reference.topk(cfg.apo_topk).indices, True)
        return chosen & ~self.is_target if cfg.apo_exclude_sampled else chosen

    @property
    def is_target(self) -> Tensor:
        return torch.nn.functional.one_hot(self.targets, VOCAB).bool()


def make_case(distance: float = 0.3, seed: int = 0) -> Case:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.repeat_interleave(torch.arange(5), LENGTHS)
    logits = 2 * torch.randn(len(ids), VOCAB, generator=generator, dtype=torch.float64)
    targets = torch.randint(VOCAB, (len(ids),), generator=generator)
    noise = distance * torch.randn(2, *logits.shape, generator=generator, dtype=torch.float64)
    targets[::2] = (logits + noise[1])[::2].argmax(-1)  # every other y is surely inside M
    old = (logits + noise[0]).log_softmax(-1).gather(1, targets[:, None])[:, 0]
    return Case(logits.requires_grad_(), old, (logits.detach() + noise[1]).log_softmax(-1), targets, ids)


def inputs_of(case: Case, cfg: ObjectiveConfig, logits: Tensor | None = None) -> LossInputs:
    """What the actor would pass: logs only, NaN where A >= 0 has no reference."""
    log_probs = (case.logits if logits is None else logits).log_softmax(-1)
    support = case.support(cfg)
    sampled = log_probs.gather(1, case.targets[:, None])[:, 0]
    reference = case.reference.gather(1, case.targets[:, None])[:, 0]
    known = torch.ones_like(case.targets, dtype=torch.bool) if cfg.use_kl_loss else case.advantages < 0
    missing = torch.full_like(reference, math.nan)
    in_top = torch.zeros_like(support).scatter_(1, case.reference.topk(cfg.apo_topk).indices, True)
    return LossInputs(
        log_probs=sampled,
        old_log_probs=case.old_log_probs,
        advantages=case.advantages,
        entropy=-(log_probs.exp() * log_probs).sum(-1),
        sequence_ids=case.sequence_ids,
        anchor_log_mass=log_probs.masked_fill(~support, -math.inf).logsumexp(-1),
        reference_anchor_log_mass=torch.where(
            known, case.reference.masked_fill(~support, -math.inf).logsumexp(-1), missing
        ),
        reference_log_probs=torch.where(known, reference, missing),
        rollout_log_probs=case.old_log_probs + 0.01,
        sampled_in_support=(in_top & case.is_target).any(-1),
    )


SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "inclusive": {"apo_exclude_sampled": False},
    "narrow_clip": {"clip_low": 0.06, "clip_high": 0.01},
    "dual_clip": {"dual_clip": 1.3},
    "kl": {"use_kl_loss": True, "kl_loss_coeff": 0.3, "kl_estimator": "k3"},
    "kl_k1": {"use_kl_loss": True, "kl_loss_coeff": 0.3, "kl_estimator": "k1"},
    "kl_on_wrong": {"use_kl_loss_on_wrong": True, "kl_loss_coeff": 0.3, "kl_estimator": "k2"},
    "entropy": {"entropy_coeff": 0.1},
    "k1_of_topk": {"apo_topk": 1},  # S is empty wherever y is the likeliest token
    "per_sequence": {"loss_aggregation": "seq-mean-token-mean"},
    "constant": {"loss_aggregation": "seq-mean-token-sum-norm", "loss_aggregation_constant": 9},
}


def config(mode: str, setting: str) -> ObjectiveConfig:
    return ObjectiveConfig(**{"loss_mode": mode, "apo_topk": 3, **SETTINGS[setting]})


def token_weights(case: Case, cfg: ObjectiveConfig) -> Tensor:
    return sequence_weights(cfg.loss_aggregation, LENGTHS, cfg.loss_aggregation_constant)[case.sequence_ids]


def select(inputs: LossInputs, rows: Tensor) -> LossInputs:
    values = {f.name: getattr(inputs, f.name) for f in dataclasses.fields(inputs)}
    chosen: dict[str, Any] = {n: v[rows] for n, v in values.items() if isinstance(v, Tensor)}
    return dataclasses.replace(inputs, **chosen)


def metric_values(case: Case, cfg: ObjectiveConfig) -> dict[str, float]:
    sums = MetricSums()
    sums.add(build_objective(cfg)(inputs_of(case, cfg), token_weights(case, cfg))[1])
    return sums.finalize()


def shares(outputs: LossOutputs) -> dict[str, float]:
    """The metrics of a loss, as they are reported."""
    sums = MetricSums()
    sums.add(outputs.metrics)
    return sums.finalize()
