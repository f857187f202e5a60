"""One trainer rank on its node: a child process, as torchrun would start it, and what is known of it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

_SECONDS_TO_SEE_A_FILE = 10.0  # a network file system may show it late
_DEVICES = "CUDA_VISIBLE_DEVICES"


class RankProcess:
    """Lives in an actor whose methods run at the same time, each in a thread."""

    def __init__(self, folder: str | None) -> None:
        """``folder``: where the rank runs; None = where the actor does (a working_dir of the job)."""
        self._folder = folder or os.getcwd()
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._ended_early = False
        self._store: Any = None  # kept: the ranks meet in it

    def problem(self, shared_file: str, content: str) -> str:
        """Why no rank can run here, or ""; ``shared_file`` was just written in run_dir/logs."""
        if not os.path.isdir(self._folder):
            return (
                f"has no folder {self._folder}, where the launcher was started: start it in a folder that "
                "all nodes have, or submit a job with a working_dir"
            )
        deadline = time.monotonic() + _SECONDS_TO_SEE_A_FILE
        while True:
            with suppress(OSError):
                if Path(shared_file).read_text(encoding="utf-8") == content:
                    return ""
            if time.monotonic() > deadline:
                return (
                    f"does not see {shared_file}, which was just written: train.run_dir must lie on a file "
                    "system that all nodes share"
                )
            time.sleep(0.2)

    def devices(self) -> str:
        """The GPUs that were given to this actor, ``0`` or ``0,1``; "" for none."""
        return os.environ.get(_DEVICES, "")

    def host_store(self) -> str:
        """The port of a new store for all ranks. The system chooses it for a socket that listens from then
        on, so nobody else can take it."""
        from torch.distributed import TCPStore  # here: it takes seconds, and one rank needs it

        self._store = TCPStore(
            "localhost", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=60)
        )
        return str(self._store.port)

    def run(self, environment: Mapping[str, str], devices: str, config_text: str, log_path: str) -> int:
        """Run the trainer with this configuration (YAML) to its end; -N where signal N ended it.

        The thread that starts the process waits for it: Linux would kill it when that thread ends.
        """
        variables = {**os.environ, **environment, "PYTHONUNBUFFERED": "1"}
        if devices:
            variables[_DEVICES] = devices
        command = [sys.executable, "-m", "apo_megatron.launch.rank_main", str(os.getpid())]
        with open(log_path, "ab") as log, self._lock:
            if self._ended_early:
                return -signal.SIGTERM
            self._process = subprocess.Popen(
                [*command, "--config", "/dev/stdin"],
                cwd=self._folder,
                env=variables,
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                start_new_session=True,  # its group can be killed, and no Ctrl-C reaches it
            )
        self._process.communicate(config_text.encode())
        self._signal_group(signal.SIGKILL)  # what it has started and left behind
        return self._process.returncode

    def ask_to_stop(self) -> None:
        """SIGTERM: the trainer saves its state and ends."""
        with self._lock:
            if self._process is None:
                self._ended_early = True
            elif self._process.poll() is None:
                self._process.send_signal(signal.SIGTERM)

    def end(self, grace: float) -> None:
        """SIGTERM, and after ``grace`` seconds SIGKILL for everything it has started."""
        self.ask_to_stop()
        if self._process is None:
            return
        deadline = time.monotonic() + grace
        while self._process.returncode is None and time.monotonic() < deadline:
            time.sleep(0.05)
        self._signal_group(signal.SIGKILL)

    def ping(self) -> None:
        """An answer shows that the node lives."""

    def _signal_group(self, number: signal.Signals) -> None:
        assert self._process is not None
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, number)
