"""DCPO's advantages: against the definition over several visits, and what is kept between them."""

from __future__ import annotations

import json
import math
import statistics
from typing import Any

import pytest
import torch

from apo_megatron.objectives import ADVANTAGE_ESTIMATORS, group_normalized_advantages
from apo_megatron.objectives.visited_advantages import dcpo_advantages, note_visits

NAN = math.nan


def plain_dcpo(history: list[list[float]]) -> list[float]:
    """The advantages of the last group of a prompt, from the rewards of all its groups."""
    mean = var = 0.0
    for visit, group in enumerate(history, start=1):
        new_mean, new_var = statistics.fmean(group), statistics.variance(group)
        drift = (visit - 1) / visit * (new_mean - mean) ** 2
        var = ((visit - 1) * var + new_var + drift) / visit
        mean = ((visit - 1) * mean + new_mean) / visit
    j, found = len(history), []
    for reward in history[-1]:
        new = (reward - new_mean) / new_var**0.5 if new_var > 0 else 0.0
        total = (reward - mean) / var**0.5 if var > 0 else 0.0
        found.append(min(total / j + (1 - 1 / j) * new, new / j + (1 - 1 / j) * total, key=abs))
    return found


@pytest.mark.parametrize("seed", range(3))
def test_every_visit_against_the_definition(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    names = ["a", "b", "c"]
    history: dict[str, list[list[float]]] = {name: [] for name in names}
    state: dict[str, Any] = {}
    for step in range(5):
        rewards = torch.rand(3, 6, generator=generator, dtype=torch.float64)
        rewards[0] = rewards[0].round()
        rewards[1] = float(step > 2)  # all wrong, later all right
        found = dcpo_advantages(rewards, names, state)
        for name, row, of_group in zip(names, rewards.tolist(), found.tolist(), strict=True):
            history[name].append(row)
            assert of_group == pytest.approx(plain_dcpo(history[name]), rel=1e-9, abs=1e-12)
        assert found[1].ne(0).any() == (step > 2)
        # Through a checkpoint to the bit.
        state = json.loads(json.dumps(note_visits(rewards, names, state)))
        assert [visits[0] for visits in state.values()] == [step + 1] * 3


def test_the_first_time_it_is_grpo() -> None:
    rewards = torch.rand(4, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    rewards[1, 2] = NAN
    rewards[2] = 0.5
    rewards[3, 1:] = NAN
    for names in (None, ["a", "b", "c", "d"]):
        found = dcpo_advantages(rewards, names, None)
        torch.testing.assert_close(found, group_normalized_advantages(rewards, eps=0.0).nan_to_num())
    state = note_visits(rewards, ["a", "b", "c", "d"], None)
    assert set(state) == {"a", "b", "c"} and state["c"] == [1, 0.5, 0.0]  # d: nothing to compare


def test_a_prompt_that_comes_twice_was_drawn_twice() -> None:
    rewards = torch.tensor([[1.0, 0.0, 0.0], [1.0, 1.0, 1.0]], dtype=torch.float64)
    together = dcpo_advantages(rewards, ["a", "a"], None)
    first = note_visits(rewards[:1], ["a"], None)
    torch.testing.assert_close(together[1:], dcpo_advantages(rewards[1:], ["a"], first))
    assert note_visits(rewards, ["a", "a"], None) == note_visits(rewards[1:], ["a"], first)
    # All right, after one of three: what is usual is 2/3, std sqrt((1/3 + 2/9) / 2); half of its distance.
    assert together[1, 0].item() == pytest.approx((1 / 3) / math.sqrt((1 / 3 + 2 / 9) / 2) / 2, rel=1e-12)


def test_a_step_leaves_the_other_prompts_and_the_state_before_as_they_are() -> None:
    before = {"a": [3, 0.5, 0.25], "b": [1, 1.0, 0.0]}
    after = note_visits(torch.tensor([[1.0, 0.0]], dtype=torch.float64), ["b"], before)
    assert after["a"] == [3, 0.5, 0.25] and after["b"][:2] == [2, 0.75]
    assert before == {"a": [3, 0.5, 0.25], "b": [1, 1.0, 0.0]}


def test_the_registry_declares_what_it_keeps() -> None:
    spec = ADVANTAGE_ESTIMATORS["dcpo"]
    assert spec.next_state is not None and spec.looks_beyond_group and "prompt_ids" in spec.needs
    assert "arXiv" in (dcpo_advantages.__doc__ or "") and "[code]" in (dcpo_advantages.__doc__ or "")
