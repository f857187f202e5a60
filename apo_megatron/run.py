"""What a run leaves behind and what surrounds the loop: folder, metrics, display, checkpoints, evaluation."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

from apo_megatron.actor.actor import MegatronActor
from apo_megatron.actor.checkpoint_files import LATEST_FILE
from apo_megatron.actor.checkpointer import Checkpointer
from apo_megatron.config import RLConfig, SFTConfig, dump_config
from apo_megatron.data.collate import Batch
from apo_megatron.errors import CheckpointError, ConfigError, RunInterrupted, TrainingError
from apo_megatron.evaluation.harness import evaluate_pass_at_k
from apo_megatron.evaluation.result import PassAtKResult
from apo_megatron.files import write_atomically
from apo_megatron.health import activity
from apo_megatron.health.watchdog import Watchdog, put_away
from apo_megatron.objectives.unread_settings import unread_note
from apo_megatron.parallel.collectives import all_gather_objects, any_rank, barrier
from apo_megatron.parallel.memory_use import memory_metrics
from apo_megatron.parallel.state import ParallelContext
from apo_megatron.rollout.engine import RolloutEngine
from apo_megatron.rollout.sampler import StepSamples
from apo_megatron.rollout.step_files import StepFiles
from apo_megatron.telemetry.metrics import METRICS_FILE, MetricsLogger, check_destinations
from apo_megatron.telemetry.outcome import forget_outcome, write_outcome
from apo_megatron.telemetry.progress import Advance, RunDisplay
from apo_megatron.telemetry.run_report import RUN_PAGE, write_run_report
from apo_megatron.telemetry.stop_request import StopRequest
from apo_megatron.training_data import TrainingData
from apo_megatron.weight_sync import WeightSync
from apo_megatron.weights.export import HFExporter

Engine = TypeVar("Engine", bound=RolloutEngine)


class Run:
    """The run directory and the display of one training run; enter it with ``with``, at once.

    Raises ConfigError where the directory already holds a run that is not to be resumed.
    """

    def __init__(self, cfg: RLConfig | SFTConfig, parallel: ParallelContext, title: str) -> None:
        self.folder = Path(cfg.train.run_dir)
        self.checkpoint_folder = self.folder / "checkpoints"
        self._cfg = cfg
        self._parallel = parallel
        self._resumes = cfg.checkpoint.resume == "auto"
        self._refuse_another_run()
        if parallel.is_main:
            check_destinations(cfg.logging)
            self.folder.mkdir(parents=True, exist_ok=True)
            put_away(self.folder)
            forget_outcome(self.folder)
        self._watchdog = Watchdog(
            self.folder,
            parallel.rank,
            parallel.world,
            cfg.parallel.patience_minutes,
            cfg.parallel.timeout_minutes,
        )
        self._logger: MetricsLogger | None = None
        self._step_files: StepFiles | None = None
        self._metrics: Mapping[str, float] = {}  # of the last step
        self._stop_request = StopRequest()
        self._exporter = HFExporter(cfg.model.hf_path, parallel)
        self._display = RunDisplay(cfg.train.num_steps, parallel.is_main, title)
        self._closing = ExitStack()
        barrier(parallel)

    def _refuse_another_run(self) -> None:
        metrics, latest = self.folder / METRICS_FILE, self.checkpoint_folder / LATEST_FILE
        # Without a finished step there is nothing to lose.
        holds_run = latest.exists() or (metrics.exists() and metrics.stat().st_size > 0)
        if self._resumes:
            # One rank looks: on a shared file system the others may see an older state of the folder.
            starts_over = self._parallel.is_main and not latest.exists() and self._had_checkpoints(metrics)
            if any_rank(starts_over, self._parallel):
                raise ConfigError(
                    f"train.run_dir={self.folder} holds metrics of a run but no checkpoint to go on from: "
                    "it would be overwritten. Choose another directory, or remove this one to start anew"
                )
        elif any_rank(holds_run, self._parallel):
            raise ConfigError(
                f"train.run_dir={self.folder} already holds a run ({METRICS_FILE} or checkpoints): choose "
                "another directory, remove it, or set checkpoint.resume=auto (--resume auto) to go on"
            )

    def _had_checkpoints(self, metrics: Path) -> bool:
        """Whether a run with these metrics has come so far that it has a checkpoint, if it writes any."""
        checkpoint = self._cfg.checkpoint
        num_steps = metrics.read_bytes().count(b"\n") if metrics.exists() else 0
        # In the background the first is complete before the second begins.
        return num_steps > checkpoint.interval * (2 if checkpoint.async_save else 1)

    def resume(self, checkpointer: Checkpointer) -> int:
        """Restore the latest checkpoint if configured, write config.yaml; the completed steps."""
        restored = checkpointer.load_latest(self._cfg.train.num_steps) if self._resumes else None
        start = 0 if restored is None else restored.step
        if restored is not None:
            self.note(f"going on after step {start}, from {restored.folder}")
            if not restored.same_layout:
                self.note("the layout is another one: the random state is seeded anew")
        self._logger = MetricsLogger(self.folder, self._cfg.logging, self._parallel.is_main, start)
        if isinstance(self._cfg, RLConfig):
            self._step_files = StepFiles(self._cfg.train, self._parallel, start, self.note)
            self._closing.callback(self._step_files.close)
            if unread := unread_note(self._cfg):
                self.note(unread)
        if self._parallel.is_main:
            dump_config(self._cfg, self.folder / "config.yaml")
        activity.current.begin_step(start + 1)
        return start

    def finish(self, checkpointer: Checkpointer, actor: MegatronActor) -> None:
        """What is configured for the end of a run: a checkpoint, the model in Hugging Face format."""
        if self._step_files is not None:
            self._step_files.finish()
        checkpoint, num_steps = self._cfg.checkpoint, self._cfg.train.num_steps
        if checkpoint.save_final or (checkpoint.interval and num_steps % checkpoint.interval == 0):
            checkpointer.save(num_steps, self._metrics)
        checkpointer.finish()
        if self._cfg.checkpoint.export_hf:
            self._exporter.start(self.folder / "hf", actor.weight_source())
        self._exporter.finish()

    def closing(self, engine: Engine) -> Engine:
        """``engine``, which is closed when the run ends, however it ends."""
        self._closing.callback(engine.close)
        return engine

    @contextmanager
    def phase(self, name: str, total: int | None = None) -> Iterator[Advance]:
        """Time and show a phase of the step."""
        doing = activity.current
        with self._display.phase(name, total) as show, doing.inside(name, total):

            def advance(n: int, tokens: int = 0) -> None:
                doing.done += n
                show(n, tokens)

            yield advance

    def is_due(self, interval: int, step: int) -> bool:
        """Whether something that happens every ``interval`` steps (0 = never) follows ``step``."""
        return interval > 0 and (step + 1) % interval == 0 and step + 1 < self._cfg.train.num_steps

    def save_samples(self, step: int, samples: StepSamples, batch: Batch | None) -> None:
        """Write the samples of ``step`` (counted from 0) into run_dir/rollouts, where it is due; ``batch`` is
        what it trained on, None where it did not. Collective."""
        assert self._step_files is not None, "resume comes first"
        with self.phase("rollout files"):
            self._step_files.save(step + 1, samples, batch)

    def finish_step(
        self, step: int, metrics: Mapping[str, float], actor: MegatronActor, checkpointer: Checkpointer
    ) -> None:
        """Log the metrics of ``step`` (counted from 0), show its line, save and export where that is due.

        Raises TrainingError after too many updates that were not finite, RunInterrupted after a signal that
        asks to stop; the state is saved before either.
        """
        assert self._logger is not None, "resume comes first"
        self._metrics = {**metrics, **self._display.timings(), **memory_metrics(self._parallel)}
        self._logger.log(step + 1, self._metrics)
        self._display.step_line(step + 1, metrics)
        has_diverged = actor.most_consecutive_skips >= self._cfg.train.max_skipped_updates
        stopped_by = self._stopped_by()
        must_end = has_diverged or stopped_by is not None
        with self.phase("checkpoint"):
            if must_end or self.is_due(self._cfg.checkpoint.interval, step):
                if self._step_files is not None:  # a run that goes on from here must not lack this step's
                    self._step_files.finish()
                # The last good state stays beside one that has diverged.
                folder = checkpointer.save(step + 1, self._metrics, keep_all=has_diverged)
            else:
                checkpointer.poll()
            with _completed_on_error(checkpointer):
                if self.is_due(self._cfg.checkpoint.export_hf_interval, step):
                    self._exporter.start(self.folder / f"hf_step_{step + 1:06d}", actor.weight_source())
                else:
                    self._exporter.poll()
            if must_end:
                checkpointer.finish()
                self._exporter.finish()
        if has_diverged:
            raise TrainingError(
                "the last updates had a loss or gradient that is not finite and were skipped "
                f"(train.max_skipped_updates). The state is saved in {folder}; look at the last lines of "
                f"{self.folder / METRICS_FILE}. To go on, write the name of the last good step_* folder into "
                f"{self.checkpoint_folder / LATEST_FILE} or lower optimizer.lr, and give the same command "
                "with --resume auto"
            )
        if stopped_by is not None:
            raise RunInterrupted(
                f"{stopped_by} received: stopped after step {step + 1} of {self._cfg.train.num_steps}, the "
                f"state is saved in {folder}. To go on, give the same command with --resume auto"
            )
        activity.current.begin_step(min(step + 2, self._cfg.train.num_steps))

    def _stopped_by(self) -> str | None:
        """The signal that asked any rank to stop, the same answer on every rank."""
        received = self._stop_request.received
        if not any_rank(received is not None, self._parallel):
            return None
        return next(name for name in all_gather_objects(received, self._parallel) if name is not None)

    def note(self, text: str) -> None:
        """Show a line."""
        self._display.note(text)

    def write_json(self, name: str, content: Any) -> None:
        """Write ``folder``/``name`` on the main rank."""
        if self._parallel.is_main:
            write_atomically(self.folder / name, json.dumps(content, indent=1))

    def __enter__(self) -> Run:
        self._stop_request.__enter__()
        self._watchdog.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with ExitStack() as ending:  # from the last to the first, each of them also where another fails
            if self._parallel.is_main:
                ending.callback(write_outcome, self.folder, error)
            ending.callback(self._watchdog.__exit__)
            if self._logger is not None:
                ending.callback(self._logger.close)
            ending.callback(self._display.close)
            ending.callback(self._stop_request.__exit__, kind, error, trace)
            ending.callback(self._closing.close)
        if self._parallel.is_main and kind is None and self._cfg.logging.report:
            from apo_megatron.telemetry.plots import run_picture  # here: matplotlib, on one rank only

            run_picture(self.folder)
            write_run_report([self.folder], self.folder / RUN_PAGE)


@contextmanager
def _completed_on_error(checkpointer: Checkpointer) -> Iterator[None]:
    """An export that failed must not cost the checkpoint that is being written."""
    try:
        yield
    except CheckpointError as error:  # on every rank
        try:
            checkpointer.finish()
        except CheckpointError as second:
            raise CheckpointError(f"{error}. And: {second}") from error
        raise


class Evaluator:
    """Pass@K of the engine's weights on the held-out problems."""

    def __init__(
        self,
        cfg: RLConfig,
        parallel: ParallelContext,
        run: Run,
        engine: RolloutEngine,
        sync: WeightSync,
        data: TrainingData,
    ) -> None:
        self._cfg, self._parallel, self._run = cfg, parallel, run
        self._engine, self._sync, self._data = engine, sync, data

    def run(self, tag: str, version: int) -> None:
        """The full evaluation of the actor's weights, which are policy ``version``; written to
        run_dir/evaluation_``tag``.json and shown. Collective."""
        if not self._data.held_out:
            return
        result = self._evaluate(self._cfg.evaluation.num_samples, version)
        self._run.write_json(f"evaluation_{tag}.json", result.to_json())
        shown = "  ".join(f"@{k} {100 * value:.1f}" for k, value in result.pass_at_k.items())
        self._run.note(f"Pass@K ({tag}, {len(result.num_correct)} problems): {shown}")

    def metrics(self, version: int) -> dict[str, float]:
        """The smaller evaluation between the ends, as metrics; collective."""
        if not self._data.held_out:
            return {}
        result = self._evaluate(self._cfg.evaluation.interval_num_samples, version)
        return {f"eval/pass_at_{k}": value for k, value in result.pass_at_k.items()}

    def _evaluate(self, num_samples: int, version: int) -> PassAtKResult:
        with (
            self._run.phase("evaluation", total=len(self._data.held_out)) as advance,
            self._sync.lent(version),
        ):
            return evaluate_pass_at_k(
                self._engine,
                self._data.held_out,
                self._data.reward,
                self._cfg.evaluation,
                self._cfg.rollout,
                self._parallel,
                source=self._sync.source,
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
