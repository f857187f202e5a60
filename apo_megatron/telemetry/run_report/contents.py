"""Everything that the page shows, as plain containers for JSON."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np

from apo_megatron.config.flat import flat
from apo_megatron.telemetry.run_report.findings import Finding
from apo_megatron.telemetry.run_report.folders import CONFIG_FILE, RunRecord
from apo_megatron.telemetry.run_report.panels import LEARNING, Panel, panels_of
from apo_megatron.telemetry.run_report.phases import phase_contents
from apo_megatron.telemetry.series import Floats, rounded, smooth, thinned

MAX_POINTS = 400  # of a curve, where the page has few runs
MAX_POINTS_OF_ALL_RUNS = 1_600  # of one metric
FEWEST_POINTS = 20
MAX_DIFFERENCES = 60
MAX_SETTING_CHARACTERS = 200
_FILES = (
    ("metrics.jsonl", "every metric of every step"),
    (CONFIG_FILE, "the resolved configuration"),
    ("training_curves.png", "curves as a picture"),
    ("evaluation_start.json", "evaluation before the first step"),
    ("evaluation_final.json", "evaluation after the last step"),
    ("outcome.json", "how the run ended"),
    ("rollouts", "samples of every step (tools/view_rollouts)"),
    ("checkpoints", "to resume from"),
    ("hf", "the final model, Hugging Face format"),
    ("tensorboard", "TensorBoard"),
    ("servers", "logs of SGLang servers"),
    ("hang", "report of a hang"),
)


def page_contents(
    runs: Sequence[RunRecord], found: Sequence[tuple[int, Finding]], written: str, folder: Path
) -> dict[str, Any]:
    """``found``: (place of the run, finding); ``written``: date and time; links to files are relative to
    ``folder``, where the page will lie."""
    limit = max(FEWEST_POINTS, min(MAX_POINTS, MAX_POINTS_OF_ALL_RUNS // len(runs)))
    panels, zero = [], []
    for panel in panels_of(runs):
        values = [run.values(panel.key) for run in runs]
        if not any(len(of_run) for _, of_run in values):
            continue
        if panel.group != LEARNING and not any(of_run.any() for _, of_run in values):
            zero.append(panel.title)
        else:
            panels.append(_panel_contents(panel, values, limit))
    return {
        "written": written,
        "runs": [_run_contents(run, folder) for run in runs],
        "differences": _differences(runs),
        "findings": [{"run": place, **asdict(finding)} for place, finding in found],
        "pass_at_k": _pass_at_k(runs),
        "panels": panels,
        "always_zero": zero,
        "is_thinned": any(len(run.history) > limit for run in runs),
        "max_points": limit,
        "phases": [phase_contents(run) for run in runs],
    }


def _run_contents(run: RunRecord, folder: Path) -> dict[str, Any]:
    return {
        "label": run.label,
        "folder": str(run.folder),
        "status": asdict(run.status),
        "facts": _facts(run),
        "hang_summary": run.hang_summary,
        "files": [
            {"name": name, "link": _link(run.folder / name, folder), "what": what}
            for name, what in _FILES
            if (run.folder / name).exists()
        ],
    }


def _link(path: Path, folder: Path) -> str:
    return "./" + quote(os.fsencode(os.path.relpath(path, folder)))


def _facts(run: RunRecord) -> list[tuple[str, str]]:
    """What the run is, from its configuration."""
    if not run.config:
        return []
    setting = run.setting
    sizes = [
        f"{name} {setting(f'parallel.{field}_parallel_size')}"
        for name, field in (("TP", "tensor"), ("PP", "pipeline"), ("CP", "context"), ("EP", "expert"))
        if (setting(f"parallel.{field}_parallel_size") or 1) != 1
    ]
    facts = [
        ("model", str(setting("model.megatron_path") or setting("model.hf_path") or "not known")),
        ("layout", ", ".join(sizes) or "data parallel only"),
    ]
    if setting("objective") is not None:
        facts.append(("objective", _objective(run)))
        prompts, samples = setting("data.prompts_per_step"), setting("rollout.group_size")
        facts.append(
            ("rollouts", f"{setting('rollout.engine')}, {prompts} prompts x {samples} samples a step")
        )
    facts.append(("learning rate", str(setting("optimizer.lr", "not known"))))
    return [(name, value[:MAX_SETTING_CHARACTERS]) for name, value in facts]


def _objective(run: RunRecord) -> str:
    setting = run.setting
    parts = [str(setting("objective.loss_mode"))]
    if setting("objective.loss_mode") == "apo_ratio":
        parts += [f"{name} {setting(f'objective.apo_{name}_coeff')}" for name in ("push", "pull")]
        parts.append(f"top-{setting('objective.apo_topk')}")
    if setting("objective.use_kl_loss") or setting("objective.use_kl_loss_on_wrong"):
        where = " on wrong answers" if setting("objective.use_kl_loss_on_wrong") else ""
        parts.append(f"KL {setting('objective.kl_loss_coeff')}{where}")
    return ", ".join(parts)


def _differences(runs: Sequence[RunRecord]) -> dict[str, Any]:
    """Settings that all configurations have, and that are not the same in all of them."""
    settings = [_shown_settings(run.config) for run in runs]
    known = [of_run for of_run in settings if of_run]
    shared = [name for name in (known or [{}])[0] if all(name in of_run for of_run in known)]
    differing = [
        name for name in shared if name != "train.run_dir" and len({of_run[name] for of_run in known}) > 1
    ]
    return {
        "rows": [
            [name, [of_run.get(name, "\u2013") for of_run in settings]]
            for name in differing[:MAX_DIFFERENCES]
        ],
        "num_left_out": max(0, len(differing) - MAX_DIFFERENCES),
    }


def _shown_settings(config: Mapping[str, Any]) -> dict[str, str]:
    texts = {name: "null" if value is None else str(value) for name, value in flat(config).items()}
    return {name[:MAX_SETTING_CHARACTERS]: text[:MAX_SETTING_CHARACTERS] for name, text in texts.items()}


def _pass_at_k(runs: Sequence[RunRecord]) -> list[dict[str, Any]]:
    rows = []
    for place, run in enumerate(runs):
        for when, result in (("start", run.start), ("end", run.final)):
            if result is not None:
                rows.append(
                    {
                        "run": place,
                        "when": when,
                        "values": {str(k): list(result.values[k]) for k in sorted(result.values)},
                        "num_problems": result.num_problems,
                        "num_samples": result.num_samples,
                        "borrowed_from": result.borrowed_from,
                    }
                )
    return rows


def _panel_contents(panel: Panel, values: Sequence[tuple[Floats, Floats]], limit: int) -> dict[str, Any]:
    return {
        **{name: value for name, value in asdict(panel).items() if name != "key"},
        "metric": panel.key,
        "series": [_curve(steps, of_run, panel.points, limit) for steps, of_run in values],
    }


def _curve(steps: Floats, values: Floats, is_points: bool, limit: int) -> dict[str, Any] | None:
    """Thin: the values; thick: their running mean; first and last: the means of the table."""
    if not len(steps):
        return None
    raw_steps, raw = thinned(steps, values, limit)
    length = 1 if is_points else max(1, len(values) // 10)
    curve: dict[str, Any] = {
        "raw": [_whole(raw_steps), rounded(raw)],
        "first": rounded(values[:length].mean(keepdims=True))[0],
        "last": rounded(values[-length:].mean(keepdims=True))[0],
    }
    if not is_points:
        kept = np.unique(np.linspace(0, len(steps) - 1, min(len(steps), limit // 2)).astype(int))
        curve["smooth"] = [_whole(steps[kept]), rounded(smooth(values)[kept])]
    return curve


def _whole(steps: Floats) -> list[int]:
    return [int(step) for step in steps]
