"""What the launcher needs of a cluster; ``ray.py`` implements it. The supervision itself is free of Ray."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from apo_megatron.launch.placement import Node, Resources


class ActorLost(RuntimeError):
    """The process of an actor is gone, killed or with its node."""


class Call(Protocol):
    """A method of an actor that was called."""

    def is_done(self) -> bool: ...

    def result(self, timeout: float) -> Any:
        """Waits. Raises ActorLost, TimeoutError after ``timeout`` seconds, or what the method raised."""
        ...


class Actor(Protocol):
    """A process in a bundle. Its methods may run at the same time."""

    def call(self, method: str, *values: Any) -> Call: ...

    def kill(self) -> None:
        """Kill -9; no effect where it is gone."""
        ...


class Cluster(Protocol):
    def nodes(self) -> list[Node]:
        """Those that are alive."""
        ...

    def reserve(self, bundles: Sequence[Resources]) -> None:
        """Ask for all bundles together. A bundle whose node is lost is placed again where there is room."""
        ...

    def bundle_nodes(self) -> list[Node | None]:
        """The node of each bundle, None for one that is not placed (any more)."""
        ...

    def start_actor(self, body: type, bundle: int, num_gpus: int, *values: Any) -> Actor:
        """Start ``body(*values)`` in a process of its own, with one CPU of the bundle."""
        ...

    def wait(self, calls: Sequence[Call], seconds: float) -> None:
        """Until one of ``calls`` is done, at most so long."""
        ...

    def close(self) -> None:
        """Give everything back; actors that still run are killed."""
        ...
