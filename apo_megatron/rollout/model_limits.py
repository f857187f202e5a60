"""What a request must keep to. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from apo_megatron.errors import RolloutError
from apo_megatron.rollout.engine import SamplingParams
from apo_megatron.types import Prompt


@dataclass(frozen=True)
class ModelLimits:
    """Of the model that an engine holds. Servers check less: a token that their model lacks ends them."""

    vocab_size: int
    max_positions: int
    eos_token_ids: frozenset[int]

    def stop_token_ids(self, sampling: SamplingParams) -> tuple[int, ...]:
        """All that end a completion, sorted."""
        return tuple(sorted(self.eos_token_ids | set(sampling.stop_token_ids)))

    def check(self, prompts: Sequence[Prompt], sampling: SamplingParams) -> None:
        """Raises RolloutError for tokens that the model does not have, or more than it has positions.

        (SGLang keeps two positions for itself: what needs the very last ones ends two tokens early, as cut.)
        """
        outside = [i for i in self.stop_token_ids(sampling) if not 0 <= i < self.vocab_size]
        if outside:
            raise RolloutError(
                f"stop tokens {outside} lie outside the model's vocabulary of {self.vocab_size}: mend "
                "rollout.stop_token_ids, or eos_token_id in generation_config.json"
            )
        for prompt in prompts:
            num_tokens = len(prompt.token_ids)
            assert num_tokens > 0, f"prompt {prompt.prompt_id} is empty"
            wrong = prompt.token_ids[(prompt.token_ids < 0) | (prompt.token_ids >= self.vocab_size)]
            if len(wrong):
                raise RolloutError(
                    f"prompt {prompt.prompt_id!r}: token {wrong[0]} lies outside the model's vocabulary of "
                    f"{self.vocab_size}: the prompts belong to another tokenizer"
                )
            if num_tokens + sampling.max_new_tokens > self.max_positions:
                raise RolloutError(
                    f"prompt {prompt.prompt_id!r}: {num_tokens} tokens + max_new_tokens="
                    f"{sampling.max_new_tokens} exceed the model's max_position_embeddings="
                    f"{self.max_positions}: lower rollout.max_new_tokens or data.max_prompt_length"
                )
