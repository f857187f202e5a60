"""GPTModel that projects only the positions that are trained on, or leaves the projection to the loss."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from torch import Tensor


@dataclass(frozen=True)
class LMHeadInput:
    """What the logits ``hidden @ weight.T`` would be made of."""

    hidden: Tensor  # [T, H], the same on every tensor-parallel rank
    weight: Tensor  # [V/p, H], this rank's rows of the output layer or of the tied embedding

    @property
    def device(self) -> torch.device:
        """Megatron's schedule asks for it where the model has experts."""
        return self.hidden.device


class PolicyModel(GPTModel):
    """A decoder whose logits exist only where ``loss_mask`` is True, and only while they are small.

    ``model(tokens, position_ids, None, loss_mask=loss_mask)`` with tokens [B, S] int64 and loss_mask [B, S]
    bool returns logits [T, V/p] in the parameter dtype on the last stage: one row per True, in row-major
    [B, S] order, of this rank's columns of the padded vocabulary. Without a mask there are B * S rows. T = 0
    is fine in both directions. Where the logits would take more than ``max_logits_bytes``, the result is an
    LMHeadInput instead. Other stages return hidden states [S, B, H] for the pipeline schedule.
    """

    def __init__(self, *positional: Any, max_logits_bytes: float = float("inf"), **keywords: Any) -> None:
        super().__init__(*positional, **keywords)
        self.max_logits_bytes = max_logits_bytes
        if self.post_process:
            # Rows are selected from the whole sequence, so the gather happens before the projection and
            # the projection itself must reduce its input gradient over the ranks, as without SP.
            self.output_layer.sequence_parallel = False
            self.output_layer.allreduce_dgrad = self.config.tensor_model_parallel_size > 1

    def _postprocess(  # called by GPTModel.forward, by keyword
        self, hidden_states: Tensor, loss_mask: Tensor | None = None, **_unused: Any
    ) -> Tensor | LMHeadInput:
        if not self.post_process:
            return hidden_states
        if self.config.sequence_parallel:
            # The projection's input gradient is complete on every rank: take this rank's slice, no sum.
            hidden_states = gather_from_sequence_parallel_region(
                hidden_states, tensor_parallel_output_grad=False, group=self.pg_collection.tp
            )
        by_sequence = hidden_states.transpose(0, 1)  # [B, S, H]
        rows = by_sequence.flatten(0, 1) if loss_mask is None else by_sequence[loss_mask]
        weight = (
            self.shared_embedding_or_output_weight()
            if self.share_embeddings_and_output_weights
            else self.output_layer.weight
        )
        if len(rows) * len(weight) * weight.element_size() > self.max_logits_bytes:
            # Of no rows, for Megatron's hooks on the layer: they complete its weight (overlap_param_gather).
            self.output_layer(rows[:0].detach(), weight=weight)
            return LMHeadInput(rows, weight)
        logits, _ = self.output_layer(rows, weight=weight)
        return logits
