"""A reward of the user's own, for the evaluation command: right begins with one of the first 50 words."""

from __future__ import annotations

from collections.abc import Sequence

from apo_megatron.types import Completion, Prompt


def score(prompt: Prompt, completions: Sequence[Completion]) -> list[float]:
    firsts = [(completion.text.split() or ["w99"])[0] for completion in completions]
    return [float(int(first.removeprefix("w")) < 53) for first in firsts]
