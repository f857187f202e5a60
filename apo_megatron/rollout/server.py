"""SGLang servers on this machine: started together, kept running, ended with the program.

    python -m apo_megatron.rollout.server --config run.yaml [section.field=value ...]

The command keeps servers running on a machine of their own; a trainer elsewhere uses them through
rollout.sglang.urls, or rollout.sglang.servers_file on a disk that both see. One server: server_process.py;
the thread that watches it: server_watch.py; its end: server_guard.py.
"""

from __future__ import annotations

import atexit
import ipaddress
import json
import os
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

import torch

from apo_megatron.config import ModelConfig, RLConfig
from apo_megatron.config.rollout import SGLangConfig
from apo_megatron.errors import RolloutError
from apo_megatron.files import write_atomically
from apo_megatron.parallel.server_devices import devices_for_servers
from apo_megatron.rollout.server_command import ServerCommand
from apo_megatron.rollout.server_watch import Note, ServerAddress, WatchedServer
from apo_megatron.telemetry.command import parse_command_line, run_command
from apo_megatron.telemetry.stop_request import StopRequest

LOOK_SECONDS = 0.5


def print_note(line: str) -> None:
    """A line for the user on stderr."""
    print(line, file=sys.stderr, flush=True)


class ServerPool:
    """``cfg.num_servers`` servers. They end when this process ends, however it does.

    Each takes ``cfg.tensor_parallel_size`` GPUs: those after the trainer's ``num_trainer_gpus`` on this
    machine, or the trainer's own where ``cfg.colocated``. Methods may be called from any thread.
    """

    def __init__(
        self,
        cfg: SGLangConfig,
        model: ModelConfig,
        log_folder: Path,
        on_cpu: bool,
        num_trainer_gpus: int | None = None,
        note: Note = print_note,
    ) -> None:
        """Nothing is started yet. ``num_trainer_gpus`` None: one for each rank that torchrun has started
        here. ``note`` takes lines for the user, from several threads. Raises ConfigError."""
        self._cfg, self._log_folder, self._note = cfg, log_folder, note
        self._command = ServerCommand(cfg, model, on_cpu)
        if num_trainer_gpus is None:
            num_trainer_gpus = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        self._devices: list[dict[str, str]] = [{}] * cfg.num_servers
        if not on_cpu:
            self._devices = devices_for_servers(
                cfg.num_servers, cfg.tensor_parallel_size, num_trainer_gpus, cfg.colocated
            )
        self._servers: dict[str, WatchedServer] = {}
        self._lock = threading.Lock()  # another thread may close the pool while it starts
        self._is_closed = False

    def start(self) -> None:
        """Start all servers at once and wait until each answers.

        Raises RolloutError with the last lines of one that does not start (the others are then ended too),
        or where another thread closes the pool meanwhile.
        """
        assert not self._servers, "a pool is started once"
        if not _is_loopback(self._cfg.host) and self._command.api_key is None:
            self._note(
                f"warning: rollout.sglang.host={self._cfg.host} lets the network in, and there is no API "
                f"key: who reaches a server can replace its weights. Set {self._cfg.api_key_variable}"
            )
        self._log_folder.mkdir(parents=True, exist_ok=True)
        atexit.register(self.close)
        try:
            with self._lock:
                self._create()
            for server in self._servers.values():
                problem = server.wait_until_started()
                if problem is not None:
                    raise RolloutError(problem)
        except BaseException:  # Ctrl-C too
            self.close()
            raise

    def _create(self) -> None:
        if self._is_closed:
            raise RolloutError("the servers were closed before they were started")
        for index, devices in enumerate(self._devices):
            name = f"server-{index}"
            self._servers[name] = WatchedServer(
                name, self._command, self._cfg, devices, self._log_folder / f"{name}.log", self._note
            )

    def addresses(self) -> list[ServerAddress]:
        """Of those that serve now."""
        found = [server.address() for server in list(self._servers.values())]
        return [address for address in found if address is not None]

    def restart(self, name: str, reason: str) -> None:
        """Kill this server with all its processes and start it anew, in the background."""
        self._servers[name].restart(reason)

    def hold_starts(self, hold: bool) -> None:
        """While held, no server is started again; one that is being started is ended."""
        for server in list(self._servers.values()):
            server.hold_starts(hold)

    def watch_for_hangs(self) -> None:
        """From now on restart servers that answer no more. A trainer does this for those that it starts."""
        for server in self._servers.values():
            server.watch_for_hangs()

    def failure(self) -> str | None:
        """Of a server that is not started again: it used up max_restarts; with its last lines."""
        return next((failure for failure in self._failures() if failure is not None), None)

    def has_failed(self) -> bool:
        """Whether none of the servers will be there again."""
        return all(failure is not None for failure in self._failures())

    def _failures(self) -> list[str | None]:
        return [server.failure() for server in list(self._servers.values())]

    def close(self) -> None:
        """End all servers; returns when their processes are gone. Safe to call again."""
        with self._lock:
            self._is_closed = True
        for server in self._servers.values():
            server.request_close()
        for server in self._servers.values():
            server.join()
        atexit.unregister(self.close)

    def __enter__(self) -> ServerPool:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def keep_running(cfg: RLConfig) -> None:
    """Keep the servers that ``cfg`` describes until SIGTERM or Ctrl-C, with all GPUs of this machine.

    Where rollout.sglang.servers_file is set it holds, at any time, those that serve. Raises RolloutError
    when all of them have used up their restarts.
    """
    sglang = cfg.rollout.sglang
    pool = ServerPool(
        sglang,
        cfg.model,
        Path(cfg.train.run_dir, "servers"),
        on_cpu=not torch.cuda.is_available(),
        num_trainer_gpus=0,
    )
    known: list[ServerAddress] = []
    _publish(known, sglang.servers_file)  # what stands there is of servers that ran before
    try:
        with pool, StopRequest() as stop:
            pool.watch_for_hangs()
            while stop.received is None:
                addresses = pool.addresses()
                if addresses != known:
                    known = addresses
                    urls = [address.url for address in known]
                    print(f"rollout.sglang.urls={json.dumps(urls)}", flush=True)
                    _publish(known, sglang.servers_file)
                if pool.has_failed():
                    raise RolloutError(str(pool.failure()))
                time.sleep(LOOK_SECONDS)
    finally:
        _publish([], sglang.servers_file)


def _publish(addresses: Sequence[ServerAddress], servers_file: str | None) -> None:
    if servers_file is not None:
        Path(servers_file).parent.mkdir(parents=True, exist_ok=True)  # run_dir, where no run has begun yet
        entries = [{"name": address.name, "url": address.url} for address in addresses]
        write_atomically(servers_file, json.dumps(entries, indent=1) + "\n")


def main(argv: Sequence[str] | None = None) -> int:
    """The command line (default: that of the process); the exit code."""

    def run(words: Sequence[str]) -> None:
        keep_running(parse_command_line(words, RLConfig, "python -m apo_megatron.rollout.server"))

    return run_command(run, argv)


if __name__ == "__main__":
    sys.exit(main())
