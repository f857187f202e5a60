"""Which server draws for which prompt: a pure choice, by what each has to do already."""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Sequence

# A prompt stays with the server that knows it until that one has more work than the idlest by so many
# requests like this one: reading a prompt again is cheaper than waiting behind them.
AFFINITY_MARGIN = 2
MAX_REMEMBERED_PROMPTS = 100_000


class Balancer:
    """Counts the tokens in flight at each server (prompt and the longest possible answers).

    Not thread-safe; deterministic: the same calls give the same choices.
    """

    def __init__(self) -> None:
        self._tokens_in_flight: Counter[str] = Counter()
        self._server_of: OrderedDict[str, str] = OrderedDict()  # prompt id -> server, least recent first

    def choose(self, prompt_id: str, num_tokens: int, candidates: Sequence[str]) -> str:
        """The server that gets a request of ``num_tokens``, which then are in flight there.

        It is the candidate that had the prompt last, as its cache holds it, unless that one has too much to
        do; else the one with the least to do, the first of equals.
        """
        assert candidates, "a choice needs candidates"
        idlest = min(candidates, key=lambda name: self._tokens_in_flight[name])
        limit = self._tokens_in_flight[idlest] + AFFINITY_MARGIN * num_tokens
        chosen = self._server_of.pop(prompt_id, idlest)
        if chosen not in candidates or self._tokens_in_flight[chosen] > limit:
            chosen = idlest
        self._server_of[prompt_id] = chosen
        if len(self._server_of) > MAX_REMEMBERED_PROMPTS:
            self._server_of.popitem(last=False)
        self._tokens_in_flight[chosen] += num_tokens
        return chosen

    def release(self, server: str, num_tokens: int) -> None:
        """A request of ``num_tokens`` at ``server`` has been answered, or given up."""
        self._tokens_in_flight[server] -= num_tokens
        assert self._tokens_in_flight[server] >= 0, f"{server}: more tokens released than were in flight"

    def forget_prompts(self) -> None:
        """The servers' caches were flushed."""
        self._server_of.clear()
