"""Where numbers go: metrics.jsonl always, TensorBoard and Weights & Biases when configured."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from apo_megatron.config.training import LoggingConfig
from apo_megatron.errors import ConfigError, DataError
from apo_megatron.files import write_atomically

METRICS_FILE = "metrics.jsonl"


class MetricsLogger:
    """Appends one JSON object a call to ``run_dir/metrics.jsonl``; does nothing off the main rank.

    A run that goes on after step ``after_step`` keeps the lines up to it: what an earlier process wrote
    beyond is written again (TensorBoard hides it). With 0 the file starts anew. Only metrics leave this
    process: no configuration, no environment, no code.

    Raises ConfigError where a configured destination is not installed.
    """

    def __init__(
        self, run_dir: str | Path, logging_cfg: LoggingConfig, is_main: bool, after_step: int = 0
    ) -> None:
        self._file = None
        self._tensorboard: Any = None
        self._wandb: Any = None
        if not is_main:
            return
        run_dir = Path(run_dir)
        run_dir.mkdir(parents=True, exist_ok=True)
        # Before the file is opened: a missing package must not cost the metrics of an earlier run.
        if logging_cfg.tensorboard:
            self._tensorboard = _summary_writer_class()(
                log_dir=str(run_dir / "tensorboard"), purge_step=after_step + 1
            )
        if logging_cfg.wandb_project is not None:
            self._wandb = _open_wandb(logging_cfg.wandb_project, run_dir)
        path = run_dir / METRICS_FILE
        if path.exists():
            _keep_steps(path, after_step)
        self._file = path.open("a", encoding="utf-8")

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Write ``metrics`` of ``step``; NaN and infinities as null.

        Values are anything that ``float`` accepts (0-dim tensors too). Flushed at once, so that a reader
        sees every finished step.
        """
        if self._file is None:
            return
        values = {name: _number(value) for name, value in metrics.items()}
        self._file.write(json.dumps({"step": step, **values}) + "\n")
        self._file.flush()
        finite = {name: value for name, value in values.items() if value is not None}
        if self._tensorboard is not None:
            for name, value in finite.items():
                self._tensorboard.add_scalar(name, value, step)
        if self._wandb is not None:
            self._wandb.log(finite, step=step)

    def close(self) -> None:
        """Flush and close all destinations; safe to call twice."""
        if self._file is not None:
            self._file.close()
            self._file = None
        if self._tensorboard is not None:
            self._tensorboard.close()
            self._tensorboard = None
        if self._wandb is not None:
            self._wandb.finish()
            self._wandb = None

    def __enter__(self) -> MetricsLogger:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def read_metrics(path: str | Path) -> list[dict[str, float]]:
    """All lines of a metrics file, in order; null comes back as NaN.

    A last line without its end (a run that is being written, or was killed) is left out. Raises DataError
    for any other line that is not a JSON object with a step, FileNotFoundError where there is no file.
    """
    lines = Path(path).read_text(encoding="utf-8").split("\n")
    return [_parse_line(path, number, line) for number, line in enumerate(lines[:-1], 1) if line.strip()]


def _parse_line(path: str | Path, number: int, line: str) -> dict[str, float]:
    try:
        values = json.loads(line)
    except json.JSONDecodeError as error:
        raise DataError(f"{path}, line {number}: not JSON ({error}); found {line[:80]!r}") from error
    if not isinstance(values, dict) or "step" not in values:
        raise DataError(f"{path}, line {number}: expected an object with a step, found {line[:80]!r}")
    return {name: math.nan if value is None else value for name, value in values.items()}


def _number(value: float) -> float | None:
    number = value if isinstance(value, int) else float(value)
    return number if math.isfinite(number) else None


def _keep_steps(path: Path, last_step: int) -> None:
    """Cut off the lines of later steps, and one that a crash tore."""
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    kept = [
        line
        for number, line in enumerate(lines, 1)
        if line.endswith("\n") and _parse_line(path, number, line)["step"] <= last_step
    ]
    write_atomically(path, "".join(kept))


def check_destinations(logging_cfg: LoggingConfig) -> None:
    """Raises ConfigError where a configured destination is not installed, before a run has started."""
    if logging_cfg.tensorboard:
        _summary_writer_class()
    if logging_cfg.wandb_project is not None:
        _wandb(logging_cfg.wandb_project)


def _summary_writer_class() -> Any:
    try:  # here, because it takes seconds to import
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ConfigError(
            "logging.tensorboard=true, but tensorboard is not installed: pip install tensorboard, "
            "or set logging.tensorboard=false"
        ) from error
    return SummaryWriter


def _wandb(project: str) -> Any:
    try:  # here, because it is optional
        import wandb
    except ImportError as error:
        raise ConfigError(
            f"logging.wandb_project={project}, but wandb is not installed: pip install wandb, "
            "or set logging.wandb_project=null"
        ) from error
    return wandb


def _open_wandb(project: str, run_dir: Path) -> Any:
    wandb = _wandb(project)
    settings = wandb.Settings(save_code=False, disable_git=True)
    return wandb.init(project=project, name=run_dir.name, dir=str(run_dir), settings=settings)
