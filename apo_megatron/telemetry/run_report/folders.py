"""Reads what a run has left in its directory: finished or not, whole or broken."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import orjson
import yaml

from apo_megatron.errors import DataError
from apo_megatron.telemetry.metrics import METRICS_FILE
from apo_megatron.telemetry.outcome import OUTCOME_FILE
from apo_megatron.telemetry.run_report.status import Signs, Status, status_of
from apo_megatron.telemetry.series import Floats, series

CONFIG_FILE = "config.yaml"
HANG_SUMMARY = "hang/summary.txt"
EVALUATION_PREFIX = "eval/pass_at_"  # of the metrics between the ends
TOKENS_PER_SECOND = "tokens_per_second"
STEP_SECONDS = "step_seconds"  # without the evaluation
MAX_SUMMARY_CHARACTERS = 20_000
_LIFE_SIGNS = (METRICS_FILE, CONFIG_FILE, "evaluation_*.json", "health/*.json", "checkpoints/*", "servers/*")
# Settings of an evaluation that may differ where its problems and samples are the same.
_SCHEDULE = {"at_start", "interval", "interval_num_samples", "bootstrap_samples"}


@dataclass(frozen=True)
class PassAtK:
    """An evaluation at one end of a run: K -> (mean, low, high) in [0, 1], 95 % interval over problems."""

    values: Mapping[int, tuple[float, float, float]]
    num_problems: int
    num_samples: int  # per problem
    borrowed_from: str | None = None  # the run that evaluated the same weights


@dataclass(frozen=True)
class RunRecord:
    """One run directory."""

    label: str
    folder: Path
    config: Mapping[str, Any] = field(default_factory=dict)
    history: Sequence[Mapping[str, float]] = ()  # a line a step, in order
    start: PassAtK | None = None
    final: PassAtK | None = None
    status: Status = Status("starting", "no step is finished yet")
    hang_summary: str | None = None
    num_server_starts: Mapping[str, int] = field(default_factory=dict)  # log of a server -> starts in it
    unreadable: Sequence[str] = ()  # files, with what is wrong

    def values(self, key: str) -> tuple[Floats, Floats]:
        """Steps [n] and finite values [n] of a metric."""
        return series(self.history, key)

    def setting(self, name: str, default: Any = None) -> Any:
        """``section.field`` of its configuration."""
        value: Any = self.config
        for part in name.split("."):
            if not isinstance(value, Mapping) or part not in value:
                return default
            value = value[part]
        return value


def ks_on_the_way(runs: Iterable[RunRecord]) -> list[int]:
    """The K of the evaluations between the ends, of any of ``runs``, in order."""
    names = {name for run in runs for line in run.history for name in line}
    ends = (name.removeprefix(EVALUATION_PREFIX) for name in names if name.startswith(EVALUATION_PREFIX))
    return sorted(int(end) for end in ends if re.fullmatch("[1-9][0-9]{0,8}", end))


def read_runs(folders: Sequence[Path], now: float | None = None) -> list[RunRecord]:
    """All of them, with labels that tell them apart; ``now`` in seconds since the epoch.

    A run without an evaluation of its start takes that of another run from the same weights. Raises
    DataError where a folder holds no run.
    """
    now = time.time() if now is None else now
    runs = [_read_run(folder, label, now) for folder, label in zip(folders, _labels(folders), strict=True)]
    return [replace(run, start=run.start or _start_of_another(run, runs)) for run in runs]


def _read_run(folder: Path, label: str, now: float) -> RunRecord:
    if not any((folder / name).exists() for name in (METRICS_FILE, CONFIG_FILE, OUTCOME_FILE)):
        raise DataError(
            f"{folder} holds no run: expected {METRICS_FILE} or {CONFIG_FILE} in it, found "
            f"{'nothing' if folder.is_dir() else 'no such directory'}. Name the directory that "
            "train.run_dir names"
            + "".join(
                f"; there is a run in {path.parent}" for path in sorted(folder.glob(f"*/{METRICS_FILE}"))[:3]
            )
        )
    problems: list[str] = []
    config = _read_config(folder / CONFIG_FILE, problems)
    history = _read_history(folder / METRICS_FILE, problems)
    start, final = (
        _read_pass_at_k(folder / f"evaluation_{tag}.json", problems) for tag in ("start", "final")
    )
    run = RunRecord(label, folder, config, history, start, final, unreadable=problems)
    hang_summary = _hang_summary(folder)
    outcome = _read_json(folder / OUTCOME_FILE, problems)
    num_steps = run.setting("train.num_steps")
    signs = Signs(
        last_step=int(history[-1]["step"]) if history else 0,
        num_steps=num_steps if isinstance(num_steps, int) else None,
        step_seconds=run.values("time/step")[1],
        outcome=outcome if isinstance(outcome, dict) else None,
        has_hung=hang_summary is not None,
        is_evaluated=final is not None or run.setting("evaluation.data_path") is None,
        seconds_since_sign=_seconds_since_sign(folder, now),
    )
    return replace(
        run,
        status=status_of(signs),
        hang_summary=hang_summary,
        num_server_starts={path.name: _num_starts(path) for path in sorted(folder.glob("servers/*.log"))},
    )


def _labels(folders: Sequence[Path]) -> list[str]:
    """The last parts of each path, as many as tell them apart."""
    parts = [folder.absolute().parts for folder in folders]
    for length in range(1, max(map(len, parts)) + 1):
        labels = ["/".join(part[-length:]) for part in parts]
        if len(set(labels)) == len(labels):
            return labels
    raise DataError(f"a run is named twice: {', '.join(map(str, folders))}. Name each of them once")


def _read_config(path: Path, problems: list[str]) -> Mapping[str, Any]:
    try:
        config = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        problems.append(f"{path.name} cannot be read: {error}")
        return {}
    return config if isinstance(config, dict) else {}


def _read_history(path: Path, problems: list[str]) -> list[dict[str, float]]:
    """A line a step; of several for one step (a run that went on) the last. Lines that tear are left out."""
    if not path.exists():
        return []
    *lines, _unfinished = path.read_text(encoding="utf-8", errors="replace").split("\n")
    by_step: dict[float, dict[str, float]] = {}
    num_bad = 0
    for line in lines:
        try:
            values = orjson.loads(line) if line.strip() else {}
        except orjson.JSONDecodeError:
            values = None
        if not isinstance(values, dict) or (values and not isinstance(values.get("step"), int)):
            num_bad += 1
        elif values:
            by_step[values["step"]] = _with_derived(values)
    if num_bad:
        problems.append(f"{path.name}: {num_bad} of {len(lines)} lines are no metrics and left out")
    return [by_step[step] for step in sorted(by_step)]


def _with_derived(values: Mapping[str, Any]) -> dict[str, float]:
    """The numbers among ``values``, and those that follow from them."""
    line = {name: float(value) for name, value in values.items() if isinstance(value, int | float)}
    if "time/step" in line:
        line[STEP_SECONDS] = line["time/step"] - line.get("time/evaluation", 0.0)
        if "response_tokens" in line and line[STEP_SECONDS] > 0:
            line[TOKENS_PER_SECOND] = line["response_tokens"] / line[STEP_SECONDS]
    return line


def _read_pass_at_k(path: Path, problems: list[str]) -> PassAtK | None:
    result = _read_json(path, problems)
    if result is None:
        return None
    try:
        intervals = {k: (float(low), float(high)) for k, (low, high) in result["ci95"].items()}
        return PassAtK(
            {int(k): (float(value), *intervals[k]) for k, value in result["pass_at_k"].items()},
            len(result["num_correct"]),
            int(result["num_samples"]),
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        problems.append(f"{path.name} is not the result of an evaluation ({error!r})")
        return None


def _read_json(path: Path, problems: list[str]) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        problems.append(f"{path.name} cannot be read: {error}")
        return None


def _hang_summary(folder: Path) -> str | None:
    """Of a hang of this run: a run that went on leaves a newer config.yaml."""
    path, config = folder / HANG_SUMMARY, folder / CONFIG_FILE
    if not path.exists() or (config.exists() and config.stat().st_mtime > path.stat().st_mtime):
        return None
    return path.read_text(encoding="utf-8", errors="replace")[:MAX_SUMMARY_CHARACTERS]


def _seconds_since_sign(folder: Path, now: float) -> float:
    times = [path.stat().st_mtime for pattern in _LIFE_SIGNS for path in folder.glob(pattern)]
    return max(now - max(times, default=now), 0.0)


def _num_starts(path: Path) -> int:
    """Each start of a server is a header in its log (rollout/server_process.py)."""
    with path.open("rb") as log:
        return sum(line.startswith(b"=== ") for line in log)


def _start_of_another(run: RunRecord, runs: Sequence[RunRecord]) -> PassAtK | None:
    """The evaluation of the weights that ``run`` started from, on the same problems, by another run."""
    if not run.config or not run.setting("evaluation.data_path"):
        return None
    for other in runs:
        if other.start is not None and _start_settings(other) == _start_settings(run):
            return replace(other.start, borrowed_from=other.label)
    return None


def _start_settings(run: RunRecord) -> tuple[Any, ...]:
    evaluation = run.setting("evaluation", {})
    measured = {name: value for name, value in dict(evaluation).items() if name not in _SCHEDULE}
    model = (run.setting("model.hf_path"), run.setting("model.megatron_path"))
    return (*model, run.setting("rollout.max_new_tokens"), run.setting("reward.name"), measured)
