"""What drawing a step's samples costs beside the engine: an engine that answers at once, and a clock.

    python tools/benchmark_rollout_overhead.py --quick
    python tools/benchmark_rollout_overhead.py --prompts 64 --samples 16 --tokens 256 --world 1 2

"orchestration" is everything from prompts to samples with advantages on every rank: requests, waiting,
versions, gathering, advantages, metrics, without the time inside the reward. Scoring (an exact
comparison here) and collation are shown beside it. The slowest rank of a step counts, and the least of all
steps, because a busy machine disturbs them.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from apo_megatron.config import ParallelConfig, RLConfig
from apo_megatron.data.collate import make_batch, trained_sequences
from apo_megatron.data.prompts import PromptLoader
from apo_megatron.parallel.collectives import all_gather_objects
from apo_megatron.parallel.state import init_parallel
from apo_megatron.rollout.engine import Progress, SampleRequest, SamplingParams
from apo_megatron.rollout.groups import assign_advantages, group_metrics
from apo_megatron.rollout.sampler import GroupSampler
from apo_megatron.types import Completion, Prompt

PROMPT_TOKENS = 64


@dataclass
class Clock:
    """Seconds by name."""

    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def time(self, name: str) -> Iterator[None]:
        started = time.perf_counter()
        yield
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - started


class InstantEngine:
    """Its completions are there when they are asked for, the same for every prompt."""

    def __init__(self, num_samples: int, num_tokens: int) -> None:
        self.policy_version = 0
        self._answers = [
            Completion(
                token_ids=np.full(num_tokens, sample, np.int32),
                log_probs=np.full(num_tokens, -0.5, np.float32),
                text="right" if sample % 2 else "wrong",
                finish_reason="stop",
                versions=((0, num_tokens),),
            )
            for sample in range(num_samples)
        ]

    def start(
        self, requests: Sequence[SampleRequest], sampling: SamplingParams, progress: Progress | None = None
    ) -> InstantGeneration:
        return InstantGeneration([self._answers] * len(requests))

    def generate(self, *values: Any) -> list[list[Completion]]:
        raise NotImplementedError

    def update_weights(self, source: Any, version: int, probe: Any = None) -> dict[str, float]:
        raise NotImplementedError

    def recover(self, source: Any) -> bool:
        return True

    def sleep(self) -> None: ...

    def close(self) -> None: ...


@dataclass
class InstantGeneration:
    answers: list[list[Completion]]

    def wait(self, seconds: float) -> bool:
        return True

    def num_finished(self) -> int:
        return len(self.answers)

    def stop(self) -> None: ...

    def results(self) -> list[list[Completion]]:
        return self.answers


class TimedReward:
    """Right is what says so."""

    required_fields: Mapping[str, type] = MappingProxyType({})

    def __init__(self, clock: Clock) -> None:
        self._clock = clock

    def score(self, prompt: Prompt, completions: Sequence[Completion]) -> list[float]:
        with self._clock.time("scoring"):
            return [float(completion.text == "right") for completion in completions]


def measure_this_world(options: argparse.Namespace) -> dict[str, float]:
    """Milliseconds per 1,000 samples, by part, of the world this process is a rank of."""
    parallel = init_parallel(ParallelConfig())
    cfg = RLConfig.model_validate(
        {
            "model": {"hf_path": "none"},
            "data": {"train_path": "none", "prompts_per_step": options.prompts},
            "train": {"run_dir": "none", "num_steps": options.steps + 1},
            "rollout": {"group_size": options.samples, "max_new_tokens": options.tokens},
        }
    )
    rng = np.random.default_rng(0)
    prompts = [
        Prompt(f"{i}", "", rng.integers(0, 1000, PROMPT_TOKENS).astype(np.int32))
        for i in range(4 * options.prompts)
    ]
    clock = Clock()
    engine = InstantEngine(options.samples, options.tokens)
    loader = PromptLoader(prompts, options.prompts, seed=0, shuffle=True)
    sampler = GroupSampler(engine, loader, TimedReward(clock), cfg, parallel)
    found: list[dict[str, float]] = []
    for step in range(options.steps + 1):
        clock.seconds.clear()
        all_gather_objects(None, parallel)  # the ranks begin together
        with clock.time("orchestration"):
            samples = sampler.next_groups(step, None)  # type: ignore[arg-type]
            assign_advantages(samples.groups, cfg)
            group_metrics(samples.groups, cfg)
        with clock.time("collation"):
            make_batch(trained_sequences(samples.groups), cfg.objective, parallel, 1, (0, step))
        clock.seconds["orchestration"] -= clock.seconds["scoring"]
        shares = all_gather_objects(dict(clock.seconds), parallel)
        found.append({name: max(share[name] for share in shares) for name in clock.seconds})
    per_thousand = 1e6 / (options.prompts * options.samples)  # ms per 1,000 samples of a second per step
    return {name: min(step[name] for step in found) * per_thousand for name in found[0]}


def start_world(world: int, options: argparse.Namespace) -> dict[str, float]:
    """Run this file again on ``world`` ranks. Raises CalledProcessError where a rank fails."""
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder, "result.json")
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={world}"]
        command += [__file__, "--json", str(result)]
        for name in ("prompts", "samples", "tokens", "steps"):
            command += [f"--{name}", str(getattr(options, name))]
        subprocess.run(command, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=sys.stderr)
        return dict(json.loads(result.read_text()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--prompts", type=int, default=64, help="of one step, default: 64")
    parser.add_argument("--samples", type=int, default=16, help="per prompt, default: 16")
    parser.add_argument("--tokens", type=int, default=256, help="per sample, default: 256")
    parser.add_argument("--steps", type=int, default=50, help="default: 50")
    parser.add_argument("--world", nargs="+", type=int, default=[1, 2], help="ranks, default: 1 2")
    parser.add_argument("--quick", action="store_true", help="five steps")
    parser.add_argument("--json", type=Path, help=argparse.SUPPRESS)  # from start_world to its ranks
    options = parser.parse_args()
    options.steps = 5 if options.quick else options.steps
    if options.json is not None:
        result = measure_this_world(options)
        if os.environ["RANK"] == "0":
            options.json.write_text(json.dumps(result))
        return
    print(f"{options.prompts} prompts x {options.samples} samples x {options.tokens} tokens")
    columns = ["orchestration", "scoring", "collation"]
    print(f"\n| ranks | {' | '.join(columns)} |\n" + "|---" * (1 + len(columns)) + "|")
    for world in options.world:
        ms = start_world(world, options)
        print(f"| {world} | {' | '.join(f'{ms[name]:.2f}' for name in columns)} |")
    print("\nmilliseconds per 1,000 samples")


if __name__ == "__main__":
    main()
