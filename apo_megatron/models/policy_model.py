"""GPTModel that projects only the positions that are trained on."""

from __future__ import annotations

from typing import Any

from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from torch import Tensor


class PolicyModel(GPTModel):
    """A decoder whose logits exist only where ``loss_mask`` is True.

    ``model(tokens, position_ids, None, loss_mask=loss_mask)`` with tokens [B, S] int64 and loss_mask [B, S]
    bool returns logits [T, V/p] in the parameter dtype on the last stage: one row per True, in row-major
    [B, S] order, of this rank's columns of the padded vocabulary. Without a mask there are B * S rows. T = 0
    is fine in both directions. Other stages return hidden states [S, B, H] for the pipeline schedule.
    """

    def __init__(self, *positional: Any, **keywords: Any) -> None:
        super().__init__(*positional, **keywords)
        if self.post_process:
            # Rows are selected from the whole sequence, so the gather happens before the projection and
            # the projection itself must reduce its input gradient over the ranks, as without SP.
            self.output_layer.sequence_parallel = False
            self.output_layer.allreduce_dgrad = self.config.tensor_model_parallel_size > 1

    def _postprocess(  # called by GPTModel.forward, by keyword
        self, hidden_states: Tensor, loss_mask: Tensor | None = None, **_unused: Any
    ) -> Tensor:
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
            self.shared_embedding_or_output_weight() if self.share_embeddings_and_output_weights else None
        )
        logits, _ = self.output_layer(rows, weight=weight)
        return logits
