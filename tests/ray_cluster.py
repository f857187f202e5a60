"""A simulated Ray cluster of two nodes, and the launcher as a user starts it there."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

import psutil
import yaml
from ray.cluster_utils import Cluster

from tests.countdown_base import CountdownBase
from tests.run_metrics import repeatable_metrics

ROOT = Path(__file__).resolve().parent.parent
RANK, SERVER = "apo_megatron.launch.rank_main", "sglang.launch_server"
NODE: dict[str, Any] = {"num_cpus": 1, "object_store_memory": 80 * 2**20}
NUM_STEPS = 12
PATIENCE = 600.0  # seconds, on a very busy machine
ENDS_WITHIN = 60.0  # seconds from a failure until every process of the run is gone
MEASURED = re.compile(r"seconds$|_gap(_max)?$")  # times, and what rounding is all of


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


def ray_config(base: CountdownBase, run: str, **sections: Any) -> dict[str, Any]:
    wanted: dict[str, Any] = {
        "parallel": {"tensor_parallel_size": 1},
        "train": {"run_dir": str(base.folder / run), "num_steps": NUM_STEPS, "num_mini_batches": 2},
        "checkpoint": {"interval": 2, "keep_last": 2, "export_hf": False},
    }
    for section, values in sections.items():
        wanted[section] = {**wanted.get(section, {}), **values}
    return base.config(run, **wanted)


def metrics_of(folder: Path) -> list[dict[str, float]]:
    """Of each step, without what no two runs have in common."""
    return [
        {name: row[name] for name in row if not MEASURED.search(name)} for row in repeatable_metrics(folder)
    ]
