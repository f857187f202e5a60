"""One server process from its start to its end: what it says, whether it serves, how it is ended."""

from __future__ import annotations

import http.client
import json
import os
import re
import secrets
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

from apo_megatron.rollout import server_guard
from apo_megatron.rollout.server_command import ServerCommand

NUM_LAST_LINES = 30
_TAIL_BYTES = 65536
_PROBE_SECONDS = 5.0
_KILL_SECONDS = 10.0  # from the signal until everything is gone, on a busy machine
_NO_API_KEY = "-"  # no environment variable has this name
_COLOURS = re.compile(r"\x1b\[[0-9;]*m")
_PORT_TAKEN = re.compile(r"address already in use|EADDRINUSE|Errno 98", re.IGNORECASE)


class ServerProcess:
    """A server that was started now. Its processes end with it, and with ours (server_guard.py)."""

    def __init__(
        self,
        command: ServerCommand,
        api_key_variable: str,
        devices: dict[str, str],
        port: int,
        log_path: Path,
    ) -> None:
        """Start it; its output is appended to ``log_path`` below a header. Raises OSError."""
        self.started = time.monotonic()
        self._port = port
        self._api_key = command.api_key
        self._nonce = f"apo_megatron-{secrets.token_hex(8)}"
        self._log_path = log_path
        words = command.words(port, self._nonce)
        with log_path.open("ab") as log:
            log.write(f"\n=== {time.strftime('%Y-%m-%d %H:%M:%S')}  {shlex.join(words)}\n".encode())
            self._log_start = log.tell()
            log.flush()
            variable = _NO_API_KEY if self._api_key is None else api_key_variable
            guard = [sys.executable, "-P", server_guard.__file__, str(os.getpid()), variable]
            self._guard = subprocess.Popen(
                [*guard, *words],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=command.environment(devices),
                start_new_session=True,  # Ctrl-C reaches us only, and we end it
            )

    @property
    def seconds(self) -> float:
        """Since the start."""
        return time.monotonic() - self.started

    def exit_code(self) -> int | None:
        """None while it runs; -N where signal N ended it."""
        code = self._guard.poll()
        return code if code is None or code <= 128 else 128 - code

    def probe(self, host: str) -> Literal["silent", "serving", "stranger"]:
        """Whether it answers requests by now; "stranger": somebody else answers on its port."""
        try:
            status, models = self._get(host, "/v1/models")
            if status >= 500:
                return "silent"
            if not _names_model(models, self._nonce):
                return "stranger"
            return "serving" if self._get(host, "/health")[0] == 200 else "silent"
        except OSError:
            return "silent"
        except http.client.HTTPException:  # something that speaks no HTTP
            return "stranger"

    def hangs(self, host: str, patience: float) -> bool:
        """Whether it keeps a question waiting for ``patience`` seconds. Its scheduler answers this one also
        while it is paused, but not while it takes weights."""
        try:
            self._get(host, "/server_info", patience)
        except TimeoutError:
            return True
        except (OSError, http.client.HTTPException):  # it has ended, which shows elsewhere
            pass
        return False

    def _get(self, host: str, path: str, timeout: float = _PROBE_SECONDS) -> tuple[int, bytes]:
        headers = {} if self._api_key is None else {"Authorization": f"Bearer {self._api_key}"}
        connection = http.client.HTTPConnection(host, self._port, timeout=timeout)
        try:
            connection.request("GET", path, headers=headers)
            answer = connection.getresponse()
            return answer.status, answer.read()
        finally:
            connection.close()

    def last_lines(self, count: int = NUM_LAST_LINES) -> list[str]:
        """What it has printed last, without blank lines and colours."""
        with self._log_path.open("rb") as log:
            log.seek(0, os.SEEK_END)
            log.seek(max(self._log_start, log.tell() - _TAIL_BYTES))
            text = _COLOURS.sub("", log.read().decode(errors="replace"))
        return [line.rstrip() for line in re.split(r"[\r\n]+", text) if line.strip()][-count:]

    def port_was_taken(self) -> bool:
        """Whether it says that a port it wanted belongs to somebody else."""
        # It goes on for a while after that, with pages of tracebacks.
        return any(_PORT_TAKEN.search(line) for line in self.last_lines(_TAIL_BYTES))

    def stop(self) -> None:
        """Ask it to end, then kill it; returns when all its processes are gone."""
        self._end(signal.SIGTERM, server_guard.GRACE_SECONDS + _KILL_SECONDS)

    def kill(self) -> None:
        """Kill all its processes, stopped ones (SIGSTOP) included; returns when they are gone."""
        self._end(signal.SIGUSR1, _KILL_SECONDS)

    def _end(self, number: signal.Signals, seconds: float) -> None:
        with suppress(ProcessLookupError):
            self._guard.send_signal(signal.SIGCONT)  # it may have been stopped together with the server
            self._guard.send_signal(number)
        try:
            self._guard.wait(seconds)
        except subprocess.TimeoutExpired:
            with suppress(ProcessLookupError):
                os.killpg(self._guard.pid, signal.SIGKILL)
            self._guard.wait()


def _names_model(answer: bytes, name: str) -> bool:
    try:
        models: Any = json.loads(answer)["data"]
        return any(model["id"] == name for model in models)
    except (ValueError, KeyError, TypeError):
        return False


def describe_exit(code: int) -> str:
    """An exit code in words."""
    if code >= 0:
        return f"ended with exit code {code}"
    try:
        return f"was killed ({signal.Signals(-code).name})"
    except ValueError:  # a real-time signal
        return f"was killed (signal {-code})"


def quote_lines(lines: Sequence[str], path: Path) -> str:
    """A server's last lines, for an error message."""
    if not lines:
        return f"It printed nothing ({path})."
    return "\n".join([f"Last lines of {path}:", *(f"  | {line}" for line in lines)])
