"""What the Ray launcher decides without Ray: bundles, order of ranks, what is lacking, who failed first."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from apo_megatron.config import RLConfig
from apo_megatron.errors import ConfigError, RunInterrupted, TrainingError
from apo_megatron.launch import entry, waiting
from apo_megatron.launch.command import command_to_go_on, read_command_line
from apo_megatron.launch.outcome import LogTail, RankEnd, first_failure, last_lines
from apo_megatron.launch.placement import (
    Node,
    Plan,
    common_address,
    describe_wait,
    make_plan,
    place_ranks,
    rank_environment,
    visible_devices,
    why_never,
)
from apo_megatron.launch.rank_process import RankProcess
from apo_megatron.launch.stop_signals import StopSignals
from apo_megatron.launch.waiting import Waiting


def node(name: str, num_gpus: int = 0, num_cpus: int = 64, free_gpus: int | None = None) -> Node:
    total = {"GPU": float(num_gpus), "CPU": float(num_cpus), "memory": 1e9}
    free = total if free_gpus is None else {**total, "GPU": float(free_gpus)}
    return Node(f"id-{name}", f"10.0.0.{name}", total, free)


def config(engine: str = "embedded", sglang: dict[str, Any] | None = None, **parallel: int) -> RLConfig:
    return RLConfig.model_validate(
        {
            "model": {"hf_path": "m"},
            "data": {"train_path": "d"},
            "train": {"run_dir": "r", "num_steps": 1},
            "parallel": parallel,
            "rollout": {"engine": engine, "sglang": sglang or {}},
        }
    )


def test_ranks_of_a_tensor_parallel_group_share_a_bundle() -> None:
    plan = make_plan(
        config(tensor_parallel_size=4, pipeline_parallel_size=2), None, [node("1", 8), node("2", 9)]
    )
    assert plan.num_ranks == 16  # of 17 GPUs, in whole copies of the model
    assert plan.bundles() == [{"GPU": 4.0, "CPU": 4.0}] * 4


def test_without_gpus_there_is_one_copy_of_the_model() -> None:
    plan = make_plan(config(tensor_parallel_size=2), None, [node("1")])
    assert (plan.num_ranks, plan.use_gpu) == (2, False)
    assert plan.bundles() == [{"CPU": 2.0}]


def test_servers_get_bundles_of_their_own() -> None:
    cfg = config("sglang", {"num_servers": 2, "tensor_parallel_size": 2}, tensor_parallel_size=2)
    plan = make_plan(cfg, None, [node("1", 8)])
    assert plan.num_ranks == 4
    assert plan.bundles() == [{"GPU": 2.0, "CPU": 2.0}] * 2 + [{"GPU": 2.0, "CPU": 1.0}] * 2
    assert [plan.server_bundle(server) for server in range(2)] == [2, 3]


def test_colocated_servers_share_the_trainers_bundles() -> None:
    sglang = {"num_servers": 3, "tensor_parallel_size": 2, "colocated": True}
    plan = make_plan(config("sglang", sglang, tensor_parallel_size=4), 8, [node("1", 8)])
    assert plan.bundles() == [{"GPU": 4.0, "CPU": 6.0}, {"GPU": 4.0, "CPU": 5.0}]
    assert [plan.server_bundle(server) for server in range(3)] == [0, 0, 1]
    assert make_plan(config("sglang", sglang, tensor_parallel_size=4), None, []).num_servers == 3
    assert make_plan(config("sglang", sglang, tensor_parallel_size=4), None, [node("1", 8)]).num_ranks == 8
    wide = {"num_servers": 1, "tensor_parallel_size": 4, "colocated": True}
    assert make_plan(config("sglang", wide), None, [node("1", 8)]).ranks_per_bundle == 4


@pytest.mark.parametrize("sglang", [{"urls": ["http://a:1"]}, {"servers_file": "s.json"}])
def test_servers_that_run_already_are_not_started(sglang: dict[str, Any]) -> None:
    plan = make_plan(config("sglang", sglang), 2, [])
    assert plan.num_servers == 0 and len(plan.bundles()) == 2


def test_a_layout_that_does_not_divide_the_ranks_is_refused() -> None:
    with pytest.raises(ConfigError, match="--num-trainers=6 must be a multiple of 4.*tensor_parallel_size=2"):
        make_plan(config(tensor_parallel_size=2, pipeline_parallel_size=2), 6, [])
    sglang = {"num_servers": 3, "colocated": True}
    with pytest.raises(ConfigError, match="num_servers=3 .* more than the 2 GPUs"):
        make_plan(config("sglang", sglang), 2, [node("1", 8)])


def plan_of(num_ranks: int, per_bundle: int) -> Plan:
    return Plan(num_ranks, per_bundle, 0, 1, False, True)


def test_ranks_of_a_node_are_adjacent() -> None:
    first, second = node("1"), node("2")
    places = place_ranks(plan_of(6, 2), [second, first, second])
    assert [(p.rank, p.node.address, p.local_rank, p.local_world_size, p.bundle) for p in places] == [
        (0, "10.0.0.1", 0, 2, 1),
        (1, "10.0.0.1", 1, 2, 1),
        (2, "10.0.0.2", 0, 4, 0),
        (3, "10.0.0.2", 1, 4, 0),
        (4, "10.0.0.2", 2, 4, 2),
        (5, "10.0.0.2", 3, 4, 2),
    ]
    environment = rank_environment(places[3], 6, "10.0.0.1", "29500")
    assert (environment["RANK"], environment["LOCAL_RANK"], environment["WORLD_SIZE"]) == ("3", "1", "6")
    assert (environment["LOCAL_WORLD_SIZE"], environment["MASTER_PORT"]) == ("4", "29500")


def test_one_machine_talks_over_loopback() -> None:
    twin = Node("other id", "10.0.0.1", {}, {})
    assert common_address([node("1"), twin]) == "127.0.0.1"
    assert common_address([node("2"), node("1")]) == "10.0.0.2"


def test_every_rank_sees_the_gpus_of_all_ranks_on_its_node() -> None:
    places = place_ranks(plan_of(4, 1), [node("1"), node("2"), node("1"), node("1")])
    assert visible_devices(places, ["10", "0", "2", "7"]) == {"id-1": "0,2,10", "id-2": "7"}
    assert visible_devices(places, [""] * 4) == {"id-1": "", "id-2": ""}


@pytest.mark.parametrize(
    ("bundles", "nodes", "lack"),
    [
        ([{"GPU": 4.0, "CPU": 4.0}] * 2, [node("1", 4), node("2", 4)], None),
        ([{"GPU": 4.0, "CPU": 4.0}] * 2, [node("1", 4), node("2", 2)], r"2 GPU \(8 asked, 6 there\)"),
        (
            [{"GPU": 4.0, "CPU": 4.0}],
            [node("1", 2), node("2", 2)],
            "nodes with 4 GPU, 4 CPU together: 1 times",
        ),
        ([{"CPU": 1.0}] * 3, [node("1", 0, 1)], r"2 CPU \(3 asked, 1 there\)"),
        # Two groups and a server: the sums would do, and nothing proves that they cannot be packed.
        ([{"GPU": 2.0}] * 2 + [{"GPU": 1.0}], [node("1", 3), node("2", 2)], None),
    ],
)
def test_what_a_cluster_can_never_hold(
    bundles: list[dict[str, float]], nodes: list[Node], lack: str | None
) -> None:
    found = why_never(bundles, nodes)
    if lack is None:
        assert found is None
    else:
        assert found is not None and re.match(lack, found), found


def test_status_shows_demand_and_what_is_free() -> None:
    lines = describe_wait(
        [{"GPU": 2.0, "CPU": 2.0}] * 2 + [{"GPU": 1.0, "CPU": 1.0}], [node("1", 4, 8, free_gpus=1)]
    )
    assert lines[0] == "asked: 2 x (2 GPU, 2 CPU) + 1 x (1 GPU, 1 CPU)"
    assert lines[1].endswith(": 1 of 4 GPU, 8 of 8 CPU free") and "10.0.0.1" in lines[1]
    many = describe_wait([{"CPU": 1.0}], [node(str(i), 0, 1) for i in range(20)])
    assert len(many) == 18 and many[-1].strip() == "4 more nodes: 4 of 4 CPU free"


def test_the_cause_comes_before_its_consequences() -> None:
    zero, one, two = place_ranks(plan_of(3, 1), [node("1")] * 3)
    broken = RankEnd(zero, 1)
    assert first_failure([RankEnd(zero, 0), RankEnd(one, 130)]) is None
    assert first_failure([broken, RankEnd(one, 2)]) is broken
    killed = RankEnd(one, -signal.SIGKILL)
    assert first_failure([broken, killed]) is killed
    assert "rank 1 on node 10.0.0.1 (id-1) was ended by SIGKILL" in killed.describe()
    lost = RankEnd(two, None, "was lost")
    assert first_failure([broken, lost]) is lost
    assert (broken.exit_code, RankEnd(one, 2).exit_code, lost.exit_code) == (1, 2, 1)


def test_a_log_is_shown_in_whole_lines_from_now_on(tmp_path: Path) -> None:
    path = tmp_path / "rank_0.log"
    path.write_text("of an earlier attempt\n")
    tail = LogTail(path)
    with path.open("a") as log:
        log.write("one\ntw")
        log.flush()
        assert tail.new_text() == "one\n"
        log.write("o\n\nthree")
        log.flush()
        assert tail.new_text() == "two\n\n"
    assert tail.new_text(to_end=True) == "three"
    assert last_lines(path)[-3:] == ["one", "two", "three"]
    assert last_lines(tmp_path / "none") == [] and LogTail(tmp_path / "none").new_text() == ""


def test_launcher_options_stand_among_those_of_the_trainer(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("model: {hf_path: m}\ndata: {train_path: d}\ntrain: {run_dir: r, num_steps: 1}\n")
    words = ["--num-trainers", "4", "--config", str(path), "train.num_steps=7", "--max-failures=2"]
    options, cfg = read_command_line([*words, "--resume", "auto"])
    assert (options.num_trainers, options.max_failures, options.address) == (4, 2, None)
    assert (cfg.train.num_steps, cfg.checkpoint.resume) == (7, "auto")
    expected = f"--num-trainers 4 --config {path} train.num_steps=7 --max-failures=2 --resume auto"
    assert command_to_go_on([*words[:2], "--resume", "never", *words[2:]]).endswith(expected)
    for wrong in (
        ["--num-trainers", "0"],
        ["--wait-minutes", "nan"],
        ["--max-failures", "x"],
        ["--nonsense"],
    ):
        with pytest.raises(ConfigError, match="usage|expected"):
            read_command_line(["--config", str(path), *wrong])


def test_waiting_shows_lines_and_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr(waiting.time, "monotonic", lambda: clock[0])
    shown: list[str] = []
    stop = StopSignals()
    wait = Waiting(stop, shown.append, minutes=1.0)
    for clock[0] in range(0, 60):
        wait.step(["for resources", "  a node"])
    assert len(shown) == 6 and shown[0] == "waiting 0:03 of 1:00 for resources\n  a node"
    clock[0] = 61
    with pytest.raises(TrainingError, match="gave up after 1:01 .*waiting for resources"):
        wait.step(["for resources"])
    stop.count, stop.name = 1, "SIGTERM"
    with pytest.raises(RunInterrupted, match="SIGTERM received while waiting for resources"):
        wait.step(["for resources"])


def test_stop_signals_are_counted() -> None:
    previous = signal.getsignal(signal.SIGTERM)
    with StopSignals() as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGINT)
    assert (stop.count, stop.name) == (2, "SIGINT")
    assert signal.getsignal(signal.SIGTERM) is previous


def test_a_rank_that_is_stopped_before_it_starts_does_not_start(tmp_path: Path) -> None:
    rank = RankProcess(str(tmp_path))
    rank.ask_to_stop()
    assert rank.run({}, "", "", str(tmp_path / "log")) == -signal.SIGTERM


def test_a_node_where_ranks_cannot_run_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shared = tmp_path / "shared_folder"
    shared.write_text("a")
    assert RankProcess(str(tmp_path)).problem(str(shared), "a") == ""
    assert "has no folder" in RankProcess(str(tmp_path / "none")).problem(str(shared), "a")
    monkeypatch.setattr("apo_megatron.launch.rank_process._SECONDS_TO_SEE_A_FILE", 0.1)
    assert "does not see" in RankProcess(str(tmp_path)).problem(str(shared), "b")


def test_a_rank_does_not_start_without_its_parent() -> None:
    command = [sys.executable, "-m", "apo_megatron.launch.rank_main", "1", "--config", "x"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert result.returncode == 1 and "process 1, which started this rank, is gone" in result.stderr


def test_without_ray_the_launcher_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(entry, "find_spec", lambda name: None)
    config = str(Path(__file__).parent.parent / "examples/countdown/apo.yaml")
    assert entry.main(["--config", config]) == 2
    assert "Ray is not installed: pip install" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="0"):
        entry.main(["--help"])
    assert "--num-trainers" in capsys.readouterr().out
