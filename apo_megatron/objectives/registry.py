"""Which losses there are, and what each needs computed for it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from apo_megatron.config.objective import ObjectiveConfig
from apo_megatron.objectives.interface import BatchStatistics, Need, PolicyLoss
from apo_megatron.objectives.policy_losses.apo import apo_ratio
from apo_megatron.objectives.policy_losses.batch_wide import (
    BAPO_BOUNDS,
    CLIP_COV_TOKENS,
    KL_COV_TOKENS,
    SAMPLE_SIZE,
    bapo,
    clip_cov,
    kl_cov,
    p3o,
)
from apo_megatron.objectives.policy_losses.bounded_ratio import gbpo
from apo_megatron.objectives.policy_losses.clipped import dcpo_clip, gppo, sapo, vanilla
from apo_megatron.objectives.policy_losses.matching import GROUP_DISTANCES, dmpo
from apo_megatron.objectives.policy_losses.sequence_level import ctpo, gspo, vespo
from apo_megatron.objectives.policy_losses.supervised import supervised
from apo_megatron.objectives.policy_losses.top_tokens import simko, topk_forward_kl
from apo_megatron.objectives.policy_losses.weighted import cispo, dispo, dppo_tv


@dataclass(frozen=True)
class PolicyLossSpec:
    """A loss and its declared needs; what is not declared is not computed for it."""

    function: PolicyLoss
    needs: frozenset[Need] = frozenset()
    uses_rollouts: bool = True  # false: demonstrations, so no old policy, no advantages, no reference
    policy_topk: Callable[[ObjectiveConfig], int] | None = None  # K of the need "policy_topk"
    statistics: BatchStatistics | None = None  # of the whole mini-batch: costs a pass without gradients
    whole_groups: bool = False  # all trained samples of a prompt must lie in one mini-batch
    settings: str | None = None  # its section in ObjectiveConfig
    reads: frozenset[str] = frozenset()  # fields of ObjectiveConfig outside its section


_DUAL = frozenset({"dual_clip"})
_CLIP = _DUAL | {"clip_low", "clip_high"}

POLICY_LOSSES: dict[str, PolicyLossSpec] = {
    "apo_ratio": PolicyLossSpec(
        apo_ratio,
        needs=frozenset({"anchor"}),
        settings="apo_variants",
        reads=_CLIP | {"apo_push_coeff", "apo_pull_coeff"},
    ),
    "vanilla": PolicyLossSpec(vanilla, reads=_CLIP),
    "cispo": PolicyLossSpec(cispo, settings="cispo"),
    "dispo": PolicyLossSpec(dispo, settings="dispo"),
    "sapo": PolicyLossSpec(sapo, settings="sapo"),
    "gppo": PolicyLossSpec(gppo, settings="gppo", reads=_CLIP),
    "dcpo_clip": PolicyLossSpec(dcpo_clip, settings="dcpo", reads=_DUAL),
    "dppo_tv": PolicyLossSpec(dppo_tv, settings="dppo"),
    "gspo": PolicyLossSpec(gspo, needs=frozenset({"whole_sequences"}), settings="gspo", reads=_DUAL),
    "ctpo": PolicyLossSpec(ctpo, needs=frozenset({"whole_sequences"}), settings="ctpo"),
    "vespo": PolicyLossSpec(vespo, needs=frozenset({"whole_sequences"}), settings="vespo"),
    "simko": PolicyLossSpec(
        simko,
        needs=frozenset({"policy_topk", "whole_sequences"}),
        policy_topk=lambda cfg: cfg.simko.topk,
        settings="simko",
        reads=_CLIP,
    ),
    "topk_forward_kl": PolicyLossSpec(
        topk_forward_kl,
        needs=frozenset({"reference_topk", "solve_rates"}),
        settings="topk_forward_kl",
        reads=_CLIP,
    ),
    "clip_cov": PolicyLossSpec(clip_cov, statistics=CLIP_COV_TOKENS, settings="clip_cov", reads=_DUAL),
    "kl_cov": PolicyLossSpec(kl_cov, statistics=KL_COV_TOKENS, settings="kl_cov"),
    "bapo": PolicyLossSpec(bapo, statistics=BAPO_BOUNDS, settings="bapo", reads=_DUAL),
    "p3o": PolicyLossSpec(p3o, statistics=SAMPLE_SIZE),
    "dmpo": PolicyLossSpec(dmpo, statistics=GROUP_DISTANCES, whole_groups=True, settings="dmpo", reads=_CLIP),
    "gbpo": PolicyLossSpec(gbpo, needs=frozenset({"target_advantages"}), settings="gbpo"),
    "supervised": PolicyLossSpec(supervised, uses_rollouts=False),
}
