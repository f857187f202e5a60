"""A run in which nothing moves names the rank that is behind, and ends, so that it can go on elsewhere."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from transformers import AutoTokenizer

from apo_megatron.health.activity import Place
from apo_megatron.health.diagnosis import Diagnosis, diagnose, idle_seconds
from apo_megatron.health.stamp import (
    CollectiveCount,
    LastCollective,
    Stamp,
    read_stamp,
    write_stamp,
)
from apo_megatron.health.watchdog import Watchdog, put_away
from apo_megatron.parallel.collective_log import rank_list
from apo_megatron.telemetry.command import EXIT_STALLED
from tests.distributed import ROOT, DistributedRun, run_distributed
from tests.run_metrics import repeatable_metrics
from tests.tiny_models import make_tiny_model

TARGET = "tests.workers.hang:train_and_stop"
STALL_SECONDS = 6.0
NUM_STEPS, STEP_OF_STALL = 4, 3
NOW = 1000.0


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hang")
    model = make_tiny_model(folder / "model", "qwen3")
    words = sorted(word for word in AutoTokenizer.from_pretrained(model).get_vocab() if word.isalnum())
    prompts = [{"prompt": " ".join(words[i : i + 2 + i % 3])} for i in range(9)]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in prompts))
    run_distributed(2, TARGET, _payload(folder, "unbroken"))
    return folder


def _config(folder: Path, name: str, **checkpoint: Any) -> dict[str, Any]:
    return {
        "model": {"hf_path": str(folder / "model"), "dtype": "float32", "make_vocab_size_divisible_by": 8},
        "data": {"train_path": str(folder / "prompts.jsonl"), "prompts_per_step": 4, "max_prompt_length": 16},
        "train": {"run_dir": str(folder / name), "num_steps": NUM_STEPS, "micro_batch_size": 2},
        "parallel": {"stall_minutes": STALL_SECONDS / 60},
        "rollout": {"group_size": 4, "max_new_tokens": 5},
        "reward": {"name": "tests.word_reward:score"},
        "objective": {"loss_mode": "apo_ratio"},
        "checkpoint": {"interval": 1, "keep_last": 2, **checkpoint},
        "logging": {"tensorboard": False},
    }


def _payload(folder: Path, name: str, **how: Any) -> dict[str, Any]:
    return {"config": _config(folder, name), "victim": -1, "how": "", "step": STEP_OF_STALL, **how}


# Asleep as the last of two stages, so that the first waits for its message.
@pytest.mark.parametrize(
    ("victim", "how", "num_stages"), [(1, "frozen", 1), (0, "frozen", 1), (1, "sleeping", 2)]
)
def test_the_rank_that_stops_is_named_and_the_run_goes_on_from_its_checkpoint(
    folder: Path, victim: int, how: str, num_stages: int
) -> None:
    name = f"{how}_{victim}"
    run_dir, other = folder / name, 1 - victim
    payload = _payload(folder, name, victim=victim, how=how)
    payload["config"]["parallel"]["pipeline_parallel_size"] = num_stages
    with DistributedRun(2, TARGET, payload) as run:
        codes = run.exit_codes(timeout=90)
        deadline = time.monotonic() + 10
        while None in codes and time.monotonic() < deadline:
            time.sleep(0.1)
            codes = run.exit_codes(timeout=10)
        assert codes[other] == EXIT_STALLED, run.log(other)
        assert codes[victim] == (-signal.SIGKILL if how == "frozen" else EXIT_STALLED), run.log(victim)
        logs = [run.log(rank) for rank in range(2)]
    text = (run_dir / "hang" / "summary.txt").read_text()
    assert text in "".join(logs)
    sentences = text.split("\n\n")[1].splitlines()
    assert sentences[0].startswith(f"Rank {victim} (host "), text
    assert f"step {STEP_OF_STALL}, update" in sentences[0]
    assert "micro-batch 2 of" in sentences[0]
    expected = "stopped by a signal (state T)" if how == "frozen" else "in sleep_for_ever: time.sleep(600)"
    assert expected in sentences[0]
    assert sentences[1].startswith(f"Rank {other}: step {STEP_OF_STALL}, update") and len(sentences) == 2
    reports = sorted(path.name for path in (run_dir / "hang").glob("rank_*.txt"))
    alive = [other] if how == "frozen" else [0, 1]
    assert reports == [f"rank_{rank:05d}.txt" for rank in alive]
    stack = (run_dir / "hang" / f"rank_{other:05d}.txt").read_text()
    assert "thread MainThread" in stack and "in train: " in stack and "world (ranks 0, 1)" in stack
    stalled = read_stamp(run_dir, other)
    assert stalled is not None and STALL_SECONDS <= stalled.idle_seconds < STALL_SECONDS + 5

    if (victim, how) == (1, "frozen"):
        _goes_on(folder, name, text)


def _goes_on(folder: Path, name: str, summary: str) -> None:
    """With the metrics of a run that was never broken; the report is put away."""
    run_dir = folder / name
    run_distributed(2, TARGET, {**_payload(folder, name), "config": _config(folder, name, resume="auto")})
    assert repeatable_metrics(run_dir) == repeatable_metrics(folder / "unbroken")
    assert (run_dir / "hang_1" / "summary.txt").read_text() == summary
    assert not (run_dir / "hang").exists()
    ended = [read_stamp(run_dir, rank) for rank in range(2)]
    assert all(stamp is not None and stamp.has_ended for stamp in ended)


def test_a_slow_rank_that_gets_on_is_no_stall(folder: Path) -> None:
    payload = _payload(folder, "slow", victim=1, how="slow", seconds=STALL_SECONDS / 2)
    payload["config"]["train"]["num_steps"] = 1
    run_distributed(2, TARGET, payload)  # the other rank waits for four such micro-batches at once
    assert not (folder / "slow" / "hang").exists()


def test_torchrun_ends_when_a_rank_is_frozen_from_outside(folder: Path) -> None:
    run_dir, config = folder / "torchrun", _config(folder, "torchrun", interval=0)
    config["train"]["num_steps"] = 100_000
    (folder / "torchrun.yaml").write_text(yaml.safe_dump(config))
    command = (
        *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"),
        *("-m", "apo_megatron.train", "--config", str(folder / "torchrun.yaml")),
    )
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    output = folder / "torchrun.log"
    with output.open("w") as log:
        launcher = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=log, stderr=log, start_new_session=True
        )
    try:
        victim = _in_training(run_dir, rank=1, launcher=launcher, output=output)
        os.kill(victim.pid, signal.SIGSTOP)
        frozen_at = time.monotonic()
        assert launcher.wait(timeout=60) != 0
        seconds = time.monotonic() - frozen_at
    finally:
        _kill_group(launcher)
    assert STALL_SECONDS < seconds < STALL_SECONDS + 15  # with what torchrun itself needs
    text = (run_dir / "hang" / "summary.txt").read_text()
    assert text.split("\n\n")[1].startswith(f"Rank 1 (host {victim.host}, pid {victim.pid}) is behind: ")
    assert text in output.read_text()


def _in_training(run_dir: Path, rank: int, launcher: subprocess.Popen[bytes], output: Path) -> Stamp:
    """The stamp of ``rank``, once it has come to its second step."""
    deadline = time.monotonic() + 120
    while True:
        assert launcher.poll() is None and time.monotonic() < deadline, output.read_text()[-3000:]
        stamp = read_stamp(run_dir, rank)
        if stamp is not None and stamp.place.step >= 2:
            return stamp
        time.sleep(0.05)


def _kill_group(launcher: subprocess.Popen[bytes]) -> None:
    """The launcher and what it has started, also what is stopped."""
    try:
        os.killpg(launcher.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
    launcher.wait()


def test_all_that_torch_distributed_issues_is_counted() -> None:
    for rank, counts in enumerate(run_distributed(2, "tests.workers.hang:count_collectives", {})):
        assert counts == {name: count for name, (count, _) in EXPECTED_COUNTS.items()}, rank


# Per function of torch.distributed: how many collectives it issues, and why not one.
EXPECTED_COUNTS = {
    "all_reduce": (1, ""),
    "broadcast": (1, ""),
    "all_gather": (1, ""),
    "all_gather_into_tensor": (1, ""),
    "reduce_scatter_tensor": (1, ""),
    "all_to_all_single": (1, ""),
    "barrier": (1, ""),
    "all_gather_object": (2, "sizes first"),
    "broadcast_object_list": (2, "sizes first"),
    "batch_isend_irecv": (2, "one message each way"),
    "subgroup": (1, ""),
}


def _stamp(rank: int, **values: Any) -> Stamp:
    """One of four ranks at tensor parallel 2, all at the same place; ``counts`` by group."""
    counts: Mapping[str, int] = values.pop("counts", {})
    tensor_ranks = (0, 1) if rank < 2 else (2, 3)
    groups = {
        "world": (0, 1, 2, 3),
        f"tp{tensor_ranks[0]}": tensor_ranks,
        f"pp{rank % 2}": (rank % 2, rank % 2 + 2),
    }
    stamp = Stamp(
        rank=rank,
        host="node",
        pid=100 + rank,
        process_start=7,
        time=NOW - 1,
        idle_seconds=100,
        place=Place(3, "update", 2, 8, 1, 4),
        num_collectives=9,
        last_collective=LastCollective("allreduce", "world", 3),
        groups={key: CollectiveCount(key, ranks, counts.get(key, 5)) for key, ranks in groups.items()},
        stack=("/x/torch/a.py:1 in f: wait()", "/x/apo_megatron/run.py:2 in g: f()"),
    )
    return replace(stamp, **values)


def _diagnose(*stamps: Stamp | None, state: str | None = "S") -> Diagnosis:
    return diagnose(stamps, NOW, silent_after=30, state_of=lambda stamp: state)


def test_who_has_issued_fewer_collectives_and_waits_for_nobody_is_behind() -> None:
    # Rank 3 has not come to a collective of tp2, so 2 waits for it, and 0 for 2 in pp0; 1 waits for 0.
    found = _diagnose(
        _stamp(0, counts={"tp0": 5, "pp0": 6}),
        _stamp(1, counts={"tp0": 6}),
        _stamp(2, counts={"tp2": 6}),
        _stamp(3),
    )
    assert found.behind == (3,)
    assert found.sentences[0] == (
        "Rank 3 (host node, pid 103) is behind: of tp2 it has issued 5, others 6. It is in step 3, "
        "update (2 of 8), micro-batch 1 of 4, at /x/torch/a.py:1 in f: wait(), called by "
        "/x/apo_megatron/run.py:2 in g: f()."
    )
    assert found.sentences[1].startswith("Ranks 0-2: step 3, update (2 of 8), micro-batch 1 of 4; last")


def test_two_ranks_can_be_behind_and_who_has_sent_ahead_is_one_of_them() -> None:
    ahead = {"counts": {"world": 6}}
    assert _diagnose(_stamp(0, **ahead), _stamp(1), _stamp(2), _stamp(3, **ahead)).behind == (1, 2)
    sent_ahead = _stamp(1, counts={"pp1": 6}, last_collective=LastCollective("allreduce", "tp0", 3))
    found = _diagnose(
        _stamp(0, **ahead), sent_ahead, _stamp(2, **ahead), _stamp(3, counts={"world": 6, "tp2": 5})
    )
    assert found.behind == (1,)


def test_a_lost_rank_is_behind_whatever_the_counts_say() -> None:
    ahead = _stamp(0, counts={"world": 6})
    silent = _stamp(1, time=NOW - 62)
    for state, words in (
        (None, "its process is gone"),
        ("T", "is stopped by a signal"),
        ("", "or its node is"),
    ):
        found = _diagnose(ahead, silent, _stamp(2), _stamp(3), state=state)
        assert found.behind == (1,)
        assert "no sign of life for 62 s" in found.sentences[0] and words in found.sentences[0]
    assert (
        _diagnose(ahead, _stamp(1), None, _stamp(3)).sentences[0].startswith("Rank 2 is behind: it has never")
    )
    found = _diagnose(ahead, _stamp(1), _stamp(2), _stamp(3, time=NOW - 62, has_ended=True))
    assert found.behind == (3,) and "it has left the run" in found.sentences[0]


def test_where_the_counts_are_equal_nobody_is_accused() -> None:
    found = _diagnose(*map(_stamp, range(4)))
    assert found.behind == () and found.sentences[0].startswith("No rank is behind")
    assert _diagnose(_stamp(0)).sentences[0].startswith("There is one rank")


def test_what_a_live_rank_did_since_its_stamp_is_not_held_against_it() -> None:
    assert idle_seconds(_stamp(0, time=NOW - 20), NOW, silent_after=30) == 100
    assert idle_seconds(_stamp(0, time=NOW - 40), NOW, silent_after=30) == 140


def test_a_new_run_puts_the_reports_of_earlier_ones_away(tmp_path: Path) -> None:
    for number in (1, 2):
        (tmp_path / "hang").mkdir()
        (tmp_path / "hang" / "summary.txt").write_text(str(number))
        put_away(tmp_path)
    write_stamp(tmp_path, _stamp(2))
    assert read_stamp(tmp_path, 2) == _stamp(2) and read_stamp(tmp_path, 1) is None
    put_away(tmp_path)
    assert read_stamp(tmp_path, 2) is None
    assert [(tmp_path / f"hang_{n}" / "summary.txt").read_text() for n in (1, 2)] == ["1", "2"]
    assert not (tmp_path / "hang").exists()


def test_a_rank_that_does_not_see_the_folder_yet_makes_it(tmp_path: Path) -> None:
    """Network file systems remember that a name was not there."""
    with Watchdog(tmp_path / "run", rank=1, world=2, stall_minutes=0, timeout_minutes=30):
        assert read_stamp(tmp_path / "run", 1) is not None


def test_ranks_in_words() -> None:
    lists = [rank_list(ranks) for ranks in ((3,), (0, 1), (4, 5, 6, 7), (0, 8, 16, 24), (0, 1, 5))]
    assert lists == ["rank 3", "ranks 0, 1", "ranks 4-7", "ranks 0, 8, ... 24", "ranks 0, 1, 5"]
