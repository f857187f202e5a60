"""Memory that servers on this machine map, in the form of torch's "file_system" sharing.

With that strategy torch starts a daemon, torch_shm_manager, which removes what dead processes leave behind.
It would outlive the trainer and hold its output open, so the trainer takes its part here: it answers what a
server's torch asks before it maps a segment, and removes the segments itself.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import secrets
import socketserver
import struct
import threading
from contextlib import suppress
from pathlib import Path

import torch

from apo_megatron.rollout.transports.pickled import call, reference, value

_FOLDER = Path("/dev/shm")  # where shm_open looks on Linux
_PREFIX = "apo_megatron_"
# A segment begins with the number of those who use it, which torch keeps; who counts down to zero removes the
# segment. It starts so high that only its owner ever does.
_HEADER = struct.Struct("@i")
_HEADER_BYTES = 64
_NUM_USERS = 2**30
# What a server's torch sends: its process id, whether it lets a segment go, which one; padded as in C.
_MESSAGE = struct.Struct("@i?60s3x")
_ANSWER = b"OK"
_NUM_AHEAD = 64  # answers that lie ready, so that a server need not wait while Python is busy here


class SharedMemory:
    """Owns a segment at a time, and answers the servers that map it."""

    def __init__(self) -> None:
        """Removes what killed processes have left."""
        for lock in _FOLDER.glob(f"{_PREFIX}*.lock"):
            _remove_if_left_behind(lock)
        self._stem, self._lock = _lock_new_stem()
        self._num_segments = 0
        self._segment: Path | None = None
        self._socket = _FOLDER / f"{self._stem}.socket"
        self._manager = _Manager(self._socket)

    def allocate(self, num_bytes: int) -> torch.Tensor:
        """[num_bytes] uint8: a new segment instead of the last one. Raises OSError where there is no room."""
        self.free()
        self._num_segments += 1  # a name that is used again would give servers the memory that they know
        self._segment = _FOLDER / f"{self._stem}.{self._num_segments}"
        descriptor = os.open(self._segment, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
        try:
            # Takes the memory now: with /dev/shm full, writing later would end the process.
            os.posix_fallocate(descriptor, 0, _HEADER_BYTES + num_bytes)
            memory = mmap.mmap(descriptor, _HEADER_BYTES + num_bytes)
        except OSError:
            self.free()
            raise
        finally:
            os.close(descriptor)
        _HEADER.pack_into(memory, 0, _NUM_USERS)
        return torch.frombuffer(memory, dtype=torch.uint8, offset=_HEADER_BYTES)

    def tensor(self, num_bytes: int) -> bytes:
        """Fragment of a pickle: the segment as a tensor [num_bytes] uint8, mapped where it is unpickled."""
        assert self._segment is not None
        handle = b"/" + os.fsencode(self._segment.name)
        manager = os.fsencode(self._socket)
        storage = call(
            _reduction("rebuild_storage_filename"),
            *map(value, (torch.UntypedStorage, manager, handle, num_bytes)),
        )
        typed = call(_reduction("rebuild_typed_storage"), storage, value(torch.uint8))
        layout = (0, (num_bytes,), (1,), False)  # offset, shape, stride, requires_grad
        return call(_reduction("rebuild_tensor"), value(torch.Tensor), typed, value(layout))

    def free(self) -> None:
        """Remove the segment; who has mapped it keeps its contents."""
        if self._segment is not None:
            self._segment.unlink(missing_ok=True)
            self._segment = None

    def close(self) -> None:
        """Free everything. Servers must be done with the segment."""
        self.free()
        self._manager.stop()
        _remove_all(self._stem)
        os.close(self._lock)


def _reduction(name: str) -> bytes:
    return reference("torch.multiprocessing.reductions", name)


class _Manager(socketserver.ThreadingUnixStreamServer):
    """In threads of its own: who asks waits for a second at most, and a server that gives up ends."""

    daemon_threads = True
    block_on_close = False  # servers stay connected

    def __init__(self, path: Path) -> None:
        super().__init__(str(path), _Answers)
        threading.Thread(target=self.serve_forever, daemon=True, name="shared-memory").start()

    def stop(self) -> None:
        self.shutdown()
        self.server_close()


class _Answers(socketserver.StreamRequestHandler):
    def handle(self) -> None:
        with suppress(ConnectionError):
            self.wfile.write(_ANSWER * _NUM_AHEAD)
            while len(message := self.rfile.read(_MESSAGE.size)) == _MESSAGE.size:
                _, lets_go, _ = _MESSAGE.unpack(message)
                if not lets_go:
                    self.wfile.write(_ANSWER)


def _lock_new_stem() -> tuple[str, int]:
    """A new common part of file names, and the lock that shows that its process lives."""
    stem = f"{_PREFIX}{secrets.token_hex(6)}"
    new = _FOLDER / f".{stem}.lock"
    descriptor = os.open(new, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    new.rename(_FOLDER / f"{stem}.lock")  # seen by others only now that it is locked
    return stem, descriptor


def _remove_if_left_behind(lock: Path) -> None:
    with suppress(OSError), lock.open("rb") as file:  # another user's, or removed by another process
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        _remove_all(lock.stem)


def _remove_all(stem: str) -> None:
    for path in _FOLDER.glob(f"{stem}.*"):
        path.unlink(missing_ok=True)
