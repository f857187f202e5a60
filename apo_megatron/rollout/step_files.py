"""Writes the samples of a run's steps, each step's while the next one begins."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch

from apo_megatron.config.training import TrainConfig
from apo_megatron.data.collate import Batch, trained_samples
from apo_megatron.parallel.collectives import all_gather_objects
from apo_megatron.parallel.state import ParallelContext
from apo_megatron.rollout.sample_records import ROLLOUTS_FOLDER, step_paths, write_step
from apo_megatron.rollout.sampler import StepSamples
from apo_megatron.types import SampleGroup


class StepFiles:
    """run_dir/rollouts of one run. The main rank writes: it has all samples, and is told their marks.

    A run that goes on after step ``after_step`` writes the later steps again: their files are removed.
    """

    def __init__(
        self, cfg: TrainConfig, parallel: ParallelContext, after_step: int, note: Callable[[str], None]
    ) -> None:
        """``note`` takes a line about a file that could not be written: no run ends for that."""
        self._cfg, self._parallel, self._note = cfg, parallel, note
        self._folder = Path(cfg.run_dir) / ROLLOUTS_FOLDER
        self._thread = ThreadPoolExecutor(1, "rollout files")
        self._under_way: Future[None] | None = None
        if parallel.is_main:
            for step, path in step_paths(self._folder).items():
                if step > after_step:
                    path.unlink(missing_ok=True)

    def save(self, step: int, samples: StepSamples, batch: Batch | None) -> None:
        """Begin to write the samples of ``step`` (counted from 1), where it is due. Collective.

        ``batch``: what the step trained on, after its updates; None where it did not train.
        """
        if not self._cfg.save_rollouts or step % self._cfg.save_rollouts:
            return
        pulled = {} if batch is None else gather_pulled(batch, samples.groups, self._parallel)
        self.finish()
        if self._parallel.is_main:
            self._under_way = self._thread.submit(
                write_step, self._folder, step, samples, pulled, self._cfg.keep_rollouts
            )

    def finish(self) -> None:
        """Wait until what was begun is on disk, or has failed."""
        under_way, self._under_way = self._under_way, None
        if under_way is None:
            return
        try:
            under_way.result()
        except OSError as error:
            self._note(
                f"the samples of a step could not be written into {self._folder} "
                f"({error.strerror or error}): training goes on without that file. Make room, lower "
                "train.keep_rollouts, or set train.save_rollouts=0"
            )

    def close(self) -> None:
        """Wait until nothing is written any more; raises nothing."""
        self._thread.shutdown()


def gather_pulled(
    batch: Batch, groups: list[SampleGroup], parallel: ParallelContext
) -> dict[int, np.ndarray]:
    """Where the pull acted on the sequences of all ranks: [R] bool by number in ``trained_samples(groups)``.

    {} where the loss has no pull. Collective; a data rank's share is a bit for each of its trained tokens.
    """
    share = None
    # Tensor and context ranks have the same bits.
    if batch.pulled and parallel.tensor_rank == parallel.context_rank == 0:
        share = batch.rows, np.packbits(torch.cat(batch.pulled).cpu().numpy()).tobytes()
    lengths = [len(sample.completion.token_ids) for _, sample in trained_samples(groups)]
    found: dict[int, np.ndarray] = {}
    for of_rank in all_gather_objects(share, parallel):
        if of_rank is None:
            continue
        rows, packed = of_rank
        bits = np.unpackbits(np.frombuffer(packed, np.uint8)).astype(bool)
        starts = np.cumsum([0, *(lengths[row] for row in rows)])
        found |= {row: bits[start : start + lengths[row]] for row, start in zip(rows, starts, strict=False)}
    return found
