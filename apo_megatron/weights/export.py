"""The policy as a Hugging Face checkpoint, streamed out of the ranks and written in the background."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

from torch import Tensor

from apo_megatron.errors import CheckpointError
from apo_megatron.models.hf_config import resolve_model_path
from apo_megatron.parallel.collectives import any_rank
from apo_megatron.parallel.state import ParallelContext
from apo_megatron.weights.conversion.streaming import divide_by_size
from apo_megatron.weights.formats.hf_checkpoint import MAX_SHARD_BYTES, finish_hf_checkpoint
from apo_megatron.weights.formats.output_directory import written_aside
from apo_megatron.weights.formats.safetensors_writer import ShardPlan, ShardWriter, plan_shards
from apo_megatron.weights.source import WeightSource


class HFExporter:
    """Writes the current weights as Hugging Face checkpoints, one at a time. Every method is collective.

    Each rank keeps and writes the files that are its share: ``start`` takes the time of a weight sync and
    host memory of the model's size divided by the ranks; the files are written while the caller goes on.
    """

    def __init__(
        self, hf_path: str | Path, parallel: ParallelContext, max_shard_bytes: int = MAX_SHARD_BYTES
    ) -> None:
        """config.json and tokenizer are copied from ``hf_path``."""
        self._config_source = resolve_model_path(hf_path)
        self._parallel = parallel
        self._max_shard_bytes = max_shard_bytes
        self._folder = Path()
        self._putting_in_place = ExitStack()
        self._writing: Future[None] | None = None

    def start(self, folder: str | Path, source: WeightSource) -> None:
        """Take the weights as they are now; ``folder`` appears, complete, in ``poll`` or ``finish``.

        Raises what ``finish`` raises, for an export that has not ended.
        """
        self.finish()
        self._folder = Path(folder)
        plans = plan_shards(([spec] for spec in source.tensor_specs()), self._max_shard_bytes)
        shares = divide_by_size(plans, lambda plan: plan.num_bytes, self._parallel.world)
        mine = shares[self._parallel.rank]
        wanted = {spec.name for plan in mine for spec in plan.specs}
        staged = {
            name: tensor.to("cpu", copy=True)
            for bucket in source.buckets()
            for name, tensor in bucket
            if name in wanted
        }
        partial = self._putting_in_place.enter_context(written_aside(self._folder, self._parallel))
        writer = ThreadPoolExecutor(max_workers=1, thread_name_prefix="hf-export")
        self._writing = writer.submit(self._write, partial, plans, mine, staged)
        writer.shutdown(wait=False)

    def poll(self) -> None:
        """Put the checkpoint in place if all ranks have written theirs; does not wait."""
        if self._writing is not None and not any_rank(not self._writing.done(), self._parallel):
            self.finish()

    def finish(self) -> None:
        """Wait for the export under way, if there is one, and put it in place.

        Raises CheckpointError on every rank where one of them could not write; ``folder`` is then as before.
        """
        if self._writing is None:
            return
        error = self._writing.exception()
        self._writing = None
        with self._putting_in_place.pop_all():
            if any_rank(error is not None, self._parallel):
                raise CheckpointError(
                    f"{self._folder}: the Hugging Face checkpoint could not be written "
                    f"({error or 'another rank says why'})"
                ) from error

    def _write(
        self, folder: Path, plans: Sequence[ShardPlan], mine: Sequence[ShardPlan], staged: dict[str, Tensor]
    ) -> None:
        for plan in mine:
            with ShardWriter(folder / plan.file, plan) as writer:
                for spec in plan.specs:
                    writer.write(spec.name, staged.pop(spec.name))  # its memory is free from here on
        if self._parallel.is_main:
            finish_hf_checkpoint(folder, plans, self._config_source)
