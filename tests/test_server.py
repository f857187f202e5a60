"""Real SGLang servers: started, killed, stopped, restarted, protected by a key, ended with the program."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from apo_megatron.config import ModelConfig
from apo_megatron.config.rollout import SGLangConfig
from apo_megatron.errors import RolloutError
from apo_megatron.rollout import server_watch
from apo_megatron.rollout.server import ServerAddress, ServerPool
from tests.sglang_servers import sglang_python, stop_sglang_servers
from tests.tiny_models import make_tiny_model

ROOT = Path(__file__).resolve().parent.parent
KEY = "a-secret-Key_1"
KEY_VARIABLE = "APO_MEGATRON_TEST_KEY"
START_SECONDS = 300.0  # on a very busy machine


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> ModelConfig:
    path = make_tiny_model(tmp_path_factory.mktemp("model"), "qwen3", tokenizer=False)
    return ModelConfig(hf_path=str(path), dtype="float32")


class Pool:
    """Two servers with a key that may each be restarted once, and what the pool said about them."""

    def __init__(self, model: ModelConfig, log_folder: Path) -> None:
        cfg = SGLangConfig(
            python=sglang_python(), num_servers=2, api_key_variable=KEY_VARIABLE, max_restarts=1
        )
        self.notes: list[str] = []
        self.log_folder = log_folder
        self.servers = ServerPool(cfg, model, log_folder, on_cpu=True, note=self.notes.append)


@pytest.fixture(scope="module")
def pool(model: ModelConfig, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pool]:
    stop_sglang_servers()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(KEY_VARIABLE, KEY)
        patch.setattr(server_watch, "STATUS_SECONDS", 2.0)
        started = Pool(model, tmp_path_factory.mktemp("logs"))
        with started.servers:
            yield started


def eventually(condition: Callable[[], bool], seconds: float = START_SECONDS) -> bool:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)
    return True


def generate(address: ServerAddress, key: str | None = KEY) -> dict[str, Any]:
    """Three tokens from the server."""
    body = {"input_ids": [5, 6, 7], "sampling_params": {"max_new_tokens": 3, "ignore_eos": True}}
    headers = {"Content-Type": "application/json"}
    if key is not None:
        headers["Authorization"] = f"Bearer {key}"
    request = urllib.request.Request(f"{address.url}/generate", json.dumps(body).encode(), headers)
    with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=60) as answer:
        found: dict[str, Any] = json.loads(answer.read())
    return found


def processes_of(log_path: Path) -> list[psutil.Process]:
    """The guard of the server that writes this log, and everything below it."""
    for process in psutil.process_iter():
        try:
            if "server_guard.py" in " ".join(process.cmdline()) and process.open_files():
                if any(Path(file.path) == log_path for file in process.open_files()):
                    return [process, *process.children(recursive=True)]
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
    return []


def main_process(log_path: Path) -> psutil.Process:
    """The server's own first process."""
    return next(p for p in processes_of(log_path)[1:] if "sglang.launch_server" in " ".join(p.cmdline()))


def all_gone(processes: list[psutil.Process]) -> bool:
    return not any(p.is_running() and p.status() != psutil.STATUS_ZOMBIE for p in processes)


def test_servers_answer_with_the_key_only(pool: Pool) -> None:
    addresses = pool.servers.addresses()
    assert [address.name for address in addresses] == ["server-0", "server-1"]
    assert len({address.url for address in addresses}) == 2
    for address in addresses:
        assert len(generate(address)["output_ids"]) == 3
        for key in (None, "wrong"):
            with pytest.raises(urllib.error.HTTPError, match="401"):
                generate(address, key)


def test_a_start_is_never_silent(pool: Pool) -> None:
    for name in ("server-0", "server-1"):
        assert any(re.match(rf"{name} has been starting for \d+ s: .+", note) for note in pool.notes)
        assert any(
            re.match(rf"{name} serves at http://127.0.0.1:\d+ after \d+ s", note) for note in pool.notes
        )


def test_the_key_is_neither_listed_nor_logged(pool: Pool) -> None:
    commands = []
    for process in psutil.process_iter():
        with suppress(psutil.NoSuchProcess):
            commands += process.cmdline()
    assert any("sglang.launch_server" in word for word in commands)
    assert not [word for word in commands if KEY in word]
    logs = [path.read_text() for path in pool.log_folder.iterdir()]
    assert all("'api_key': '[secret]'" in log for log in logs)  # SGLang prints all its settings
    assert not [log for log in [*logs, *pool.notes] if KEY in log]


def test_killed_and_hung_servers_come_back(pool: Pool) -> None:
    """One is killed, one is stopped as a whole (SIGSTOP), at the same time."""
    logs = [pool.log_folder / f"server-{index}.log" for index in range(2)]
    old = [processes_of(log) for log in logs]
    assert all(len(processes) >= 4 for processes in old)  # guard, HTTP server, scheduler, detokenizer
    pool.servers.hold_starts(True)
    main_process(logs[0]).kill()
    for process in old[1]:
        process.suspend()
    assert eventually(lambda: [a.name for a in pool.servers.addresses()] == ["server-1"], 20)
    pool.servers.restart("server-1", "no answer for 30 s")
    assert pool.servers.addresses() == []
    assert eventually(lambda: all_gone([*old[0], *old[1]]), 30)
    time.sleep(2)  # twice the pause before a restart
    assert not any(processes_of(log) for log in logs)
    pool.servers.hold_starts(False)
    assert eventually(lambda: len(pool.servers.addresses()) == 2), pool.notes
    assert pool.servers.failure() is None
    for address in pool.servers.addresses():
        assert len(generate(address)["output_ids"]) == 3
    assert any("server-0 was killed (SIGKILL)" in note and "Last lines of" in note for note in pool.notes)
    assert any("no answer for 30 s" in note and "restart 1 of 1 in 1 s" in note for note in pool.notes)
    assert all(log.read_text().count("\n=== ") == 2 for log in logs)  # appended, with a header a start


def test_the_last_restart_is_the_last(pool: Pool) -> None:
    main_process(pool.log_folder / "server-0.log").kill()
    assert eventually(lambda: pool.servers.failure() is not None, 30)
    failure = pool.servers.failure()
    assert failure is not None
    assert "server-0 was restarted 1 times (rollout.sglang.max_restarts)" in failure
    assert "was killed (SIGKILL)" in failure and "  | " in failure
    assert any("server-0 was restarted 1 times" in note and "is given up" in note for note in pool.notes)
    assert [address.name for address in pool.servers.addresses()] == ["server-1"]
    survivors = processes_of(pool.log_folder / "server-1.log")
    pool.servers.close()
    assert all_gone(survivors)
    pool.servers.close()


def start_one(model: ModelConfig, log_folder: Path, **settings: Any) -> str:
    """What the error says that a pool of one server ends in."""
    cfg = SGLangConfig.model_validate({"python": sglang_python(), **settings})
    servers = ServerPool(cfg, model, log_folder, on_cpu=True, note=lambda line: None)
    with pytest.raises(RolloutError) as caught, servers:
        pass
    assert processes_of(log_folder / "server-0.log") == []
    return str(caught.value)


def test_an_interpreter_without_sglang(model: ModelConfig, tmp_path: Path) -> None:
    message = start_one(model, tmp_path, python=sys.executable)
    assert "server-0 ended with exit code 1" in message
    assert f"rollout.sglang.python={sys.executable} has no sglang" in message
    assert "  | " in message and "No module named 'sglang'" in message  # its own words


def test_a_folder_without_a_model(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    message = start_one(ModelConfig(hf_path=str(tmp_path / "empty")), tmp_path)
    assert "Does model.hf_path=" in message
    assert str(tmp_path / "empty") in message
    assert "  | " in message and "config.json" in message.split("  | ", 1)[1]


def test_a_start_that_takes_too_long(model: ModelConfig, tmp_path: Path) -> None:
    message = start_one(model, tmp_path, startup_timeout=1.0)
    assert "server-0 did not serve within 1 s (rollout.sglang.startup_timeout)" in message


def test_closed_while_it_starts(model: ModelConfig, tmp_path: Path) -> None:
    servers = ServerPool(
        SGLangConfig(python=sglang_python()), model, tmp_path, on_cpu=True, note=lambda line: None
    )
    with ThreadPoolExecutor(1) as executor:
        start = executor.submit(servers.start)
        assert eventually(lambda: len(processes_of(tmp_path / "server-0.log")) > 1)
        servers.close()
        with pytest.raises(RolloutError, match="server-0 was closed while it started"):
            start.result()
    assert processes_of(tmp_path / "server-0.log") == []
    assert servers.addresses() == []


@pytest.fixture
def command(model: ModelConfig, tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """The command that keeps one server running, started."""
    config = {
        "model": model.model_dump(),
        "data": {"train_path": "unused.jsonl"},
        "train": {"run_dir": str(tmp_path / "run"), "num_steps": 100},
        "rollout": {"sglang": {"python": sglang_python(), "servers_file": str(tmp_path / "servers.json")}},
    }
    config["rollout"]["sglang"] |= {"health_interval": 1.0, "health_timeout": 8.0, "update_timeout": 2.0}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(config))
    with (tmp_path / "output").open("w") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "apo_megatron.rollout.server", "--config", str(tmp_path / "run.yaml")],
            cwd=ROOT,
            stdout=output,
            stderr=subprocess.STDOUT,
            text=True,
            env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
        )
    yield process
    process.kill()
    process.wait()


def test_the_command_survives_a_taken_port_and_leaves_nothing_behind(
    command: subprocess.Popen[str], tmp_path: Path
) -> None:
    stop_sglang_servers()
    output = (tmp_path / "output").read_text
    log = tmp_path / "run" / "servers" / "server-0.log"
    assert eventually(lambda: log.exists() and "--port" in log.read_text()), output()
    found = re.search(r"--port (\d+)", log.read_text())
    assert found is not None
    port = int(found.group(1))
    with socket.create_server(("127.0.0.1", port)) as stranger:
        stranger.settimeout(0.2)
        assert eventually(lambda: _speak_no_http(stranger) or "somebody else took port" in output())
    servers_file = tmp_path / "servers.json"
    assert eventually(lambda: servers_file.exists() and servers_file.read_text() != "[]\n"), output()
    (entry,) = json.loads(servers_file.read_text())
    assert entry["name"] == "server-0" and not entry["url"].endswith(f":{port}")
    assert f'rollout.sglang.urls=["{entry["url"]}"]' in output()
    assert len(generate(ServerAddress(**entry), key=None)["output_ids"]) == 3

    processes = processes_of(log)
    assert len(processes) >= 4
    next(p for p in processes if p.cmdline()[0] == "sglang::scheduler").suspend()
    assert eventually(lambda: "server-0 is killed: no answer for 10 s" in output(), 60)
    assert eventually(lambda: all_gone(processes), 10)
    assert eventually(lambda: len(processes_of(log)) >= 4)
    processes = processes_of(log)
    os.kill(command.pid, signal.SIGKILL)
    command.wait()
    assert eventually(lambda: all_gone(processes), 10)


def _speak_no_http(stranger: socket.socket) -> bool:
    """Answer one request, if there is one; False."""
    with suppress(OSError):  # nobody asks, or no longer
        connection, _ = stranger.accept()
        with connection:
            connection.recv(65536)
            connection.sendall(b"220 not what you expect\r\n")
    return False
