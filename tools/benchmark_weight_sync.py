"""Seconds and memory of a weight push into a real SGLang server, beside what the machine can do.

    python -m tools.benchmark_weight_sync --folder /tmp/weight_sync --python .venv-sglang/bin/python

Makes a random model of about 1 GB in the folder, starts one server with it on the CPU, and pushes the weights
of a trainer of one rank with every transport in turn. In the same turns the same number of bytes is copied in
memory, sent over a loopback TCP connection, broadcast by gloo, and written to a file and read: the limits.
The median of the repetitions counts. Memory is the largest resident set during a push, beyond that before it;
memory that trainer and server share counts in both.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import socket
import statistics
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import psutil
import torch
import torch.distributed as dist
from torch import Tensor

from apo_megatron.config import ModelConfig, ParallelConfig
from apo_megatron.config.rollout import SGLangConfig
from apo_megatron.models.build import build_policy_model
from apo_megatron.models.hf_config import read_architecture
from apo_megatron.parallel.outside_group import OutsideGroup
from apo_megatron.parallel.state import init_parallel
from apo_megatron.rollout.event_loop import EventLoopThread
from apo_megatron.rollout.server import ServerPool
from apo_megatron.rollout.sglang_client import SGLangClient, open_session
from apo_megatron.rollout.transport import WeightTransport, build_transport
from apo_megatron.weights.source import WeightSource
from tools.random_model import write_random_model

# The shape of a small Qwen2; the number of layers makes the size.
CONFIG = {
    "hidden_size": 1536,
    "num_attention_heads": 12,
    "num_key_value_heads": 2,
    "intermediate_size": 8960,
    "vocab_size": 32000,
    "max_position_embeddings": 4096,
}
LAYER_GB = 0.0936
EMBEDDINGS_GB = 0.1966
SAMPLE_SECONDS = 0.005
TRANSPORTS = ("tensors", "broadcast", "disk")
LIMITS = {
    "memcpy": "copy in memory",
    "tcp": "loopback TCP",
    "gloo": "gloo broadcast",
    "file": "file, written with fsync and read",
}


@dataclass
class Measurement:
    """All repetitions of one operation, and what memory it takes."""

    seconds: list[float] = field(default_factory=list)
    trainer_bytes: int = 0
    server_bytes: int = 0

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    @contextmanager
    def timed(self) -> Iterator[None]:
        started = time.perf_counter()
        yield
        self.seconds.append(time.perf_counter() - started)


def make_model(folder: Path, size_gb: float) -> Path:
    """Write a random bf16 model of about this size, unless it is there."""
    model = folder / "model"
    if model.exists():
        return model
    num_layers = max(1, round((size_gb - EMBEDDINGS_GB) / LAYER_GB))
    return write_random_model(folder, {**CONFIG, "num_hidden_layers": num_layers}, torch.bfloat16)


class PeakMemory:
    """The largest resident set of some processes together, beyond that at the start of the ``with`` block."""

    def __init__(self, processes: Sequence[psutil.Process]) -> None:
        self._processes = processes
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._start_bytes = self._peak_bytes = self._resident()

    @property
    def extra_bytes(self) -> int:
        return self._peak_bytes - self._start_bytes

    def __enter__(self) -> PeakMemory:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._stop.set()
        self._thread.join()

    def _resident(self) -> int:
        return sum(process.memory_info().rss for process in self._processes)

    def _watch(self) -> None:
        while not self._stop.wait(SAMPLE_SECONDS):
            self._peak_bytes = max(self._peak_bytes, self._resident())


class Peer:
    """Another process that takes bytes, over TCP or gloo, into memory that it has used before."""

    def __init__(self, num_bytes: int) -> None:
        context = multiprocessing.get_context("spawn")
        listener = socket.create_server(("127.0.0.1", 0))
        self._group = OutsideGroup("benchmark", "127.0.0.1", 1, torch.device("cpu"), "gloo")
        self._process = context.Process(
            target=_take, args=(num_bytes, listener.getsockname()[1], self._group.port), daemon=True
        )
        self._process.start()
        self._connection, _ = listener.accept()
        self._group.connect(60.0).result()

    def tcp(self, source: Tensor) -> None:
        self._connection.sendall(b"t")
        self._connection.sendall(source.numpy().data)
        self._wait()

    def gloo(self, source: Tensor) -> None:
        self._connection.sendall(b"g")
        self._group.broadcast(source, 600.0).result()
        self._wait()

    def close(self) -> None:
        self._connection.close()
        self._process.join()

    def _wait(self) -> None:
        assert self._connection.recv(1) == b"k"


def _take(num_bytes: int, tcp_port: int, group_port: int) -> None:
    torch.set_num_threads(1)
    target = torch.ones(num_bytes, dtype=torch.uint8)
    connection = socket.create_connection(("127.0.0.1", tcp_port))
    store: Any = dist.TCPStore("127.0.0.1", group_port, 2, is_master=False)
    for prefix in ("benchmark", "benchmark/", "cpu/"):
        store = dist.PrefixStore(prefix, store)
    group: Any = dist.ProcessGroupGloo(store, 1, 2, timedelta(minutes=10))
    while kind := connection.recv(1):
        if kind == b"t":
            rest = memoryview(target.numpy().data)
            while rest:
                rest = rest[connection.recv_into(rest) :]
        else:
            group.broadcast([target], dist.BroadcastOptions()).wait()
        connection.sendall(b"k")


def write_and_read(source: Tensor, target: Tensor, path: Path) -> None:
    """Through a new file; reading finds it in the page cache, as a server on this machine does."""
    with path.open("wb", buffering=0) as out:
        rest = source.numpy().data
        while rest:
            rest = rest[out.write(rest[: 2**20]) :]
        os.fsync(out.fileno())
    with path.open("rb", buffering=0) as file:
        left = target.numpy().data
        while left:
            left = left[file.readinto(left[: 2**20]) :]
    path.unlink()


class Bench:
    """A trainer of one rank, a server, and memory to measure the limits with."""

    def __init__(self, model: ModelConfig, folder: Path, bucket_mib: int, url: str) -> None:
        self._folder = folder
        self._parallel = init_parallel(ParallelConfig())
        architecture = read_architecture(model.hf_path)
        chunks = build_policy_model(architecture, model, self._parallel)
        self._source = WeightSource(chunks, architecture, self._parallel, bucket_mib * 2**20)
        self.num_bytes = sum(spec.num_bytes for spec in self._source.tensor_specs())
        self._bytes = torch.ones(self.num_bytes, dtype=torch.uint8)
        self._copy = torch.ones_like(self._bytes)
        self._peer = Peer(self.num_bytes)
        self._loop = EventLoopThread()
        self._session = self._loop.run(open_session(None))
        self._server = SGLangClient("server", url, self._session, vocab_size=1)
        self._processes = server_processes(url)
        self._transports = {name: self._transport(name) for name in TRANSPORTS}
        self._loop.run(self._server.pause())

    def _transport(self, name: Any) -> WeightTransport:
        cfg = SGLangConfig(weight_transport=name)
        return build_transport(cfg, self._parallel, self._loop, self._folder / "weights", same_machine=True)

    def limit(self, name: str) -> None:
        """Move the bytes in one of the ways of LIMITS."""
        if name == "memcpy":
            self._copy.copy_(self._bytes)
        elif name == "tcp":
            self._peer.tcp(self._bytes)
        elif name == "gloo":
            self._peer.gloo(self._bytes)
        else:
            write_and_read(self._bytes, self._copy, self._folder / "file")

    def push(self, name: str, label: str) -> None:
        problems = self._transports[name].push(self._source, [self._server], label)
        assert not problems, problems

    def push_watched(self, name: str, label: str) -> tuple[int, int]:
        """Bytes of memory that a push takes in the trainer and in the server."""
        trainer, server = PeakMemory([psutil.Process()]), PeakMemory(self._processes)
        with trainer, server:
            self.push(name, label)
        return trainer.extra_bytes, server.extra_bytes

    def checksum(self) -> str | None:
        """Of the server's weights."""
        return self._loop.run(self._server.checksum())

    def close(self) -> None:
        for transport in self._transports.values():
            transport.close()
        self._peer.close()
        self._loop.run(self._session.close())
        self._loop.close()


def server_processes(url: str) -> list[psutil.Process]:
    """All processes of the server that listens there."""
    port = int(url.rpartition(":")[2])
    pid = next(c.pid for c in psutil.net_connections("tcp") if c.status == "LISTEN" and c.laddr.port == port)
    return [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]


def measure(bench: Bench, repetitions: int) -> dict[str, Measurement]:
    """Name of the limit or transport -> what it took."""
    found = {name: Measurement() for name in (*LIMITS, *TRANSPORTS)}
    checksums = set()
    for name in TRANSPORTS:  # watching takes time, so it has pushes of its own; the first makes the group
        bench.push(name, f"{name}-first")
        found[name].trainer_bytes, found[name].server_bytes = bench.push_watched(name, f"{name}-watched")
        checksums.add(bench.checksum())
    for repetition in range(repetitions):
        for name in LIMITS:
            with found[name].timed():
                bench.limit(name)
        for name in TRANSPORTS:
            with found[name].timed():
                bench.push(name, f"{name}-{repetition}")
            checksums.add(bench.checksum())
        print(f"repetition {repetition}, load {os.getloadavg()[0]:.1f}", flush=True)
    assert len(checksums) == 1 and None not in checksums, "the transports bring different weights"
    return found


def table(found: dict[str, Measurement], num_bytes: int) -> str:
    """In Markdown."""
    lines = [
        f"| Operation | seconds | GB/s | {' | '.join(LIMITS)} | trainer, MiB | server, MiB |",
        "|---|---|---|" + "---|" * (len(LIMITS) + 2),
    ]
    for name, m in found.items():
        cells = [LIMITS.get(name, f"**{name}**"), f"{m.median:.2f}", f"{num_bytes / m.median / 1e9:.2f}"]
        if name in LIMITS:
            cells += [""] * (len(LIMITS) + 2)
        else:
            cells += [f"{m.median / found[limit].median:.2f}" for limit in LIMITS]
            cells += [f"{size / 2**20:.0f}" for size in (m.trainer_bytes, m.server_bytes)]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="for the model, logs and files; kept")
    parser.add_argument("--python", required=True, help="interpreter of the environment that has sglang")
    parser.add_argument("--size-gb", type=float, default=1.04, help="of the weights, default: 1.04")
    parser.add_argument("--bucket-mib", type=int, default=512, help="rollout.bucket_mib, default: 512")
    parser.add_argument("--repetitions", type=int, default=3)
    options = parser.parse_args()
    model = ModelConfig(hf_path=str(make_model(options.folder, options.size_gb)), dtype="bfloat16")
    cfg = SGLangConfig(python=options.python)
    with ServerPool(cfg, model, options.folder / "logs", on_cpu=True) as pool:
        bench = Bench(model, options.folder, options.bucket_mib, pool.addresses()[0].url)
        found = measure(bench, options.repetitions)
        bench.close()
    print(f"{bench.num_bytes / 1e9:.2f} GB, buckets of {options.bucket_mib} MiB, {os.cpu_count()} cores\n")
    print(table(found, bench.num_bytes))


if __name__ == "__main__":
    main()
