"""A rollout engine inside the trainer's process: a transformers model with a KV cache on every rank."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from apo_megatron.errors import RolloutError
from apo_megatron.parallel.collectives import all_gather_objects
from apo_megatron.rollout.decoding import decode, plan_chunks
from apo_megatron.rollout.engine import Probe, Progress, SampleRequest, SamplingParams
from apo_megatron.rollout.model_limits import ModelLimits
from apo_megatron.rollout.sampling import prompt_uniforms, sampling_log_probs
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
        max_canary_gap: float = math.inf,
    ) -> None:
        self.policy_version = policy_version
        self._model = model.eval().requires_grad_(False)
        self._tokenizer = tokenizer
        config = model.config
        self._limits = ModelLimits(
            config.vocab_size, config.max_position_embeddings, frozenset(eos_token_ids)
        )
        self._max_batch_size = max_batch_size
        self._max_canary_gap = max_canary_gap

    @torch.no_grad()
    def update_weights(
        self, source: WeightSource, version: int, probe: Probe | None = None
    ) -> dict[str, float]:
        """Copy every tensor of ``source`` into the weights of its Hugging Face name. Collective.

        Raises RolloutError where a name is unknown, a shape differs, a weight was not filled or the model
        does not say what the ``probe`` says; the engine then refuses to generate until a whole update went
        through.
        """
        self.load_weights(source.buckets(), version)
        metrics = {}
        if probe is not None:
            # Every rank has a model of its own: all stop where one of them is wrong.
            gap = float(np.max(all_gather_objects(self._canary_gap(probe), source.parallel)))
            if not gap <= self._max_canary_gap:  # true of NaN, too
                self.policy_version = -1
                raise RolloutError(
                    f"after the update to version {version} the rollout model's log-probs differ from the "
                    f"actor's by {gap:.4g} nats on average, more than rollout.max_canary_gap="
                    f"{self._max_canary_gap:.4g}: the weights did not arrive as they are, or the two models "
                    "compute differently"
                )
            metrics["canary_gap"] = gap
        return metrics

    @torch.no_grad()
    def load_weights(self, buckets: Iterable[Sequence[tuple[str, torch.Tensor]]], version: int) -> None:
        """Copy named tensors into the weights of their Hugging Face name; no collective of its own.

        Raises RolloutError where a name is unknown, a shape differs or a weight was not filled.
        """
        self.policy_version = -1
        views = weight_views(self._model)
        filled: set[int] = set()
        for bucket in buckets:
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

    def start(
        self, requests: Sequence[SampleRequest], sampling: SamplingParams, progress: Progress | None = None
    ) -> EmbeddedGeneration:
        """Nothing is drawn before the first ``wait``, which then draws everything.

        The same prompt, seed and weights give the same completion in any batch, up to floating-point noise
        in the logits. Completions that were begun are not continued: none is ever stopped half-way.
        """
        return EmbeddedGeneration(lambda: self._draw(requests, sampling, progress), requests)

    def generate(
        self, prompts: Sequence[Prompt], sampling: SamplingParams, progress: Progress | None = None
    ) -> list[list[Completion]]:
        """``num_samples`` completions for each of this rank's prompts, in order; no collective.

        Raises RolloutError as ``EmbeddedGeneration.wait``.
        """
        requests = [SampleRequest(prompt, sampling.num_samples) for prompt in prompts]
        return self._draw(requests, sampling, progress)

    def recover(self, source: WeightSource | None) -> bool:
        """Nothing gets lost within one process."""
        return True

    def sleep(self) -> None:
        """The weights stay where they are."""

    def close(self) -> None:
        """Free the weights."""
        self.policy_version = -1
        self._model.to("meta")

    def _draw(
        self, requests: Sequence[SampleRequest], sampling: SamplingParams, progress: Progress | None
    ) -> list[list[Completion]]:
        assert all(request.begun is None for request in requests), "the config has a rule for this"
        if self.policy_version < 0:
            raise RolloutError("the rollout engine has no weights: call update_weights before generate")
        self._limits.check([request.prompt for request in requests], sampling)
        rows_by_range: defaultdict[tuple[int, int], list[int]] = defaultdict(list)
        for row, request in enumerate(requests):
            rows_by_range[request.first, request.num_samples].append(row)
        completions: list[list[Completion]] = [[] for _ in requests]
        for (first, num_samples), rows in rows_by_range.items():
            lengths = [len(requests[row].prompt.token_ids) for row in rows]
            for indices, samples in plan_chunks(lengths, num_samples, self._max_batch_size):
                chunk = [rows[i] for i in indices]
                numbers = range(first + samples.start, first + samples.stop)
                new = self._complete([requests[row].prompt for row in chunk], numbers, sampling)
                for i, row in enumerate(chunk):
                    completions[row] += new[i * len(samples) : (i + 1) * len(samples)]
                if progress is not None:
                    progress(len(new), sum(len(completion.token_ids) for completion in new))
        return completions

    def _canary_gap(self, probe: Probe) -> float:
        """Mean |difference| of log-probs (nats) over the probe's tokens."""
        gaps = []
        for token_ids, expected in zip(probe.token_ids, probe.log_probs, strict=True):
            tokens = torch.from_numpy(token_ids).to(self._model.device).long()
            logits = self._model(input_ids=tokens[None, :-1], use_cache=False).logits[0]
            found = sampling_log_probs(logits, temperature=1.0).gather(-1, tokens[1:, None])[:, 0]
            gaps.append(np.abs(found.cpu().numpy() - expected))
        return float(np.concatenate(gaps).mean())

    def _complete(self, prompts: list[Prompt], samples: range, sampling: SamplingParams) -> list[Completion]:
        """Completions of one chunk, prompt by prompt."""
        uniforms = np.concatenate(
            [
                prompt_uniforms(sampling.seed, p.prompt_id, samples.stop, sampling.max_new_tokens)[
                    samples.start :
                ]
                for p in prompts
            ]
        )
        stop_ids = self._limits.stop_token_ids(sampling)
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


class EmbeddedGeneration:
    """What one rank draws: everything, in the first ``wait``."""

    def __init__(self, draw: Callable[[], list[list[Completion]]], requests: Sequence[SampleRequest]) -> None:
        self._draw, self._requests = draw, requests
        self._results: list[list[Completion]] | None = None

    def wait(self, seconds: float) -> bool:
        """Draw, if that has not happened yet, however long it takes.

        Raises RolloutError before the first update of the weights, for a prompt that leaves no room for
        ``max_new_tokens``, for stop tokens that the model does not have, and where its output is not finite.
        """
        if self._results is None:
            self._results = self._draw()
        return True

    def num_finished(self) -> int:
        """All requests, or none."""
        return 0 if self._results is None else len(self._requests)

    def stop(self) -> None:
        """Before the first ``wait`` nothing has been drawn, later nothing is running."""
        if self._results is None:
            self._results = [[_NOTHING_DRAWN] * request.num_samples for request in self._requests]

    def results(self) -> list[list[Completion]]:
        """Completions by request."""
        assert self._results is not None, "wait comes first"
        return self._results


_NOTHING_DRAWN = Completion(np.empty(0, np.int32), np.empty(0, np.float32), "", "abort", versions=())


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
