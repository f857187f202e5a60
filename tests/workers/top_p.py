"""The reference's Top-P and the metrics of the policy on it, the vocabulary sharded over the world."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

from apo_megatron.actor.forward_step import TokenTerms
from apo_megatron.config import ObjectiveConfig
from apo_megatron.objectives import MetricSums, build_objective
from apo_megatron.parallel.vocab import VocabShard
from apo_megatron.types import TrainedTokens


def run(payload: dict[str, Any]) -> list[dict[str, Any]]:
    """``results_of`` every objective, with this rank's columns."""
    dist.init_process_group("gloo")
    width, vocab_size = payload["reference"].shape[1], payload["vocab_size"]
    shard = VocabShard.of_rank(dist.get_rank(), dist.get_world_size(), width, vocab_size, dist.group.WORLD)
    found = [results_of(payload, objective, shard) for objective in payload["objectives"]]
    dist.destroy_process_group()
    return found


def results_of(payload: dict[str, Any], objective: dict[str, Any], shard: VocabShard) -> dict[str, Any]:
    """What the reference pass keeps, and the metrics of the loss that gets it."""
    terms, cfg = TokenTerms(shard, payload["temperature"]), ObjectiveConfig.model_validate(objective)
    reference, policy = (
        payload[name][:, shard.start : shard.end].clone() for name in ("reference", "policy")
    )
    targets = payload["targets"]
    tokens = TrainedTokens(
        torch.zeros_like(targets), targets, -torch.ones(len(targets)), torch.ones(len(targets))
    )
    asked = build_objective(cfg)
    kept = terms.reference(
        reference, tokens, asked.support_size, asked.exclude_sampled, support_mass=asked.support_mass
    )
    fields = {
        "reference_support_ids": kept["support_ids"],
        "reference_anchor_log_mass": kept["anchor_log_mass"],
    }
    _, metrics = terms.loss(asked, policy, TrainedTokens(**{**vars(tokens), **fields}))
    sums = MetricSums()
    sums.add(metrics)
    return {**kept, "metrics": sums.finalize()}
