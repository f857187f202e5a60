"""What a run leaves behind and what surrounds the loop: folder, metrics, display, data, evaluation."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from apo_megatron.config import RLConfig, SFTConfig, dump_config
from apo_megatron.data.prompts import PromptLoader, load_prompts
from apo_megatron.data.tokenizer import check_tokenizer, load_tokenizer
from apo_megatron.errors import ConfigError, TrainingError
from apo_megatron.evaluation.harness import PassAtKResult, evaluate_pass_at_k
from apo_megatron.models.hf_config import read_architecture
from apo_megatron.parallel.collectives import any_rank, barrier
from apo_megatron.parallel.state import ParallelContext
from apo_megatron.rewards.registry import Reward, build_reward
from apo_megatron.rollout.engine import RolloutEngine
from apo_megatron.telemetry.metrics import METRICS_FILE, MetricsLogger
from apo_megatron.telemetry.plots import run_picture
from apo_megatron.telemetry.progress import Advance, RunDisplay
from apo_megatron.types import Prompt


@dataclass(frozen=True)
class TrainingData:
    """Everything a step needs beside the models; the same on every rank."""

    prompts: PromptLoader
    held_out: list[Prompt]
    reward: Reward


def load_training_data(cfg: RLConfig) -> TrainingData:
    """Read and check data, tokenizer and reward: all that can fail before a model is built."""
    vocab_size = read_architecture(cfg.model.hf_path).vocab_size
    tokenizer = load_tokenizer(cfg.model.hf_path)
    check_tokenizer(tokenizer, vocab_size, cfg.model.hf_path)
    reward = build_reward(cfg.reward)

    def load(path: str, max_rows: int | None = None) -> list[Prompt]:
        return load_prompts(
            path,
            tokenizer,
            cfg.data.prompt_field,
            cfg.data.max_prompt_length,
            reward.required_fields,
            max_rows,
        )

    held_out_path = cfg.evaluation.data_path
    return TrainingData(
        prompts=PromptLoader(
            load(cfg.data.train_path), cfg.data.prompts_per_step, cfg.train.seed, cfg.data.shuffle
        ),
        held_out=[] if held_out_path is None else load(held_out_path, cfg.evaluation.max_problems),
        reward=reward,
    )


class Run:
    """The run directory and the display of one training run; closed by ``with``.

    Raises ConfigError where the directory already holds a run that is not to be resumed.
    """

    def __init__(self, cfg: RLConfig | SFTConfig, parallel: ParallelContext, title: str) -> None:
        self.folder = Path(cfg.train.run_dir)
        self._parallel = parallel
        self._num_steps = cfg.train.num_steps
        resume = cfg.checkpoint.resume == "auto"
        if any_rank((self.folder / METRICS_FILE).exists(), parallel) and not resume:
            raise ConfigError(
                f"train.run_dir={self.folder} already holds a run ({METRICS_FILE}): choose another "
                "directory, remove it, or set checkpoint.resume=auto to go on"
            )
        if parallel.is_main:
            self.folder.mkdir(parents=True, exist_ok=True)
            dump_config(cfg, self.folder / "config.yaml")
        self._logger = MetricsLogger(self.folder, cfg.logging, parallel.is_main, append=resume)
        self._display = RunDisplay(cfg.train.num_steps, parallel.is_main, title)
        barrier(parallel)

    def phase(self, name: str, total: int | None = None) -> AbstractContextManager[Advance]:
        """Time and show a phase of the step."""
        return self._display.phase(name, total)

    def is_due(self, interval: int, step: int) -> bool:
        """Whether something that happens every ``interval`` steps (0 = never) follows ``step``."""
        return interval > 0 and (step + 1) % interval == 0 and step + 1 < self._num_steps

    def finish_step(self, step: int, metrics: Mapping[str, float]) -> None:
        """Log the metrics of ``step`` (counted from 0) and show its line."""
        self._logger.log(step + 1, {**metrics, **self._display.timings()})
        self._display.step_line(step + 1, metrics)

    def note(self, text: str) -> None:
        """Show a line."""
        self._display.note(text)

    def write_json(self, name: str, content: Any) -> None:
        """Write ``folder``/``name`` on the main rank, aside and then renamed."""
        if self._parallel.is_main:
            aside = self.folder / f".{name}.partial"
            aside.write_text(json.dumps(content, indent=1))
            os.replace(aside, self.folder / name)

    def diverged(self, checkpoint: Path) -> TrainingError:
        """The error of a run whose updates are not finite any more."""
        return TrainingError(
            "the last updates had a loss or gradient that is not finite and were skipped "
            f"(train.max_skipped_updates). The state is saved in {checkpoint}; lower optimizer.lr or look at "
            f"the last lines of {self.folder / METRICS_FILE}"
        )

    def __enter__(self) -> Run:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._display.close()
        self._logger.close()
        if self._parallel.is_main and kind is None:
            run_picture(self.folder)


class Evaluator:
    """Pass@K of the engine's weights on the held-out problems."""

    def __init__(
        self, cfg: RLConfig, parallel: ParallelContext, run: Run, engine: RolloutEngine, data: TrainingData
    ) -> None:
        self._cfg, self._parallel, self._run = cfg, parallel, run
        self._engine, self._data = engine, data

    def run(self, tag: str) -> None:
        """The full evaluation, written to run_dir/evaluation_``tag``.json and shown; collective."""
        if not self._data.held_out:
            return
        result = self._evaluate(self._cfg.evaluation.num_samples)
        self._run.write_json(f"evaluation_{tag}.json", result.to_json())
        shown = "  ".join(f"@{k} {100 * value:.1f}" for k, value in result.pass_at_k.items())
        self._run.note(f"Pass@K ({tag}, {len(result.num_correct)} problems): {shown}")

    def metrics(self) -> dict[str, float]:
        """The smaller evaluation between the ends, as metrics; collective."""
        if not self._data.held_out:
            return {}
        result = self._evaluate(self._cfg.evaluation.interval_num_samples)
        return {f"eval/pass_at_{k}": value for k, value in result.pass_at_k.items()}

    def _evaluate(self, num_samples: int) -> PassAtKResult:
        with self._run.phase("evaluation", total=len(self._data.held_out)) as advance:
            return evaluate_pass_at_k(
                self._engine,
                self._data.held_out,
                self._data.reward,
                self._cfg.evaluation,
                self._cfg.rollout,
                self._parallel,
                num_samples=num_samples,
                progress=advance,
            )


def mean_metrics(updates: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """The mean of each metric over a step's updates that have it; skipped updates are summed."""
    names = {name: None for update in updates for name in update}
    means = {}
    for name in names:
        values = [u[name] for u in updates if name in u and not math.isnan(u[name])]
        if values:
            means[name] = sum(values) / len(values)
    means["skipped_update"] = sum(update.get("skipped_update", 0.0) for update in updates)
    return means
