"""The real SGLang server on a CPU, one set of servers for all tests of a session.

A start takes 20 seconds and more, so servers stay until a test asks for another set. ServerPool ends them
with the session, however that ends.
"""

from __future__ import annotations

import tempfile
import time
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pytest

from apo_megatron.config import ModelConfig
from apo_megatron.config.rollout import SGLangConfig
from apo_megatron.rollout.server import ServerPool

RESTART_SECONDS = 180.0  # on a very busy machine
PYTHON = Path(__file__).resolve().parent.parent / ".venv-sglang" / "bin" / "python"


@dataclass
class _Running:
    key: tuple[object, ...]
    pool: ServerPool
    log_folder: tempfile.TemporaryDirectory[str]


_running: list[_Running] = []  # at most one


def sglang_python() -> str:
    """The interpreter for rollout.sglang.python; fails the test where it is not installed."""
    if not PYTHON.exists():
        pytest.fail("there is no .venv-sglang: run `make sglang-cpu`", pytrace=False)
    return str(PYTHON)


def sglang_servers(
    model_path: str | Path,
    num_servers: int = 1,
    dtype: Literal["float32", "bfloat16"] = "float32",
    fresh: bool = False,
) -> ServerPool:
    """Servers that answer, with the weights that an earlier test has left them (its version label too).

    ``fresh``: new ones, for a test that needs the weights of ``model_path``. Any test may kill servers of
    the pool: they are waited for. Two sets never run at once (memory): a call for other servers ends those
    that run.
    """
    key = (str(Path(model_path).resolve()), num_servers, dtype)
    if _running and not fresh and _running[0].key == key and _all_serve_soon(_running[0].pool, num_servers):
        return _running[0].pool
    stop_sglang_servers()
    log_folder = tempfile.TemporaryDirectory(prefix="sglang_servers_")
    cfg = SGLangConfig(python=sglang_python(), num_servers=num_servers)
    pool = ServerPool(cfg, ModelConfig(hf_path=key[0], dtype=dtype), Path(log_folder.name), on_cpu=True)
    _running.append(_Running(key, pool, log_folder))
    pool.start()
    return pool


def stop_sglang_servers() -> None:
    """End what runs, for a test that starts servers of its own."""
    while _running:
        ended = _running.pop()
        ended.pool.close()
        ended.log_folder.cleanup()


def _all_serve_soon(pool: ServerPool, num_servers: int) -> bool:
    """Whether all are there, after the starts of those that were killed; False where one will not be."""
    deadline = time.monotonic() + RESTART_SECONDS
    while pool.failure() is None and time.monotonic() < deadline:
        addresses = pool.addresses()
        if len(addresses) == num_servers and all(_answers(a.url) for a in addresses):
            return True
        time.sleep(0.5)
    return False


def _answers(url: str) -> bool:
    """The pool may not have noticed yet what a test has just done to a server."""
    try:
        with urllib.request.urlopen(f"{url}/model_info", timeout=10):
            return True
    except OSError:
        return False
