"""The process between us and a server: everything below it ends with the server, and with us."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from apo_megatron.rollout import server_guard

# A process that leaves its session and its parent behind, as a server's helpers may.
ORPHAN = (
    "import os, time; os.fork() and os._exit(0); os.setsid(); open({path!r}, 'w').write(str(os.getpid()))"
)
WAIT = "; time.sleep(600)"


@pytest.fixture
def guard(tmp_path: Path) -> Iterator[Callable[..., subprocess.Popen[bytes]]]:
    """Starts a guard of ``program`` (Python); its output goes into tmp_path/log."""
    started: list[subprocess.Popen[bytes]] = []

    def start(program: str, parent: int | None = None, secret: str = "") -> subprocess.Popen[bytes]:
        words = [str(parent or os.getpid()), "THE_SECRET", sys.executable, "-c", program]
        with (tmp_path / "log").open("ab") as log:
            started.append(
                subprocess.Popen(
                    [sys.executable, "-P", server_guard.__file__, *words],
                    stdout=log,
                    stderr=log,
                    env={**os.environ, "THE_SECRET": secret},
                    start_new_session=True,
                )
            )
        return started[-1]

    yield start
    for process in started:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def eventually(condition: Callable[[], bool], seconds: float = 20.0) -> bool:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


def pid_in(path: Path) -> int:
    """What a process writes into ``path`` when it runs."""
    assert eventually(lambda: path.exists() and path.read_text() != ""), f"{path} was never written"
    return int(path.read_text())


def has_ended(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


@pytest.mark.parametrize(
    ("program", "code"),
    [("raise SystemExit(7)", 7), ("import os; os.kill(os.getpid(), 9)", 137), ("print('done')", 0)],
)
def test_exit_code_is_the_servers(
    guard: Callable[..., subprocess.Popen[bytes]], program: str, code: int
) -> None:
    assert guard(program).wait(20) == code


def test_a_missing_program_is_named(tmp_path: Path) -> None:
    words = [str(os.getpid()), "-", str(tmp_path / "no_such_program")]
    done = subprocess.run(
        [sys.executable, "-P", server_guard.__file__, *words], capture_output=True, text=True, timeout=20
    )
    assert done.returncode == server_guard.EXIT_NOT_STARTED
    assert "no_such_program: No such file or directory" in done.stdout


def test_what_a_server_leaves_behind_ends_with_it(
    guard: Callable[..., subprocess.Popen[bytes]], tmp_path: Path
) -> None:
    """The server ends by itself; a process of its own session, whose parent is gone, still runs."""
    leave = ORPHAN.format(path=str(tmp_path / "pid")) + WAIT
    program = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {leave!r}]); sys.stdin.read()"
    server = guard(f"{program}; import time; time.sleep(1); raise SystemExit(3)")
    orphan = pid_in(tmp_path / "pid")
    assert server.wait(20) == 3
    assert has_ended(orphan)


def test_everything_ends_with_the_parent(tmp_path: Path) -> None:
    leave = ORPHAN.format(path=str(tmp_path / "orphan")) + WAIT
    note = f"open({str(tmp_path / 'server')!r}, 'w').write(str(os.getpid()))"
    server = f"import os, subprocess, sys; {note}; subprocess.run([sys.executable, '-c', {leave!r}]){WAIT}"
    server = server.replace("import os,", "import os, time,")
    start = (
        f"subprocess.Popen([sys.executable, '-P', {server_guard.__file__!r}, str(os.getpid()), '-', *words])"
    )
    program = f"import os, subprocess, sys, time; words = [sys.executable, '-c', {server!r}]; {start}{WAIT}"
    parent = subprocess.Popen([sys.executable, "-c", program])
    below = [pid_in(tmp_path / "server"), pid_in(tmp_path / "orphan")]
    parent.kill()
    parent.wait()
    assert eventually(lambda: all(map(has_ended, below)))


def test_sigterm_asks_and_sigusr1_kills_what_is_stopped(
    guard: Callable[..., subprocess.Popen[bytes]], tmp_path: Path
) -> None:
    note = f"open({str(tmp_path / 'pid')!r}, 'w').write(str(os.getpid()))"
    handler = "signal.signal(signal.SIGTERM, lambda *_: sys.exit(5))"
    program = f"import os, signal, sys, time; {handler}; {note}; time.sleep(600)"
    asked = guard(program)
    pid_in(tmp_path / "pid")
    asked.send_signal(signal.SIGTERM)
    assert asked.wait(20) == 5

    (tmp_path / "pid").unlink()
    stopped = guard(program)
    server = pid_in(tmp_path / "pid")
    os.kill(server, signal.SIGSTOP)
    stopped.send_signal(signal.SIGUSR1)
    assert stopped.wait(20) == 128 + signal.SIGKILL
    assert has_ended(server)


def test_a_killed_guard_takes_the_server_with_it(
    guard: Callable[..., subprocess.Popen[bytes]], tmp_path: Path
) -> None:
    note = f"open({str(tmp_path / 'pid')!r}, 'w').write(str(os.getpid()))"
    between = guard(f"import os, time; {note}; time.sleep(600)")
    server = pid_in(tmp_path / "pid")
    between.kill()
    between.wait()
    assert eventually(lambda: has_ended(server))


@pytest.mark.parametrize("size", [1, 3, 1000])
def test_the_secret_is_not_copied(size: int) -> None:
    secret = b"abcabd"
    text = b"key=abcabd, abcabcabd, abca abcab\nabcabdabcabd abc"
    source, feed = os.pipe()
    output, target = os.pipe()
    copier = threading.Thread(target=server_guard.copy_without, args=(secret, source, target))
    copier.start()
    for start in range(0, len(text), size):
        os.write(feed, text[start : start + size])
        time.sleep(0.002)  # so that each part is read alone
    os.close(feed)
    copier.join()
    os.close(target)
    assert os.read(output, 65536) == text.replace(secret, b"[secret]")
    for descriptor in (source, output):
        os.close(descriptor)


def test_the_guard_reads_the_secret_from_its_variable(
    guard: Callable[..., subprocess.Popen[bytes]], tmp_path: Path
) -> None:
    assert guard("print('server_args: api_key=k-e-y!')", secret="k-e-y").wait(20) == 0
    assert (tmp_path / "log").read_text() == "server_args: api_key=[secret]!\n"
