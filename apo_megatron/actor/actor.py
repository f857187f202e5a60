"""The Megatron actor: the policy on this rank, its passes over a batch and its updates."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import partial

import numpy as np
import torch
from megatron.core.optimizer import MegatronOptimizer
from torch import Tensor

from apo_megatron.actor.batch_statistics import loss_statistics
from apo_megatron.actor.data_parallel import data_parallel_chunks
from apo_megatron.actor.forward_step import (
    Progress,
    TokenFunction,
    TokenTerms,
    run_forward,
    run_forward_backward,
)
from apo_megatron.actor.micro_batches import MicroBatchSize, split_into_micro_batches
from apo_megatron.actor.offload import TrainingStateOffload
from apo_megatron.actor.optimizer import build_optimizer, build_scheduler
from apo_megatron.actor.snapshot import AveragedWeights, WeightSnapshot
from apo_megatron.actor.token_fields import at_tokens, reference_fields, reference_metrics
from apo_megatron.config.model import ModelConfig
from apo_megatron.config.training import OptimizerConfig
from apo_megatron.data.collate import make_scoring_batch
from apo_megatron.models.build import build_policy_model
from apo_megatron.models.hf_config import read_architecture
from apo_megatron.models.transformer_config import TORCH_DTYPES
from apo_megatron.objectives.diagnostics import MetricSums
from apo_megatron.objectives.interface import TokenMetric
from apo_megatron.objectives.mismatch import mismatch_metrics
from apo_megatron.objectives.objective import Objective
from apo_megatron.objectives.sequences import WholeSequences
from apo_megatron.objectives.token_metrics import PULL_FRACTION
from apo_megatron.parallel.collectives import (
    all_gather_objects,
    any_rank,
    broadcast_from_last_stage,
    sum_over_context_parallel,
    sum_over_data_and_context_parallel,
    sum_over_data_parallel,
)
from apo_megatron.parallel.state import ParallelContext
from apo_megatron.parallel.vocab import VocabShard
from apo_megatron.types import PaddedSequences
from apo_megatron.weights.load import load_hf_weights, load_megatron_weights
from apo_megatron.weights.source import WeightSource


class MegatronActor:
    """Policy, optimizer and schedule of this rank. Every method is collective: all ranks call it.

    ``num_updates`` is the length of the learning-rate schedule; ``temperature`` divides the logits of
    every distribution; ``weight_bucket_bytes`` bounds the tensors that ``weight_source`` gathers at a time.
    """

    def __init__(
        self,
        model_cfg: ModelConfig,
        optimizer_cfg: OptimizerConfig,
        parallel: ParallelContext,
        micro_batch_size: MicroBatchSize,
        num_updates: int,
        temperature: float = 1.0,
        weight_bucket_bytes: int = 512 * 2**20,
    ) -> None:
        self.parallel = parallel
        self.architecture = read_architecture(model_cfg.hf_path)
        self.micro_batch_size = micro_batch_size
        dtype = TORCH_DTYPES[model_cfg.dtype]
        packs = micro_batch_size.max_tokens is not None
        models = build_policy_model(self.architecture, model_cfg, parallel, packs=packs)
        if model_cfg.megatron_path is None:
            load_hf_weights(models, self.architecture, model_cfg.hf_path, parallel)
        else:
            load_megatron_weights(models, self.architecture, model_cfg.megatron_path, parallel)
        self.config = models[0].config
        self.model_chunks = data_parallel_chunks(models, parallel.dims)
        self._optimizer = build_optimizer(
            optimizer_cfg, self.model_chunks, dtype, parallel.dims.distributed_optimizer
        )
        self._offload = TrainingStateOffload(self.model_chunks, self._optimizer)
        self._offloads_optimizer = optimizer_cfg.offload
        self.scheduler = build_scheduler(optimizer_cfg, self._optimizer, num_updates)
        self.token_terms = TokenTerms(
            VocabShard.of_rank(
                parallel.tensor_rank,
                parallel.dims.tensor,
                models[0].vocab_size,  # padded
                self.architecture.vocab_size,
                parallel.tensor_group,
            ),
            temperature,
            # Megatron starts reducing when autograd hands it the last gradient of a bucket.
            gradient_in_place=not parallel.dims.overlap_grad_reduce,
            sum_over_context=partial(sum_over_context_parallel, parallel=parallel),
        )
        self.consecutive_skips = self.most_consecutive_skips = 0  # updates that were not finite
        self.averaged_weights: AveragedWeights | None = None  # saved and loaded with the weights
        self._weights_are_complete = True
        self._old_log_probs_are_current = False  # no update since they were computed
        self._weight_source = WeightSource(models, self.architecture, parallel, weight_bucket_bytes)

    @property
    def optimizer(self) -> MegatronOptimizer:
        """Megatron's optimizer, whose state is there only while the actor is awake."""
        assert not self._offload.is_out, "the actor sleeps: call wake() first"
        return self._optimizer

    def sleep(self) -> None:
        """Free the device memory that only updates need, until ``wake``; no effect on an actor that sleeps.

        Weights, snapshots and passes without gradients work as before; updates and checkpoints do not.
        """
        self._offload.move_out()

    def wake(self) -> None:
        """Bring back what ``sleep`` freed, to the bit; no effect on an actor that is awake."""
        self._offload.move_in()

    def weight_source(self) -> WeightSource:
        """Streams the current weights as Hugging Face tensors. Take a new one after an update."""
        self.complete_weights()
        return self._weight_source

    def snapshot(self) -> WeightSnapshot:
        """A host copy of this rank's weights as they are now."""
        self.complete_weights()
        return WeightSnapshot(self._parameters())

    def start_average(self, decay: float) -> AveragedWeights:
        """A moving average of the weights, which starts from them as they are now.

        From here on it is part of the actor's checkpoints.
        """
        self.complete_weights()
        self.averaged_weights = AveragedWeights(self._parameters(), decay)
        return self.averaged_weights

    def update_average(self) -> None:
        """Take the weights as they are now into their moving average; no effect where there is none."""
        if self.averaged_weights is not None:
            self.complete_weights()
            self.averaged_weights.update()

    def weights_from(self, snapshot: WeightSnapshot) -> AbstractContextManager[None]:
        """The model holds ``snapshot``'s weights inside the block."""
        self.complete_weights()
        return snapshot.in_place()

    def complete_weights(self) -> None:
        """Gather what other ranks have updated, before the weights are read elsewhere than in a forward pass.

        With ``parallel.overlap_param_gather`` an update leaves that to the next forward pass.
        """
        if self._weights_are_complete:
            return
        for chunk in self.model_chunks:
            chunk.start_param_sync(force_sync=True)
        self._weights_are_complete = True

    def score(self, token_ids: Sequence[np.ndarray]) -> list[np.ndarray]:
        """log pi of tokens 1..L-1 of each sequence ([L] int, L >= 2) at T = 1: [L - 1] float32, natural logs.

        Every rank passes the same sequences and gets the same bits: those of the first data-parallel rank.
        """
        at_one = replace(self.token_terms, temperature=1.0)
        results = self._forward(make_scoring_batch(token_ids), at_one.log_probs, None)
        place = self.parallel.data_rank, self.parallel.tensor_rank, self.parallel.context_rank
        is_speaker = bool(results) and not any(place)
        found = results["log_probs"].float().numpy() if is_speaker else None
        flat = next(f for f in all_gather_objects(found, self.parallel) if f is not None)
        return np.split(flat, np.cumsum([len(tokens) - 1 for tokens in token_ids])[:-1])

    def attach_old_log_probs(
        self, sequences: PaddedSequences, progress: Progress | None = None
    ) -> PaddedSequences:
        """Fill ``old_log_probs`` with the log-probs under the current weights (on the last stage)."""
        self._old_log_probs_are_current = True
        results = self._forward(sequences, self.token_terms.log_probs, progress)
        if not results:
            return sequences
        found = at_tokens(results["log_probs"], sequences.loss_mask, fill=0.0)
        return sequences.with_fields(old_log_probs=found)

    def measure_mismatch(self, sequences: PaddedSequences, objective: Objective) -> dict[str, float]:
        """How far the engine that drew ``sequences`` is from the old policy, over all their trained tokens.

        For sequences whose ``old_log_probs`` this actor attached; metrics of ``objectives/mismatch.py``.
        """
        sums = MetricSums()
        if self.parallel.is_last_stage:
            assert sequences.old_log_probs is not None and sequences.rollout_log_probs is not None
            mask = sequences.loss_mask
            sums.add(
                mismatch_metrics(
                    sequences.old_log_probs[mask],
                    sequences.rollout_log_probs[mask],
                    objective.cfg,
                    WholeSequences.all_here(mask.nonzero()[:, 0]),
                )
            )
        return self._reduce(sums, sum_over_data_parallel)

    def attach_reference(
        self, sequences: PaddedSequences, objective: Objective, progress: Progress | None = None
    ) -> tuple[PaddedSequences, dict[str, float]]:
        """Fill the reference fields that ``objective`` needs; call it with the reference weights in place.

        Only sequences with a token of negative advantage go through the model, unless the objective
        needs all; elsewhere the log values are NaN and the ids -1. Also returns reference metrics.
        """
        if objective.reference_scope == "none":
            return sequences, {}
        rows = torch.arange(sequences.num_sequences)
        if objective.reference_scope == "wrong":
            rows = rows[(sequences.advantages < 0).any(dim=1)]
        chosen = sequences.select(rows)
        results = self._forward(
            chosen,
            partial(
                self.token_terms.reference,
                topk=objective.support_size,
                exclude_sampled=objective.exclude_sampled,
                keep_log_probs=objective.needs_support_log_probs,
                support_mass=objective.support_mass,
            ),
            progress,
        )
        sums = MetricSums()
        filled: dict[str, Tensor] = {}
        if results:
            mask = torch.zeros_like(sequences.loss_mask)
            mask[rows] = chosen.loss_mask
            sums.add(reference_metrics(results, chosen))
            filled = reference_fields(results, mask, objective)
        return sequences.with_fields(**filled), self._reduce(sums, sum_over_data_parallel)

    def update(
        self,
        mini_batch: PaddedSequences,
        objective: Objective,
        progress: Progress | None = None,
        take_pulled: Callable[[Tensor], None] | None = None,
    ) -> dict[str, float]:
        """One optimizer update on ``mini_batch``; its metrics, the same on every rank.

        What a loss must know of the whole mini-batch is found before, by a pass without gradients; not in the
        first update after ``attach_old_log_probs``, whose weights are the old ones.

        Beside those of the objective: ``token_utilization``, the share of the model's positions that hold a
        token and not padding, and ``num_micro_batches``.

        A loss or gradient that is not finite leaves weights, optimizer and schedule as they are and
        counts in ``skipped_update`` (and ``most_consecutive_skips``, of the run so far).

        ``take_pulled`` gets [T] bool, on the last stage and where the objective has a pull: on which of the
        trained tokens, in row-major order of the mask, it acted (``token_metrics.pull_metrics``).
        """
        if objective.spec.statistics is not None:
            mini_batch = self._with_statistics(mini_batch, objective)
        self.optimizer.zero_grad()
        for chunk in self.model_chunks:
            chunk.zero_grad_buffer()
        sums = MetricSums()
        pulled: list[Tensor] = []

        def consume(metrics: dict[str, TokenMetric]) -> None:
            sums.add(metrics)
            if take_pulled is not None and PULL_FRACTION in metrics:
                pulled.append(metrics[PULL_FRACTION].values)

        micro_batches = split_into_micro_batches(mini_batch, self.micro_batch_size, self.parallel)
        with self._offload.optimizer_state_out() if self._offloads_optimizer else nullcontext():
            run_forward_backward(
                self.model_chunks, micro_batches, partial(self.token_terms.loss, objective), consume, progress
            )
        if self.parallel.is_last_stage:
            is_real = torch.cat([model_input.is_real.flatten() for model_input in micro_batches.inputs])
            sums.add({"token_utilization": TokenMetric(is_real.to(self.parallel.device))})
        metrics = self._reduce(sums, sum_over_data_and_context_parallel)
        learning_rate = float(self.optimizer.param_groups[0]["lr"])
        is_finite = math.isfinite(metrics["loss"]) and self._gradients_are_finite()
        is_skipped = any_rank(not is_finite, self.parallel)
        if is_skipped:
            grad_norm = math.nan
            self.consecutive_skips += 1
            self.most_consecutive_skips = max(self.most_consecutive_skips, self.consecutive_skips)
        else:
            _, grad_norm, _ = self.optimizer.step()
            self._old_log_probs_are_current = False
            self._weights_are_complete = not self.parallel.dims.overlap_param_gather
            self.scheduler.step(increment=1)
            self.consecutive_skips = 0
        if take_pulled is not None and pulled:
            take_pulled(micro_batches.in_order(torch.cat(pulled)) & (not is_skipped))
        return {
            **metrics,
            "num_micro_batches": float(len(micro_batches.inputs)),
            "grad_norm": float(grad_norm),
            "learning_rate": learning_rate,
            "skipped_update": float(is_skipped),
        }

    def _with_statistics(self, mini_batch: PaddedSequences, objective: Objective) -> PaddedSequences:
        """With ``loss_statistics`` of the current weights, on the last stage."""
        current: dict[str, Tensor] = {}
        if not self._old_log_probs_are_current:
            current = self._forward(mini_batch, self.token_terms.log_probs, None)
        if not self.parallel.is_last_stage:
            return mini_batch
        assert mini_batch.old_log_probs is not None
        mask = mini_batch.loss_mask
        log_probs = current.get("log_probs", mini_batch.old_log_probs[mask])
        found = loss_statistics(mini_batch, log_probs, objective, self.parallel)
        return mini_batch.with_fields(loss_statistics=at_tokens(found, mask, fill=0.0))

    def _forward(
        self, sequences: PaddedSequences, function: TokenFunction, progress: Progress | None
    ) -> dict[str, Tensor]:
        """Results of all trained tokens in host memory, in the order of the sequences."""
        micro_batches = split_into_micro_batches(sequences, self.micro_batch_size, self.parallel)
        results = run_forward(self.model_chunks, micro_batches, function, progress)
        return {name: values.cpu() for name, values in results.items()}

    def _reduce(
        self, sums: MetricSums, sum_over_ranks: Callable[[Tensor, ParallelContext], Tensor]
    ) -> dict[str, float]:
        """Metrics of the whole mini-batch, the same on every rank."""
        metrics: dict[str, float] = {}
        if self.parallel.is_last_stage:
            flat = sums.flat().to(self.parallel.device)
            sums.load_flat(sum_over_ranks(flat, self.parallel).cpu())
            metrics = sums.finalize()
        return broadcast_from_last_stage(metrics, self.parallel)

    def _parameters(self) -> Iterator[torch.nn.Parameter]:
        return (p for chunk in self.model_chunks for p in chunk.parameters())

    def _gradients_are_finite(self) -> bool:
        # The largest magnitude needs no temporary of the size of the gradients, and NaN propagates.
        return all(
            bool(torch.linalg.vector_norm(buffer.grad_data, ord=math.inf).isfinite())
            for chunk in self.model_chunks
            for buffer in (*chunk.buffers, *chunk.expert_parallel_buffers)
        )
