"""What each method does to Pass@1 and Pass@256 on Countdown, at the same problems, steps and tuning budget.

    python examples/countdown/compare.py --tune --seeds 0 1 2 --jobs 2
    python examples/countdown/compare.py --methods grpo apo cispo      # untuned, as methods.py says

    OUT/seed0/data, base, base_test    problems, the cold-started model, its Pass@K
    OUT/seed0/METHOD                   100 steps from that base, evaluated on test.jsonl
    OUT/seed0/tuned/METHOD             --tune: the same with the setting that was chosen
    OUT/seed3/tuning/METHOD/TRIAL      --tune: the same on a seed of its own, evaluated on validation.jsonl
    OUT                                results.json, table.md, frontier.png

With --tune every method gets six trials: the same two learning rates for each of three values of its most
important setting (P3O, which has none: six learning rates). The trial with the largest sqrt(Pass@1 x
Pass@256) on the validation problems is then run on all seeds and evaluated on the test problems, which
nothing was chosen on. That score is the area which a point of the picture dominates: gaining a tenth of
Pass@1 is worth losing a tenth of Pass@256.

Each run is a command of its own, the first line of its log (OUT/.../METHOD.log). Run again, this goes on
after what has finished with the same command and YAML file; what failed, or took 20 times as long as
expected, is shown as failed, and tried again the next time. Data and bases are never made anew: where those
in OUT are not what would be made now, this says so and ends. For new ones choose another OUT.
"""

from __future__ import annotations

import argparse
import shlex
import signal
import sys
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path

from compare_results import PAGE, MethodRuns, TrialRun, best_trial, shown, with_section, write_results
from methods import METHODS, Method, Trial, trials
from report import Counts, read_counts
from side_by_side import Executor, Workers, run_all
from stages import (
    BASE,
    HERE,
    Progress,
    Stage,
    StageFailed,
    data_stage,
    digest_of,
    program,
    refuse_others,
    relative,
    sft_stage,
    short,
)

from apo_megatron import __version__
from apo_megatron.errors import ConfigError, DataError
from apo_megatron.telemetry.progress import duration

OUT, QUICK_OUT = "runs/compare", "runs/compare_quick"
SEEDS_OF_DOCS = 3
BASE_TEST = "base_test"
DATA = ("--num-validation", "200", "--num-test", "400")
QUICK_DATA = (
    *("--num-demonstrations", "25600", "--num-train", "256", "--num-heldout", "8"),
    *("--num-validation", "8", "--num-test", "8"),
)
# A base that solves about one per cent: some groups are mixed, and runs learn.
QUICK_BASE = ("train.num_steps=100", "optimizer.lr=4e-3", "optimizer.lr_warmup_steps=10")
QUICK_MEASUREMENT = ("evaluation.num_samples=16", "evaluation.ks=[1, 16]")
QUICK_RUN = (
    "train.num_steps=2",
    "data.prompts_per_step=16",
    "optimizer.lr_warmup_steps=0",
    *QUICK_MEASUREMENT,
)
KINDS_OF_A_BASE = ("data", "cold start", "evaluation")


def make_executor(num_slots: int) -> AbstractContextManager[Executor]:
    """What runs the commands."""
    return Workers(num_slots)


@dataclass
class Comparison:
    """The stages of one comparison under ``out``, and what has failed of them."""

    out: Path
    executor: Executor
    progress: Progress
    quick: bool
    fresh: bool
    failures: dict[Path, str] = field(default_factory=dict)
    digest: str = field(default_factory=lambda: digest_of(HERE / "compare.yaml"))  # of every training

    def folder(self, seed: int) -> Path:
        return self.out / f"seed{seed}"

    def prepare(self, seeds: Sequence[int]) -> None:
        """Problems, a base and its Pass@K for each seed. Raises StageFailed, and DataError for other ones."""
        for seed in seeds:
            refuse_others(self._data(seed), built_before=())
            refuse_others(self._base(seed), built_before=("data",))
        for make in (self._data, self._base, self._base_test):
            failures = self._run([make(seed) for seed in seeds], fresh=False)
            if failures:
                raise StageFailed(f"nothing can be compared: {'; '.join(failures.values())}", 1)

    def tune(self, methods: Mapping[str, Method], seed: int) -> dict[str, list[TrialRun]]:
        """All trials of all methods on one seed's validation problems."""
        planned = {
            name: [(trial, self._training(name, seed, trial, is_tuning=True)) for trial in trials(method)]
            for name, method in methods.items()
        }
        self.failures |= self._run([stage for runs in planned.values() for _, stage in runs], self.fresh)
        return {
            name: [TrialRun(trial, self._counts(stage), self._reason(stage)) for trial, stage in runs]
            for name, runs in planned.items()
        }

    def train(self, chosen: Mapping[str, Trial], seeds: Sequence[int]) -> dict[str, dict[int, Stage]]:
        """Each method with its trial on every seed: its stages by seed."""
        planned = {
            name: {seed: self._training(name, seed, trial) for seed in seeds}
            for name, trial in chosen.items()
        }
        self.failures |= self._run(
            [stage for runs in planned.values() for stage in runs.values()], self.fresh
        )
        return planned

    def method_runs(
        self,
        method: Method,
        tuning: list[TrialRun],
        trial: Trial | None,
        stages: Mapping[int, Stage],
    ) -> MethodRuns:
        """What came of one method."""
        reasons = [f"seed {seed}: {reason}" for seed, s in stages.items() if (reason := self._reason(s))]
        if trial is None:
            reasons = ["every trial failed, the last: " + (tuning[-1].failed or "")]
        counts = {seed: found for seed, s in stages.items() if (found := self._counts(s))}
        folders = {seed: stages[seed].folder for seed in counts}
        return MethodRuns(method, tuning, trial, counts, folders, "; ".join(reasons))

    def base_counts(self, seeds: Sequence[int]) -> dict[int, Counts]:
        """The evaluations of the bases. Raises DataError."""
        return {seed: read_counts(self._base_test(seed).results[0]) for seed in seeds}

    def _run(self, stages: Sequence[Stage], fresh: bool) -> dict[Path, str]:
        return run_all(stages, self.executor, self.progress, fresh, self._describe)

    def _describe(self, stage: Stage) -> str:
        counts = self._counts(stage)
        return "" if counts is None else shown(counts)

    def _counts(self, stage: Stage) -> Counts | None:
        is_measured = stage.results[0].name in ("evaluation_final.json", "results.json")
        return read_counts(stage.results[0]) if is_measured and stage.is_finished() else None

    def _reason(self, stage: Stage) -> str:
        return self.failures.get(stage.folder, "")

    def _data(self, seed: int) -> Stage:
        options = QUICK_DATA if self.quick else DATA
        return data_stage(self.folder(seed) / "data", seed, options)

    def _base(self, seed: int) -> Stage:
        overrides = QUICK_BASE if self.quick else ()
        return sft_stage(self.folder(seed) / BASE, seed, 1, overrides, "cold start")

    def _base_test(self, seed: int) -> Stage:
        folder = self.folder(seed) / BASE_TEST
        overrides = (
            f"model.hf_path={self.folder(seed) / BASE / 'hf'}",
            f"benchmarks=[{{name: countdown, path: '{self.folder(seed) / 'data' / 'test.jsonl'}'}}]",
            f"output_dir={folder}",
            "evaluation.ks=[1, 256]",
            *(QUICK_MEASUREMENT if self.quick else ()),
        )
        config = HERE / "evaluate.yaml"
        command = (sys.executable, "-m", "apo_megatron.evaluate", "--config", str(config), *overrides)
        title, results = f"Pass@K of the base (seed {seed})", (folder / "results.json",)
        return Stage(title, "evaluation", folder, relative(command), results, digest_of(config))

    def _training(self, name: str, seed: int, trial: Trial, is_tuning: bool = False) -> Stage:
        method, of_seed = METHODS[name], self.folder(seed)
        tried = trial.name(method)
        final = of_seed / name if trial == Trial() else of_seed / "tuned" / name
        folder = of_seed / "tuning" / name / tried if is_tuning else final
        overrides = (
            f"model.hf_path={of_seed / BASE / 'hf'}",
            f"data.train_path={of_seed / 'data' / 'train.jsonl'}",
            f"evaluation.data_path={of_seed / 'data' / ('validation' if is_tuning else 'test')}.jsonl",
            f"train.run_dir={folder}",
            f"train.seed={seed}",
            *method.settings,
            *trial.words(method),
            *(QUICK_RUN if self.quick else ()),
        )
        command = program(1, "apo_megatron.train", HERE / "compare.yaml", overrides)
        title = f"{name} {tried} ({'tuning' if is_tuning else f'seed {seed}'})"
        return Stage(title, "run", folder, command, (folder / "evaluation_final.json",), self.digest)


def compare(options: argparse.Namespace, out: Path, executor: Executor) -> list[Path]:
    """Run all that is missing and write the results; the files written.

    Raises StageFailed, DataError, ConfigError.
    """
    if options.update_docs:
        with_section(PAGE.read_text(), "", "")  # is there a place? Before hours of work
    methods = {name: METHODS[name] for name in options.methods}
    seeds = options.seeds
    bases = list(dict.fromkeys([*seeds, *([options.tuning_seed] if options.tune else [])]))
    num_trials = sum(len(trials(method)) for method in methods.values()) if options.tune else 0
    kinds = [*KINDS_OF_A_BASE * len(bases), *["run"] * (num_trials + len(seeds) * len(methods))]
    progress = Progress(kinds, side_by_side=options.jobs)
    comparison = Comparison(out, executor, progress, options.quick, options.fresh)
    print(
        f"{len(methods)} methods, {len(kinds)} stages, {options.jobs} at a time: expected about "
        f"{duration(progress.seconds_left)}, less what is there",
        flush=True,
    )
    comparison.prepare(bases)
    tuning = comparison.tune(methods, options.tuning_seed) if options.tune else {}
    chosen = {name: best_trial(tuning[name]) if options.tune else Trial() for name in methods}
    runs = comparison.train({name: trial for name, trial in chosen.items() if trial is not None}, seeds)
    found = {
        name: comparison.method_runs(method, tuning.get(name, []), chosen[name], runs.get(name, {}))
        for name, method in methods.items()
    }
    settings = {
        "command": shlex.join(["python", "examples/countdown/compare.py", *options.words]),
        "seeds": seeds,
        "tuning_seed": options.tuning_seed if options.tune else None,
        "quick": options.quick,
        "version": __version__,
    }
    print(f"\n=== results | elapsed {duration(progress.elapsed)}\n", flush=True)
    return write_results(out, comparison.base_counts(seeds), found, settings, options.update_docs)


def main(argv: Sequence[str] | None = None) -> int:
    options = _parse(sys.argv[1:] if argv is None else argv)
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # so that runs end with us
    try:
        with make_executor(options.jobs) as executor:
            written = compare(options, Path(options.out).resolve(), executor)
    except StageFailed as error:
        print(f"\nerror: {error}", file=sys.stderr, flush=True)
        return error.code
    except (ConfigError, DataError) as error:
        print(f"\nerror: {error}", file=sys.stderr, flush=True)
        return 2
    except KeyboardInterrupt:
        print("\ninterrupted: run the same command again to go on", file=sys.stderr, flush=True)
        return 130
    for path in written:
        print(f"wrote {short(path)}")
    if options.quick:
        print("--quick: this shows that everything runs; the numbers mean nothing")
    return 0


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--out", help=f"where everything goes (default: {OUT}; with --quick {QUICK_OUT})")
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS), metavar="NAME",
                        help="the files written are of these alone, whatever else OUT holds "
                        f"(default: all of {', '.join(METHODS)})")  # fmt: skip
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of data and base")
    parser.add_argument("--tune", action="store_true", help="six trials a method first")
    parser.add_argument(
        "--tuning-seed", type=int, default=3, help="seed of the trials (default: %(default)s)"
    )
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time (default: %(default)s)")
    parser.add_argument("--quick", action="store_true", help="two steps a run: does it run? Not a result")
    parser.add_argument(
        "--fresh",
        action="store_true",
        help="repeat the runs (and trials) of --methods on --seeds, on the same bases",
    )
    parser.add_argument(
        "--update-docs",
        action="store_true",
        help="put table and picture into docs/methods.md (with --tune, all "
        f"methods and {SEEDS_OF_DOCS} seeds or more)",
    )
    options = parser.parse_args(argv)
    options.seeds, options.methods = list(dict.fromkeys(options.seeds)), list(dict.fromkeys(options.methods))
    options.words = list(argv)
    if options.jobs < 1:
        parser.error(f"--jobs {options.jobs}: expected 1 or more")
    if options.tune and options.tuning_seed in options.seeds:
        parser.error(f"--tuning-seed {options.tuning_seed} is one of --seeds: choose a seed for tuning alone")
    is_whole = options.tune and set(options.methods) == set(METHODS) and len(options.seeds) >= SEEDS_OF_DOCS
    if options.update_docs and (options.quick or not is_whole):
        parser.error(
            f"--update-docs needs --tune, all methods, {SEEDS_OF_DOCS} seeds or more, and no --quick"
        )
    options.out = options.out or (QUICK_OUT if options.quick else OUT)
    return options


if __name__ == "__main__":
    sys.exit(main())
