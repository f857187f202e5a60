"""SGLang servers that Ray places on a simulated cluster, and that are lost."""

from __future__ import annotations

import json
import signal
from collections.abc import Iterator

import pytest

from tests.countdown_base import CountdownBase
from tests.ray_cluster import RANK, SERVER, Launch, Nodes, metrics_of, ray_config
from tests.sglang_servers import sglang_python, stop_sglang_servers


@pytest.fixture(scope="module")
def cluster() -> Iterator[Nodes]:
    nodes = Nodes()
    yield nodes
    nodes.close()


def test_a_server_that_cannot_start_ends_the_run(base: CountdownBase, cluster: Nodes) -> None:
    servers = {"python": "no-such-python"}
    config = ray_config(base, "no_server", rollout={"engine": "sglang", "sglang": servers})
    with Launch(cluster, config) as launch:
        assert launch.exit_code() == 2
    assert "error: rollout.sglang.python=no-such-python: no such program" in launch.text
    assert not cluster.processes(RANK)


@pytest.mark.slow
def test_servers_that_are_lost_come_back_and_the_run_goes_on(base: CountdownBase, cluster: Nodes) -> None:
    stop_sglang_servers()
    cluster.add()
    servers = {"num_servers": 2, "python": sglang_python(), "health_interval": 2.0}
    servers |= {"health_timeout": 5.0, "update_timeout": 15.0}
    config = ray_config(
        base, "servers", train={"num_steps": 2000}, rollout={"engine": "sglang", "sglang": servers}
    )
    with Launch(cluster, config) as launch:

        def listed() -> dict[str, str]:
            path = launch.folder / "servers.json"
            entries = json.loads(path.read_text()) if path.exists() else []
            return {entry["name"]: entry["url"] for entry in entries}

        def num_used() -> float:
            """At the last update; a step without a mixed group leaves the weights as they are."""
            found = [row["num_servers"] for row in metrics_of(launch.folder) if "num_servers" in row]
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
