"""Ranks that push the weights of Hugging Face checkpoints into real servers."""

from __future__ import annotations

import base64
import io
import pickle
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from apo_megatron.config import ModelConfig, ParallelConfig
from apo_megatron.config.rollout import SGLangConfig
from apo_megatron.models.build import build_policy_model
from apo_megatron.models.hf_config import read_architecture
from apo_megatron.parallel.state import init_parallel
from apo_megatron.rollout.event_loop import EventLoopThread
from apo_megatron.rollout.sglang_client import ServerError, SGLangClient, open_session
from apo_megatron.rollout.transport import WeightTransport, build_transport
from apo_megatron.weights.formats.safetensors_writer import TensorSpec
from apo_megatron.weights.load import load_hf_weights
from apo_megatron.weights.source import NamedTensors, WeightSource

# Of sglang.srt.utils.common.SafeUnpickler (0.5.23), what our pickles need.
ALLOWED = {
    ("collections", "OrderedDict"),
    ("sglang.srt.weight_sync.tensor_bucket", "FlattenedTensorMetadata"),
    ("torch", "Tensor"),
    ("torch", "bfloat16"),
    ("torch", "float16"),
    ("torch", "float32"),
    ("torch", "uint8"),
    ("torch._utils", "_rebuild_tensor_v2"),
    ("torch.multiprocessing.reductions", "rebuild_cuda_tensor"),
    ("torch.multiprocessing.reductions", "rebuild_storage_filename"),
    ("torch.multiprocessing.reductions", "rebuild_tensor"),
    ("torch.multiprocessing.reductions", "rebuild_typed_storage"),
    ("torch.storage", "TypedStorage"),
    ("torch.storage", "UntypedStorage"),
    ("torch.storage", "_load_from_bytes"),
}


@dataclass
class Metadata:
    """The fields of FlattenedTensorMetadata, in its order."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    start_idx: int
    end_idx: int
    numel: int


class ServersUnpickler(pickle.Unpickler):
    """Takes what the server takes."""

    def find_class(self, module: str, name: str) -> Any:
        assert (module, name) in ALLOWED, f"{module}.{name} is not on the server's list"
        if name == "rebuild_cuda_tensor":
            return lambda *arguments: arguments
        return Metadata if name == "FlattenedTensorMetadata" else super().find_class(module, name)


def unpickled(payload: str) -> dict[str, Tensor]:
    """What the server makes of an entry of serialized_named_tensors."""
    content = ServersUnpickler(io.BytesIO(base64.b64decode(payload, validate=True))).load()
    flat = content["flattened_tensor"]
    assert all(m.numel == m.end_idx - m.start_idx for m in content["metadata"])
    return {m.name: flat[m.start_idx : m.end_idx].view(m.dtype).reshape(m.shape) for m in content["metadata"]}


def map_and_clear(payload: dict[str, Any]) -> dict[str, Tensor]:
    """Copies of the tensors of ``payload["payload"]``, whose own bytes are then set to zero."""
    found = unpickled(payload["payload"])
    copies = {name: tensor.clone() for name, tensor in found.items()}
    for tensor in found.values():
        tensor.zero_()
    return copies


class OlderClient(SGLangClient):
    """Of a server as it was before update sessions: it has no path for them. (The real one wants a session,
    so there is one.)"""

    async def post(self, path: str, body: Any, *, timeout: float) -> Any:
        if path not in ("/begin_weight_update", "/end_weight_update"):
            return await super().post(path, body, timeout=timeout)
        if path == "/begin_weight_update":
            with suppress(ServerError):  # it is open from the push before
                await super().post(path, body, timeout=timeout)
        raise ServerError(self.name, path, "status 404", 404)


class WatchedSource:
    """A WeightSource; before each bucket the label that the rank's server shows is noted."""

    def __init__(self, source: WeightSource, note_label: Callable[[], None]) -> None:
        self._source = source
        self._note_label = note_label

    def tensor_specs(self) -> list[TensorSpec]:
        return self._source.tensor_specs()

    def buckets(self) -> Iterator[NamedTensors]:
        for bucket in self._source.buckets():
            self._note_label()
            yield bucket


class Pusher:
    """A rank with a model and clients of all servers of ``payload``."""

    def __init__(self, payload: dict[str, Any]) -> None:
        self.parallel = init_parallel(ParallelConfig(**payload["layout"]))
        self._payload = payload
        self._loop = EventLoopThread()
        self._session = self._loop.run(open_session(None))
        self._servers = [
            (OlderClient if name in payload.get("older", []) else SGLangClient)(
                name,
                url,
                self._session,
                vocab_size=107,
                update_timeout=payload["timeout"],
                control_timeout=payload["timeout"],
            )
            for name, url in payload["servers"]
        ]
        self._transports: dict[str, WeightTransport] = {}
        hf_path = payload["hf_path"]
        self._architecture = read_architecture(hf_path)
        model = ModelConfig(hf_path=hf_path, dtype=payload["dtype"], make_vocab_size_divisible_by=8)
        self._chunks = build_policy_model(self._architecture, model, self.parallel)

    def load(self, hf_path: str) -> None:
        load_hf_weights(self._chunks, self._architecture, hf_path, self.parallel)

    def push(self, kind: Any, label: str) -> dict[str, Any]:
        """With a transport that is made once."""
        if kind not in self._transports:
            cfg = SGLangConfig(weight_transport=kind, update_timeout=self._payload["timeout"])
            folder = Path(self._payload["folder"])
            self._transports[kind] = build_transport(cfg, self.parallel, self._loop, folder, True)
        source: Any = WeightSource(
            self._chunks, self._architecture, self.parallel, self._payload["bucket_bytes"]
        )
        labels: set[str] = set()
        if self._payload.get("watch_labels") and self.parallel.is_main:
            source = WatchedSource(source, lambda: labels.add(self._label()))
        started = time.monotonic()
        problems = self._transports[kind].push(source, self._servers, label)
        seconds = time.monotonic() - started
        return {"problems": problems, "seconds": seconds, "labels_meanwhile": sorted(labels)}

    def _label(self) -> str:
        """Of the server that this rank serves: others may be ahead by a bucket."""
        return self._loop.run(self._servers[self.parallel.rank].weight_label())

    def look(self, problems: dict[str, str]) -> list[dict[str, Any]]:
        """What the servers without problems say now; the main rank looks."""
        updated = [server for server in self._servers if server.name not in problems]
        return [self._loop.run(self._see(server)) for server in updated] if self.parallel.is_main else []

    async def _see(self, server: SGLangClient) -> dict[str, Any]:
        """What the server says with its weights; ``prompt`` and its greedy continuation, if there is one."""
        seen: dict[str, Any] = {"name": server.name, "label": await server.weight_label()}
        if "prompt" in self._payload:
            prompt = np.array(self._payload["prompt"], dtype=np.int32)
            await server.flush_cache()
            scores = await server.score([prompt])
            sampling = {"temperature": 0.0, "max_new_tokens": 8, "ignore_eos": True}
            body = {"input_ids": prompt, "sampling_params": sampling}
            answer = await server.post("/generate", body, timeout=60.0)
            seen["log_probs"] = scores.log_probs[0].tolist()
            seen["tokens"] = answer["output_ids"]
            seen["checksum"] = await server.checksum()
        return seen

    def close(self) -> None:
        for transport in self._transports.values():
            transport.close()
        self._loop.run(self._session.close())
        self._loop.close()


def push_weights(payload: dict[str, Any]) -> list[dict[str, Any]]:
    """Each of ``pushes``: {transport, hf_path, label}. One transport of a kind is used for all.

    Results have problems, seconds, and on the main rank what each server then says.
    """
    pusher = Pusher(payload)
    results = []
    for push in payload["pushes"]:
        pusher.load(push["hf_path"])
        result = pusher.push(push["transport"], push["label"])
        results.append({**result, "seen": pusher.look(result["problems"])})
    pusher.close()
    return results


def push_until_problem(payload: dict[str, Any]) -> dict[str, Any]:
    """Push the same weights, as 0, 1, 2, ..., until a server has a problem; the result of that push.

    The file ``pushing`` appears after the first push.
    """
    pusher = Pusher(payload)
    pusher.load(payload["hf_path"])
    for number in range(payload["max_pushes"]):
        result = pusher.push(payload["transport"], str(number))
        if number == 0 and pusher.parallel.is_main:
            Path(payload["pushing"]).touch()
        if result["problems"]:
            break
    seen = pusher.look(result["problems"])
    pusher.close()
    return {**result, "number": number, "seen": seen}
