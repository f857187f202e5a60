"""A real Slurm with several nodes on this machine (slurm_cluster.sh), as a user of it sees it."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType

import psutil
import pytest

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ROOT / "tests" / "slurm_cluster.sh"
PROGRAMS = ("slurmctld", "slurmd", "munged", "sbatch", "unshare", "nsenter", "ip", "pkill")
SYSTEM_PATH = f"{os.environ['PATH']}:/usr/sbin:/sbin"
ACTIVE = ("PENDING", "CONFIGURING", "RUNNING", "COMPLETING", "REQUEUED")
# Nothing of an outer Slurm job or torchrun, and no GPU.
ENVIRONMENT = {
    **{name: text for name, text in os.environ.items() if not re.match("SLURM|SBATCH|SRUN|RANK|WORLD", name)},
    "PYTHON": sys.executable,
    "PYTHONPATH": str(ROOT),
    "CUDA_VISIBLE_DEVICES": "",
    "OMP_NUM_THREADS": "1",
}


class SlurmCluster:
    """Nodes node0, node1, ...; use it with ``with``: nothing it has started outlives the block.

    Skips the test where Slurm is not installed or may not be started.
    """

    def __init__(self, folder: Path, num_nodes: int = 2, cpus_per_node: int = 4) -> None:
        missing = [name for name in PROGRAMS if shutil.which(name, path=SYSTEM_PATH) is None]
        if missing:
            pytest.skip(f"no {', '.join(missing)}: make slurm installs Debian's Slurm")
        if os.geteuid() != 0:
            pytest.skip("only root can start a Slurm in namespaces of its own")
        if subprocess.run(["unshare", "--net", "--mount", "--uts", "--pid", "--fork", "true"]).returncode:
            pytest.skip("this machine does not let us have namespaces of our own")
        self.folder = folder
        self._call("up", str(num_nodes), str(cpus_per_node))

    def _call(self, action: str, *words: str, **variables: str) -> str:
        result = subprocess.run(
            ["bash", str(SCRIPT), action, str(self.folder), *words],
            cwd=ROOT, env=ENVIRONMENT | variables, capture_output=True, text=True, timeout=120,
        )  # fmt: skip
        assert result.returncode == 0, f"{action} {words}: {result.stdout[-2000:]}{result.stderr[-4000:]}"
        return result.stdout

    def run(self, *command: str, **variables: str) -> str:
        """The output of a command that runs inside, in the root of the checkout."""
        return self._call("exec", *command, **variables)

    def submit(self, script: str, *words: str, options: Sequence[str] = (), **variables: str) -> Job:
        """``sbatch OPTIONS SCRIPT WORDS`` in the root of the checkout, with ``variables``."""
        is_array = any(option.startswith("--array") for option in options)
        output = self.folder / ("%A_%a.out" if is_array else "%j.out")
        command = ("sbatch", "--parsable", f"--output={output}", *options, script, *words)
        return Job(self, self.run(*command, **variables).strip())

    def processes(self, *words: str) -> list[psutil.Process]:
        """Those inside whose command line has all ``words``."""
        found = []
        for process in psutil.Process(int((self.folder / "run" / "init").read_text())).children(True):
            try:
                line = process.cmdline()
            except psutil.Error:  # it has just ended
                continue
            if all(word in line for word in words):
                found.append(process)
        return found

    def __enter__(self) -> SlurmCluster:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._call("down")


class Job:
    """A job by its number, or a task of an array ("7_1")."""

    def __init__(self, cluster: SlurmCluster, number: str) -> None:
        self.cluster, self.number = cluster, number

    def shown(self, name: str) -> str:
        """A field of ``scontrol show job``, such as JobState or Restarts."""
        found = re.search(rf"\b{name}=(\S*)", self.cluster.run("scontrol", "show", "job", self.number))
        assert found is not None, name
        return found.group(1)

    @property
    def text(self) -> str:
        """What the job has printed."""
        path = self.cluster.folder / f"{self.number}.out"
        return path.read_text(errors="replace") if path.exists() else ""

    def wait_until(self, condition: Callable[[], bool], patience: float = 240.0) -> None:
        """Until ``condition`` holds; fails with what the job printed where it ends before."""
        deadline = time.monotonic() + patience
        while not condition():
            if self.shown("JobState") not in ACTIVE or time.monotonic() > deadline:
                assert condition(), self.text[-6000:]
                return
            time.sleep(0.2)

    def wait(self, patience: float = 240.0) -> str:
        """The state in which it ends: COMPLETED, FAILED, ..."""
        self.wait_until(lambda: self.shown("JobState") not in ACTIVE, patience)
        return self.shown("JobState")

    def start_now(self) -> None:
        """Slurm lets a requeued job wait for two minutes. Some it needs: nodes still refuse it at once."""
        self.wait_until(lambda: self.shown("JobState") == "PENDING")
        self.cluster.run("scontrol", "update", f"jobid={self.number}", "StartTime=now+3")
