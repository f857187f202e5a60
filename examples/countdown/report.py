"""Tables and the picture of finished demo runs, from OUT/METHOD or OUT/seed*/METHOD.

    python examples/countdown/report.py runs/demo

demo.py calls it at its end. Over several seeds a table shows mean +- standard deviation over the seeds.
Intervals are 95 % bootstrap intervals over the held-out problems, each with its mean over the seeds: they say
what other problems could change, not what other seeds could.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from rich import box
from rich.console import Console
from rich.table import Table
from stages import BASE

from apo_megatron.errors import DataError
from apo_megatron.evaluation.bootstrap import bootstrap_interval
from apo_megatron.evaluation.pass_at_k import pass_at_k
from apo_megatron.telemetry.plots import comparison_picture, read_history

METHODS = {"grpo": "GRPO", "grpo_kl": "GRPO + KL", "kl_on_wrong": "KL on wrong", "apo": "APO"}
LABELS = {BASE: "base", **METHODS}
TABLE_KS = (1, 8, 32, 64, 256)
BOOTSTRAP_SAMPLES = 10_000
BOOTSTRAP_SEED = 0
LOG_WIDTH = 110  # of a table where there is no terminal
HOW_TO_READ = (
    "Exploration collapse: Pass@1 rises above the base while Pass@K at large K falls below it. What a method "
    "keeps at large K, at the same Pass@1, is support it did not lose."
)


@dataclass(frozen=True)
class Counts:
    """How many of ``num_samples`` answers were right, for each problem: all that Pass@K needs."""

    num_samples: int
    num_correct: np.ndarray  # [P] int64
    ks: tuple[int, ...]

    def per_problem(self, k: int) -> np.ndarray:
        """[P] float64: the Pass@K estimate of each problem."""
        return np.asarray(pass_at_k(self.num_samples, self.num_correct, k))


def read_counts(path: Path) -> Counts:
    """An evaluation that train.py or evaluate.py wrote. Raises DataError, FileNotFoundError."""
    try:
        content = json.loads(path.read_text())
        if "benchmarks" in content:  # of evaluate.py, on one set of problems
            (content,) = content["benchmarks"].values()
        return Counts(
            int(content["num_samples"]),
            np.asarray(content["num_correct"], dtype=np.int64),
            tuple(sorted(int(k) for k in content["pass_at_k"])),
        )
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path}: not an evaluation ({error!r}); repeat the run that wrote it") from error


def base_evaluation(folder: Path) -> Path:
    """The evaluation of the base of one seed, which one of its runs wrote. Raises FileNotFoundError."""
    for name in METHODS:
        path = folder / name / "evaluation_start.json"
        if path.exists():
            return path
    raise FileNotFoundError(2, "no run evaluated the base", str(folder / "*" / "evaluation_start.json"))


def collect(folders: Sequence[Path], methods: Sequence[str]) -> dict[str, list[Counts]]:
    """Method -> its evaluation in each folder (one a seed), the base first.

    Raises DataError, FileNotFoundError.
    """
    counts = {BASE: [read_counts(base_evaluation(folder)) for folder in folders]}
    for method in methods:
        counts[method] = [read_counts(folder / method / "evaluation_final.json") for folder in folders]
    sizes = {(len(c.num_correct), c.num_samples, c.ks) for runs in counts.values() for c in runs}
    if len(sizes) != 1:
        raise DataError(
            f"the evaluations differ in problems, samples or K: {sorted(sizes)}. Repeat the runs "
            "with the same evaluation settings (demo.py --fresh)"
        )
    return counts


def mean_over_seeds(runs: Sequence[Counts], k: int) -> np.ndarray:
    """[P]: the Pass@K of each problem, mean over the seeds (which share the problems)."""
    return np.mean([run.per_problem(k) for run in runs], axis=0)


def summarize(counts: Mapping[str, Sequence[Counts]], seeds: Sequence[int]) -> dict[str, Any]:
    """The content of results.json (without settings); fractions in [0, 1], K as text."""
    first = counts[BASE][0]
    return {
        "methods": {method: _summary(runs) for method, runs in counts.items()},
        "differences": {
            f"{a} - {b}": {str(k): _difference(counts[a], counts[b], k) for k in first.ks}
            for a, b in _pairs(list(counts))
        },
        "seeds": {
            str(seed): {method: _summary([runs[i]]) for method, runs in counts.items()}
            for i, seed in enumerate(seeds)
        },
    }


def _summary(runs: Sequence[Counts]) -> dict[str, Any]:
    ks = runs[0].ks
    means = {k: mean_over_seeds(runs, k) for k in ks}
    summary: dict[str, Any] = {
        "pass_at_k": {str(k): float(means[k].mean()) for k in ks},
        "ci95": {str(k): _bootstrap(means[k]) for k in ks},
        "num_problems": len(runs[0].num_correct),
        "num_samples": runs[0].num_samples,
    }
    if len(runs) > 1:
        summary["std"] = {
            str(k): statistics.stdev(float(run.per_problem(k).mean()) for run in runs) for k in ks
        }
    return summary


def _difference(a: Sequence[Counts], b: Sequence[Counts], k: int) -> dict[str, Any]:
    """Paired: both are resampled with the same problems, which takes out the spread between problems."""
    differences = mean_over_seeds(a, k) - mean_over_seeds(b, k)
    return {"difference": float(differences.mean()), "ci95": _bootstrap(differences)}


def _bootstrap(per_problem: np.ndarray) -> list[float]:
    low, high = bootstrap_interval(per_problem, BOOTSTRAP_SAMPLES, BOOTSTRAP_SEED).tolist()
    return [low, high]


def _pairs(methods: Sequence[str]) -> list[tuple[str, str]]:
    trained = [method for method in methods if method != BASE]
    pairs = [(method, BASE) for method in trained]
    return pairs + [("apo", other) for other in trained if "apo" in trained and other != "apo"]


def table_rows(results: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Header and rows of the Pass@K table, in per cent: mean +- sd over seeds, or the 95 % interval."""
    ks = _table_ks(results["methods"][BASE]["pass_at_k"])
    rows = []
    for method, summary in results["methods"].items():
        cells = [LABELS[method]]
        for k in ks:
            value = 100 * summary["pass_at_k"][k]
            if "std" in summary:
                cells.append(f"{value:.1f} ± {100 * summary['std'][k]:.1f}")
            else:
                cells.append(f"{value:.1f} {_interval(summary['ci95'][k])}")
        rows.append(cells)
    return ["Pass@K (%)", *(f"@{k}" for k in ks)], rows


def difference_rows(results: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Header and rows of the table of paired differences, in points."""
    ks = _table_ks(results["methods"][BASE]["pass_at_k"])
    rows = []
    for name, by_k in results["differences"].items():
        a, b = name.split(" - ")
        cells = [f"{100 * by_k[k]['difference']:+.1f} {_interval(by_k[k]['ci95'])}" for k in ks]
        rows.append([f"{LABELS[a]} - {f'({LABELS[b]})' if '+' in LABELS[b] else LABELS[b]}", *cells])
    return ["Difference (points)", *(f"@{k}" for k in ks)], rows


def _table_ks(pass_at_k_by_k: Mapping[str, float]) -> list[str]:
    available = sorted(int(k) for k in pass_at_k_by_k)
    return [str(k) for k in available if k in TABLE_KS or k == available[-1]]


def _interval(bounds: Sequence[float]) -> str:
    return f"[{100 * bounds[0]:.1f}, {100 * bounds[1]:.1f}]"


def caption(results: Mapping[str, Any]) -> str:
    """What the numbers are made of, and what the brackets mean."""
    base, seeds = results["methods"][BASE], list(results["seeds"])
    size = f"{base['num_problems']} held-out problems, {base['num_samples']} samples each"
    if len(seeds) == 1:
        return f"{size}; seed {seeds[0]}; [95 % interval: bootstrap over problems]."
    return (
        f"{size}; mean ± standard deviation over {len(seeds)} seeds ({', '.join(seeds)}); "
        "[95 % interval: bootstrap over problems, each averaged over the seeds]."
    )


def markdown(results: Mapping[str, Any]) -> str:
    """Both tables with their caption, for a README."""
    parts = [markdown_table(*table_rows(results)), markdown_table(*difference_rows(results))]
    parts.append(caption(results))
    if "command" in results.get("settings", {}):
        parts.append(f"Made by `{results['settings']['command']}`.")
    return "\n\n".join(parts) + "\n"


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    rule = ["---", *["---:"] * (len(header) - 1)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (header, rule, *rows))


def print_tables(results: Mapping[str, Any], console: Console) -> None:
    """Both tables and how to read them."""
    for header, rows in (table_rows(results), difference_rows(results)):
        table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
        for name in header:
            table.add_column(name, justify="left" if name is header[0] else "right")
        for cells in rows:  # brackets on a line of their own: narrow terminals
            table.add_row(*(cell.replace(" [", "\n[") for cell in cells))
        console.print(table)
        console.print()
    console.print(caption(results), markup=False, highlight=False)
    console.print(HOW_TO_READ, markup=False, highlight=False)
    console.print()


def run_settings(folders: Mapping[int, Path], methods: Sequence[str]) -> dict[str, Any]:
    """What the runs say about themselves: seeds and, of each method's first run, steps and objective."""
    settings: dict[str, Any] = {"seeds": list(folders), "methods": {}}
    first = next(iter(folders.values()))
    for method in methods:
        path = first / method / "config.yaml"
        if path.exists():
            config = yaml.safe_load(path.read_text())
            settings["methods"][method] = {
                "num_steps": config["train"]["num_steps"],
                "lr": config["optimizer"]["lr"],
                "objective": config["objective"],
            }
    return settings


def write_report(
    out: Path, folders: Mapping[int, Path], methods: Sequence[str], extra_settings: Mapping[str, Any]
) -> list[Path]:
    """Print the tables; write results.json, table.md and comparison.png under ``out``; the files written.

    ``folders``: seed -> the folder with its methods. Raises DataError, FileNotFoundError.
    """
    seeds = list(folders)
    results = summarize(collect(list(folders.values()), methods), seeds)
    results["settings"] = {**extra_settings, **run_settings(folders, methods)}
    console = Console()
    print_tables(results, console if console.is_terminal else Console(width=LOG_WIDTH))
    results_path, table_path = out / "results.json", out / "table.md"
    results_path.write_text(json.dumps(results, indent=1) + "\n")
    table_path.write_text(markdown(results))
    histories = {
        method: [read_history(folder / method, base_evaluation(folder)) for folder in folders.values()]
        for method in methods
    }
    title = f"Countdown, seed{'s' if len(seeds) > 1 else ''} {', '.join(map(str, seeds))}"
    picture = comparison_picture(results["methods"], histories, out / "comparison.png", title)
    return [results_path, table_path, picture]


def find_folders(out: Path) -> dict[int, Path]:
    """Seed -> its folder: OUT/seed*, or OUT itself for a demo of one seed (0 where its runs do not say)."""
    names = [path.name.removeprefix("seed") for path in out.glob("seed*")]
    numbers = sorted(int(name) for name in names if name.isdigit())
    if numbers:
        return {seed: out / f"seed{seed}" for seed in numbers}
    configs = [out / method / "config.yaml" for method in METHODS]
    seeds = [yaml.safe_load(path.read_text())["train"]["seed"] for path in configs if path.exists()]
    return {seeds[0] if seeds else 0: out}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("out", type=Path, help="folder of the demo")
    out = parser.parse_args(argv).out
    folders = find_folders(out)
    finished = [
        method
        for method in METHODS
        if all((folder / method / "evaluation_final.json").exists() for folder in folders.values())
    ]
    if not finished:
        print(f"error: {out}: no method has finished for the seeds {list(folders)}", file=sys.stderr)
        return 2
    previous = out / "results.json"
    settings = json.loads(previous.read_text()).get("settings", {}) if previous.exists() else {}
    for path in write_report(out, folders, finished, settings):
        print(f"wrote {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
