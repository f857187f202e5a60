"""Training runs whose SGLang servers or ranks die or hang: no sample is lost, and nothing is left behind."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import psutil

from tests.countdown_base import CountdownBase
from tests.distributed import DistributedRun, run_distributed
from tests.sglang_runs import WORKER, assert_agreement, assert_trained_as_asked, metrics_of
from tests.sglang_servers import sglang_python, stop_sglang_servers

BF16_GAP = 0.05  # mean over tokens; measured: docs/rollouts.md
SECONDS_UNTIL_EVERYTHING_IS_GONE = 60


def test_servers_that_die_and_hang_cost_no_sample(base: CountdownBase) -> None:
    stop_sglang_servers()
    faults = [
        {"step": 2, "when": "generate", "signal": "SIGKILL", "servers": [0]},
        {"step": 3, "when": "push", "signal": "SIGKILL", "servers": [0]},
        {"step": 4, "when": "between", "signal": "SIGKILL", "servers": [1]},
        {"step": 5, "when": "generate", "signal": "SIGSTOP", "servers": [0]},
        {"step": 6, "when": "generate", "signal": "SIGKILL", "servers": [0, 1]},
    ]
    config = base.config(
        "faults",
        model={"dtype": "bfloat16"},
        train={"num_steps": 7},
        rollout={
            "engine": "sglang",
            "sglang": {
                "python": sglang_python(),
                "num_servers": 2,
                "health_interval": 2.0,
                "health_timeout": 10.0,
                "update_timeout": 30.0,
            },
        },
        checkpoint={"export_hf": False},
    )
    result = run_distributed(2, WORKER, {"config": config, "faults": faults}, timeout=1800)[0]
    assert len(result["faults"]) == len(faults)
    assert_trained_as_asked(result, 7)
    assert_agreement(metrics_of(base, "faults"), BF16_GAP)
    assert not _processes_in(base.folder), "servers end with the run"


def test_a_killed_rank_ends_everything_and_the_run_goes_on_from_its_checkpoint(base: CountdownBase) -> None:
    stop_sglang_servers()
    servers = {"python": sglang_python(), "num_servers": 1}
    config = base.config(
        "killed",
        train={"num_steps": 200},
        rollout={"engine": "sglang", "sglang": servers},
        checkpoint={"export_hf": False, "interval": 1, "async_save": False},
    )
    latest = base.folder / "killed" / "checkpoints" / "latest"
    with DistributedRun(2, WORKER, {"config": config}) as run:
        _wait_for(latest.exists, 300, lambda: run.log(0)[-2000:])
        run.kill(1)
        killed_at = time.monotonic()
        codes = run.exit_codes(SECONDS_UNTIL_EVERYTHING_IS_GONE)
        assert any(codes)
        _wait_for(lambda: None not in run.exit_codes(0.1), SECONDS_UNTIL_EVERYTHING_IS_GONE, lambda: "ranks")
        _wait_for(lambda: not _processes_in(base.folder), SECONDS_UNTIL_EVERYTHING_IS_GONE, lambda: "servers")
        assert time.monotonic() - killed_at < SECONDS_UNTIL_EVERYTHING_IS_GONE
    num_done = int(latest.read_text().strip().removeprefix("step_"))
    config["train"]["num_steps"] = num_done + 1
    config["checkpoint"]["resume"] = "auto"
    result = run_distributed(2, WORKER, {"config": config})[0]
    assert result["ended"] == "" and len(result["steps"]) == 1
    assert result["steps"][0]["versions"] == [num_done]


def _processes_in(folder: Path) -> list[psutil.Process]:
    """Servers that were started with a model below ``folder``."""
    found = []
    for process in psutil.process_iter(["cmdline", "status"]):
        words = process.info["cmdline"] or []
        is_server = any("sglang" in word for word in words) and any(str(folder) in word for word in words)
        if is_server and process.info["status"] != psutil.STATUS_ZOMBIE:
            found.append(process)
    return found


def _wait_for(condition: Any, seconds: float, describe: Any) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, describe()
        time.sleep(0.2)
