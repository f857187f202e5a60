"""Batched decoding with a transformers model: chunks of prompts, a KV cache, the tokens that are drawn."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from transformers import DynamicCache, PreTrainedModel

from apo_megatron.errors import RolloutError
from apo_megatron.rollout.engine import SamplingParams
from apo_megatron.rollout.sampling import sample_tokens, sampling_log_probs


def plan_chunks(
    prompt_lengths: Sequence[int], num_samples: int, max_batch_size: int
) -> list[tuple[list[int], range]]:
    """(prompts, samples) to decode together: several prompts with all their samples, or a part of one's.

    Prompts of similar length share a chunk, which keeps padding small.
    """
    order = sorted(range(len(prompt_lengths)), key=lambda row: prompt_lengths[row])
    num_prompts = max(1, max_batch_size // num_samples)
    num_together = min(num_samples, max_batch_size)
    return [
        (order[i : i + num_prompts], range(start, min(start + num_together, num_samples)))
        for i in range(0, len(order), num_prompts)
        for start in range(0, num_samples, num_together)
    ]


def left_pad(prompts: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """(token ids [P, L] int64, mask [P, L] bool): the last token of every prompt is in the last column."""
    longest = max(len(tokens) for tokens in prompts)
    token_ids = np.zeros((len(prompts), longest), dtype=np.int64)
    mask = np.zeros((len(prompts), longest), dtype=bool)
    for row, tokens in enumerate(prompts):
        token_ids[row, longest - len(tokens) :] = tokens
        mask[row, longest - len(tokens) :] = True
    return token_ids, mask


@torch.inference_mode()
def decode(
    model: PreTrainedModel,
    prompts: Sequence[np.ndarray],
    uniforms: np.ndarray,
    sampling: SamplingParams,
    stop_ids: Sequence[int],
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Decode N = P * n sequences, n for each of P prompts; ``uniforms`` [N, T] choose the tokens.

    Returns (token ids [N, T] int32, log-probs [N, T] fp32, lengths [N] int64 in tokens, a stop token
    included); beyond a sequence's length the first two are meaningless. Prompts are read once and their
    cache is expanded; when half of the batch has stopped, those sequences leave it.
    Raises RolloutError where a sampled token's log-prob is not finite.
    """
    device = model.device
    num_rows, max_new_tokens = uniforms.shape
    draws = torch.from_numpy(uniforms).to(device)
    is_stop = torch.zeros(model.config.vocab_size, dtype=torch.bool, device=device)
    is_stop[list(stop_ids)] = True

    logits, cache, positions, mask = _read_prompts(model, prompts, num_rows // len(prompts))
    tokens = torch.zeros(num_rows, max_new_tokens, dtype=torch.int64, device=device)
    log_probs = torch.zeros(num_rows, max_new_tokens, device=device)
    lengths = torch.full((num_rows,), max_new_tokens, device=device)
    rows = torch.arange(num_rows, device=device)  # the sequences still in the batch
    for step in range(max_new_tokens):
        step_log_probs = sampling_log_probs(logits, sampling.temperature)
        new_tokens = sample_tokens(step_log_probs, draws[rows, step], sampling.top_k, sampling.top_p)
        tokens[rows, step] = new_tokens
        log_probs[rows, step] = step_log_probs.gather(-1, new_tokens.unsqueeze(-1)).squeeze(-1)
        ended = torch.where(is_stop[new_tokens], step + 1, max_new_tokens)
        lengths[rows] = torch.minimum(lengths[rows], ended)
        running = lengths[rows] == max_new_tokens
        num_running = int(running.sum())
        if num_running == 0 or step + 1 == max_new_tokens:
            break
        if 2 * num_running <= len(rows):
            keep = running.nonzero().squeeze(-1)
            rows, new_tokens, positions = rows[keep], new_tokens[keep], positions[keep]
            mask = None if mask is None else mask[keep]
            cache.batch_select_indices(keep)
        positions = positions + 1
        if mask is not None:
            mask = torch.nn.functional.pad(mask, (0, 1), value=1)
        logits = _last_logits(model, new_tokens.unsqueeze(-1), mask, positions, cache)
    result = tokens.int().cpu().numpy(), log_probs.cpu().numpy(), lengths.cpu().numpy()
    _require_finite(result[1], result[2])
    return result


def _read_prompts(
    model: PreTrainedModel, prompts: Sequence[np.ndarray], num_samples: int
) -> tuple[torch.Tensor, DynamicCache, torch.Tensor, torch.Tensor | None]:
    """Logits [N, V] after each prompt, cache, position of the last token [N, 1] and mask [N, L] (None where
    nothing is padded), every prompt read once and repeated ``num_samples`` times.
    """
    token_ids, is_token = left_pad(prompts)
    inputs = torch.from_numpy(token_ids).to(model.device)
    positions = torch.from_numpy(np.maximum(is_token.cumsum(axis=1) - 1, 0)).to(model.device)
    mask = None if is_token.all() else torch.from_numpy(is_token).to(model.device).long()
    cache = DynamicCache(config=model.config)
    logits = _last_logits(model, inputs, mask, positions, cache).repeat_interleave(num_samples, dim=0)
    cache.batch_repeat_interleave(num_samples)
    positions = positions[:, -1:].repeat_interleave(num_samples, dim=0)
    mask = None if mask is None else mask.repeat_interleave(num_samples, dim=0)
    return logits, cache, positions, mask


def _last_logits(
    model: PreTrainedModel,
    inputs: torch.Tensor,
    mask: torch.Tensor | None,
    positions: torch.Tensor,
    cache: DynamicCache,
) -> torch.Tensor:
    """Logits [N, V] after the last of ``inputs`` [N, L], which join the cache."""
    output = model(
        input_ids=inputs,
        attention_mask=mask,
        position_ids=positions,
        past_key_values=cache,
        use_cache=True,
        logits_to_keep=1,
    )
    return output.logits[:, -1]


def _require_finite(log_probs: np.ndarray, lengths: np.ndarray) -> None:
    valid = np.arange(log_probs.shape[1]) < lengths[:, None]
    num_bad = int((~np.isfinite(log_probs) & valid).any(axis=1).sum())
    if num_bad:
        raise RolloutError(
            f"{num_bad} of {len(lengths)} completions have log-probs that are not finite: the weights are "
            "broken (a diverged run?) or overflow in model.dtype"
        )
