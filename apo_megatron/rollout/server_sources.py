"""Where an engine learns which SGLang servers there are. Used on rank 0, which tells the others."""

from __future__ import annotations

import json
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Protocol

from apo_megatron.config import ModelConfig
from apo_megatron.config.rollout import SGLangConfig
from apo_megatron.errors import RolloutError
from apo_megatron.rollout.server import ServerPool
from apo_megatron.rollout.server_watch import Note


class ServerSource(Protocol):
    """Servers by name with their URLs, as they come and go."""

    def addresses(self) -> dict[str, str]:
        """Those there are now, by name. Raises RolloutError where they cannot be told, or did not start."""
        ...

    def is_starting(self) -> bool:
        """Whether the first ones are still on their way, within a time-out of their own."""
        ...

    def restart(self, name: str, reason: str) -> None:
        """Server ``name`` hangs: start it anew, if that is this source's to do. Returns at once."""
        ...

    def hold_starts(self, hold: bool) -> None:
        """The trainer has the GPUs: start no server until it gives them back."""
        ...

    def failure(self) -> str | None:
        """Why servers will not come back, where that is known."""
        ...

    def close(self) -> None:
        """End what was started here."""
        ...


def server_source(
    cfg: SGLangConfig, model: ModelConfig, log_folder: Path, on_cpu: bool, note: Note
) -> ServerSource:
    """The servers that ``cfg`` names, or new ones, which begin to start at once. Raises ConfigError."""
    if cfg.urls:
        return ListedServers(cfg.urls)
    if cfg.servers_file is not None:
        return FileServers(cfg.servers_file)
    return StartedServers(ServerPool(cfg, model, log_folder, on_cpu, note=note))


class ListedServers:
    """Servers that somebody else runs, named in the configuration."""

    def __init__(self, urls: Sequence[str]) -> None:
        self._urls = urls

    def addresses(self) -> dict[str, str]:
        return {url: url for url in self._urls}

    def is_starting(self) -> bool:
        return False

    def restart(self, name: str, reason: str) -> None:
        pass

    def hold_starts(self, hold: bool) -> None:
        pass

    def failure(self) -> str | None:
        return None

    def close(self) -> None:
        pass


class FileServers(ListedServers):
    """Servers that a supervisor keeps listed in a file: a JSON list of {"name": ..., "url": ...}.

    Or in a folder of such files, one for each machine; a server is then called "file/name".
    """

    def __init__(self, path: str) -> None:
        super().__init__(())
        self._path = Path(path)
        self._last: dict[Path, dict[str, str]] = {}

    def addresses(self) -> dict[str, str]:
        """Empty where the file is not there yet, or has nothing in it."""
        if not self._path.is_dir():
            return self._read(self._path)
        files = sorted(self._path.glob("*.json"))
        return {f"{file.stem}/{name}": url for file in files for name, url in self._read(file).items()}

    def _read(self, path: Path) -> dict[str, str]:
        try:
            text = path.read_text(encoding="utf-8")
        except FileNotFoundError:
            return {}
        except (OSError, UnicodeDecodeError) as error:
            if path in self._last:  # a shared disk that flickers
                return self._last[path]
            raise RolloutError(f"sglang.servers_file={path} cannot be read: {error}") from error
        if not text.strip():
            return {}
        try:
            self._last[path] = {str(entry["name"]): str(entry["url"]) for entry in json.loads(text)}
            return self._last[path]
        except (ValueError, TypeError, KeyError) as error:
            raise RolloutError(
                f'sglang.servers_file={path}: expected a JSON list of {{"name": ..., "url": ...}}, '
                f"found {text[:200]!r}"
            ) from error


class StartedServers:
    """Servers that this run starts, while it loads its own model."""

    def __init__(self, pool: ServerPool) -> None:
        self._pool = pool
        executor = ThreadPoolExecutor(1, thread_name_prefix="server-start")
        self._start: Future[None] = executor.submit(pool.start)
        executor.shutdown(wait=False)

    def addresses(self) -> dict[str, str]:
        if not self._start.done():
            return {}
        self._start.result()
        return {address.name: address.url for address in self._pool.addresses()}

    def is_starting(self) -> bool:
        return not self._start.done()

    def restart(self, name: str, reason: str) -> None:
        self._pool.restart(name, reason)

    def hold_starts(self, hold: bool) -> None:
        self._pool.hold_starts(hold)

    def failure(self) -> str | None:
        return self._pool.failure()

    def close(self) -> None:
        self._pool.close()
