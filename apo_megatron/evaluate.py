"""Pass@K and its neighbours of a checkpoint, of SGLang servers, or of generations that exist already.

    python -m apo_megatron.evaluate --config examples/countdown/evaluate.yaml model.hf_path=runs/demo/apo/hf
    torchrun --nproc-per-node 2 -m apo_megatron.evaluate --config examples/countdown/evaluate.yaml

Every rank holds the whole model and draws its share of the samples. All samples are on disk before they
count: the same command goes on where a killed one was.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from apo_megatron.config import EvalConfig, ParallelConfig, RewardConfig, dump_config
from apo_megatron.data.tokenizer import load_tokenizer
from apo_megatron.errors import ConfigError
from apo_megatron.evaluation.benchmarks import LoadedBenchmark, load_benchmark
from apo_megatron.evaluation.drawing import draw_units
from apo_megatron.evaluation.report import write_report
from apo_megatron.evaluation.result import PassAtKResult
from apo_megatron.evaluation.sample_store import SampleWriter, locked, pin_weights
from apo_megatron.evaluation.standalone import BenchmarkRun, check_results, write_results
from apo_megatron.models.hf_config import read_architecture
from apo_megatron.parallel.state import ParallelContext, init_parallel
from apo_megatron.rewards.interface import WorkerReward
from apo_megatron.rollout.build import load_engine
from apo_megatron.rollout.engine import RolloutEngine
from apo_megatron.rollout.served_weights import AS_SERVED
from apo_megatron.rollout.sglang import SGLangEngine
from apo_megatron.rollout.waiting import on_every_rank
from apo_megatron.telemetry.command import parse_command_line, run_command
from apo_megatron.telemetry.progress import RunDisplay

_MAX_WAIT_MINUTES = 24 * 60.0


def evaluate(cfg: EvalConfig) -> dict[str, PassAtKResult]:
    """Evaluate as ``cfg`` says: the results by benchmark, on every rank. Collective.

    The main rank writes results.json and report.html into cfg.output_dir and prints a table. Raises the
    errors of ``errors.py`` for what a user can mend: those of data and settings before any model is loaded.
    """
    # A rank that is done waits for the slowest one.
    parallel = init_parallel(ParallelConfig(timeout_minutes=_MAX_WAIT_MINUTES), cfg.evaluation.seed)
    if parallel.world > 1 and (cfg.generations is not None or cfg.rollout.engine == "sglang"):
        raise ConfigError(
            f"{parallel.world} ranks with {'generations' if cfg.model is None else 'rollout.engine=sglang'}: "
            "one process is enough, start it without torchrun"
        )
    runs = [BenchmarkRun(cfg, benchmark) for benchmark in _load_benchmarks(cfg)]
    with (
        _alone_in(Path(cfg.output_dir), parallel),
        RunDisplay(len(runs), parallel.is_main, "evaluate") as display,
        _Engine(cfg, parallel, display) as engine,
    ):

        def prepare() -> list[list[int]]:
            if not parallel.is_main:
                return []
            check_results(cfg)
            stages = [run.prepare() for run in runs]
            dump_config(cfg, Path(cfg.output_dir, "config.yaml"))  # not where that has refused
            return stages

        for run, stages in zip(runs, on_every_rank(prepare, parallel)[0], strict=True):
            _complete(run, stages, engine, parallel, display)
        return on_every_rank(lambda: _finish(cfg, runs) if parallel.is_main else {}, parallel)[0]


@contextmanager
def _alone_in(folder: Path, parallel: ParallelContext) -> Iterator[None]:
    """No other evaluation in ``folder``."""
    with ExitStack() as stack:
        if parallel.is_main:
            stack.enter_context(locked(folder))
        yield


def _finish(cfg: EvalConfig, runs: Sequence[BenchmarkRun]) -> dict[str, PassAtKResult]:
    """Compute, write and show the results."""
    folder = Path(cfg.output_dir)
    results = {run.name: run.result() for run in runs}
    write_results(cfg, results)
    write_report([folder], folder / "report.html")
    for name, result in results.items():
        Console().print(result_table(result, f"{cfg.shown_label} on {name}"))
    print(f"written to {folder}: results.json, report.html, generations/")
    return results


def _load_benchmarks(cfg: EvalConfig) -> list[LoadedBenchmark]:
    settings = RewardConfig(**cfg.reward.model_dump())
    if cfg.model is None:
        return [load_benchmark(benchmark, None, settings=settings) for benchmark in cfg.benchmarks]
    tokenizer = load_tokenizer(cfg.model.hf_path)
    limit = read_architecture(cfg.model.hf_path).max_position_embeddings - cfg.rollout.max_new_tokens
    return [
        load_benchmark(benchmark, tokenizer, settings=settings, max_prompt_length=limit)
        for benchmark in cfg.benchmarks
    ]


class _Engine:
    """Loads the engine where a benchmark needs one. Use as a context manager."""

    def __init__(self, cfg: EvalConfig, parallel: ParallelContext, display: RunDisplay) -> None:
        self._cfg, self._parallel, self._display = cfg, parallel, display
        self._engine: RolloutEngine | None = None
        self._closing = ExitStack()

    def get(self) -> RolloutEngine:
        """Collective where it is called first."""
        if self._engine is None:
            assert self._cfg.model is not None, "there are generations otherwise"
            folder = Path(self._cfg.output_dir)
            self._engine = load_engine(
                self._cfg.rollout, self._cfg.model, self._parallel, folder, self._display.note
            )
            self._closing.callback(self._engine.close)
        return self._engine

    def __enter__(self) -> _Engine:
        return self

    def __exit__(self, *exception: object) -> None:
        self._closing.close()


def _complete(
    run: BenchmarkRun, stages: Sequence[int], engine: _Engine, parallel: ParallelContext, display: RunDisplay
) -> None:
    """Draw, or read, and judge what is missing of a benchmark. Collective.

    What a rank raises ends its process, and with it, by torchrun, the others: nobody draws for hours more.
    """
    drawn = run.drawn()
    on_every_rank(lambda: None, parallel)  # nobody writes before all have read
    total = run.num_samples * len(run.prompts)
    have = sum(number < run.num_samples for numbers in drawn.values() for number in numbers)
    if have:
        display.note(f"{run.name}: {have} of {total} samples are there already")
    generations = run.generations()
    units = [] if generations is not None else run.missing_units(drawn, stages)
    mine = units[parallel.rank :: parallel.world]
    if units:
        loaded = engine.get()
        if isinstance(loaded, SGLangEngine):
            pin_weights(run.folder, loaded.weights_label)
    left = total - have if generations is not None else sum(r.num_samples for unit in mine for r in unit)
    with (
        SampleWriter(run.folder, parallel.rank) as writer,
        display.phase(run.name, total=left) as advance,
    ):
        if generations is not None:
            generations.judge(run.reward, writer, drawn, advance)
        elif mine:
            drawing = engine.get()
            draw_units(
                drawing,
                mine,
                run.sampling,
                run.reward,
                writer,
                run.max_running,
                lambda: drawing.recover(AS_SERVED),
                advance,
            )
    on_every_rank(lambda: None, parallel)
    if isinstance(run.reward, WorkerReward):
        run.reward.close()


def result_table(result: PassAtKResult, title: str) -> Table:
    """What a person reads, in percent."""
    table = Table(title=Text(title), caption=_caption(result))
    table.add_column("K", justify="right")
    table.add_column("Pass@K (%)", justify="right")
    table.add_column("95 % interval")
    if result.majority_at_k:
        table.add_column("majority@K (%)", justify="right")
        table.add_column("95 % interval")
    for k in result.pass_at_k:
        table.add_row(
            str(k),
            *_shown(result.pass_at_k, result.ci95, k),
            *(_shown(result.majority_at_k, result.majority_ci95, k) if result.majority_at_k else ()),
        )
    return table


def _shown(
    values: Mapping[int, float], intervals: Mapping[int, tuple[float, float]], k: int
) -> tuple[str, str]:
    low, high = intervals[k]
    return f"{100 * values[k]:.1f}", f"{100 * low:.1f} to {100 * high:.1f}"


def _caption(result: PassAtKResult) -> str:
    parts = [f"{len(result.num_correct)} problems x {result.num_samples} samples"]
    if result.mean_response_length is not None:
        parts.append(f"{result.mean_response_length:.1f} tokens a sample")
    parts.append(f"{100 * result.truncation_rate:.1f} % truncated")
    parts.append(f"{result.distinct_correct:.1f} different right answers a problem")
    if result.verifier_failures:
        parts.append(
            f"{result.verifier_failures} samples ({100 * result.verifier_failure_rate:.2g} %) could not be "
            "judged and count as wrong"
        )
    return ", ".join(parts)


def main(argv: Sequence[str] | None = None) -> int:
    """The command line (default: that of the process); the exit code."""

    def run(words: Sequence[str]) -> None:
        evaluate(parse_command_line(words, EvalConfig, "python -m apo_megatron.evaluate"))

    return run_command(run, argv)


if __name__ == "__main__":
    sys.exit(main())
