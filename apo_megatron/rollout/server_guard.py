"""Runs one server and ends all of it: nothing of a server outlives the program that started it.

    python server_guard.py PARENT_PID SECRET_VARIABLE COMMAND...

The program that starts servers can be killed at any moment, also while a server starts, when the server's own
children do not watch their parent yet. So each server has this small process between: it sees its parent
vanish, inherits every process that loses its own parent, and kills them all. It copies the server's output
to its own, without the secret that stands in the environment variable SECRET_VARIABLE.

SIGTERM asks the server to end and kills it after a while, SIGUSR1 kills it at once. The exit code is the
server's; 128 + N where signal N ended it. Started as a script: it must cost neither memory nor time.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import threading
import time
from contextlib import suppress

import psutil

GRACE_SECONDS = 15.0  # between SIGTERM and SIGKILL: SGLang looks every 5 s whether it has been asked to end
LOOK_SECONDS = 0.5  # between two looks whether the parent lives
EXIT_NOT_STARTED = 127  # the command could not be executed
_SIGNALS = (signal.SIGCHLD, signal.SIGTERM, signal.SIGUSR1)
_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36  # linux/prctl.h


def main(parent: int, secret: bytes, command: list[str]) -> int:
    """Run ``command`` until it ends or has to; its exit code."""
    libc = ctypes.CDLL(None)
    libc.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)  # orphans below become children of this process
    previous_mask = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)  # they are waited for
    output, server_output = os.pipe()
    guard = os.getpid()
    server = os.fork()
    if server == 0:
        libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)  # should this process be killed
        if os.getppid() == guard:
            signal.pthread_sigmask(signal.SIG_SETMASK, previous_mask)
            _become(command, server_output)
        os._exit(EXIT_NOT_STARTED)
    os.close(server_output)
    copier = threading.Thread(target=copy_without, args=(secret, output, sys.stdout.fileno()), daemon=True)
    copier.start()
    status = _wait(server, parent)
    for number, code in _kill_descendants().items():
        status = code if number == server else status
    copier.join(1.0)  # the last lines say why
    assert status is not None, "a server that was not reaped was killed and reaped with the rest"
    return status if status >= 0 else 128 - status


def _become(command: list[str], output: int) -> None:
    """Replace this process by ``command``; returns where that is impossible."""
    os.dup2(output, 1)
    os.dup2(output, 2)
    try:
        os.execvp(command[0], command)
    except OSError as error:
        os.write(2, f"cannot run {command[0]}: {error.strerror}\n".encode())


def copy_without(secret: bytes, source: int, target: int) -> None:
    """Copy until the end of ``source``, with [secret] in place of the secret (empty = there is none)."""
    held = b""  # what may be the beginning of the secret, until the rest arrives
    while chunk := os.read(source, 65536):
        text = held + chunk
        if secret:
            text = text.replace(secret, b"[secret]")
            length = next((n for n in range(len(secret) - 1, 0, -1) if text.endswith(secret[:n])), 0)
            text, held = text[: len(text) - length], text[len(text) - length :]
        with suppress(OSError):  # a full disk costs lines of a log, not the server
            os.write(target, text)
    with suppress(OSError):
        os.write(target, held)


def _wait(server: int, parent: int) -> int | None:
    """Until the server has ended (its exit code), or is to be killed (None)."""
    deadline = float("inf")
    while os.getppid() == parent and time.monotonic() < deadline:
        received = signal.sigtimedwait(_SIGNALS, LOOK_SECONDS)
        if received is not None and received.si_signo == signal.SIGUSR1:
            return None
        if received is not None and received.si_signo == signal.SIGTERM:
            deadline = min(deadline, time.monotonic() + GRACE_SECONDS)
            os.kill(server, signal.SIGTERM)
        ended = _reap()
        if server in ended:
            return ended[server]
    return None


def _kill_descendants() -> dict[int, int]:
    """Kill everything below this process, until nothing is left; the exit codes of its children."""
    ended: dict[int, int] = {}
    while below := psutil.Process().children(recursive=True):
        for process in below:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        time.sleep(0.02)
        ended |= _reap()
    return ended


def _reap() -> dict[int, int]:
    """Exit codes of the children that have ended since the last call."""
    ended = {}
    with suppress(ChildProcessError):
        while (child := os.waitpid(-1, os.WNOHANG))[0] != 0:
            ended[child[0]] = os.waitstatus_to_exitcode(child[1])
    return ended


if __name__ == "__main__":
    secret_variable, words = sys.argv[2], sys.argv[3:]
    sys.exit(main(int(sys.argv[1]), os.environ.get(secret_variable, "").encode(), words))
