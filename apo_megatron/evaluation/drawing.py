"""Draws the samples that an evaluation still lacks, unit by unit, and judges and stores each unit."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from time import monotonic, sleep

from apo_megatron.errors import RolloutError
from apo_megatron.evaluation.judging import judge
from apo_megatron.evaluation.result import JudgedSample
from apo_megatron.evaluation.sample_store import SampleWriter
from apo_megatron.rewards.interface import Reward
from apo_megatron.rollout.engine import Generation, RolloutEngine, SampleRequest, SamplingParams
from apo_megatron.rollout.groups import check_versions
from apo_megatron.rollout.waiting import POLL_SECONDS
from apo_megatron.types import Prompt

Progress = Callable[[int, int], None]  # (samples, tokens) stored since the last call
Unit = tuple[SampleRequest, ...]

_LOOK_SECONDS = 0.02  # between two looks at what runs


def plan_units(prompts: Sequence[Prompt], numbers: range, unit_size: int) -> list[Unit]:
    """The samples ``numbers`` of all ``prompts`` in units of at most ``unit_size``, which are drawn together.

    Several problems with all their samples, or a part of one's. The plan does not depend on what has been
    drawn: an engine whose rounding depends on the batch gives the same after a restart.
    """
    num_prompts, num_together = max(1, unit_size // len(numbers)), min(len(numbers), unit_size)
    return [
        tuple(
            SampleRequest(prompt, min(num_together, numbers.stop - first), first=first)
            for prompt in prompts[start : start + num_prompts]
        )
        for start in range(0, len(prompts), num_prompts)
        for first in range(numbers.start, numbers.stop, num_together)
    ]


def is_drawn(unit: Unit, drawn: Mapping[str, set[int]]) -> bool:
    """Whether all samples of ``unit`` are among ``drawn``: prompt id -> sample numbers."""
    return all(
        drawn.get(request.prompt.prompt_id, set()).issuperset(
            range(request.first, request.first + request.num_samples)
        )
        for request in unit
    )


def draw_units(
    engine: RolloutEngine,
    units: Sequence[Unit],
    sampling: SamplingParams,
    reward: Reward,
    writer: SampleWriter,
    max_running: int,
    keep_up: Callable[[], bool],
    progress: Progress,
) -> None:
    """Draw, judge and write all ``units``, at most ``max_running`` at a time. Not collective.

    ``keep_up`` is called now and then while units run, for engines that may come back. Raises RolloutError,
    RewardError and DataError; what was written before stays.
    """
    waiting = list(reversed(units))
    running: list[tuple[Unit, Generation]] = []
    looked_at = monotonic()
    while waiting or running:
        while waiting and len(running) < max_running:
            unit = waiting.pop()
            running.append((unit, engine.start(unit, sampling)))
        done = [(unit, generation) for unit, generation in running if generation.wait(0)]
        if done:
            is_done = {id(generation) for _, generation in done}
            running = [pair for pair in running if id(pair[1]) not in is_done]
            samples = _judge_units(done, reward, engine.policy_version)
            writer.write(samples)
            progress(len(samples), sum(sample.num_tokens or 0 for sample in samples))
        else:
            sleep(_LOOK_SECONDS)
        if monotonic() - looked_at > POLL_SECONDS:
            looked_at = monotonic()
            keep_up()


def _judge_units(
    done: Sequence[tuple[Unit, Generation]], reward: Reward, policy_version: int
) -> list[JudgedSample]:
    requests = [request for unit, _ in done for request in unit]
    completions = [drawn for _, generation in done for drawn in generation.results()]
    for request, drawn in zip(requests, completions, strict=True):
        if len(drawn) != request.num_samples:
            raise RolloutError(
                f"problem {request.prompt.prompt_id!r}: the engine gave {len(drawn)} samples, "
                f"{request.num_samples} were asked for"
            )
        check_versions(request.prompt, drawn, policy_version, policy_version)
    return [sample for of_request in judge(reward, requests, completions) for sample in of_request]
