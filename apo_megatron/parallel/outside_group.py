"""A communication group with processes of another program, beside torch's default group.

Those processes (SGLang's weight update) make their end with an inner function of torch.distributed, from an
address, a port, a group name and a world size. This end is made of the same parts without torch's registry
of groups around them: it neither needs the default group nor disturbs it.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

POLL_SECONDS = 0.0005
# torch ends the whole process when a NCCL operation takes longer than its group allows. Whoever waits here
# gives up earlier, and closes the group.
WATCHDOG_MARGIN = timedelta(hours=1)


class OutsideGroup:
    """Rank 0 of a group whose ranks 1, 2, ... are elsewhere: ``connect`` once, then ``broadcast``.

    Both work in a thread of their own, so that one can stop waiting for members that died or hang; after
    that, and after an error, all that can be done is ``close``.
    """

    def __init__(self, name: str, address: str, num_others: int, device: torch.device, backend: str) -> None:
        """``address`` is this machine's, as the others see it; they find the group at ``port``."""
        self.name = name
        self.address = address
        self.size = 1 + num_others
        self.backend = backend
        self._device = device
        # Port 0: the system picks one, which is bound before anybody hears of it.
        self._store: dist.TCPStore | None = dist.TCPStore(
            address, 0, self.size, is_master=True, wait_for_workers=False
        )
        self._group: Any = None

    @property
    def port(self) -> int:
        """Of this end's rendezvous."""
        assert self._store is not None
        return int(self._store.port)

    def connect(self, timeout: float) -> Future[None]:
        """Done when all have joined. RuntimeError where that takes longer than ``timeout`` seconds."""
        # As torch.distributed's init_method and _new_process_group_helper nest them, with SGLang's own prefix
        # between (torch 2.0 to 2.13).
        store: Any = self._store
        for prefix in (self.name, f"{self.name}/", f"{self._device.type}/"):
            store = dist.PrefixStore(prefix, store)

        def connect() -> None:
            self._group = _make_backend(self.backend, store, self.size, timedelta(seconds=timeout))

        return _in_thread(connect)

    def broadcast(self, tensor: Tensor, timeout: float) -> Future[None]:
        """Done when ``tensor`` (contiguous, complete on its device) is out, so that it may change again.

        RuntimeError after ``timeout`` seconds where the backend can tell (gloo), else never.
        """
        group = self._group
        options = dist.BroadcastOptions()
        options.rootRank = 0
        options.timeout = timedelta(seconds=timeout)

        def broadcast() -> None:
            work = group.broadcast([tensor], options)
            while self.backend == "nccl" and not work.is_completed():  # its wait() only queues what follows
                time.sleep(POLL_SECONDS)
            work.wait()  # raises what went wrong

        return _in_thread(broadcast)

    def close(self) -> None:
        """Leave. Members that wait get an error: at once, or where gloo is sending, after its time-out."""
        group, self._group, self._store = self._group, None, None
        if group is not None and self.backend == "nccl":
            _in_thread(group.abort)


def _make_backend(backend: str, store: dist.Store, size: int, timeout: timedelta) -> Any:
    if backend == "gloo":
        return dist.ProcessGroupGloo(store, 0, size, timeout)
    options = dist.ProcessGroupNCCL.Options()
    options._timeout = timeout + WATCHDOG_MARGIN
    return dist.ProcessGroupNCCL(store, 0, size, options)


def _in_thread(action: Callable[[], None]) -> Future[None]:
    """What ``action`` does, in a thread that nobody waits for at the end of the program."""
    future: Future[None] = Future()

    def run() -> None:
        try:
            action()
        except RuntimeError as error:
            future.set_exception(error)
        else:
            future.set_result(None)

    threading.Thread(target=run, daemon=True, name="outside-group").start()
    return future
