"""An independent single-process step: transformers logits, textbook formulas, autograd, torch AdamW.

Nothing of apo_megatron is used here; the formulas are written again from the definitions.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM
from transformers.core_model_loading import revert_weight_conversion

from tests.plain_batch_losses import PLAIN_BATCH_LOSSES
from tests.plain_batch_losses import Answer as BatchAnswer
from tests.plain_bounded_ratio import plain_gbpo
from tests.plain_losses import PLAIN_LOSSES, plain_loss
from tests.plain_sequence_losses import PLAIN_SEQUENCE_LOSSES, plain_sequence_loss, plain_weights
from tests.plain_top_tokens import TOP_TOKEN_LOSSES, Answer


def run_plain(
    model_path: str,
    sequences: list[dict[str, Any]],
    objective: dict[str, Any],
    optimizer: dict[str, Any],
    num_mini_batches: int,
    seed: int,
) -> dict[str, Any]:
    """One RL step of ``num_mini_batches`` updates; losses, gradient norms and final parameters.

    The parameters are named as in the checkpoint, experts one by one.
    """
    model = AutoModelForCausalLM.from_pretrained(
        model_path, dtype=torch.float32, attn_implementation="eager", experts_implementation="eager"
    )
    # transformers gives the embedding of pad_token_id no gradient; as a real token it must have one.
    model.get_input_embeddings().padding_idx = None
    with torch.no_grad():
        reference = [_token_log_probs(model, s) for s in sequences]
    old = [log_probs.gather(-1, targets[:, None])[:, 0] for log_probs, targets in reference]
    if objective.get("old_log_probs") == "rollout":
        old = [torch.tensor(s["rollout"]) for s in sequences]
    decayed = [p for p in model.parameters() if p.ndim > 1]
    not_decayed = [p for p in model.parameters() if p.ndim == 1]
    adam = torch.optim.AdamW(
        [
            {"params": decayed, "weight_decay": optimizer["weight_decay"]},
            {"params": not_decayed, "weight_decay": 0.0},
        ],
        lr=optimizer["lr"],
        betas=(0.9, 0.95),
        eps=optimizer["adam_eps"],
    )
    rng = np.random.default_rng([seed, 0])
    parts = _mini_batches(rng, sequences, objective, num_mini_batches)
    draw_seeds = rng.integers(2**63, size=len(sequences)).tolist()
    losses, norms = [], []
    for part in parts:
        added: torch.Tensor | float = 0.0
        if objective["loss_mode"] in PLAIN_BATCH_LOSSES:
            answers = [_answer(model, sequences[i], old[i], draw_seeds[i]) for i in part]
            found, added = PLAIN_BATCH_LOSSES[objective["loss_mode"]](answers, objective)
            terms = [torch.stack(losses_of_answer) for losses_of_answer in found]
        else:
            terms = [_sequence_loss(model, sequences[i], old[i], reference[i][0], objective) for i in part]
        if objective["loss_aggregation"] == "token-mean":
            loss = torch.cat(terms).mean()
        elif objective["loss_aggregation"] == "seq-mean-token-mean":
            loss = torch.stack([t.mean() for t in terms]).mean()
        else:
            loss = torch.stack([t.sum() / objective["loss_aggregation_constant"] for t in terms]).mean()
        loss = loss + added
        adam.zero_grad()
        loss.backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), optimizer["clip_grad"])))
        losses.append(float(loss.detach()))
        adam.step()
    return {
        "losses": losses,
        "grad_norms": norms,
        "parameters": revert_weight_conversion(model, _weights(model)),
    }


def _weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Parameters, tied ones once, and what else a checkpoint holds."""
    saved = model.state_dict().keys()
    buffers = {name: buffer for name, buffer in model.named_buffers() if name in saved}
    return {name: p.detach() for name, p in model.named_parameters()} | buffers


def _mini_batches(
    rng: np.random.Generator, sequences: list[dict[str, Any]], objective: dict[str, Any], count: int
) -> list[list[int]]:
    """Sequences in random order; with DMPO groups, each whole."""
    if objective["loss_mode"] != "dmpo":
        return [part.tolist() for part in np.array_split(rng.permutation(len(sequences)), count)]
    groups = list(dict.fromkeys(s["group"] for s in sequences))
    cut = np.array_split(rng.permutation(len(groups)), count)
    return [
        [i for number in part for i, s in enumerate(sequences) if s["group"] == groups[number]]
        for part in cut
    ]


def _answer(
    model: torch.nn.Module, sequence: dict[str, Any], old: torch.Tensor, draw_seed: int
) -> BatchAnswer:
    all_log_probs, targets = _token_log_probs(model, sequence)
    log_probs = all_log_probs.gather(-1, targets[:, None])[:, 0]
    return BatchAnswer(log_probs, old, sequence["advantage"], sequence["group"], draw_seed)


def _token_log_probs(model: torch.nn.Module, sequence: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
    tokens = torch.tensor(sequence["tokens"])
    logits = model(tokens[None]).logits[0]
    start = sequence["prompt_length"]
    return torch.log_softmax(logits[start - 1 : -1], dim=-1), tokens[start:]


@dataclass(frozen=True)
class _Tokens:
    """The trained tokens of one sequence, under three policies."""

    all_log_probs: torch.Tensor  # [T, V], grad
    old: torch.Tensor  # [T]
    reference: torch.Tensor  # [T, V]; also the old policy, as the step begins at the reference
    targets: torch.Tensor  # [T]
    sequence: dict[str, Any]

    @property
    def log_probs(self) -> torch.Tensor:
        return self.all_log_probs.gather(-1, self.targets[:, None])[:, 0]

    def filled(self, field: str) -> torch.Tensor:
        return torch.full_like(self.old, self.sequence[field])


def _sequence_loss(
    model: torch.nn.Module,
    sequence: dict[str, Any],
    old: torch.Tensor,
    reference: torch.Tensor,
    objective: dict[str, Any],
) -> torch.Tensor:
    all_log_probs, targets = _token_log_probs(model, sequence)
    tokens = _Tokens(all_log_probs, old, reference, targets, sequence)
    advantage, log_probs = sequence["advantage"], tokens.log_probs
    loss = _LOSSES[objective["loss_mode"]](tokens, objective)
    if "rollout" in sequence:
        weights = plain_weights(log_probs.tolist(), old.tolist(), sequence["rollout"], advantage, objective)
        loss = loss * torch.tensor(weights)
    on_all, on_wrong = objective.get("use_kl_loss", False), objective.get("use_kl_loss_on_wrong", False)
    if on_all or (on_wrong and advantage < 0):
        difference = reference.gather(-1, targets[:, None])[:, 0] - log_probs
        loss = loss + objective["kl_loss_coeff"] * (torch.exp(difference) - difference - 1)
    return loss


def _vanilla(tokens: _Tokens, objective: dict[str, Any]) -> torch.Tensor:
    return _clipped(torch.exp(tokens.log_probs - tokens.old), tokens.sequence["advantage"], objective)


def _apo_ratio(tokens: _Tokens, objective: dict[str, Any]) -> torch.Tensor:
    if tokens.sequence["advantage"] >= 0:
        return _vanilla(tokens, objective)
    top = tokens.reference.topk(objective["apo_topk"], dim=-1).indices
    keep = top != tokens.targets[:, None]  # exclusive anchoring
    top_probs, variants = tokens.reference.exp().gather(-1, top), objective.get("apo_variants", {})
    if "support_mass" in variants:
        keep &= top_probs.cumsum(-1) - top_probs < variants["support_mass"]
    reference_mass = (top_probs * keep).sum(-1) + ~keep.any(-1)  # nothing is kept: 0 / 1
    anchor = (tokens.all_log_probs.exp().gather(-1, top) * keep).sum(-1) / reference_mass
    anchor = anchor.detach() if variants.get("detach_pull") else anchor
    ratio = torch.exp(tokens.log_probs - tokens.old)
    rectified = objective["apo_push_coeff"] * ratio - objective["apo_pull_coeff"] * anchor
    return _clipped(rectified, tokens.sequence["advantage"], objective)


def _clipped(ratio: torch.Tensor, advantage: float, objective: dict[str, Any]) -> torch.Tensor:
    clipped = ratio.clamp(1 - objective["clip_low"], 1 + objective["clip_high"])
    return torch.maximum(-advantage * ratio, -advantage * clipped)


def _gbpo(tokens: _Tokens, objective: dict[str, Any]) -> torch.Tensor:
    advantages, targets = tokens.filled("advantage"), tokens.filled("target_advantage")
    return plain_gbpo(tokens.log_probs, tokens.old, advantages, targets, objective["gbpo"])


def _of_tokens(name: str, tokens: _Tokens, objective: dict[str, Any]) -> torch.Tensor:
    return plain_loss(name, tokens.log_probs, tokens.old, tokens.filled("advantage"), objective)


def _of_answers(name: str, tokens: _Tokens, objective: dict[str, Any]) -> torch.Tensor:
    return plain_sequence_loss(name, tokens.log_probs, tokens.old, tokens.sequence["advantage"], objective)


def _of_top_tokens(name: str, tokens: _Tokens, objective: dict[str, Any]) -> torch.Tensor:
    advantage, solve_rate = tokens.sequence["advantage"], tokens.sequence.get("solve_rate", 0.0)
    old = reference = tokens.reference
    answer = Answer(tokens.all_log_probs, old, reference, tokens.targets, advantage, solve_rate)
    return TOP_TOKEN_LOSSES[name](answer, objective)


_LOSSES: dict[str, Callable[[_Tokens, dict[str, Any]], torch.Tensor]] = {
    **{name: partial(_of_tokens, name) for name in PLAIN_LOSSES},
    **{name: partial(_of_answers, name) for name in PLAIN_SEQUENCE_LOSSES},
    **{name: partial(_of_top_tokens, name) for name in TOP_TOKEN_LOSSES},
    "vanilla": _vanilla,
    "apo_ratio": _apo_ratio,
    "gbpo": _gbpo,
}
