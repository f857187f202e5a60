"""Keeps one server running: starts it, waits until it serves, starts it again when it ends."""

from __future__ import annotations

import math
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from apo_megatron.config.rollout import SGLangConfig
from apo_megatron.errors import ConfigError, RolloutError
from apo_megatron.rollout.server_command import ServerCommand, hold_port
from apo_megatron.rollout.server_process import ServerProcess, describe_exit, quote_lines

Note = Callable[[str], None]  # takes a line for the user; called from several threads

NUM_PORTS = 3  # tried at one start
STATUS_SECONDS = 12.0  # between two status lines of a server that starts
LOOK_SECONDS = 0.2
FIRST_PAUSE, LONGEST_PAUSE = 1.0, 30.0  # seconds before a restart; each pause doubles the next one
HEALTHY_SECONDS = 600.0  # after so long a server counts as sound: restarts and pauses begin anew

_STRANGER = "is not what answers on its port"
_LOOPBACK_OF = {"0.0.0.0": "127.0.0.1", "::": "::1"}

# What a server's last lines mean for a user: part of a line, explanation.
_EXPLANATIONS = {
    "No module named 'sglang'": "rollout.sglang.python={python} has no sglang: name the interpreter of an "
    "environment that has it (`make sglang-cpu` builds one for CPUs: .venv-sglang/bin/python).",
    "out of memory": "It found too little memory: lower --mem-fraction-static (rollout.sglang.server_args).",
    "config.json": "Does model.hf_path={model} hold a model (config.json and *.safetensors)?",
}


@dataclass(frozen=True)
class ServerAddress:
    """Where a server that runs is reached."""

    name: str
    url: str


class WatchedServer:
    """One server and the thread that owns its process. All methods may be called from any thread."""

    def __init__(
        self,
        name: str,
        command: ServerCommand,
        cfg: SGLangConfig,
        devices: dict[str, str],
        log_path: Path,
        note: Note,
    ) -> None:
        self.name = name
        self._command, self._cfg, self._devices = command, cfg, devices
        self._log_path, self._note = log_path, note
        self._port = hold_port(cfg.host)
        self._lock = threading.Lock()  # of the four below
        self._address: ServerAddress | None = None
        self._process: ServerProcess | None = None  # that serves
        self._failure: str | None = None
        self._restart_reason: str | None = None
        self._serves_since = math.inf  # of the process that runs or ran last; the thread's own
        self._closing = threading.Event()
        self._may_start = threading.Event()
        self._may_start.set()
        self._settled = threading.Event()  # it serves, or has failed
        self._thread = threading.Thread(target=self._watch, name=f"watch {name}", daemon=True)
        self._thread.start()

    def wait_until_started(self) -> str | None:
        """Until it serves for the first time, or cannot: what went wrong, if anything."""
        self._settled.wait()
        return self.failure()

    def address(self) -> ServerAddress | None:
        """None while it does not serve."""
        with self._lock:
            return self._address

    def failure(self) -> str | None:
        """Why it is not started again, with its last lines; None while it runs or is being started."""
        with self._lock:
            return self._failure

    def restart(self, reason: str) -> None:
        """Kill it and start it again, in the background. No effect where that is under way already."""
        with self._lock:
            if self._address is not None:
                self._address, self._restart_reason = None, reason

    def hold_starts(self, hold: bool) -> None:
        """See ``ServerPool``."""
        if hold:
            self._may_start.clear()
        else:
            self._may_start.set()

    def watch_for_hangs(self) -> None:
        """From now on restart it when it answers no more: for servers that no trainer watches."""
        threading.Thread(target=self._find_hangs, name=f"ask {self.name}", daemon=True).start()

    def request_close(self) -> None:
        """End it, in the background."""
        self._closing.set()

    def join(self) -> None:
        """Wait until it has ended, after ``request_close``."""
        self._thread.join()

    def _watch(self) -> None:
        try:
            self._keep_serving()
        finally:
            self._port.close()
            if not self._closing.is_set() and self.failure() is None:
                self._fail(f"{self.name}: the thread that watches it ended with an error of ours")
            self._settled.set()

    def _find_hangs(self) -> None:
        host = _LOOPBACK_OF.get(self._cfg.host, self._cfg.host)
        patience = self._cfg.health_timeout + self._cfg.update_timeout
        while not self._closing.wait(self._cfg.health_interval):
            with self._lock:
                process = None if self._address is None else self._process
            if process is not None and process.hangs(host, patience):
                self.restart(f"no answer for {patience:g} s")

    def _keep_serving(self) -> None:
        """Until it is closed, or a failure is noted."""
        pause, num_restarts = FIRST_PAUSE, 0
        while True:
            while not self._may_start.wait(LOOK_SECONDS):
                if self._closing.is_set():
                    return
            try:
                problem = self._live()
            except (RolloutError, ConfigError, OSError) as error:  # it did not start
                problem = str(error)
                if not self._settled.is_set():  # ever: it will not the next time either
                    self._fail(problem)
                    return
            if self._closing.is_set():
                return
            if time.monotonic() - self._serves_since > HEALTHY_SECONDS:
                pause, num_restarts = FIRST_PAUSE, 0
            if num_restarts == self._cfg.max_restarts:
                limit = f"restarted {num_restarts} times (rollout.sglang.max_restarts)"
                self._fail(f"{self.name} was {limit}. {problem}")
                self._note(f"{problem}\n{self.name} was {limit} and is given up: other servers go on alone")
                return
            num_restarts += 1
            self._note(f"{problem}\nrestart {num_restarts} of {self._cfg.max_restarts} in {pause:g} s")
            if self._closing.wait(pause):
                return
            pause = min(2 * pause, LONGEST_PAUSE)

    def _fail(self, message: str) -> None:
        with self._lock:
            self._failure = message

    def _live(self) -> str:
        """Start it and wait until it has ended; why it has. Raises RolloutError where it never served."""
        self._serves_since = math.inf
        process = self._start()
        try:
            self._serves_since = time.monotonic()
            address = ServerAddress(self.name, f"http://{_host_in_url(self._cfg.host)}:{self._port_number()}")
            with self._lock:
                self._address, self._process, self._restart_reason = address, process, None
            self._note(f"{self.name} serves at {address.url} after {process.seconds:.0f} s")
            self._settled.set()
            while not self._closing.wait(LOOK_SECONDS):
                with self._lock:
                    reason = self._restart_reason
                if reason is not None:
                    return f"{self.name} is killed: {reason}."
                code = process.exit_code()
                if code is not None:
                    return f"{self.name} {describe_exit(code)}. {self._quote(process)}"
            if self._command.ends_when_asked:
                process.stop()
            return f"{self.name} was closed."
        finally:
            with self._lock:
                self._address = self._process = None
            process.kill()

    def _start(self) -> ServerProcess:
        """A process that serves. Raises RolloutError with its last lines."""
        for _ in range(NUM_PORTS):
            process = ServerProcess(
                self._command, self._cfg.api_key_variable, self._devices, self._port_number(), self._log_path
            )
            problem: str | None = "was abandoned"
            try:
                problem = self._wait_until_serving(process)
            finally:
                if problem is not None:
                    process.kill()
            if problem is None:
                return process
            if problem != _STRANGER and not process.port_was_taken():
                raise RolloutError(f"{self.name} {problem}. {self._explain(process)}{self._quote(process)}")
            self._note(f"{self.name}: somebody else took port {self._port_number()}, it tries another one")
            taken, self._port = self._port, hold_port(self._cfg.host)
            taken.close()
        raise RolloutError(
            f"{self.name}: {NUM_PORTS} ports in a row were taken by others. {self._quote(process)}"
        )

    def _wait_until_serving(self, process: ServerProcess) -> str | None:
        """What went wrong, if anything."""
        host = _LOOPBACK_OF.get(self._cfg.host, self._cfg.host)
        next_status = STATUS_SECONDS
        while not self._closing.wait(LOOK_SECONDS):
            code = process.exit_code()
            if code is not None:
                return f"{describe_exit(code)} after {process.seconds:.0f} s, before it served"
            answer = process.probe(host)
            if answer == "serving":
                return None
            if answer == "stranger":
                return _STRANGER
            if not self._may_start.is_set():
                return "was ended while it started: the trainer has the GPUs"
            if process.seconds > self._cfg.startup_timeout:
                return (
                    f"did not serve within {self._cfg.startup_timeout:g} s (rollout.sglang.startup_timeout)"
                )
            if process.seconds > next_status:
                next_status = process.seconds + STATUS_SECONDS
                last_line = "".join(process.last_lines(1))[:160]
                self._note(f"{self.name} has been starting for {process.seconds:.0f} s: {last_line}")
        return "was closed while it started"

    def _port_number(self) -> int:
        return int(self._port.getsockname()[1])

    def _explain(self, process: ServerProcess) -> str:
        text = "\n".join(process.last_lines())
        known = (explanation for part, explanation in _EXPLANATIONS.items() if part in text)
        return "".join(f"{explanation} " for explanation in known).format(
            python=self._cfg.python, model=self._command.model
        )

    def _quote(self, process: ServerProcess) -> str:
        return quote_lines(process.last_lines(), self._log_path)


def _host_in_url(host: str) -> str:
    """How others reach a server that binds to ``host``."""
    if host in _LOOPBACK_OF:  # all addresses of this machine
        return socket.gethostname()
    return f"[{host}]" if ":" in host else host
