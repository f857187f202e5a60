"""Runs of ``train`` that write down what was trained on, and hurt their SGLang servers at chosen moments."""

from __future__ import annotations

import os
import signal
import time
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
    SGLangEngine.start = _before_return(SGLangEngine.start, lambda: hurt("generate"))  # type: ignore[method-assign,assignment]
    WeightSource.buckets = _with_interruption(WeightSource.buckets, lambda: hurt("push"))  # type: ignore[method-assign,assignment]
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
    """The HTTP processes of the servers that this process has started, in the order of their names."""
    found = []
    for process in psutil.Process().children(recursive=True):
        words = process.cmdline()
        if "sglang.launch_server" in words:
            found.append((words[words.index("--port") + 1], process))
    return [process for _, process in sorted(found, key=lambda pair: pair[1].create_time())]


def _hurt(servers: Sequence[int], number: signal.Signals) -> str:
    processes = server_processes()
    chosen = [processes[i] for i in servers if i < len(processes)]
    for process in chosen:
        for victim in [process, *process.children(recursive=True)]:
            victim.send_signal(number)
    return f"{number.name} to {len(chosen)} servers"
