"""A rollout engine inside the trainer's process: a transformers model with a KV cache on every rank."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

from apo_megatron.errors import RolloutError
from apo_megatron.rollout.engine import Progress, SamplingParams
from apo_megatron.rollout.sampling import prompt_uniforms, sample_tokens, sampling_log_probs
from apo_megatron.rollout.weight_views import weight_views
from apo_megatron.types import Completion, Prompt

if TYPE_CHECKING:
    from apo_megatron.weights.source import WeightSource


class EmbeddedEngine:
    """Samples with ``model``, whose weights are those of ``policy_version`` (-1: none yet).

    The model is used as it is (device, dtype), in eval mode and without gradients. ``eos_token_ids`` end a
    completion, as do the stop tokens of the sampling parameters. At most ``max_batch_size`` sequences are
    decoded together. The random state of torch is neither read nor changed.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        eos_token_ids: Iterable[int],
        max_batch_size: int,
        policy_version: int = -1,
    ) -> None:
        self.policy_version = policy_version
        self._model = model.eval().requires_grad_(False)
        self._tokenizer = tokenizer
        self._eos_token_ids = frozenset(eos_token_ids)
        self._max_batch_size = max_batch_size

    @torch.no_grad()
    def update_weights(self, source: WeightSource, version: int) -> None:
        """Copy every tensor of ``source`` into the weights of its Hugging Face name. Collective.

        Raises RolloutError where a name is unknown, a shape differs or a weight was not filled; the engine
        then refuses to generate until a whole update went through.
        """
        self.policy_version = -1
        views = weight_views(self._model)
        filled: set[int] = set()
        for bucket in source.buckets():
            filled |= _copy_bucket(views, bucket)
            del bucket  # its memory is needed for the next one
        # By address: a tied weight is filled under either of its names.
        missing = [name for name, view in views.items() if view.data_ptr() not in filled]
        if missing:
            raise RolloutError(
                f"update to version {version} left {len(missing)} weights of the rollout model without "
                f"a value: {', '.join(missing[:5])}{', ...' if len(missing) > 5 else ''}"
            )
        self.policy_version = version

    def generate(
        self, prompts: Sequence[Prompt], sampling: SamplingParams, progress: Progress | None = None
    ) -> list[list[Completion]]:
        """``num_samples`` completions for each of this rank's prompts, in order; no collective.

        The same prompt, seed and weights give the same completion in any batch, up to floating-point noise
        in the logits. Raises RolloutError before the first update, for a prompt that leaves no room for
        ``max_new_tokens``, for stop tokens that the model does not have, and where its output is not finite.
        """
        self._check(prompts, sampling)
        completions: list[list[Completion]] = [[] for _ in prompts]
        lengths = [len(prompt.token_ids) for prompt in prompts]
        for rows, samples in plan_chunks(lengths, sampling.num_samples, self._max_batch_size):
            chunk = [prompts[row] for row in rows]
            new = self._complete(chunk, samples, sampling)
            for i, row in enumerate(rows):
                completions[row] += new[i * len(samples) : (i + 1) * len(samples)]
            if progress is not None:
                progress(len(new), sum(len(completion.token_ids) for completion in new))
        return completions

    def close(self) -> None:
        """Free the weights."""
        self.policy_version = -1
        self._model.to("meta")

    def _check(self, prompts: Sequence[Prompt], sampling: SamplingParams) -> None:
        if self.policy_version < 0:
            raise RolloutError("the rollout engine has no weights: call update_weights before generate")
        vocab_size = self._model.config.vocab_size
        outside = [i for i in self._stop_ids(sampling) if not 0 <= i < vocab_size]
        if outside:
            raise RolloutError(
                f"stop tokens {outside} lie outside the model's vocabulary of {vocab_size}: mend "
                "rollout.stop_token_ids, or eos_token_id in generation_config.json"
            )
        limit = self._model.config.max_position_embeddings
        for prompt in prompts:
            num_tokens = len(prompt.token_ids)
            assert num_tokens > 0, f"prompt {prompt.prompt_id} is empty"
            if num_tokens + sampling.max_new_tokens > limit:
                raise RolloutError(
                    f"prompt {prompt.prompt_id!r}: {num_tokens} tokens + max_new_tokens="
                    f"{sampling.max_new_tokens} exceed the model's max_position_embeddings={limit}: lower "
                    "rollout.max_new_tokens or data.max_prompt_length"
                )

    def _stop_ids(self, sampling: SamplingParams) -> list[int]:
        return sorted(self._eos_token_ids | set(sampling.stop_token_ids))

    def _complete(self, prompts: list[Prompt], samples: range, sampling: SamplingParams) -> list[Completion]:
        """Completions of one chunk, prompt by prompt."""
        uniforms = np.concatenate(
            [
                prompt_uniforms(sampling.seed, p.prompt_id, sampling.num_samples, sampling.max_new_tokens)[
                    samples.start : samples.stop
                ]
                for p in prompts
            ]
        )
        stop_ids = self._stop_ids(sampling)
        tokens, log_probs, lengths = decode(
            self._model, [p.token_ids for p in prompts], uniforms, sampling, stop_ids
        )
        stopped = np.isin(tokens[np.arange(len(tokens)), lengths - 1], stop_ids)
        bodies = [row[:n] for row, n in zip(tokens.tolist(), (lengths - stopped).tolist(), strict=True)]
        texts = self._tokenizer.batch_decode(bodies, skip_special_tokens=True)
        return [
            Completion(
                token_ids=tokens[i, :length].copy(),  # a view would keep the whole padded batch
                log_probs=log_probs[i, :length].copy(),
                text=texts[i],
                finish_reason="stop" if has_stopped else "length",
                versions=((self.policy_version, length),),
            )
            for i, (length, has_stopped) in enumerate(zip(lengths.tolist(), stopped.tolist(), strict=True))
        ]


def _copy_bucket(views: dict[str, torch.Tensor], bucket: Sequence[tuple[str, torch.Tensor]]) -> set[int]:
    """Copy the tensors into the views of their names; the address of each view that was filled."""
    for name, tensor in bucket:
        view = views.get(name)
        if view is None:
            raise RolloutError(f"the weight source sent {name!r}, which the rollout model does not have")
        if view.shape != tensor.shape:
            raise RolloutError(
                f"the weight source sent {name!r} with shape {list(tensor.shape)}, the rollout model expects "
                f"{list(view.shape)}"
            )
        view.copy_(tensor)
    return {views[name].data_ptr() for name, _ in bucket}


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
