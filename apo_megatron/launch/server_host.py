"""One SGLang server on its node, in a process of its own that also watches it."""

from __future__ import annotations

import os
import threading
import urllib.request
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
        self._notes: list[str] = []

    def start(self) -> None:
        """Returns when it serves. Raises RolloutError, and ConfigError where it cannot start here."""
        # Here: they import torch, which takes seconds, and the launcher imports this file.
        from apo_megatron.rollout.server import ServerPool
        from apo_megatron.rollout.server_command import read_api_key

        if self._folder is not None:
            os.chdir(self._folder)
        key = read_api_key(self._cfg)
        headers = {} if key is None else {"Authorization": f"Bearer {key}"}
        self._pool = ServerPool(
            self._cfg,
            self._model,
            Path(self._log_folder),
            self._on_cpu,
            num_trainer_gpus=0,  # this process sees the server's GPUs and no others
            note=lambda line: self._notes.append(self._renamed(line)),
        )
        self._pool.start()
        threading.Thread(target=self._watch, args=(self._pool, headers), daemon=True).start()

    def state(self) -> ServerState:
        notes, self._notes = self._notes, []
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

    def _watch(self, pool: ServerPool, headers: dict[str, str]) -> None:
        """Restart it when it hangs. Its scheduler answers this request also while the server is paused, but
        not while weights are received."""
        patience = self._cfg.health_timeout + self._cfg.update_timeout
        pause = threading.Event()
        while not pause.wait(self._cfg.health_interval):
            for address in pool.addresses():
                request = urllib.request.Request(f"{address.url}/server_info", headers=headers)
                try:
                    urllib.request.urlopen(request, timeout=patience).close()
                except TimeoutError:
                    pool.restart(address.name, f"no answer for {patience:g} s")
                except OSError:
                    pass  # it has ended, which the pool sees itself, or it answered with an error
