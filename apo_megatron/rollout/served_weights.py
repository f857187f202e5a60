"""Servers that are evaluated with the weights that they have."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, cast

from apo_megatron.errors import RolloutError
from apo_megatron.parallel.world import World
from apo_megatron.rollout.engine import Probe
from apo_megatron.rollout.event_loop import EventLoopThread
from apo_megatron.rollout.sglang_client import SGLangClient
from apo_megatron.rollout.sglang_update import Problems, Proof, UpdateOutcome, on_each, run_on_main

if TYPE_CHECKING:
    from apo_megatron.weights.source import WeightSource

# What stands for the weights that the servers have, where an engine wants a source of weights.
AS_SERVED = cast("WeightSource", "as served")
_UNPROVEN = "served"  # label where servers offer no checksum


class ServedWeights:
    """Gives servers a label for the weights that they have. An ``Updater``.

    The label has their checksum in it: all that is known of weights by their label holds, and two evaluations
    of the same servers want the same label and do not disturb each other. Nothing is paused or aborted.
    """

    def __init__(self, parallel: World, loop: EventLoopThread) -> None:
        self._parallel, self._loop = parallel, loop

    def new_label(self, servers: Sequence[SGLangClient], version: int) -> str:
        """See ``Updater``. Raises RolloutError where servers have different weights."""

        def find() -> str:
            checksums, _ = on_each(self._loop, servers, lambda server: server.checksum())
            names: dict[str, str] = {}  # label -> a server
            for name, checksum in checksums.items():
                names.setdefault(_label(checksum), name)
            if len(names) > 1:
                found = ", ".join(f"{name}: {label}" for label, name in names.items())
                raise RolloutError(
                    f"checksums of servers' weights differ ({found}): an evaluation is of one model, have "
                    "them all serve the same"
                )
            return next(iter(names), "")

        return run_on_main(find, self._parallel)

    def update(
        self, servers: Sequence[SGLangClient], source: WeightSource, label: str, probe: Probe | None
    ) -> UpdateOutcome:
        """See ``Updater``; ``source`` and ``probe`` are not read."""

        async def adopt(server: SGLangClient) -> Proof:
            checksum = await server.checksum()
            if label and _label(checksum) != label:
                raise RolloutError(
                    f"server {server.name} has other weights ({_label(checksum)}) than those that are being "
                    f"evaluated ({label}): was it started anew with another model?"
                )
            if await server.weight_label() != label:
                await server.set_weight_label(label, abort=False)
            return Proof(0.0, 0.0, checksum)

        proofs, problems = run_on_main(lambda: on_each(self._loop, servers, adopt), self._parallel)
        return UpdateOutcome(proofs, problems)

    def put_to_sleep(self, servers: Sequence[SGLangClient]) -> Problems:
        """There is no trainer that wants their memory."""
        raise NotImplementedError

    def close(self) -> None:
        """Nothing is held."""


def _label(checksum: str | None) -> str:
    return _UNPROVEN if checksum is None else f"{_UNPROVEN}-{checksum.partition(' ')[0][:16]}"
