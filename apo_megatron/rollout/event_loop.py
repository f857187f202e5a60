"""One background thread with an asyncio loop, for the connections that a rank holds to its servers."""

from __future__ import annotations

import asyncio
import atexit
import threading
from collections.abc import Coroutine
from concurrent.futures import Future
from typing import Any, TypeVar

T = TypeVar("T")


class EventLoopThread:
    """Runs coroutines beside the trainer's own thread, which never runs a loop itself."""

    def __init__(self, name: str = "rollout-connections") -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._main, name=name, daemon=True)
        self._thread.start()
        atexit.register(self.close)  # a loop that is torn down with tasks in it complains about each

    def submit(self, coroutine: Coroutine[Any, Any, T]) -> Future[T]:
        """Begin to run ``coroutine``; cancelling the future cancels it."""
        if not self._thread.is_alive():
            coroutine.close()
            raise RuntimeError("the event loop is closed")
        assert threading.current_thread() is not self._thread, "the loop would wait for itself"
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop)

    def run(self, coroutine: Coroutine[Any, Any, T], timeout: float | None = None) -> T:
        """What ``coroutine`` returns or raises; TimeoutError, and its end, after so many seconds."""
        future = self.submit(coroutine)
        try:
            return future.result(timeout)
        finally:
            future.cancel()  # no effect on one that is done

    def close(self) -> None:
        """Cancel what runs, wait for its end, and stop; safe to call twice."""
        if self._thread.is_alive():
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join()
        atexit.unregister(self.close)

    def _main(self) -> None:
        asyncio.set_event_loop(self._loop)
        self._loop.run_forever()
        tasks = asyncio.all_tasks(self._loop)
        for task in tasks:
            task.cancel()
        self._loop.run_until_complete(asyncio.gather(*tasks, return_exceptions=True))
        self._loop.run_until_complete(self._loop.shutdown_asyncgens())
        self._loop.close()
