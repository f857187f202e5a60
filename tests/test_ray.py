"""Runs on a simulated Ray cluster: the same numbers; ranks, nodes and launchers that are lost."""

from __future__ import annotations

import re
import signal
import time
from collections.abc import Iterator

import psutil
import pytest

from tests.countdown_base import CountdownBase
from tests.distributed import run_distributed
from tests.ray_cluster import ENDS_WITHIN, NUM_STEPS, RANK, Launch, Nodes, metrics_of, ray_config


@pytest.fixture(scope="module")
def cluster() -> Iterator[Nodes]:
    nodes = Nodes()
    yield nodes
    nodes.close()


@pytest.fixture(scope="module")
def reference(base: CountdownBase) -> list[dict[str, float]]:
    """The metrics of a run without Ray and without interruption."""
    config = ray_config(base, "reference")
    run_distributed(2, "tests.workers.ray_reference:run", config)
    return metrics_of(base.folder / "reference")


def _assert_same(found: list[dict[str, float]], expected: list[dict[str, float]]) -> None:
    assert [row["step"] for row in found] == [row["step"] for row in expected]
    for row, same in zip(found, expected, strict=True):
        assert row == pytest.approx(same, rel=1e-4, abs=1e-6)


def test_a_lost_node_costs_no_step_when_the_run_may_restart(
    base: CountdownBase, cluster: Nodes, reference: list[dict[str, float]]
) -> None:
    config = ray_config(base, "lost_node")
    with Launch(cluster, config, "--num-trainers", "2", "--max-failures", "1") as launch:
        launch.wait_for(lambda: launch.num_steps >= 5)
        ranks = cluster.processes(RANK)
        assert len(ranks) == 2 and len(cluster.processes(RANK, cluster.others[0])) == 1
        cluster.remove(cluster.others[0])
        launch.wait_for(lambda: "waiting" in launch.text.partition("was lost")[2])
        assert "its node is gone" in launch.text and "restart 1 of 1, from step_0000" in launch.text
        assert not any(rank.is_running() for rank in ranks)
        cluster.add()
        assert launch.exit_code() == 0
    _assert_same(metrics_of(launch.folder), reference)


def test_a_killed_rank_ends_the_run_which_can_go_on_and_stop_in_order(
    base: CountdownBase, cluster: Nodes, reference: list[dict[str, float]]
) -> None:
    config = ray_config(base, "killed_rank")
    with Launch(cluster, config, "--num-trainers", "2") as launch:
        launch.wait_for(lambda: launch.num_steps >= 5)
        ranks = cluster.processes(RANK)
        assert len(ranks) == 2
        victim = next(process for process in ranks if process.environ()["RANK"] == "1")
        killed = time.monotonic()
        victim.kill()
        assert launch.exit_code(ENDS_WITHIN) == 1
        assert not any(process.is_running() for process in ranks)
        assert time.monotonic() - killed < ENDS_WITHIN
    assert re.search(r"error: rank 1 on node .* was ended by SIGKILL", launch.text)
    command = re.search(r"To go on from step_\d+: (.*)", launch.text)
    assert command is not None and command[1].endswith("--resume auto") and str(launch.folder) in command[1]

    num_before = len(metrics_of(launch.folder))
    with Launch(cluster, config, "--num-trainers", "2", "--resume", "auto") as launch:
        launch.wait_for(lambda: "step" in launch.text and launch.num_steps > num_before)
        launch.send(signal.SIGTERM)
        assert launch.exit_code() == 130
    found = metrics_of(launch.folder)
    assert f"stopped after step {len(found)} of {NUM_STEPS}, the state is saved" in launch.text
    assert (launch.folder / "checkpoints" / "latest").read_text() == f"step_{len(found):06d}"
    _assert_same(found, reference[: len(found)])
    assert not cluster.processes(RANK)


def test_no_rank_outlives_a_killed_launcher(base: CountdownBase, cluster: Nodes) -> None:
    with Launch(cluster, ray_config(base, "killed_launcher"), "--num-trainers", "2") as launch:
        launch.wait_for(lambda: launch.num_steps >= 1)
        ranks = cluster.processes(RANK)
        assert len(ranks) == 2
        launch.send(signal.SIGKILL)
        _, alive = psutil.wait_procs(ranks, ENDS_WITHIN)
        assert not alive


def test_too_small_a_cluster_is_named_at_once_or_waited_for(base: CountdownBase, cluster: Nodes) -> None:
    config = ray_config(base, "waiting")
    with Launch(cluster, config, "--num-trainers", "3") as launch:
        assert launch.exit_code() == 2
    assert "it lacks 1 CPU (3 asked, 2 there)" in launch.text
    with Launch(
        cluster, config, "--num-trainers", "3", "--wait-for-nodes", "--wait-minutes", "0.1"
    ) as launch:
        assert launch.exit_code() == 2
    assert re.search(r"ray: waiting 0:0\d of 0:06 for resources, asked: 3 x \(1 CPU\)", launch.text)
    assert len(re.findall(r"\): 1 of 1 CPU free", launch.text)) >= 4  # two nodes, shown twice
    assert "gave up after 0:06 (--wait-minutes)" in launch.text
