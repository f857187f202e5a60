"""Metrics files, the display without a terminal, how commands end, pictures of runs."""

from __future__ import annotations

import io
import json
import math
import os
import subprocess
import sys
import time
import types
from collections.abc import Sequence
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest
import torch
from rich.console import Console

from apo_megatron.config.describe import section_of
from apo_megatron.config.schema import RLConfig, SFTConfig
from apo_megatron.config.training import LoggingConfig
from apo_megatron.errors import CheckpointError, ConfigError, DataError, RunInterrupted, WeightMappingError
from apo_megatron.telemetry import command, plots, progress
from apo_megatron.telemetry.command import parse_command_line, run_command
from apo_megatron.telemetry.metrics import MetricsLogger, read_metrics
from apo_megatron.telemetry.progress import RunDisplay, duration, short_count
from apo_megatron.telemetry.series import smooth

ROOT = Path(__file__).resolve().parent.parent
QUIET = LoggingConfig(tensorboard=False)


# --- metrics ---------------------------------------------------------------------------------------


def test_metrics_are_one_flushed_line_a_call(tmp_path: Path) -> None:
    logger = MetricsLogger(tmp_path / "run", QUIET, is_main=True)
    logger.log(1, {"reward": 0.5, "entropy": math.nan, "ratio": math.inf, "norm": torch.tensor(2.0)})  # type: ignore[dict-item]
    logger.log(1, {"eval/pass_at_1": np.float32(0.25)})  # type: ignore[dict-item]
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()  # before close
    assert json.loads(lines[0]) == {"step": 1, "reward": 0.5, "entropy": None, "ratio": None, "norm": 2.0}
    assert json.loads(lines[1]) == {"step": 1, "eval/pass_at_1": 0.25}
    logger.close()
    logger.close()
    read = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert math.isnan(read[0]["entropy"]) and read[1]["eval/pass_at_1"] == 0.25


def test_only_the_main_rank_writes(tmp_path: Path) -> None:
    with MetricsLogger(tmp_path / "run", LoggingConfig(wandb_project="x"), is_main=False) as logger:
        logger.log(1, {"reward": 1.0})
    assert not (tmp_path / "run").exists()


def test_what_lies_beyond_the_checkpoint_is_cut_off_on_resume(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "reward": 0.1}\n{"step": 2, "reward": 0.7}\n{"step": 3, "rew')
    assert [row["step"] for row in read_metrics(path)] == [1, 2]  # without the torn line
    with MetricsLogger(tmp_path, QUIET, is_main=True, after_step=1) as logger:
        logger.log(2, {"reward": 0.2})
    assert [line["reward"] for line in read_metrics(path)] == [0.1, 0.2]
    with MetricsLogger(tmp_path, QUIET, is_main=True) as logger:
        logger.log(1, {"reward": 0.3})
    assert [line["reward"] for line in read_metrics(path)] == [0.3]


@pytest.mark.parametrize("bad", ["{nonsense}", "[1]", '{"reward": 1}'])
def test_broken_line_is_named(tmp_path: Path, bad: str) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text(f'{{"step": 1}}\n{bad}\n{{"step": 3}}\n')
    with pytest.raises(DataError, match=r"metrics.jsonl, line 2: "):
        read_metrics(path)


def test_tensorboard_gets_finite_values(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with MetricsLogger(tmp_path, LoggingConfig(), is_main=True) as logger:
        logger.log(7, {"reward": 0.5, "entropy": math.nan})
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert events.Tags()["scalars"] == ["reward"]
    assert [(event.step, event.value) for event in events.Scalars("reward")] == [(7, 0.5)]


def test_tensorboard_hides_what_lies_beyond_the_checkpoint(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with MetricsLogger(tmp_path, LoggingConfig(), is_main=True) as logger:
        for step in (1, 2, 3):
            logger.log(step, {"reward": 0.1 * step})
    with MetricsLogger(tmp_path, LoggingConfig(), is_main=True, after_step=1) as logger:
        logger.log(2, {"reward": 0.5})
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    found = [(event.step, round(event.value, 6)) for event in events.Scalars("reward")]
    assert found == [(1, 0.1), (2, 0.5)]


def test_missing_wandb_is_a_config_error_that_keeps_old_metrics(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n')
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ConfigError, match="logging.wandb_project=mine, but wandb is not installed"):
        MetricsLogger(tmp_path, LoggingConfig(tensorboard=False, wandb_project="mine"), is_main=True)
    assert read_metrics(tmp_path / "metrics.jsonl") == [{"step": 1}]


def test_wandb_gets_metrics_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[str, object]] = []
    fake_run = types.SimpleNamespace(
        log=lambda values, step: calls.append(("log", (values, step))),
        finish=lambda: calls.append(("finish", None)),
    )

    def init(**options: object) -> object:
        calls.append(("init", options))
        return fake_run

    fake = types.SimpleNamespace(init=init, Settings=lambda **options: options)
    monkeypatch.setitem(sys.modules, "wandb", fake)
    run_dir = tmp_path / "run"
    with MetricsLogger(
        run_dir, LoggingConfig(tensorboard=False, wandb_project="mine"), is_main=True
    ) as logger:
        logger.log(3, {"reward": 0.5, "entropy": math.nan})
    settings = {"save_code": False, "disable_git": True}
    assert calls[0] == ("init", {"project": "mine", "name": "run", "dir": str(run_dir), "settings": settings})
    assert calls[1:] == [("log", ({"reward": 0.5}, 3)), ("finish", None)]


# --- display ---------------------------------------------------------------------------------------


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(progress, "monotonic", clock)
    return clock


def test_log_has_one_line_a_step(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    with RunDisplay(total_steps=10, is_main=True, title="apo") as display:
        with display.phase("evaluation", total=200) as advance:  # before the first step: not in its time
            clock.now += 5
            advance(200)
        with display.phase("rollout", total=64) as advance:
            for _ in range(64):
                clock.now += 2 / 64
                advance(1, tokens=100)
        with display.phase("update"):
            clock.now += 2
        metrics = {"reward": 0.25, "clip_fraction_low": 0.01, "clip_fraction_high": 0.02, "other": 9.0}
        display.step_line(1, metrics)
    assert capsys.readouterr().out == (
        "step  1/10 | reward 0.250 | clip 0.030 | 1.6k tokens/s | 4.00 s/step | 0:36 left\n"
    )


def test_long_phases_speak_every_ten_seconds(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    with RunDisplay(total_steps=10, is_main=True, title="apo") as display:
        with display.phase("rollout", total=100) as advance:
            for _ in range(100):
                clock.now += 0.25
                advance(1, tokens=10)
        with display.phase("reference"):
            clock.now += 61
    assert capsys.readouterr().out.splitlines() == [
        "  rollout 40/100 | 40 tokens/s | 0:15 left",
        "  rollout 80/100 | 40 tokens/s | 0:05 left",
        "  reference done in 1:01",
    ]


def test_timings_add_up_phases_since_the_last_call_on_every_rank(
    clock: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    display = RunDisplay(total_steps=2, is_main=False, title="apo")
    for seconds in (1.0, 2.0):
        with display.phase("old log-probs"):
            clock.now += seconds
    clock.now += 0.5
    display.note("nothing")
    display.step_line(1, {"reward": 1.0})
    assert display.timings() == {"time/old_log_probs": 3.0, "time/step": 3.5}
    assert display.timings() == {"time/step": 0.0}
    display.close()
    assert capsys.readouterr().out == ""


def test_phase_is_timed_and_bar_removed_when_it_raises(clock: Clock) -> None:
    display = RunDisplay(1, True, "apo", Console(force_terminal=True, file=io.StringIO(), width=120))
    with pytest.raises(ZeroDivisionError), display.phase("rollout"):
        clock.now += 1
        raise ZeroDivisionError
    assert display.timings()["time/rollout"] == 1.0
    assert display._bars is not None
    assert [task.visible for task in display._bars.tasks] == [True, False]  # the run's own, the phase's
    display.close()


def test_terminal_shows_bars_and_step_lines() -> None:
    screen = io.StringIO()
    console = Console(force_terminal=True, file=screen, width=120)
    with RunDisplay(total_steps=4, is_main=True, title="apo", console=console) as display:
        with display.phase("rollout", total=8) as advance:
            advance(3, tokens=50)
            assert display._bars is not None
            display._bars.refresh()
        display.step_line(1, {"reward": 0.25})
        display.note("see [brackets]")
    shown = screen.getvalue()
    for text in ("rollout", "3/8", "step 1/4 | reward 0.250", "see [brackets]"):
        assert text in shown


def test_a_step_costs_little() -> None:
    console = Console(force_terminal=True, file=io.StringIO(), width=120)
    with RunDisplay(total_steps=100, is_main=True, title="apo", console=console) as display:
        started = time.thread_time()
        for step in range(20):
            for name in ("rollout", "old log-probs", "reference", "update", "weight sync"):
                with display.phase(name, total=10) as advance:
                    for _ in range(10):
                        advance(1, tokens=5)
            display.step_line(step + 1, {"reward": 0.5})
        seconds = (time.thread_time() - started) / 20
    assert seconds < 0.02  # measured: 4 ms; steps of the demo take half a second


def test_durations_and_counts_read_well() -> None:
    assert [duration(s) for s in (0.4, 59.6, 3723)] == ["0:00", "1:00", "1:02:03"]
    assert [short_count(n) for n in (7, 999.6, 3140, 2_400_000)] == ["7", "1.0k", "3.1k", "2.40M"]


# --- commands --------------------------------------------------------------------------------------


def raising(error: BaseException) -> object:
    def main(argv: Sequence[str]) -> None:
        raise error

    return main


@pytest.mark.parametrize(
    ("error", "code", "shown"),
    [
        (ConfigError("train.seed: found 'x'"), 2, "error: train.seed: found 'x'\n"),
        (WeightMappingError("no rule for 'a.b'"), 2, "error: no rule for 'a.b'\n"),
        (CheckpointError("truncated"), 2, "error: truncated\n"),
        (FileNotFoundError(2, "No such file", "data/x.jsonl"), 2, "error: No such file: data/x.jsonl\n"),
        (KeyboardInterrupt(), 130, "interrupted\n"),
        (RunInterrupted("stopped after step 3"), 130, "stopped after step 3\n"),
    ],
)
def test_user_errors_end_with_a_message(
    error: BaseException,
    code: int,
    shown: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.delenv(command.TRACEBACK_VARIABLE, raising=False)
    hook = sys.excepthook
    assert run_command(raising(error), []) == code  # type: ignore[arg-type]
    assert capsys.readouterr().err == shown
    assert sys.excepthook is hook


def test_traceback_on_request_and_rank_named(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(command, "SECONDS_BEFORE_OTHER_RANKS_SPEAK", 0.0)
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv(command.TRACEBACK_VARIABLE, "1")
    assert run_command(raising(DataError("row 7")), []) == 2  # type: ignore[arg-type]
    shown = capsys.readouterr().err
    assert shown.startswith("Traceback") and shown.endswith("error (rank 3): row 7\n")


def test_our_mistakes_are_not_swallowed() -> None:
    with pytest.raises(AssertionError):
        run_command(raising(AssertionError("ours")), [])  # type: ignore[arg-type]
    sys.excepthook = sys.__excepthook__


FAILING_RANK = """
import atexit, sys, time
import torch.distributed as dist
from apo_megatron.errors import RolloutError
from apo_megatron.telemetry.command import run_command
def main(argv):
    dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())
    atexit.register(time.sleep, 600)  # an orderly exit that waits for other ranks
    raise {"user": RolloutError, "ours": ZeroDivisionError}[argv[0]]("broken")
sys.exit(run_command(main))
"""


def test_a_failing_rank_ends_at_once_where_others_may_wait() -> None:
    started = {
        kind: subprocess.Popen(
            [sys.executable, "-c", FAILING_RANK, kind],
            stderr=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            env={**os.environ, "RANK": "0", "OMP_NUM_THREADS": "1"},
        )
        for kind in ("user", "ours")
    }
    try:
        shown = {kind: process.communicate(timeout=120)[1] for kind, process in started.items()}
    finally:
        for process in started.values():
            process.kill()
    assert {kind: process.returncode for kind, process in started.items()} == {"user": 2, "ours": 1}
    assert shown["user"].endswith("error: broken\n") and "Traceback" not in shown["user"]
    assert "ZeroDivisionError: broken" in shown["ours"] and "Traceback" in shown["ours"]


def test_command_line_reads_file_and_overrides(tmp_path: Path) -> None:
    path = tmp_path / "sft.yaml"
    path.write_text("model: {hf_path: a}\ndata: {train_path: b}\ntrain: {run_dir: c, num_steps: 5}\n")
    for argv in (
        ["--config", str(path), "train.num_steps=7", "optimizer.lr=1e-3"],
        ["train.num_steps=7", "--config", str(path), "optimizer.lr=1e-3"],
    ):
        cfg = parse_command_line(argv, SFTConfig, "python -m apo_megatron.sft")
        assert (cfg.train.num_steps, cfg.optimizer.lr, cfg.train.run_dir) == (7, 1e-3, "c")
        assert cfg.checkpoint.resume == "never"
        cfg = parse_command_line([*argv, "--resume", "auto"], SFTConfig, "python -m apo_megatron.sft")
        assert cfg.checkpoint.resume == "auto"


@pytest.mark.parametrize("argv", [[], ["train.seed=1"], ["--config", "x.yaml", "--confg=y"]])
def test_wrong_command_line_is_a_config_error_with_the_usage(argv: list[str]) -> None:
    with pytest.raises(ConfigError, match=r"(?s)--conf.*usage: prog --config FILE"):
        parse_command_line(argv, SFTConfig, "prog")


def test_help_lists_every_field(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        parse_command_line(["--help"], RLConfig, "python -m apo_megatron.train")
    assert stop.value.code == 0
    shown = capsys.readouterr().out
    assert "--resume {auto,never}" in shown
    for name, section in RLConfig.model_fields.items():
        assert f"\n{name}: " in shown
        for field, info in section.annotation.model_fields.items():  # type: ignore[union-attr]
            if section_of(info) is not None:
                continue
            assert f"\n  {name}.{field}{'  (required)' if info.is_required() else '='}" in shown
            assert info.description is not None
    assert "\n  rollout.sglang.num_servers=1\n" in shown
    assert "objective.apo_pull_coeff=0.1\n        beta: weight of the anchor ratio where A < 0." in shown


# --- pictures --------------------------------------------------------------------------------------


def history(scale: float) -> list[dict[str, float]]:
    return [
        {"step": step, "reward": scale * step / 100, "entropy": 2 - scale * step / 60, "anchor_mass": 0.8}
        for step in range(1, 51)
    ]


def result(top: float) -> dict[str, dict[str, object]]:
    ks = (1, 4, 16)
    return {
        "pass_at_k": {str(k): top * k / 16 for k in ks},
        "ci95": {str(k): [top * k / 20, min(1.0, top * k / 14)] for k in ks},
    }


def shows_color(path: Path, color: str) -> bool:
    pixels = (255 * matplotlib.image.imread(path)[..., :3]).round().astype(int)
    wanted = [int(color[i : i + 2], 16) for i in (1, 3, 5)]
    return bool((np.abs(pixels - wanted).max(axis=-1) <= 2).sum() > 100)


def test_comparison_picture_shows_every_method(tmp_path: Path) -> None:
    methods = {"base": 0.9, "grpo": 0.6, "apo": 0.8, "mine": 0.7}
    path = plots.comparison_picture(
        {name: result(top) for name, top in methods.items()},
        {"grpo": [history(1.0)], "apo": [history(0.7), history(0.8)]},
        tmp_path / "new" / "comparison.png",
    )
    height, width = matplotlib.image.imread(path).shape[:2]
    assert width > 1500 and height > 800
    assert all(shows_color(path, plots.style_of(name, list(methods)).color) for name in methods)
    assert not shows_color(path, plots.STYLES["grpo_kl"].color)


def test_run_picture_draws_metrics_and_end_evaluations(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in history(1.0)))
    (tmp_path / "evaluation_start.json").write_text(json.dumps({"pass_at_k": {"1": 0.1}}))
    (tmp_path / "evaluation_final.json").write_text(json.dumps({"pass_at_k": {"1": 0.3}}))
    panel = next(panel for panel in plots.RUN_PANELS if panel.keys == ("eval/pass_at_1",))
    steps, values = plots._series(plots.read_history(tmp_path), panel)
    assert steps.tolist() == [0, 50] and values.tolist() == [0.1, 0.3]
    assert plots.run_picture(tmp_path) == tmp_path / "training_curves.png"
    assert shows_color(tmp_path / "training_curves.png", "#0072B2")


def test_nothing_logged_makes_no_picture(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "reward": null}\n')
    assert plots.run_picture(tmp_path) is None


def test_series_takes_the_last_line_of_a_step_and_finite_values() -> None:
    lines = [{"step": 2, "reward": 0.5}, {"step": 1, "reward": 0.1}, {"step": 2, "reward": 0.7}]
    lines += [{"step": 3, "reward": math.nan}, {"step": 4}]
    steps, values = plots._series(lines, plots.Panel("", ("reward",)))
    assert steps.tolist() == [1, 2] and values.tolist() == [0.1, 0.7]


def test_labels_never_overlap_and_curves_keep_their_mean() -> None:
    heights = plots._spread([93.0, 92.7, 99.3, 92.2], 4.5)
    assert np.diff(np.sort(heights)).min() > 4.4
    assert np.argsort(heights).tolist() == [3, 1, 0, 2]
    np.testing.assert_allclose(smooth(np.full(200, 0.3)), 0.3, rtol=1e-12)
    np.testing.assert_allclose(smooth(np.arange(200.0))[10:-10], np.arange(10.0, 190.0), rtol=1e-12)
