"""Tests marked ``gpu`` are skipped without a CUDA device; those with servers run beside the others."""

from __future__ import annotations

import fcntl
import importlib
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path, PurePath
from types import ModuleType
from typing import Any

import pytest
from xdist.scheduler import LoadScopeScheduling
from xdist.workermanage import WorkerController

from tests.countdown_base import COUNTDOWN, CountdownBase, make_countdown_base

# Files that start servers, or whole clusters, and mostly wait for them: one process of `make test` begins
# with these, another with those that compute. The longest first: who is done early takes a short one.
WITH_SERVERS = (
    "test_sglang_failures",
    "test_sglang_training",
    "test_server",
    "test_transport",
    "test_slurm",
    "test_sglang_engine",
    "test_ray_servers",
    "test_sglang_evaluation",
    "test_sglang_client",
    "test_server_command",
    "test_sglang_cpu",
)


def _place(nodeid: str) -> int:
    """Of a file among ``WITH_SERVERS``; behind them for all others."""
    name = PurePath(nodeid.split("::")[0]).stem
    return WITH_SERVERS.index(name) if name in WITH_SERVERS else len(WITH_SERVERS)


class _ServersBesideOthers(LoadScopeScheduling):
    """A file is one piece of work. The first process takes files from the front, where those with servers
    are, the others from the back: they meet when little is left."""

    def _split_scope(self, nodeid: str) -> str:
        return nodeid.split("::")[0]

    def _assign_work_unit(self, node: WorkerController) -> None:
        if node is not self.nodes[0]:
            self.workqueue.move_to_end(next(reversed(self.workqueue)), last=False)
        super()._assign_work_unit(node)


@pytest.fixture(scope="session")
def made_base(tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> CountdownBase:
    """Made by the first process that wants it, for all."""
    folder = tmp_path_factory.getbasetemp()
    if worker_id != "master":
        folder = folder.parent
    folder /= "countdown_base"
    with Path(f"{folder}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        base = CountdownBase(folder)
        return base if base.model.exists() else make_countdown_base(folder)


@pytest.fixture(scope="module")
def base(made_base: CountdownBase, tmp_path_factory: pytest.TempPathFactory) -> CountdownBase:
    """A Countdown model that solves some problems, in a folder for the runs of one file of tests."""
    folder = tmp_path_factory.mktemp("countdown")
    shutil.copytree(made_base.folder, folder, dirs_exist_ok=True)
    return CountdownBase(folder)


@pytest.fixture(scope="module")
def example_module() -> Iterator[Callable[[str], ModuleType]]:
    """Imports a script of examples/countdown, which find each other as when they are run."""
    sys.path.insert(0, str(COUNTDOWN))
    yield importlib.import_module
    sys.path.remove(str(COUNTDOWN))


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> LoadScopeScheduling:
    return _ServersBesideOthers(config, log)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: _place(item.nodeid))
    gpu_items = [item for item in items if item.get_closest_marker("gpu")]
    if not gpu_items:
        return
    import torch  # seconds, and most selections have no such test

    if not torch.cuda.is_available():
        for item in gpu_items:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
