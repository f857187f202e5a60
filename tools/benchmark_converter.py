"""Speed and memory of the converter beside ``cp`` of the same files.

    python tools/benchmark_converter.py --size-gb 3 --ranks 1 2

Makes a random model in a temporary directory (it needs about five times the size there), converts it both
ways as a user would, and copies the files that are read, in turn. The best of the repetitions counts. Seconds
are those that the command reports, without the start of Python; memory is the largest resident set of any
rank, with everything that it has imported and mapped.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from apo_megatron.models.hf_config import read_architecture
from apo_megatron.weights.formats.hf_checkpoint import write_hf_checkpoint
from apo_megatron.weights.formats.safetensors_writer import TensorSpec
from apo_megatron.weights.table import build_table

SHARD_BYTES = 500_000_000
# The shape of a small Qwen3; the number of layers makes the size.
CONFIG = {
    "model_type": "qwen3",
    "hidden_size": 2048,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "intermediate_size": 6144,
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000.0,
    "hidden_act": "silu",
    "attention_bias": False,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
}
# Before cp: as long as Python takes to start before a conversion. A virtual machine may use the time to give
# freed memory back to its host, and getting it again costs more than copying into it.
PAUSE_SECONDS = 3.0
DONE = re.compile(r"GB in ([\d.]+) s")


@dataclass
class Measurement:
    """The best repetition of one operation, and of the copies of the files that it reads."""

    name: str
    seconds: float = float("inf")
    peak_bytes: int = 0
    copy_seconds: float = float("inf")
    durable_copy_seconds: float = float("inf")

    def add(self, seconds: float, peak_bytes: int) -> None:
        self.seconds = min(self.seconds, seconds)
        self.peak_bytes = max(self.peak_bytes, peak_bytes)

    def add_copy(self, seconds: float, durable: bool) -> None:
        if durable:
            self.durable_copy_seconds = min(self.durable_copy_seconds, seconds)
        else:
            self.copy_seconds = min(self.copy_seconds, seconds)


def make_model(folder: Path, size_gb: float, vocab_size: int) -> tuple[int, int]:
    """Write a random model of about this size; bytes of the weights, and of the largest group."""
    folder.mkdir()
    one, two = (sum(s.num_bytes for g in _groups(folder, vocab_size, n) for s in g) for n in (1, 2))
    groups = _groups(folder, vocab_size, max(1, 1 + round((size_gb * 1e9 - one) / (two - one))))
    specs = [spec for group in groups for spec in group]
    generator = torch.Generator().manual_seed(0)

    def random_tensors() -> Iterator[tuple[str, Tensor]]:
        for spec in specs:
            yield spec.name, torch.empty(spec.shape, dtype=spec.dtype).uniform_(-1, 1, generator=generator)

    write_hf_checkpoint(folder.with_name("model"), specs, random_tensors(), folder, SHARD_BYTES)
    return sum(spec.num_bytes for spec in specs), max(sum(s.num_bytes for s in group) for group in groups)


def _groups(folder: Path, vocab_size: int, num_layers: int) -> list[list[TensorSpec]]:
    """Write config.json; the tensors of each parameter."""
    config = {**CONFIG, "vocab_size": vocab_size, "num_hidden_layers": num_layers}
    (folder / "config.json").write_text(json.dumps(config))
    return [
        [
            TensorSpec(name, shape, torch.bfloat16)
            for name, shape in zip(entry.hf_names, entry.layout.hf_shapes, strict=True)
        ]
        for entry in build_table(read_architecture(folder)).entries()
        if entry.exported
    ]


def convert(script: str, ranks: int, options: list[str]) -> tuple[float, int]:
    """Run one command line; the seconds it reports and the largest resident set of its processes."""
    command = [sys.executable, "-m", f"checkpoints_convert.{script}", *options]
    if ranks > 1:
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
        command = [sys.executable, *launcher, *command[1:]]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
    assert process.stderr is not None
    output = process.stderr.read()
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    reported = DONE.search(output)
    if process.returncode != 0 or reported is None:
        raise RuntimeError(f"{' '.join(command)} failed with {process.returncode}:\n{output}")
    return float(reported[1]), usage.ru_maxrss * 1024


def copy(source: Path, target: Path, durable: bool) -> float:
    """Seconds of ``cp -r``; ``durable`` waits until the disk has it, as the converter does."""
    time.sleep(PAUSE_SECONDS)
    started = time.monotonic()
    subprocess.run(["cp", "-r", source, target], check=True)
    if durable:
        for path in target.rglob("*"):
            descriptor = os.open(path, os.O_RDONLY)
            os.fsync(descriptor)
            os.close(descriptor)
    return time.monotonic() - started


def measure(folder: Path, ranks: list[int], repetitions: int) -> list[Measurement]:
    """Every conversion right after a copy of the files that it reads: a busy machine disturbs both alike."""
    model, megatron, back, copied = (folder / name for name in ("model", "megatron", "back", "copy"))
    operations: list[tuple[str, str, Path | None, list[str | Path]]] = [
        ("HF -> Megatron", "hf_to_megatron", model, ["--hf-path", model, "--megatron-path", megatron]),
        (
            "Megatron -> HF",
            "megatron_to_hf",
            megatron,
            ["--megatron-path", megatron, "--hf-path", back, "--max-shard-size-gb", "0.5"],
        ),
        # Reads both and writes nothing.
        ("verify", "verify", None, ["--hf-path", back, "--megatron-path", megatron]),
    ]
    found: dict[str, Measurement] = {}
    for _ in range(repetitions):
        for count in ranks:
            for title, script, source, options in operations:
                name = f"{title}, {count} rank{'s' if count > 1 else ''}"
                best = found.setdefault(name, Measurement(name))
                if source is not None:
                    for durable in (False, True):
                        best.add_copy(copy(source, copied, durable), durable)
                        shutil.rmtree(copied)
                best.add(*convert(script, count, list(map(str, options))))
            shutil.rmtree(megatron)
            shutil.rmtree(back)
    return list(found.values())


def table(measurements: list[Measurement], num_bytes: int, largest: int) -> str:
    """In Markdown."""
    bound = 2 * largest + 2**30
    lines = [
        f"{num_bytes / 1e9:.2f} GB of weights; the largest group has {largest / 2**20:.0f} MiB, so the bound "
        f"on the memory of a rank is {bound / 2**20:.0f} MiB.",
        "",
        "| Operation | seconds | GB/s | cp, seconds | cp and fsync | speed (cp: 1) | memory of a rank |",
        "|---|---|---|---|---|---|---|",
    ]
    for m in measurements:
        copies = "| | | "
        if m.copy_seconds < float("inf"):
            copies = (
                f"| {m.copy_seconds:.2f} | {m.durable_copy_seconds:.2f} | {m.copy_seconds / m.seconds:.2f} "
            )
        lines.append(
            f"| {m.name} | {m.seconds:.2f} | {num_bytes / m.seconds / 1e9:.2f} {copies}"
            f"| {m.peak_bytes / 2**20:.0f} MiB ({m.peak_bytes / bound:.0%}) |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--size-gb", type=float, default=3.0, help="of the weights, default: 3")
    parser.add_argument("--vocab-size", type=int, default=100_003, help="default: 100003 (odd on purpose)")
    parser.add_argument("--ranks", nargs="+", type=int, default=[1, 2], help="default: 1 2")
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument(
        "--folder", type=Path, help="where to work, default: the system's temporary directory"
    )
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        folder = Path(name)
        num_bytes, largest = make_model(folder / "config", options.size_gb, options.vocab_size)
        measurements = measure(folder, options.ranks, options.repetitions)
    print(table(measurements, num_bytes, largest))


if __name__ == "__main__":
    main()
