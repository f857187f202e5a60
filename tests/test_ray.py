"""Runs on a simulated Ray cluster of two nodes: the same numbers; ranks, nodes and servers that are lost."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

import psutil
import pytest
import yaml
from ray.cluster_utils import Cluster

from tests.countdown_base import CountdownBase, make_countdown_base
from tests.distributed import run_distributed
from tests.sglang_servers import sglang_python, stop_sglang_servers

ROOT = Path(__file__).resolve().parent.parent
RANK, SERVER = "apo_megatron.launch.rank_main", "sglang.launch_server"
NODE: dict[str, Any] = {"num_cpus": 1, "object_store_memory": 80 * 2**20}
NUM_STEPS = 24
PATIENCE = 600.0  # seconds, on a very busy machine
ENDS_WITHIN = 60.0  # seconds from a failure until every process of the run is gone
TIMED = re.compile(r"^(time|memory)/|seconds$|_gap$")


class Nodes:
    """A head and ``others``, which can be taken away; one CPU each."""

    def __init__(self) -> None:
        self._cluster = Cluster(initialize_head=True, head_node_args={**NODE, "include_dashboard": False})
        self.address = str(self._cluster.address)
        self.others: list[Any] = []
        self.add()

    def add(self) -> None:
        self.others.append(self._cluster.add_node(**NODE))

    def remove(self, node: Any) -> None:
        """Kill -9 what Ray runs there; what that has started must end by itself."""
        self.others.remove(node)
        (raylet,) = node.all_processes["raylet"]
        for process in psutil.Process(raylet.process.pid).children():
            process.kill()
        self._cluster.remove_node(node, allow_graceful=False)

    def processes(self, module: str, node: Any = None) -> list[psutil.Process]:
        """Those on ``node``, or on all nodes, that run ``python -m module``."""
        found = []
        for each in self._cluster.list_all_nodes() if node is None else [node]:
            for raylet in each.all_processes.get("raylet", []):
                with suppress(psutil.NoSuchProcess):
                    found += psutil.Process(raylet.process.pid).children(recursive=True)
        return [process for process in found if _runs(process, module)]

    def close(self) -> None:
        self._cluster.shutdown()


def _runs(process: psutil.Process, module: str) -> bool:
    with suppress(psutil.Error):
        return process.status() != psutil.STATUS_ZOMBIE and module in process.cmdline()
    return False


class Launch:
    """The launcher as a user starts it, with what it has shown; killed at the end of the ``with`` block."""

    def __init__(self, cluster: Nodes, config: dict[str, Any], *words: str) -> None:
        self.folder = Path(config["train"]["run_dir"])
        path = self.folder.with_suffix(".yaml")
        path.write_text(yaml.safe_dump(config))
        self._output = self.folder.with_suffix(".out")
        command = [sys.executable, "-m", "apo_megatron.launch.ray", "--config", str(path), *words]
        with self._output.open("w") as output:
            self._process = subprocess.Popen(
                [*command, "--address", cluster.address], cwd=ROOT, stdout=output, stderr=output
            )

    @property
    def text(self) -> str:
        return self._output.read_text(errors="replace")

    @property
    def num_steps(self) -> int:
        metrics = self.folder / "metrics.jsonl"
        return metrics.read_bytes().count(b"\n") if metrics.exists() else 0

    def wait_for(self, condition: Callable[[], bool]) -> None:
        deadline = time.monotonic() + PATIENCE
        while not condition():
            assert self._process.poll() is None and time.monotonic() < deadline, self.text[-6000:]
            time.sleep(0.05)

    def exit_code(self, seconds: float = PATIENCE) -> int:
        return self._process.wait(seconds)

    def send(self, number: signal.Signals) -> None:
        self._process.send_signal(number)

    def __enter__(self) -> Launch:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.kill()
        self._process.wait()
        if kind is not None:
            print(self.text[-6000:])


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> CountdownBase:
    return make_countdown_base(tmp_path_factory.mktemp("countdown"))


@pytest.fixture(scope="module")
def cluster() -> Iterator[Nodes]:
    nodes = Nodes()
    yield nodes
    nodes.close()


def _config(base: CountdownBase, run: str, **sections: Any) -> dict[str, Any]:
    wanted: dict[str, Any] = {
        "parallel": {"tensor_parallel_size": 1},
        "train": {"run_dir": str(base.folder / run), "num_steps": NUM_STEPS, "num_mini_batches": 2},
        "checkpoint": {"interval": 2, "keep_last": 2, "export_hf": False},
    }
    for section, values in sections.items():
        wanted[section] = {**wanted.get(section, {}), **values}
    return base.config(run, **wanted)


def _metrics(folder: Path) -> list[dict[str, float]]:
    """Of each step, without times and what rounding is all of."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{name: row[name] for name in row if not TIMED.search(name)} for row in rows]


@pytest.fixture(scope="module")
def reference(base: CountdownBase) -> list[dict[str, float]]:
    """The metrics of a run without Ray and without interruption."""
    config = _config(base, "reference")
    run_distributed(2, "tests.workers.ray_reference:run", config)
    return _metrics(base.folder / "reference")


def _assert_same(found: list[dict[str, float]], expected: list[dict[str, float]]) -> None:
    assert [row["step"] for row in found] == [row["step"] for row in expected]
    for row, same in zip(found, expected, strict=True):
        assert row == pytest.approx(same, rel=1e-4, abs=1e-6)


def test_a_lost_node_costs_no_step_when_the_run_may_restart(
    base: CountdownBase, cluster: Nodes, reference: list[dict[str, float]]
) -> None:
    config = _config(base, "lost_node")
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
    _assert_same(_metrics(launch.folder), reference)


def test_a_killed_rank_ends_the_run_which_can_go_on_and_stop_in_order(
    base: CountdownBase, cluster: Nodes, reference: list[dict[str, float]]
) -> None:
    config = _config(base, "killed_rank")
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

    num_before = len(_metrics(launch.folder))
    with Launch(cluster, config, "--num-trainers", "2", "--resume", "auto") as launch:
        launch.wait_for(lambda: "step" in launch.text and launch.num_steps > num_before)
        launch.send(signal.SIGTERM)
        assert launch.exit_code() == 130
    found = _metrics(launch.folder)
    assert f"stopped after step {len(found)} of {NUM_STEPS}, the state is saved" in launch.text
    assert (launch.folder / "checkpoints" / "latest").read_text() == f"step_{len(found):06d}"
    _assert_same(found, reference[: len(found)])
    assert not cluster.processes(RANK)


def test_no_rank_outlives_a_killed_launcher(base: CountdownBase, cluster: Nodes) -> None:
    with Launch(cluster, _config(base, "killed_launcher"), "--num-trainers", "2") as launch:
        launch.wait_for(lambda: launch.num_steps >= 1)
        ranks = cluster.processes(RANK)
        assert len(ranks) == 2
        launch.send(signal.SIGKILL)
        _, alive = psutil.wait_procs(ranks, ENDS_WITHIN)
        assert not alive


def test_too_small_a_cluster_is_named_at_once_or_waited_for(base: CountdownBase, cluster: Nodes) -> None:
    config = _config(base, "waiting")
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


def test_a_server_that_cannot_start_ends_the_run(base: CountdownBase, cluster: Nodes) -> None:
    servers = {"python": "no-such-python"}
    config = _config(base, "no_server", rollout={"engine": "sglang", "sglang": servers})
    with Launch(cluster, config) as launch:
        assert launch.exit_code() == 2
    assert "error: rollout.sglang.python=no-such-python: no such program" in launch.text
    assert not cluster.processes(RANK)


def test_servers_that_are_lost_come_back_and_the_run_goes_on(base: CountdownBase, cluster: Nodes) -> None:
    stop_sglang_servers()
    cluster.add()
    servers = {"num_servers": 2, "python": sglang_python(), "health_interval": 2.0}
    servers |= {"health_timeout": 5.0, "update_timeout": 15.0}
    config = _config(
        base, "servers", train={"num_steps": 2000}, rollout={"engine": "sglang", "sglang": servers}
    )
    with Launch(cluster, config) as launch:

        def listed() -> dict[str, str]:
            path = launch.folder / "servers.json"
            entries = json.loads(path.read_text()) if path.exists() else []
            return {entry["name"]: entry["url"] for entry in entries}

        def num_used() -> float:
            """At the last update; a step without a mixed group leaves the weights as they are."""
            found = [row["num_servers"] for row in _metrics(launch.folder) if "num_servers" in row]
            return found[-1] if found else 0.0

        launch.wait_for(lambda: launch.num_steps >= 2 and num_used() == 2)
        before = listed()
        assert all(url.startswith("http://127.0.0.1:") for url in before.values())
        (node, *_) = [node for node in cluster.others if not cluster.processes(RANK, node)]
        lost = cluster.processes(SERVER, node)
        assert lost
        cluster.remove(node)
        launch.wait_for(lambda: len(listed()) == 1)
        num_steps = launch.num_steps
        launch.wait_for(lambda: launch.num_steps >= num_steps + 2 and num_used() == 1)  # with the other
        assert not any(process.is_running() for process in lost)

        (scheduler,) = cluster.processes("sglang::scheduler")
        scheduler.suspend()  # the other one hangs, and there is room again for the lost one
        cluster.add()
        launch.wait_for(lambda: not scheduler.is_running())
        launch.wait_for(lambda: len(listed()) == 2 and num_used() == 2)
        assert "restart 2 of 10" not in launch.text  # a try on the node that was gone counts for nothing
        launch.send(signal.SIGTERM)
        assert launch.exit_code() == 130
    assert listed() == {}
    assert not cluster.processes(SERVER)
