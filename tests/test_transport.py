"""Weights travel into real SGLang servers, and what happens to a push when a server dies or hangs."""

from __future__ import annotations

import io
import os
import pickle
import time
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from torch import Tensor
from torch.multiprocessing import reductions
from transformers import AutoModelForCausalLM

from apo_megatron.config.rollout import SGLangConfig
from apo_megatron.errors import ConfigError
from apo_megatron.rollout.event_loop import EventLoopThread
from apo_megatron.rollout.server import ServerAddress, ServerPool
from apo_megatron.rollout.transport import build_transport
from apo_megatron.rollout.transports.addresses import address_towards, is_here
from apo_megatron.rollout.transports.delivery import BucketTransport, Delivery
from apo_megatron.rollout.transports.flat_bucket import FlatBucket, pieces
from apo_megatron.rollout.transports.pickled import bucket_payload, value
from apo_megatron.rollout.transports.shared_memory import SharedMemory
from apo_megatron.rollout.transports.tensors import TensorTransport, _handle, memory_ranks_of
from tests.distributed import DistributedRun, run_distributed
from tests.sglang_models import VOCAB_SIZE, other_model, served_model
from tests.sglang_servers import sglang_servers
from tests.workers.transport import ServersUnpickler, unpickled

TENSORS: list[tuple[str, Tensor]] = [
    ("a", torch.arange(3, dtype=torch.bfloat16)),
    ("b", torch.arange(10, dtype=torch.float32).view(2, 5).t()),  # not contiguous
    ("c", torch.tensor(2.5, dtype=torch.float16)),
]


def assert_same_tensors(found: dict[str, Tensor]) -> None:
    assert found.keys() == dict(TENSORS).keys()
    for name, tensor in TENSORS:
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor), name


def test_flat_bucket_has_no_gaps_and_aligned_tensors() -> None:
    layout = FlatBucket(TENSORS)
    assert [place.name for place in layout.places] == ["b", "a", "c"]
    ends = [0, *(place.end for place in layout.places)]
    assert [place.start for place in layout.places] == ends[:-1] and layout.num_bytes == ends[-1] == 48
    assert all(place.start % place.dtype.itemsize == 0 for place in layout.places)


def test_pieces_keep_order_and_bound() -> None:
    tensors = [(str(n), torch.zeros(n, dtype=torch.uint8)) for n in (3, 4, 9, 1, 1)]
    assert [[name for name, _ in piece] for piece in pieces(tensors, 7)] == [["3", "4"], ["9"], ["1", "1"]]


def test_inline_payload_is_what_the_server_takes() -> None:
    layout = FlatBucket(TENSORS)
    payload = bucket_payload(value(layout.flatten(torch.device("cpu"))), layout.places)
    assert_same_tensors(unpickled(payload))


def test_shared_memory_is_mapped_and_removed() -> None:
    memory = SharedMemory()
    layout = FlatBucket(TENSORS)
    payloads = []
    for start in (0, 64):
        segment = memory.allocate(256)
        layout.copy_to(segment[start:])
        payload = bucket_payload(memory.tensor(256), layout.places, start)
        # In another process: torch maps what is its own without asking anybody.
        (found,) = run_distributed(1, "tests.workers.transport:map_and_clear", {"payload": payload})
        assert_same_tensors(found)
        assert not segment[start : start + layout.num_bytes].any()  # it was this memory, not a copy
        payloads.append(payload)
    assert payloads[0] != payloads[1]  # a name is never used for other memory
    with pytest.raises(OSError):
        memory.allocate(2**50)
    memory.close()
    assert not _files_of(memory)


def _files_of(memory: SharedMemory) -> list[Path]:
    return list(Path("/dev/shm").glob(f"*{memory._stem}*"))


def test_device_handle_names_the_device_by_uuid(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a GPU: what torch would give for a handle is made up, the pickle is the real one."""
    arguments = (
        *(Tensor, torch.Size([48]), (1,), 0, torch.storage.TypedStorage, torch.uint8, 3),
        *(b"handle", 64, 0, False, b"counter", 8, b"event", True),
    )
    monkeypatch.setattr(reductions, "reduce_tensor", lambda flat: (reductions.rebuild_cuda_tensor, arguments))
    device_module = SimpleNamespace(
        get_device_properties=lambda device: SimpleNamespace(uuid=f"GPU-{device}")
    )
    monkeypatch.setattr(torch, "get_device_module", lambda device: device_module)
    rebuilt = ServersUnpickler(
        io.BytesIO(pickle.PROTO + b"\3" + _handle(torch.zeros(48)) + pickle.STOP)
    ).load()
    assert rebuilt == (*arguments[:6], "GPU-3", *arguments[7:])


def test_tensors_do_not_reach_gpus_of_others(tmp_path: Path) -> None:
    parallel: Any = SimpleNamespace(device=torch.device("meta"))
    loop: Any = None
    cfg = SGLangConfig(weight_transport="tensors")
    with pytest.raises(ConfigError, match="weight_transport=tensors with servers on GPUs of their own"):
        build_transport(cfg, parallel, loop, tmp_path, same_machine=True)


def test_colocated_servers_get_tensors_wherever_they_run(tmp_path: Path) -> None:
    parallel: Any = SimpleNamespace(device=torch.device("cuda"), world=1, rank=0, is_main=True)
    loop: Any = None
    transport = build_transport(SGLangConfig(colocated=True), parallel, loop, tmp_path, same_machine=False)
    assert isinstance(transport, TensorTransport)
    with pytest.raises(ConfigError, match="broadcast with colocated=true.*Set tensors"):
        cfg = SGLangConfig(colocated=True, weight_transport="broadcast")
        build_transport(cfg, parallel, loop, tmp_path, same_machine=True)


def test_each_rank_of_a_server_maps_memory_of_its_own_gpu() -> None:
    assert memory_ranks_of(1, 4, range(4, 12)) == (4, 5, 6, 7)
    assert memory_ranks_of(2, 4, range(4, 12)) == (8, 9, 10, 11)
    assert memory_ranks_of(0, 1, range(2)) == (0,)
    assert memory_ranks_of(5, 1, [0, 1]) == (1,)  # on CPUs, more servers than ranks
    assert memory_ranks_of(0, 2, []) == ()


class OneRank(BucketTransport):
    """Sends nothing."""

    def close(self) -> None: ...

    def _prepare(self, source: Any, delivery: Delivery) -> None: ...

    def _send(self, bucket: FlatBucket, delivery: Delivery, is_last: bool) -> None: ...

    def _finish(self, delivery: Delivery) -> None: ...


class BucketsThatAreDropped:
    """Each must be gone before the next is made."""

    num_made = 0

    def tensor_specs(self) -> list[int]:
        return [0, 0, 0]

    def buckets(self) -> Iterator[list[tuple[str, Tensor]]]:
        for _ in range(3):
            bucket = [("weight", torch.zeros(4))]
            last = weakref.ref(bucket[0][1])
            yield bucket
            del bucket
            assert last() is None
            self.num_made += 1


def test_one_bucket_is_held_at_a_time() -> None:
    loop = EventLoopThread()
    parallel: Any = SimpleNamespace(device=torch.device("cpu"), world=1, rank=0, is_main=True)
    source: Any = BucketsThatAreDropped()
    assert OneRank(parallel, loop, 1.0).push(source, [], "label") == {}
    assert source.num_made == 3
    loop.close()


def test_a_shared_weight_folder_is_cleared_of_this_runs_files_only(tmp_path: Path) -> None:
    parallel: Any = SimpleNamespace(device=torch.device("cpu"), world=1, rank=0, is_main=True)
    loop: Any = None
    cfg = SGLangConfig(weight_transport="disk", weight_folder=str(tmp_path / "shared"))
    folders = []
    for run in ("a/run", "b/run", "a/run"):
        transport: Any = build_transport(cfg, parallel, loop, tmp_path / run / "rollout_weights", False)
        folders.append(transport._folder)
        folders[-1].mkdir(parents=True, exist_ok=True)
        (folders[-1] / "half a model").write_text("")
        assert all(folder.parent == tmp_path / "shared" for folder in folders)
        if run == "a/run":
            build_transport(cfg, parallel, loop, tmp_path / run / "rollout_weights", False)
            assert not folders[-1].exists()
    assert folders[0] == folders[2] != folders[1] and folders[1].exists()


def test_what_a_killed_process_left_is_removed() -> None:
    memory = SharedMemory()
    memory.allocate(64)
    SharedMemory().close()
    assert len(_files_of(memory)) == 3  # in use
    os.close(memory._lock)  # as the end of a process does
    SharedMemory().close()
    assert not _files_of(memory)


def test_addresses() -> None:
    assert address_towards("http://127.0.0.1:30000") == "127.0.0.1"
    assert is_here("http://127.0.0.1:30000", True) and not is_here("http://localhost:30000", False)
    assert not is_here("http://192.0.2.1:30000", True)  # reserved for documentation


def payload_for(servers: ServerPool, folder: Path, timeout: float) -> dict[str, Any]:
    return {
        "layout": {"tensor_parallel_size": 2},
        "servers": [(server.name, server.url) for server in servers.addresses()],
        "hf_path": str(served_model()),
        "dtype": "float32",
        "bucket_bytes": 40_000,
        "timeout": timeout,
        "folder": str(folder),
    }


def test_every_transport_brings_exactly_the_weights(tmp_path: Path) -> None:
    """TP2 ranks, two servers, one of the older generation: pushed forth and back by each transport."""
    servers = sglang_servers(served_model(), num_servers=2)
    prompt = np.random.default_rng(0).integers(2, VOCAB_SIZE, 12).astype(np.int32)
    kinds = ("tensors", "broadcast", "disk")
    pushes = [
        {"transport": kind, "hf_path": str(path), "label": f"{kind}-{path.name}"}
        for kind in kinds
        for path in (other_model(), served_model())
    ]
    payload = payload_for(servers, tmp_path, timeout=120.0) | {
        "pushes": pushes,
        "prompt": prompt.tolist(),
        "watch_labels": True,
        "older": [servers.addresses()[1].name],
    }
    results = run_distributed(2, "tests.workers.transport:push_weights", payload)
    assert [r["problems"] for rank in results for r in rank] == [{}] * 2 * len(pushes)

    expected = {path.name: _greedy(path, prompt) for path in (other_model(), served_model())}
    checksums: dict[str, set[str]] = {path: set() for path in expected}
    for push, before, result in zip(pushes, [None, *pushes], results[0], strict=False):
        # As long as something is missing the old label stays.
        assert before is None or result["labels_meanwhile"] == [before["label"]]
        model = Path(push["hf_path"]).name
        tokens, log_probs = expected[model]
        for seen in result["seen"]:
            assert seen["label"] == push["label"]
            assert seen["tokens"] == tokens, push
            assert np.abs(np.array(seen["log_probs"]) - log_probs).max() < 1e-3, push
            checksums[model].add(seen["checksum"])
    assert all(len(found) == 1 for found in checksums.values())
    assert checksums["served"] != checksums["other"]
    assert list(tmp_path.iterdir()) == []  # the disk transport has cleaned up


@torch.inference_mode()
def _greedy(path: Path, prompt: np.ndarray) -> tuple[list[int], np.ndarray]:
    """Eight more tokens, and the log-probs of prompt tokens 1, 2, ..."""
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    tokens = torch.from_numpy(prompt.astype(np.int64))
    log_probs = torch.log_softmax(model(tokens[None]).logits[0], dim=-1)
    of_prompt = log_probs[:-1].gather(-1, tokens[1:, None])[:, 0].numpy()
    for _ in range(8):
        tokens = torch.cat([tokens, model(tokens[None]).logits[0, -1].argmax()[None]])
    return tokens[len(prompt) :].tolist(), of_prompt


def test_a_hung_server_holds_a_push_up_for_one_time_out(tmp_path: Path) -> None:
    servers = sglang_servers(served_model(), num_servers=2)
    for transport in ("disk", "broadcast"):
        stopped: list[psutil.Process] = []

        def stop(process: psutil.Process, stopped: list[psutil.Process] = stopped) -> None:
            stopped += [process, *process.children(recursive=True)]
            for one in stopped:
                one.suspend()

        try:
            result = _push_with_fault(servers, transport, tmp_path / transport, 5.0, stop)
        finally:
            for one in stopped:
                one.resume()
        assert 4.0 < result["seconds"] < 14.0, transport
    # Once it goes on it takes weights again.
    push = {"transport": "broadcast", "hf_path": str(other_model()), "label": "again"}
    payload = payload_for(servers, tmp_path, timeout=60.0) | {"pushes": [push]}
    ((again,), _) = run_distributed(2, "tests.workers.transport:push_weights", payload)
    assert again["problems"] == {}
    assert [server["label"] for server in again["seen"]] == ["again", "again"]


@pytest.mark.parametrize("transport", ["tensors", "broadcast"])
def test_a_killed_server_is_noticed_at_once(transport: str, tmp_path: Path) -> None:
    servers = sglang_servers(served_model(), num_servers=2)
    result = _push_with_fault(servers, transport, tmp_path, 60.0, psutil.Process.kill)
    assert result["seconds"] < 30.0


def _push_with_fault(
    servers: ServerPool, transport: str, folder: Path, timeout: float, fault: Callable[[psutil.Process], None]
) -> dict[str, Any]:
    """Hit the second server while it is being pushed to; the push in which that is noticed."""
    survivor, victim = servers.addresses()
    folder.mkdir(exist_ok=True)
    pushing = folder / "pushing"
    payload = payload_for(servers, folder, timeout) | {
        "transport": transport,
        "pushing": str(pushing),
        "max_pushes": 1000,
    }
    with DistributedRun(2, "tests.workers.transport:push_until_problem", payload) as run:
        while not pushing.exists() and run.exit_codes(0.0) == [None, None]:
            time.sleep(0.05)
        time.sleep(0.2)
        fault(_process_of(victim))
        results = run.results(120.0)
    assert results[0]["problems"] == results[1]["problems"]
    assert list(results[0]["problems"]) == [victim.name]
    seen = results[0]["seen"]
    assert [server["name"] for server in seen] == [survivor.name]
    assert seen[0]["label"] == str(results[0]["number"])
    return results[0]


def _process_of(server: ServerAddress) -> psutil.Process:
    port = int(server.url.rpartition(":")[2])
    return next(
        psutil.Process(connection.pid)
        for connection in psutil.net_connections("tcp")
        if connection.status == psutil.CONN_LISTEN and connection.laddr.port == port and connection.pid
    )
