"""The transport that brings nothing: servers are evaluated with the weights that they were started with."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, cast

from apo_megatron.parallel.world import World
from apo_megatron.rollout.event_loop import EventLoopThread
from apo_megatron.rollout.sglang_client import ServerError, SGLangClient
from apo_megatron.rollout.waiting import on_every_rank

if TYPE_CHECKING:
    from apo_megatron.weights.source import WeightSource

# What stands for the weights that the servers have, where an engine wants a source of weights.
AS_SERVED = cast("WeightSource", "as served")


class AsServedTransport:
    """Gives servers a label for the weights that they have. A ``WeightTransport``.

    All that is known of weights by their label holds then, too: an answer drawn with other ones is refused,
    and servers whose checksums differ, or that came back with another checksum, end the evaluation.
    """

    def __init__(self, parallel: World, loop: EventLoopThread) -> None:
        self._parallel, self._loop = parallel, loop

    def push(self, source: WeightSource, servers: Sequence[SGLangClient], label: str) -> dict[str, str]:
        """See ``WeightTransport``; ``source`` is not read."""

        def set_labels() -> dict[str, str]:
            problems = {}
            for server in servers:
                try:
                    self._loop.run(server.set_weight_label(label))
                except ServerError as error:
                    problems[server.name] = str(error)
            return problems

        return on_every_rank(lambda: set_labels() if self._parallel.is_main else {}, self._parallel)[0]

    def close(self) -> None:
        """Nothing is held."""
