"""Ranks that push the weights of Hugging Face checkpoints into real servers."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from apo_megatron.config import ModelConfig, ParallelConfig
from apo_megatron.config.rollout import SGLangConfig
from apo_megatron.models.build import build_policy_model
from apo_megatron.models.hf_config import read_architecture
from apo_megatron.parallel.state import init_parallel
from apo_megatron.rollout.event_loop import EventLoopThread
from apo_megatron.rollout.sglang_client import SGLangClient, open_session
from apo_megatron.rollout.transport import build_transport
from apo_megatron.weights.load import load_hf_weights
from apo_megatron.weights.source import WeightSource


def push_weights(payload: dict[str, Any]) -> list[dict[str, Any]]:
    """Push one checkpoint after the other; problems and seconds of each push.

    ``pushes`` holds {transport, hf_path, label}; ``servers`` (name, url). One transport of each kind is used
    for all. The ranks write ``ready`` after the push before the last and wait for ``go``, if given.
    """
    parallel = init_parallel(ParallelConfig(**payload["layout"]))
    loop = EventLoopThread()
    session = loop.run(open_session(None))
    servers = [
        SGLangClient(name, url, session, vocab_size=107, update_timeout=payload["timeout"])
        for name, url in payload["servers"]
    ]
    first = payload["pushes"][0]["hf_path"]
    architecture = read_architecture(first)
    model = ModelConfig(hf_path=first, dtype=payload["dtype"], make_vocab_size_divisible_by=8)
    chunks = build_policy_model(architecture, model, parallel)
    transports = {}
    results = []
    for push in payload["pushes"]:
        kind = push["transport"]
        if kind not in transports:
            cfg = SGLangConfig(weight_transport=kind, update_timeout=payload["timeout"])
            transports[kind] = build_transport(
                cfg, parallel, loop, Path(payload["folder"]), same_machine=True
            )
        load_hf_weights(chunks, architecture, push["hf_path"], parallel)
        source = WeightSource(chunks, architecture, parallel, payload["bucket_bytes"])
        chosen = [s for s in servers if s.name in push.get("servers", [s.name for s in servers])]
        started = time.monotonic()
        problems = transports[kind].push(source, chosen, push["label"])
        results.append({"problems": problems, "seconds": time.monotonic() - started})
    for transport in transports.values():
        transport.close()
    loop.run(session.close())
    loop.close()
    return results
