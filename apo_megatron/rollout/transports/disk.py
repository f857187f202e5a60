"""Weights as safetensors files in a folder that trainer and servers see."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

from apo_megatron.errors import RolloutError
from apo_megatron.parallel.collectives import any_rank
from apo_megatron.parallel.state import ParallelContext
from apo_megatron.rollout.event_loop import EventLoopThread
from apo_megatron.rollout.sglang_client import SGLangClient
from apo_megatron.rollout.transports.delivery import Delivery, Problems, gather_problems
from apo_megatron.weights.conversion.streaming import divide_by_size
from apo_megatron.weights.formats.output_directory import written_aside
from apo_megatron.weights.formats.safetensors_writer import ShardWriter, plan_shards
from apo_megatron.weights.source import WeightSource

# Small files, so that every rank has some to write.
MAX_SHARD_BYTES = 512 * 2**20


class DiskTransport:
    """Every rank writes its share of the files; then the servers read all of them.

    A folder for each label appears complete under its name or not at all, and is removed when the next one
    has been read. It holds nothing but weights: servers take config and tokenizer from their own model.
    """

    def __init__(
        self, parallel: ParallelContext, loop: EventLoopThread, timeout: float, folder: Path
    ) -> None:
        self._parallel = parallel
        self._loop = loop
        self._timeout = timeout
        self._folder = folder.absolute()
        self._written: Path | None = None

    def push(self, source: WeightSource, servers: Sequence[SGLangClient], label: str) -> Problems:
        """See WeightTransport. Weights of a label that was pushed before are not written again."""
        previous, current = self._written, self._folder / label
        if previous != current:
            self._write(source, current)
            self._written = current
        mine = servers[self._parallel.rank :: self._parallel.world]
        delivery = Delivery(mine, self._loop, self._timeout, label)
        body = delivery.update_body(is_last=True, model_path=str(current))
        delivery.submit(mine, "/update_weights_from_disk", body).result()
        problems = gather_problems(delivery.problems, self._parallel)
        if previous is not None and previous != current and self._parallel.is_main:
            shutil.rmtree(previous, ignore_errors=True)  # NFS may keep a file that a server still maps
        return problems

    def close(self) -> None:
        """Remove the files of the last push."""
        if self._written is not None and self._parallel.is_main:
            shutil.rmtree(self._written, ignore_errors=True)

    def _write(self, source: WeightSource, folder: Path) -> None:
        """Raises RolloutError on every rank where one of them cannot write; ``folder`` is then not there."""
        with written_aside(folder, self._parallel) as partial:
            error = self._write_share(source, partial)
            if any_rank(error is not None, self._parallel):
                raise RolloutError(
                    f"{folder}: the weights for the servers could not be written "
                    f"({error or 'another rank says why'}): free some space, or set sglang.weight_folder"
                ) from error

    def _write_share(self, source: WeightSource, folder: Path) -> OSError | None:
        plans = plan_shards(([spec] for spec in source.tensor_specs()), MAX_SHARD_BYTES)
        shares = divide_by_size(plans, lambda plan: plan.num_bytes, self._parallel.world)
        buckets = source.buckets()
        try:
            with ExitStack() as stack:
                writers: dict[str, ShardWriter] = {}
                for plan in shares[self._parallel.rank]:
                    writer = stack.enter_context(ShardWriter(folder / plan.file, plan))
                    writers |= {spec.name: writer for spec in plan.specs}
                for bucket in buckets:
                    for name, tensor in bucket:
                        if name in writers:
                            writers[name].write(name, tensor)
                    del bucket, tensor  # before the next one is gathered
        except OSError as error:
            for _ in buckets:  # the other ranks gather on
                pass
            return error
        return None
