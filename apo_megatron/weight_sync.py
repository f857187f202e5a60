"""Brings the actor's weights into the engine before samples are drawn, and proves that they arrived."""

from __future__ import annotations

from collections.abc import Sequence

from apo_megatron.actor.actor import MegatronActor
from apo_megatron.config.rollout import RolloutConfig
from apo_megatron.rollout.engine import Probe, RolloutEngine
from apo_megatron.types import Prompt

MAX_PROBE_LENGTH = 256  # tokens of one prompt: enough to see wrong weights, quick on every layout


class WeightSync:
    """Hands over between actor and engine. Every method is collective.

    Where both share the GPUs (rollout.sglang.colocated) only one of them has its memory at a time: the
    engine after ``push``, the actor after ``rest``.
    """

    def __init__(
        self, cfg: RolloutConfig, actor: MegatronActor, engine: RolloutEngine, prompts: Sequence[Prompt]
    ) -> None:
        """The first of ``prompts`` that have at least two tokens are the probe."""
        self._actor, self._engine = actor, engine
        self._shares_devices = cfg.engine == "sglang" and cfg.sglang.colocated
        usable = [prompt.token_ids[:MAX_PROBE_LENGTH] for prompt in prompts if len(prompt.token_ids) > 1]
        self._probe_tokens = tuple(usable[: cfg.canary_prompts])
        self._engine_is_awake = False

    def push(self, version: int) -> dict[str, float]:
        """The engine draws with the actor's weights, as policy ``version``; the metrics of the update.

        Does nothing where it does so already. Raises RolloutError where the engine then does not say what
        the actor says.
        """
        if self._engine_is_awake and self._engine.policy_version == version:
            return {}
        probe = None
        if self._probe_tokens:
            probe = Probe(self._probe_tokens, tuple(self._actor.score(self._probe_tokens)))
        if self._shares_devices:
            self._actor.sleep()
        metrics = self._engine.update_weights(self._actor.weight_source(), version, probe)
        self._engine_is_awake = True
        return metrics

    def rest(self) -> None:
        """The samples are drawn: the devices are the actor's, where they are shared."""
        if self._shares_devices and self._engine_is_awake:
            self._engine.sleep()
            self._engine_is_awake = False
            self._actor.wake()
