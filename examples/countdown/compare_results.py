"""From the runs of compare.py to results.json, table.md, frontier.png and a section of docs/methods.md."""

from __future__ import annotations

import json
import math
import shutil
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from frontier import BASE_POINT, Point, frontier_picture
from methods import FAMILIES, Method, Trial
from report import Counts, markdown_table
from stages import BASE, ROOT, STAMP

from apo_megatron.errors import DataError
from apo_megatron.evaluation.bootstrap import two_way_interval
from apo_megatron.telemetry.metrics import METRICS_FILE, read_metrics

TABLE_KS = (1, 8, 32, 256)
REFERENCE = "grpo"
BOOTSTRAP_SAMPLES, BOOTSTRAP_SEED = 10_000, 0
SMALL_MARKS = "Small marks in the picture: each seed, those of methods moved by GRPO's mean - GRPO on it."
CURVES = ("reward", "entropy", "grad_norm", "clip_fraction_low", "clip_fraction_high")  # of each final run
PAGE, PAGE_PICTURE = ROOT / "docs" / "methods.md", ROOT / "docs" / "methods_compared.png"
BEGIN, END = "<!-- compared: begin -->", "<!-- compared: end -->"


@dataclass(frozen=True)
class TrialRun:
    """One setting on the validation problems; ``counts`` None: it failed, for the reason ``failed``."""

    trial: Trial
    counts: Counts | None
    failed: str


@dataclass(frozen=True)
class MethodRuns:
    """All runs of one method; by seed, those that finished. ``failed``: why the others did not, or ""."""

    method: Method
    tuning: Sequence[TrialRun]
    trial: Trial | None
    counts: Mapping[int, Counts]
    folders: Mapping[int, Path]
    failed: str


def score(counts: Counts) -> float:
    """What a trial is chosen by: sqrt(Pass@1 x Pass@n), n = the samples of a problem. In [0, 1]."""
    return math.sqrt(mean_pass_at(counts, 1) * mean_pass_at(counts, counts.num_samples))


def best_trial(runs: Sequence[TrialRun]) -> Trial | None:
    """The trial with the largest score, the first of equals; None where all failed."""
    finished = [run for run in runs if run.counts is not None]
    return max(finished, key=lambda run: score(run.counts)).trial if finished else None


def mean_pass_at(counts: Counts, k: int) -> float:
    return float(counts.per_problem(k).mean())


def shown(counts: Counts) -> str:
    """Pass@1 and Pass@n, for a line."""
    return "  ".join(f"@{k} {100 * mean_pass_at(counts, k):.1f}" for k in (1, counts.num_samples))


def summarize(
    base: Mapping[int, Counts], runs: Mapping[str, MethodRuns], settings: Mapping[str, Any]
) -> dict[str, Any]:
    """The content of results.json; fractions in [0, 1], K and seeds as text."""
    first = next(iter(base.values()))
    reference = runs[REFERENCE] if REFERENCE in runs and not runs[REFERENCE].failed else None
    methods = {name: _method(found) for name, found in runs.items()}
    for name, found in runs.items():
        if reference is not None and name != REFERENCE and not found.failed:
            methods[name]["against_grpo"] = {
                str(k): _difference(found.counts, reference.counts, k) for k in table_ks(first.num_samples)
            }
    return {
        "settings": {
            **settings,
            "num_problems": len(first.num_correct),
            "num_samples": first.num_samples,
            "chosen_by": "sqrt(Pass@1 x Pass@n) on validation problems",
        },
        "base": _of_seeds(base),
        "methods": methods,
    }


def table_ks(num_samples: int) -> list[int]:
    """The K of the tables, the last one n."""
    return [*(k for k in TABLE_KS if k < num_samples), num_samples]


def _method(found: MethodRuns) -> dict[str, Any]:
    tuned = found.method.tuned
    content: dict[str, Any] = {
        "label": found.method.label,
        "family": found.method.family,
        "settings": list(found.method.settings),
        "coefficient": tuned.field if tuned else None,
        "data": found.method.data,
        "chosen": None if found.trial is None else _trial(found.trial),
        "failed": found.failed or None,
        "tuning": [
            {
                **_trial(run.trial),
                "failed": run.failed or None,
                **({} if run.counts is None else {"score": score(run.counts), **_one(run.counts)}),
            }
            for run in found.tuning
        ],
    }
    if not found.failed:
        content |= _of_seeds(found.counts)
    content["seeds"] = {
        str(seed): {**_one(counts), **_record(found.folders[seed])} for seed, counts in found.counts.items()
    }
    return content


def _trial(trial: Trial) -> dict[str, float | None]:
    return {"learning_rate": trial.learning_rate, "coefficient": trial.coefficient}


def _one(counts: Counts) -> dict[str, Any]:
    ks = [2**i for i in range(counts.num_samples.bit_length()) if 2**i <= counts.num_samples]
    return {
        "pass_at_k": {str(k): mean_pass_at(counts, k) for k in ks},
        "num_correct": counts.num_correct.tolist(),
    }


def _record(folder: Path) -> dict[str, Any]:
    """What a run left: its command, how long it took, its training curves."""
    stamp = json.loads((folder / STAMP).read_text())
    lines = read_metrics(folder / METRICS_FILE)
    curves = {name: [round(line[name], 5) for line in lines if name in line] for name in CURVES}
    return {**stamp, "curves": {name: values for name, values in curves.items() if values}}


def _of_seeds(counts: Mapping[int, Counts]) -> dict[str, Any]:
    """Mean and standard deviation over seeds, and each seed."""
    each = {str(seed): _one(of_seed) for seed, of_seed in counts.items()}
    curves = [one["pass_at_k"] for one in each.values()]
    content: dict[str, Any] = {
        "pass_at_k": {k: statistics.fmean(curve[k] for curve in curves) for k in curves[0]},
        "score": statistics.fmean(score(of_seed) for of_seed in counts.values()),
        "seeds": each,
    }
    if len(curves) > 1:
        content["std"] = {k: statistics.stdev(curve[k] for curve in curves) for k in curves[0]}
    return content


def _difference(a: Mapping[int, Counts], b: Mapping[int, Counts], k: int) -> dict[str, Any]:
    """Paired by problem and by seed (which share base and data); both are resampled."""
    grid = np.stack([a[seed].per_problem(k) - b[seed].per_problem(k) for seed in a], axis=1)
    low, high = two_way_interval(grid, BOOTSTRAP_SAMPLES, BOOTSTRAP_SEED).tolist()
    return {"difference": float(grid.mean()), "ci95": [low, high]}


# --- what people read ------------------------------------------------------------------------------


def table(results: Mapping[str, Any]) -> str:
    """One Markdown table: the base, then the methods of each family in their order."""
    ks = [str(k) for k in table_ks(results["settings"]["num_samples"])]
    header = ["Method", "Setting", *(f"@{k}" for k in ks), *(f"@{k} - GRPO" for k in ks)]
    rows = [[BASE, "", *(_percent(results["base"], k) for k in ks), *[""] * len(ks)]]
    for content in ordered(results["methods"]):
        if content["failed"]:
            rows.append([content["label"], "**failed**", *[""] * (2 * len(ks))])
            continue
        against = content.get("against_grpo", {})
        rows.append(
            [
                content["label"],
                _setting(content, content["chosen"]),
                *(_percent(content, k) for k in ks),
                *(_points(against[k]) if k in against else "" for k in ks),
            ]
        )
    return markdown_table(header, rows)


def ordered(methods: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """By family, as ``methods.py`` lists them."""
    return sorted(methods.values(), key=lambda content: FAMILIES.index(content["family"]))


def _percent(content: Mapping[str, Any], k: str) -> str:
    std = f" ± {100 * content['std'][k]:.1f}" if "std" in content else ""
    return f"{100 * content['pass_at_k'][k]:.1f}{std}"


def _points(found: Mapping[str, Any]) -> str:
    low, high = found["ci95"]
    return f"{100 * found['difference']:+.1f} [{100 * low:.1f}, {100 * high:.1f}]"


def _setting(content: Mapping[str, Any], trial: Mapping[str, Any]) -> str:
    parts = []
    if trial["learning_rate"] is not None:
        parts.append(f"lr {trial['learning_rate']:g}")
    if trial["coefficient"] is not None:
        parts.append(f"`{content['coefficient'].rsplit('.', 1)[-1]}` {trial['coefficient']:g}")
    return ", ".join(parts) or "as configured"


def caption(results: Mapping[str, Any]) -> str:
    """What the numbers are made of."""
    settings = results["settings"]
    seeds, tuning_seed = settings["seeds"], settings["tuning_seed"]
    names = ", ".join(map(str, seeds))
    of_seeds = (
        f"mean ± standard deviation over the seeds {names}, each with a base of its own."
        if len(seeds) > 1
        else f"seed {names}."
    )
    methods = ordered(results["methods"])
    tuned = ["Settings: as configured, not tuned."]
    if tuning_seed is not None:
        best = f"Settings: the best of six trials on seed {tuning_seed} and other problems, by sqrt(@1 x @n)"
        grid = "two learning rates x three values of one setting"
        alone = [
            f"{content['label']}: six learning rates" for content in methods if not content["coefficient"]
        ]
        tuned = [f"{best}; {'; '.join([grid, *alone])}."]
    other_data = [f"{content['label']} {content['data']}." for content in methods if content["data"]]
    failed = [f"{content['label']} failed: {content['failed']}." for content in methods if content["failed"]]
    trials = [
        f"{content['label']} ({_setting(content, trial)})"
        for content in methods
        for trial in content["tuning"]
        if trial["failed"]
    ]
    failed += [f"Trials that failed: {', '.join(trials)}."] if trials else []
    quick = ["**Two steps a run (--quick): the numbers mean nothing.**"] if settings["quick"] else []
    return " ".join(
        [
            *quick,
            f"Pass@K in per cent on {settings['num_problems']} test problems, {settings['num_samples']} "
            "samples each;",
            of_seeds,
            "Differences in points, paired; [95 % interval: bootstrap over problems",
            "and seeds, which so few seeds make too narrow]." if len(seeds) > 1 else "alone].",
            *tuned,
            *other_data,
            *failed,
            *([SMALL_MARKS] if len(seeds) > 1 and _reference(results) else []),
        ]
    )


def points(results: Mapping[str, Any]) -> list[Point]:
    """What the picture shows, the base first.

    Each seed of a method is moved by how far GRPO's mean lies from GRPO on that seed: what a seed does to all
    methods leaves the picture, as it leaves the paired differences. Means stay where they are.
    """
    far = str(results["settings"]["num_samples"])
    finished = [content for content in ordered(results["methods"]) if not content["failed"]]
    grpo = _reference(results)

    def moved(content: Mapping[str, Any], seed: str, k: str) -> float:
        value = content["seeds"][seed]["pass_at_k"][k]
        return 100 * (value + (grpo["pass_at_k"][k] - grpo["seeds"][seed]["pass_at_k"][k] if grpo else 0))

    base = [one["pass_at_k"] for one in results["base"]["seeds"].values()]
    return [
        Point(BASE, BASE_POINT, [(100 * one["1"], 100 * one[far]) for one in base]),
        *(
            Point(
                content["label"],
                content["family"],
                [(moved(content, seed, "1"), moved(content, seed, far)) for seed in content["seeds"]],
            )
            for content in finished
        ),
    ]


def _reference(results: Mapping[str, Any]) -> Mapping[str, Any]:
    """GRPO's part; empty where it failed or is not among the methods."""
    content = results["methods"].get(REFERENCE, {})
    return content if content.get("failed", "") is None else {}


def write_results(
    out: Path,
    base: Mapping[int, Counts],
    runs: Mapping[str, MethodRuns],
    settings: Mapping[str, Any],
    update_docs: bool,
) -> list[Path]:
    """Write results.json, table.md and frontier.png under ``out`` and print the table; the files written.

    Raises DataError for a page without its markers and for what a run left that cannot be read: then nothing
    is written.
    """
    results = summarize(base, runs, settings)
    results_path, table_path, picture = out / "results.json", out / "table.md", out / "frontier.png"
    text = f"{table(results)}\n\n{caption(results)}\n\nMade by `{settings['command']}`.\n"
    page = with_section(PAGE.read_text(), text, PAGE_PICTURE.name) if update_docs else None
    results_path.write_text(json.dumps(results) + "\n")
    table_path.write_text(text)
    print(text)
    frontier_picture(points(results), picture, results["settings"]["num_samples"])
    written = [results_path, table_path, picture]
    if page is not None:
        shutil.copyfile(picture, PAGE_PICTURE)
        PAGE.write_text(page)
        written += [PAGE, PAGE_PICTURE]
    return written


def with_section(page: str, text: str, picture: str) -> str:
    """``page`` with ``text`` and ``picture`` between its markers. Raises DataError where it has none."""
    before, found_begin, rest = page.partition(BEGIN)
    _, found_end, after = rest.partition(END)
    if not found_begin or not found_end:
        raise DataError(f"{PAGE.name} lacks the lines {BEGIN} and {END}, between which the table belongs")
    image = f"![Pass@1 against Pass@256 of every method, its seeds and the base]({picture})"
    return f"{before}{BEGIN}\n\n{text}\n{image}\n\n{END}{after}"
