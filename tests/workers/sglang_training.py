"""Runs of ``train`` that write down what was trained on, and hurt their SGLang servers at chosen moments."""

from __future__ import annotations

import os
import signal
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import psutil

import apo_megatron.train
from apo_megatron.config import RLConfig
from apo_megatron.data.collate import TrainingSequence, trained_sequences
from apo_megatron.errors import RolloutError
from apo_megatron.rollout.sglang import SGLangEngine
from apo_megatron.train import train
from apo_megatron.types import SampleGroup
from apo_megatron.weights.source import NamedTensors, WeightSource


def run(payload: dict[str, Any]) -> dict[str, Any]:
    """One run; per step the samples by group and their versions, and how it ended where it failed.

    ``faults``: [{"step": 1, "when": "generate" | "push" | "between", "signal": "SIGKILL", "servers": [0]}]
    hurts servers that rank 0 has started, while samples are drawn, in the middle of a push, or in between.
    """
    steps: list[Any] = []
    faults = [dict(fault) for fault in payload.get("faults", [])]
    done: list[str] = []

    def hurt(moment: str) -> None:
        for fault in faults:
            due = fault["when"] == moment and fault["step"] == len(steps) + 1
            if due and os.environ["RANK"] == "0" and not fault.get("done"):
                fault["done"] = True
                done.append(_hurt(fault["servers"], signal.Signals[fault["signal"]]))

    def record(groups: Sequence[SampleGroup]) -> list[TrainingSequence]:
        hurt("between")
        versions = [sample.completion.versions for group in groups for sample in group.samples]
        steps.append(
            {
                "prompts": [group.prompt.prompt_id for group in groups],
                "num_samples": len(versions),
                "versions": sorted({version for spans in versions for version, _ in spans}),
            }
        )
        return trained_sequences(groups)

    apo_megatron.train.trained_sequences = record
    SGLangEngine.start = _before_return(SGLangEngine.start, lambda: hurt("generate"))  # type: ignore[method-assign]
    WeightSource.buckets = _with_interruption(  # type: ignore[assignment,method-assign]
        WeightSource.buckets, lambda: hurt("push")
    )
    ended = ""
    try:
        train(RLConfig.model_validate(payload["config"]))
    except RolloutError as error:
        ended = str(error)
    return {"steps": steps, "ended": ended, "faults": done}


def _before_return(start: Callable[..., Any], hurt: Callable[[], None]) -> Callable[..., Any]:
    def started(*values: Any, **named: Any) -> Any:
        generation = start(*values, **named)
        time.sleep(0.02)  # the requests are on their way
        hurt()
        return generation

    return started


def _with_interruption(
    buckets: Callable[[WeightSource], Iterator[NamedTensors]], hurt: Callable[[], None]
) -> Callable[[WeightSource], Iterator[NamedTensors]]:
    def interrupted(source: WeightSource) -> Iterator[NamedTensors]:
        for bucket in buckets(source):
            hurt()
            yield bucket

    return interrupted


def server_processes() -> list[psutil.Process]:
    """The HTTP processes of the servers that this process has started, the oldest first."""
    found = []
    for process in psutil.Process().children(recursive=True):
        try:
            words = process.cmdline()
        except psutil.NoSuchProcess:  # a zombie, too
            continue
        is_guard = any(word.endswith("server_guard.py") for word in words)
        if "sglang.launch_server" in words and not is_guard:
            found.append(process)
    return sorted(found, key=lambda process: process.create_time())


def _serves(process: psutil.Process) -> bool:
    try:
        words = process.cmdline()
    except psutil.NoSuchProcess:
        return False
    url = f"http://127.0.0.1:{words[words.index('--port') + 1]}/model_info"
    try:
        with urllib.request.urlopen(url, timeout=5):
            return True
    except OSError:
        return False


def _hurt(servers: Sequence[int], number: signal.Signals) -> str:
    """All processes of these servers, once those that an earlier fault has hit serve again."""
    deadline = time.monotonic() + 300
    while len(processes := server_processes()) < 2 or not all(map(_serves, processes)):
        assert time.monotonic() < deadline, "the servers do not come back"
        time.sleep(0.5)
    chosen = [processes[i] for i in servers]
    for process in chosen:
        for victim in [process, *process.children(recursive=True)]:
            victim.send_signal(number)
    return f"{number.name} to {len(chosen)} servers"
