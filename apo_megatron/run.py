"""What a run leaves behind and what surrounds the loop: folder, metrics, display, data, evaluation."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from pydantic import BaseModel

from apo_megatron.actor.actor import MegatronActor
from apo_megatron.actor.checkpointer import Checkpointer, DataPosition
from apo_megatron.config import RLConfig, SFTConfig, dump_config
from apo_megatron.data.demonstrations import DemonstrationLoader, load_demonstrations
from apo_megatron.data.prompts import PromptLoader, load_prompts
from apo_megatron.data.tokenizer import check_tokenizer, load_tokenizer
from apo_megatron.errors import ConfigError, DataError, TrainingError
from apo_megatron.evaluation.harness import PassAtKResult, evaluate_pass_at_k
from apo_megatron.files import write_atomically
from apo_megatron.models.hf_config import read_architecture
from apo_megatron.parallel.collectives import any_rank, barrier
from apo_megatron.parallel.state import ParallelContext
from apo_megatron.rewards.registry import Reward, build_reward
from apo_megatron.rollout.engine import RolloutEngine
from apo_megatron.telemetry.metrics import METRICS_FILE, MetricsLogger
from apo_megatron.telemetry.plots import run_picture
from apo_megatron.telemetry.progress import Advance, RunDisplay
from apo_megatron.types import Prompt
from apo_megatron.weights.architecture import Architecture
from apo_megatron.weights.export import export_hf_checkpoint


@dataclass(frozen=True)
class TrainingData:
    """Everything a step needs beside the models; the same on every rank."""

    prompts: PromptLoader
    held_out: list[Prompt]
    reward: Reward


def load_training_data(cfg: RLConfig) -> TrainingData:
    """Read and check data, tokenizer and reward: all that can fail before a model is built."""
    architecture = read_architecture(cfg.model.hf_path)
    tokenizer = load_tokenizer(cfg.model.hf_path)
    check_tokenizer(tokenizer, architecture.vocab_size, cfg.model.hf_path)
    reward = build_reward(cfg.reward)

    def load(path: str, max_rows: int | None = None) -> list[Prompt]:
        prompts = load_prompts(
            path,
            tokenizer,
            cfg.data.prompt_field,
            cfg.data.max_prompt_length,
            reward.required_fields,
            max_rows,
        )
        _check_prompts(prompts, path, reward, cfg.rollout.max_new_tokens, architecture)
        return prompts

    held_out_path = cfg.evaluation.data_path
    return TrainingData(
        prompts=PromptLoader(
            load(cfg.data.train_path), cfg.data.prompts_per_step, cfg.train.seed, cfg.data.shuffle
        ),
        held_out=[] if held_out_path is None else load(held_out_path, cfg.evaluation.max_problems),
        reward=reward,
    )


def _check_prompts(
    prompts: Sequence[Prompt], path: str, reward: Reward, max_new_tokens: int, architecture: Architecture
) -> None:
    """Find now what would otherwise stop the run when the prompt is drawn."""
    for prompt in prompts:
        try:
            reward.score(prompt, [])
        except DataError as error:
            raise DataError(f"{path}: {error}") from error
    longest, limit = max(len(p.token_ids) for p in prompts), architecture.max_position_embeddings
    if longest + max_new_tokens > limit:
        raise ConfigError(
            f"{path}: the longest prompt has {longest} tokens; with rollout.max_new_tokens={max_new_tokens} "
            f"that is more than the model's max_position_embeddings={limit}: lower data.max_prompt_length or "
            "rollout.max_new_tokens"
        )


def load_supervised_data(cfg: SFTConfig) -> DemonstrationLoader:
    """Read and check demonstrations and tokenizer: all that can fail before a model is built."""
    architecture = read_architecture(cfg.model.hf_path)
    tokenizer = load_tokenizer(cfg.model.hf_path)
    check_tokenizer(tokenizer, architecture.vocab_size, cfg.model.hf_path)
    data = cfg.data
    demonstrations = load_demonstrations(
        data.train_path, tokenizer, data.prompt_field, data.response_field, data.max_length
    )
    longest = int(np.diff(demonstrations.offsets).max())
    if longest > architecture.max_position_embeddings:
        raise ConfigError(
            f"{data.train_path}: the longest example has {longest} tokens, more than the model's "
            f"max_position_embeddings={architecture.max_position_embeddings}: lower data.max_length"
        )
    return DemonstrationLoader(demonstrations, cfg.train.batch_size, cfg.train.seed, data.shuffle)


def fixed_settings(cfg: RLConfig | SFTConfig) -> dict[str, Any]:
    """{dotted name: value} of what cannot change when a run is resumed: model, objective, optimizer."""
    sections: dict[str, BaseModel] = {"model": cfg.model, "optimizer": cfg.optimizer}
    settings: dict[str, Any] = {}
    if isinstance(cfg, RLConfig):
        sections["objective"] = cfg.objective
        settings["rollout.temperature"] = cfg.rollout.temperature
    if cfg.optimizer.lr_decay_style != "constant":  # the length of the schedule
        settings["train.num_steps"] = cfg.train.num_steps
    for name, section in sections.items():
        values = section.model_dump(mode="json", exclude={"recompute", "transformer_impl"})
        settings |= {f"{name}.{field}": value for field, value in values.items()}
    return settings


class Run:
    """The run directory and the display of one training run; enter it with ``with``, at once.

    Raises ConfigError where the directory already holds a run that is not to be resumed.
    """

    def __init__(self, cfg: RLConfig | SFTConfig, parallel: ParallelContext, title: str) -> None:
        self.folder = Path(cfg.train.run_dir)
        self._cfg = cfg
        self._parallel = parallel
        self._resumes = cfg.checkpoint.resume == "auto"
        metrics = self.folder / METRICS_FILE
        # Without a finished step there is nothing to lose.
        if any_rank(metrics.exists() and metrics.stat().st_size > 0, parallel) and not self._resumes:
            raise ConfigError(
                f"train.run_dir={self.folder} already holds a run ({METRICS_FILE}): choose another "
                "directory, remove it, or set checkpoint.resume=auto to go on"
            )
        if parallel.is_main:
            self.folder.mkdir(parents=True, exist_ok=True)
        self._logger = MetricsLogger(self.folder, cfg.logging, parallel.is_main, append=self._resumes)
        self._display = RunDisplay(cfg.train.num_steps, parallel.is_main, title)
        barrier(parallel)

    def resume(self, checkpointer: Checkpointer, actor: MegatronActor, data: DataPosition) -> int:
        """Restore the latest checkpoint if configured, write config.yaml; the completed steps."""
        start = checkpointer.load_latest(actor, data, self._cfg.train.num_steps) if self._resumes else 0
        if self._parallel.is_main:
            dump_config(self._cfg, self.folder / "config.yaml")
        return start

    def finish(self, checkpointer: Checkpointer, actor: MegatronActor, data: DataPosition) -> None:
        """What is configured for the end of a run: a checkpoint, the model in Hugging Face format."""
        if self._cfg.checkpoint.save_final:
            checkpointer.save(self._cfg.train.num_steps, actor, data)
        if self._cfg.checkpoint.export_hf:
            source, hf_path = actor.weight_source(), self._cfg.model.hf_path
            export_hf_checkpoint(self.folder / "hf", source, hf_path, self._parallel)

    def phase(self, name: str, total: int | None = None) -> AbstractContextManager[Advance]:
        """Time and show a phase of the step."""
        return self._display.phase(name, total)

    def is_due(self, interval: int, step: int) -> bool:
        """Whether something that happens every ``interval`` steps (0 = never) follows ``step``."""
        return interval > 0 and (step + 1) % interval == 0 and step + 1 < self._cfg.train.num_steps

    def finish_step(self, step: int, metrics: Mapping[str, float]) -> None:
        """Log the metrics of ``step`` (counted from 0) and show its line."""
        self._logger.log(step + 1, {**metrics, **self._display.timings()})
        self._display.step_line(step + 1, metrics)

    def note(self, text: str) -> None:
        """Show a line."""
        self._display.note(text)

    def write_json(self, name: str, content: Any) -> None:
        """Write ``folder``/``name`` on the main rank."""
        if self._parallel.is_main:
            write_atomically(self.folder / name, json.dumps(content, indent=1))

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
