"""The answers that rewards extract for majority votes: one form each, never right and wrong at once."""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from apo_megatron.config import RewardConfig
from apo_megatron.errors import DataError
from apo_megatron.evaluation.answers import majority_at_k
from apo_megatron.rewards.answers import plain_answer
from apo_megatron.rewards.interface import AnswerReward
from apo_megatron.rewards.judging import MAX_ANSWER
from apo_megatron.rewards.registry import build_reward
from apo_megatron.types import FinishReason, Prompt
from tests.test_rewards import ENV, completion, problem

COUNTDOWN = {"numbers": [4, 4, 15, 2, 13], "target": 58}


def answer_reward(name: str) -> AnswerReward:
    reward = build_reward(RewardConfig(name=name))
    assert isinstance(reward, AnswerReward)
    return reward


def answers(name: str, prompt: Prompt, texts: Sequence[str], rewards: Sequence[float]) -> list[str | None]:
    return answer_reward(name).answers(prompt, [completion(text) for text in texts], rewards)


def scored_answers(name: str, prompt: Prompt, texts: Sequence[str]) -> list[str | None]:
    completions = [completion(text) for text in texts]
    reward = answer_reward(name)
    return reward.answers(prompt, completions, reward.score(prompt, completions))


def test_right_answers_vote_for_the_gold_answer() -> None:
    texts = ["\\boxed{1/2}", "It is 0.5", "\\boxed{2}", "so $\\boxed{ 2 }$.", "I cannot say"]
    found = answers("math_verify", problem(answer="\\frac{1}{2}"), texts, [1.0, 1.0, 0.0, 0.0, 0.0])
    assert found == ["\\frac{1}{2}", "\\frac{1}{2}", "2", "2", None]
    assert answers("math_verify", problem(answer=7), ["", ""], [1.0, math.nan]) == ["7", None]


def test_a_wrong_answer_is_never_the_gold_text() -> None:
    found = answers("math_verify", problem(answer="x"), ["\\boxed{x}", "\\boxed{x}"], [1.0, 0.0])
    assert found == ["x", "x (judged wrong)"]
    long = "7" * 5000
    right, wrong = answers("math_verify", problem(answer=long), [f"\\boxed{{{long}}}"] * 2, [1.0, 0.0])
    assert right == long and wrong == "7" * MAX_ANSWER


def test_cut_and_unjudged_samples_have_no_answer() -> None:
    ends: list[FinishReason] = ["stop", "length", "abort", "stop"]
    rewards = [1.0, 0.0, math.nan, math.nan]
    for name, text, fields in (
        ("math_verify", "\\boxed{3}", {"answer": "3"}),
        ("exact_match", "\\boxed{3}", {"answer": "3"}),
        ("multiple_choice", "\\boxed{C}", {"answer": "C"}),
        ("countdown", "4 * 15 - 2", COUNTDOWN),
    ):
        found = answer_reward(name).answers(
            problem(**fields), [completion(text, end) for end in ends], rewards
        )
        assert found[0] is not None and found[1:] == [None, None, None]


def test_texts_and_letters() -> None:
    texts = ["\\boxed{New  York}", "New\nYork", "\\boxed{Paris}", "I think\n Paris", " ", "\\boxed{}"]
    assert scored_answers("exact_match", problem(answer="New   York"), texts) == [
        "New York",
        "New York",
        "Paris",
        "I think Paris",
        None,
        None,
    ]
    letters = ["\\boxed{b}", "The answer is (B).", "Answer: C", "No idea"]
    assert scored_answers("multiple_choice", problem(answer="(b)"), letters) == ["B", "B", "C", None]


def test_expressions() -> None:
    texts = ["4 * 15 - 2", " 4 * 15 - 2 ", "15 * 4 - 2", "4*15-2", "4 * 15-2\n", "4 + 4 + 2", "4 +4+2", " \n"]
    wrong = "4*15-2 (judged wrong)"
    found = scored_answers("countdown", problem(**COUNTDOWN), texts)
    assert found == ["4*15-2", "4*15-2", "15*4-2", wrong, wrong, "4+4+2", "4+4+2", None]


@pytest.mark.parametrize(
    ("same", "other"),
    [
        (
            ["\\boxed{1,234}", "\\boxed{1{,}234}", "\\boxed{1\\,234}", "it is 1234.", "$1234$"],
            "\\boxed{1.234}",
        ),
        (["\\boxed{\\dfrac{1}{2}}", "\\boxed{\\frac{1}{2}}", "\\boxed{\\tfrac {1}{2}}"], "\\boxed{1/2}"),
        (["\\boxed{\\left( 1, 2 \\right)}", "\\boxed{(1,2)}"], "\\boxed{[1,2]}"),
        (["\\boxed{5}\\%", "\\boxed{5}%"], "\\boxed{5}"),
        (["\\boxed{1} or $\\boxed{2}$", "\\boxed{1} and \\boxed{2}"], "\\boxed{1}\n\\boxed{2}"),
        (["\\boxed{\u22123}", "\\boxed{-3}", "the answer is -3"], "\\boxed{3}"),
        (["\\boxed{\\text{(A)}}", "\\boxed{(A)}"], "\\boxed{A}"),
        (["costs $5", "costs \\$5.", "5 apples"], ".5"),
    ],
)
def test_plain_answers(same: list[str], other: str) -> None:
    found = {plain_answer(text) for text in same}
    assert len(found) == 1 and None not in found
    assert plain_answer(other) not in {None, *found}


@pytest.mark.parametrize("text", ["", "no idea", "\\boxed{}", "\\boxed{ \\, }", "\\boxed{$$}", "."])
def test_no_plain_answer(text: str) -> None:
    assert plain_answer(text) is None


PIECES = [
    *("\\boxed{", "}", "1", "2", "58", ",", "-", "*", "+", " ", "\n", "$", "\\%", "(", ")", "\\frac"),
    *(
        "B",
        "C",
        "1 2",
        "Answer: ",
        "4",
        "15",
        "\t",
        "4 * 15 - 2",
        "4*15-2",
        "\\boxed{2}",
        "\0",
        "\ud800",
        "\u0661",
    ),
]


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("exact_match", {"answer": "2"}),
        ("exact_match", {"answer": "1  2"}),
        ("multiple_choice", {"answer": "B"}),
        ("countdown", COUNTDOWN),
    ],
)
def test_no_answer_is_right_and_wrong(name: str, fields: dict[str, Any]) -> None:
    rng = np.random.default_rng(0)
    reward, prompt = answer_reward(name), problem(**fields)
    num_right = 0
    for _ in range(80):
        texts = ["".join(rng.choice(PIECES, rng.integers(0, 5))) for _ in range(32)]
        completions = [completion(text, "stop" if rng.random() < 0.9 else "length") for text in texts]
        rewards = reward.score(prompt, completions)
        # Two calls, as where a problem's samples come in parts.
        found = reward.answers(prompt, completions[:7], rewards[:7])
        found += reward.answers(prompt, completions[7:], rewards[7:])
        majority_at_k(found, [value >= 1 for value in rewards], [1, 8])
        num_right += sum(value >= 1 for value in rewards)
    assert num_right > 5


@pytest.mark.parametrize("gold", ["2", "1,2", "-", "58 (judged wrong)", "\\frac{1}{2}", 58, 0.5])
def test_no_verdict_of_the_workers_makes_an_answer_right_and_wrong(gold: object) -> None:
    """Whatever math-verify says, and be it another thing of the same text."""
    rng = np.random.default_rng(0)
    reward, prompt = answer_reward("math_verify"), problem(answer=gold)
    for _ in range(40):
        completions = [
            completion("".join(rng.choice(PIECES, rng.integers(0, 5))), "length" if i % 9 == 0 else "stop")
            for i in range(32)
        ]
        completions += [completion(f"\\boxed{{{gold}}}")]
        rewards = rng.choice([0.0, 1.0, math.nan], len(completions)).tolist()
        rewards = [
            0.0 if c.finish_reason == "length" else r for c, r in zip(completions, rewards, strict=True)
        ]
        majority_at_k(reward.answers(prompt, completions, rewards), [r >= 1 for r in rewards], [1, 5])


def test_rewards_without_an_answer_say_so() -> None:
    for cfg in (
        RewardConfig(name="format", format_pattern="a"),
        RewardConfig(name="math:sqrt"),
        RewardConfig.model_validate({"rewards": [{"name": "math_verify"}]}),
    ):
        assert not isinstance(build_reward(cfg), AnswerReward)


def test_a_problem_without_gold_answer_is_named() -> None:
    for name in ("math_verify", "exact_match", "multiple_choice"):
        with pytest.raises(DataError, match="prompt 'p7': column 'answer'"):
            answers(name, problem(), ["1"], [1.0])


def test_answers_are_read_without_sympy_and_without_workers() -> None:
    script = """
import sys
import numpy as np
from apo_megatron.config import RewardConfig
from apo_megatron.rewards.math import MathReward
from apo_megatron.types import Completion, Prompt

nothing = np.zeros(1)
texts = ["It is 3.", "n"]
completions = [Completion(nothing, nothing, text, "stop", ((0, 1),)) for text in texts]
reward = MathReward(RewardConfig(name="math_verify"))
print(reward.answers(Prompt("p", "", nothing, {"answer": "2"}), completions, [0.0, 1.0]))
print([name for name in ("sympy", "math_verify") if name in sys.modules])
"""
    found = subprocess.run(
        [sys.executable, "-c", script], env=ENV, capture_output=True, text=True, check=True
    )
    assert found.stdout.splitlines() == ["['3', '2']", "[]"]


def test_hostile_texts_are_read_quickly() -> None:
    for text in (
        "\\boxed{" * 10_000,
        "$" * 100_000,
        "1," * 50_000,
        "\\text{" * 5_000,
        "\\boxed{" + " " * 19_000 + "}",
    ):
        reward = answers("math_verify", problem(answer="2"), [text], [0.0])
        assert reward[0] is None or len(reward[0]) <= MAX_ANSWER
