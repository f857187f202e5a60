"""One SGLang server on its node, in a process of its own that also watches it."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import yaml

from apo_megatron.config import RLConfig

if TYPE_CHECKING:
    from apo_megatron.rollout.server import ServerPool

_POOL_NAME = "server-0"  # what a pool calls its only server


@dataclass(frozen=True)
class ServerState:
    """``url``: None while it does not serve; ``failure``: why it will not again; ``notes``: new lines."""

    url: str | None
    failure: str | None
    notes: tuple[str, ...]


class ServerHost:
    """Lives in an actor whose methods run at the same time."""

    def __init__(
        self,
        name: str,
        config_text: str,
        host: str,
        folder: str | None,
        log_folder: str,
        environment: Mapping[str, str],
        on_cpu: bool,
    ) -> None:
        """``host``: the address of this node that the trainer reaches; ``folder``: what relative paths are
        relative to, None = where this actor runs; ``environment``: for the server."""
        os.environ.update(environment)
        self._name, self._folder, self._log_folder, self._on_cpu = name, folder, log_folder, on_cpu
        cfg = RLConfig.model_validate(yaml.safe_load(config_text))
        self._model = cfg.model
        self._cfg = cfg.rollout.sglang.model_copy(update={"num_servers": 1, "host": host})
        self._pool: ServerPool | None = None
        self._notes: deque[str] = deque()

    def start(self) -> None:
        """Returns when it serves. Raises RolloutError, and ConfigError where it cannot start here."""
        # Here: it imports torch, which takes seconds, and the launcher imports this file.
        from apo_megatron.rollout.server import ServerPool

        if self._folder is not None:
            os.chdir(self._folder)
        self._pool = ServerPool(
            self._cfg,
            self._model,
            Path(self._log_folder),
            self._on_cpu,
            num_trainer_gpus=0,  # this process sees the server's GPUs and no others
            note=lambda line: self._notes.append(self._renamed(line)),
        )
        self._pool.start()
        self._pool.watch_for_hangs()

    def state(self) -> ServerState:
        notes = [self._notes.popleft() for _ in range(len(self._notes))]
        url = failure = None
        if self._pool is not None:
            url = next((address.url for address in self._pool.addresses()), None)
            failure = self._pool.failure()
        return ServerState(url, None if failure is None else self._renamed(failure), tuple(notes))

    def close(self) -> None:
        """End the server; its processes are gone then."""
        if self._pool is not None:
            self._pool.close()

    def _renamed(self, text: str) -> str:
        return text.replace(_POOL_NAME, self._name)
