"""From logits to tokens: filters, inverse-CDF sampling, and the random numbers behind it.

A completion depends on (seed, prompt id, sample index) only. Every prompt has a random stream of its own,
drawn before decoding, so batching, chunking, order and the rank that runs a prompt do not matter.
"""

from __future__ import annotations

import hashlib

import numpy as np
import torch

from apo_megatron.config.rollout import RolloutConfig
from apo_megatron.rollout.engine import SamplingParams


def sampling_params(rollout: RolloutConfig, seed: int) -> SamplingParams:
    """What training samples with. ``seed`` must differ between steps that may repeat a prompt."""
    return SamplingParams(
        num_samples=rollout.group_size,
        temperature=rollout.temperature,
        top_p=rollout.top_p,
        top_k=rollout.top_k,
        max_new_tokens=rollout.max_new_tokens,
        stop_token_ids=rollout.stop_token_ids,
        seed=seed,
    )


def prompt_seed(seed: int, prompt_id: str) -> int:
    """64-bit seed of one prompt's random stream, the same in every process (unlike ``hash``)."""
    return int.from_bytes(hashlib.blake2b(f"{seed}:{prompt_id}".encode(), digest_size=8).digest(), "little")


def prompt_uniforms(seed: int, prompt_id: str, num_samples: int, num_tokens: int) -> np.ndarray:
    """[num_samples, num_tokens] float32 in [0, 1): one number per token that may be sampled.

    NumPy's generator, because torch's would be one more state next to the trainer's; the first rows do not
    depend on ``num_samples``.
    """
    stream = np.random.default_rng(prompt_seed(seed, prompt_id))
    return stream.random((num_samples, num_tokens), dtype=np.float32)


def sampling_log_probs(logits: torch.Tensor, temperature: float) -> torch.Tensor:
    """log softmax(logits / T) in fp32: [..., V] any float dtype -> [..., V] fp32."""
    return torch.log_softmax(logits.float() / temperature, dim=-1)


def filter_probs(probs: torch.Tensor, top_k: int, top_p: float) -> torch.Tensor:
    """Zero what may not be sampled; not renormalised. [N, V] fp32 -> [N, V] fp32.

    First the ``top_k`` likeliest (0 = all), then the smallest set of likeliest tokens that holds at least
    ``top_p`` of the remaining mass (never empty). Of equally likely tokens the lower ids stay.
    """
    limits_k = 0 < top_k < probs.shape[-1]
    if not limits_k and top_p >= 1:
        return probs
    ranked, ids = probs.sort(dim=-1, descending=True, stable=True)
    if limits_k:
        ranked[:, top_k:] = 0
    if top_p < 1:
        likelier_mass = ranked.cumsum(dim=-1) - ranked
        ranked = ranked.masked_fill(likelier_mass >= top_p * ranked.sum(dim=-1, keepdim=True), 0)
    return torch.zeros_like(probs).scatter_(-1, ids, ranked)


def sample_tokens(log_probs: torch.Tensor, uniforms: torch.Tensor, top_k: int, top_p: float) -> torch.Tensor:
    """One token per row by inverting the cumulative distribution of the filtered probabilities.

    log_probs [N, V] fp32 (normalised), uniforms [N] fp32 in [0, 1) -> ids [N] int64. A token of zero
    probability is never returned.
    """
    probs = filter_probs(log_probs.exp(), top_k, top_p)
    cumulative = probs.cumsum(dim=-1)
    threshold = uniforms.unsqueeze(-1) * cumulative[:, -1:]
    ids = torch.searchsorted(cumulative, threshold, right=True).clamp_(max=probs.shape[-1] - 1)
    # Rounding can carry the threshold to the very end, and a parallel cumulative sum need not be monotonic
    # in its last bit: either may point at a token that cannot be sampled.
    possible = probs.gather(-1, ids) > 0
    return torch.where(possible, ids, probs.argmax(dim=-1, keepdim=True)).squeeze(-1)
