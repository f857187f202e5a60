"""Prompts on their way to groups: which rank draws which, and what has become of each."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from apo_megatron.data.prompts import PromptLoader
from apo_megatron.rollout.engine import SampleRequest
from apo_megatron.rollout.gathering import SampleColumns
from apo_megatron.types import Completion, Prompt, SampleGroup

Allocate = Callable[[Sequence[Prompt]], Sequence[int]]  # samples of each prompt that is begun


@dataclass(frozen=True)
class Verdict:
    """What every rank knows of a complete group: all but its tokens and log-probs."""

    number: int  # of its draw
    oldest_version: int  # of any of its tokens
    teaches: bool  # the advantage estimator can learn from it
    columns: SampleColumns


@dataclass
class Draw:
    """One prompt, whose samples one rank draws; only that rank has completions and group."""

    number: int  # in the order of drawing
    prompt: Prompt
    owner: int  # rank
    num_samples: int
    completions: list[Completion] = field(default_factory=list)  # "abort": begun, goes on
    group: SampleGroup | None = None  # scored, once it is complete
    verdict: Verdict | None = None  # None: open

    def requests(self) -> list[SampleRequest]:
        """What is missing: new completions, and the rest of those that were begun."""
        num_new = self.num_samples - len(self.completions)
        new = [SampleRequest(self.prompt, num_new)] if num_new else []
        begun = [c for c in self.completions if c.finish_reason == "abort"]
        return new + [SampleRequest(self.prompt, 1, c, num_new + i) for i, c in enumerate(begun)]

    def replace_begun(self, drawn: Iterable[Completion]) -> None:
        """Take the answers to ``requests``; what was cut before its first token is missing as before."""
        finished = [c for c in self.completions if c.finish_reason != "abort"]
        self.completions = finished + [c for c in drawn if len(c.token_ids)]

    def is_complete(self) -> bool:
        """Whether all completions are there, none of them cut (known to the owner)."""
        reasons = [completion.finish_reason for completion in self.completions]
        return len(reasons) == self.num_samples and "abort" not in reasons

    def oldest_version(self) -> int:
        """Of any token of its completions (known to the owner)."""
        return min(completion.policy_version for completion in self.completions)

    def drop_older(self, oldest_version: int) -> int:
        """Forget completions with older tokens, and the group with them; how many there were."""
        kept = [c for c in self.completions if c.policy_version >= oldest_version]
        num_dropped = len(self.completions) - len(kept)
        self.completions = kept
        if self.verdict is not None and self.verdict.oldest_version < oldest_version:
            self.group = self.verdict = None
        return num_dropped


class Draws:
    """All prompts that were taken from the data and have not been used up, the same on every rank.

    Its state are their ids: completions are not saved, so what was under way is drawn anew after a resume.
    """

    def __init__(self, prompts: PromptLoader, num_ranks: int, allocate: Allocate) -> None:
        self._prompts, self._num_ranks, self._allocate = prompts, num_ranks, allocate
        self._waiting: deque[Prompt] = deque()  # given back; they come before new ones
        self._draws: dict[int, Draw] = {}  # by number, in order
        self._next_number = 0

    def begin(self, count: int) -> list[Draw]:
        """Draws of ``count`` more prompts, each at the rank that has the fewest samples of open ones."""
        loads = [0] * self._num_ranks
        for draw in self.open():
            loads[draw.owner] += draw.num_samples
        num_new = max(0, count - len(self._waiting))
        prompts = [self._waiting.popleft() for _ in range(count - num_new)] + self._prompts.take(num_new)
        begun = []
        for prompt, num_samples in zip(prompts, self._allocate(prompts), strict=True):
            owner = loads.index(min(loads))
            loads[owner] += num_samples
            begun.append(Draw(self._next_number, prompt, owner, num_samples))
            self._draws[self._next_number] = begun[-1]
            self._next_number += 1
        return begun

    def all(self) -> list[Draw]:
        """Open and complete ones, in the order of drawing."""
        return list(self._draws.values())

    def open(self) -> list[Draw]:
        """Those whose groups are not complete, in the order of drawing."""
        return [draw for draw in self._draws.values() if draw.verdict is None]

    def complete(self) -> list[tuple[Draw, Verdict]]:
        """Those whose groups are complete, in the order of drawing."""
        return [(draw, draw.verdict) for draw in self._draws.values() if draw.verdict is not None]

    def complete_with(self, verdicts: Iterable[Verdict]) -> None:
        """Note on every rank that these groups are complete."""
        for verdict in verdicts:
            self._draws[verdict.number].verdict = verdict

    def use_up(self, draws: Iterable[Draw]) -> None:
        """These are done with."""
        for draw in draws:
            del self._draws[draw.number]

    def give_back(self, draws: Iterable[Draw]) -> None:
        """These are drawn again, before new prompts and in the same order; their samples are dropped."""
        returned = sorted(draws, key=lambda draw: draw.number)
        self.use_up(returned)
        self._waiting.extendleft(draw.prompt for draw in reversed(returned))

    def state_dict(self) -> dict[str, Any]:
        """Ids of the prompts that are under way or wait to be drawn again."""
        prompts = [*(draw.prompt for draw in self._draws.values()), *self._waiting]
        return {"pending": [prompt.prompt_id for prompt in prompts]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Draw those prompts first. Raises CheckpointError where the data does not have them."""
        assert not self._draws, "nothing may be under way"
        self._waiting = deque(self._prompts.with_ids(state["pending"]))
