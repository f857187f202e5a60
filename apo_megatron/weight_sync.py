"""Brings the actor's weights into the engine before samples are drawn, and proves that they arrived."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from apo_megatron.actor.actor import MegatronActor
from apo_megatron.config.rollout import RolloutConfig
from apo_megatron.data.prompts import PromptLoader
from apo_megatron.rollout.engine import Probe, RolloutEngine
from apo_megatron.rollout.sampler import GroupSampler
from apo_megatron.weights.source import WeightSource

MAX_PROBE_LENGTH = 256  # tokens of one prompt: enough to see wrong weights, quick on every layout


class WeightSync:
    """Hands over between actor and engine. Every method is collective.

    Where both share the GPUs (rollout.sglang.colocated) only one of them has its memory at a time: the
    engine after ``push``, the actor after ``rest``.
    """

    def __init__(
        self,
        cfg: RolloutConfig,
        actor: MegatronActor,
        engine: RolloutEngine,
        sampler: GroupSampler,
        prompts: PromptLoader,
    ) -> None:
        """The first of ``prompts`` are the probe."""
        self._actor, self._engine, self._sampler = actor, engine, sampler
        self._shares_devices = cfg.engine == "sglang" and cfg.sglang.colocated
        token_ids = [prompt.token_ids[:MAX_PROBE_LENGTH] for prompt in prompts.first(cfg.canary_prompts)]
        self._probe_tokens = tuple(tokens for tokens in token_ids if len(tokens) > 1)
        self._engine_is_awake = False

    @property
    def source(self) -> WeightSource:
        """Streams the actor's weights."""
        return self._actor.weight_source()

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
        with self._sampler.settled():
            metrics = self._engine.update_weights(self.source, version, probe)
        self._engine_is_awake = True
        return metrics

    @contextmanager
    def lent(self, version: int) -> Iterator[None]:
        """The engine draws with policy ``version`` inside the block; the actor has the devices after it."""
        self.push(version)
        yield
        self.rest()

    def rest(self) -> None:
        """The samples are drawn: the devices are the actor's, where they are shared."""
        if self._shares_devices and self._engine_is_awake:
            self._engine.sleep()
            self._engine_is_awake = False
            self._actor.wake()
