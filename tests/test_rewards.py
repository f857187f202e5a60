"""Rewards: answers that are right, wrong, hostile; workers that hang and crash; weights."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from apo_megatron.config import ObjectiveConfig, RewardConfig
from apo_megatron.errors import ConfigError, DataError, RewardError
from apo_megatron.rewards import build_reward
from apo_megatron.rewards.answers import MAX_TAIL, MAX_TEXT, boxed_answer, final_answer
from apo_megatron.rewards.interface import TermReward, score_batch
from apo_megatron.rewards.math import MathReward
from apo_megatron.rewards.text import chosen_letter
from apo_megatron.rewards.workers import WorkerPool
from apo_megatron.rollout.groups import score_groups
from apo_megatron.types import Completion, FinishReason, Prompt, Sample, SampleGroup

ANSWERS = [
    json.loads(line)
    for line in (Path(__file__).parent / "data" / "math_answers.jsonl").read_text("utf-8").splitlines()
]
TIMEOUT = 30.0  # seconds; a busy machine is no wrong answer
ENV = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parent.parent)}


def completion(text: str, finish_reason: FinishReason = "stop") -> Completion:
    return Completion(np.zeros(1, np.int32), np.zeros(1, np.float32), text, finish_reason, ((0, 1),))


def problem(**fields: Any) -> Prompt:
    return Prompt("p7", "How many?", np.zeros(1, np.int32), fields)


def judge(reward: Any, pairs: Sequence[tuple[str, str]]) -> list[float]:
    """Rewards of (gold, text) pairs, a prompt each, in one batch."""
    prompts = [problem(answer=gold) for gold, _ in pairs]
    return [row[0] for row in score_batch(reward, prompts, [[completion(text)] for _, text in pairs])]


def worker_processes() -> list[psutil.Process]:
    """Children that judge, without multiprocessing's tracker of semaphores."""
    children = psutil.Process().children()
    return [child for child in children if "spawn_main" in " ".join(child.cmdline())]


@pytest.fixture(scope="module")
def math_reward() -> Iterator[MathReward]:
    reward = MathReward(RewardConfig(name="math_verify", timeout=TIMEOUT))
    yield reward
    reward.close()


def test_the_written_answers_are_judged_as_a_mathematician_would(math_reward: MathReward) -> None:
    assert len(ANSWERS) == 200
    assert 50 < sum(not row["right"] for row in ANSWERS) < 150
    rewards = judge(math_reward, [(row["gold"], row["text"]) for row in ANSWERS])
    surprises = [
        (row["topic"], row["text"], row["gold"], reward)
        for row, reward in zip(ANSWERS, rewards, strict=True)
        if (reward == row["right"]) == ("known_disagreement" in row)
    ]
    assert surprises == []
    assert sum("known_disagreement" in row for row in ANSWERS) <= 2


@pytest.mark.parametrize(
    ("gold", "text"),
    [
        ("${1,3} \\cup {2,4}$", "${1,2,3,4}$"),
        ("$\\frac{1}{2}$", "The answer is $\\frac{1}{2}$"),
        ("1/2", "The answer is 1/2"),
        ("$1/3$", "0.333333"),
    ],
)
def test_published_examples_of_math_verify(math_reward: MathReward, gold: str, text: str) -> None:
    assert judge(math_reward, [(gold, text)]) == [1.0]


HOSTILE = {
    "nested braces": "\\boxed{" + "{" * 10_000 + "1" + "}" * 10_000 + "}",
    "open braces": "{" * 10_000,
    "open boxes": "\\boxed{" * 10_000,
    "digits": "9" * 1_000_000,
    "boxed digits": "\\boxed{" + "9" * 1_000_000 + "}",
    "boxed short digits": "\\boxed{" + "9" * 15_000 + "}",
    "power tower": "9**9**9**9",
    "boxed python tower": "\\boxed{9**9**9**9}",
    "boxed tower": "\\boxed{9^{9^{9^{9}}}}",
    "factorial": "\\boxed{(10^{10})!}",
    "NUL": "\0\\boxed{\0}\0",
    "code": "\\boxed{__import__('os').system('touch hostile_was_here')}",
    "bare code": "The answer is __import__('os').system('touch hostile_was_here')",
    "format string": "\\boxed{%s%n{0.__class__}}",
    "surrogate": "\\boxed{\ud800}",
    "parentheses": "$" + "(" * 5_000 + "1" + ")" * 5_000 + "$",
    "blanks": " " * 1_000_000,
    "lines": "\n" * 1_000_000 + "x",
    "word": "answer " * 100_000,
}


def test_hostile_answers_meet_the_deadline_and_the_workers_live_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    others = worker_processes()
    reward = MathReward(RewardConfig(name="math_verify", timeout=1.0))
    judge(reward, [("1", "\\boxed{1}")])  # starts the workers
    outcomes = {}
    for name, text in HOSTILE.items():
        begun = time.monotonic()
        [outcomes[name]] = judge(reward, [("58", text)])
        assert time.monotonic() - begun < 20, name  # the deadline, and a busy machine
    assert not any(value == 1.0 for value in outcomes.values())
    assert math.isnan(outcomes["boxed tower"])  # masked, not wrong
    assert list(tmp_path.iterdir()) == []
    assert judge(reward, [("58", "\\boxed{58}")]) == [1.0]
    reward.close()
    assert worker_processes() == others


def test_one_hanging_answer_does_not_touch_its_neighbours() -> None:
    reward = MathReward(RewardConfig(name="math_verify", timeout=1.0))
    pairs = [(str(i), f"\\boxed{{{i + i % 2}}}") for i in range(40)]
    pairs[7] = ("7", HOSTILE["boxed tower"])
    rewards = judge(reward, pairs)
    reward.close()
    assert math.isnan(rewards[7])
    assert rewards[:7] + rewards[8:] == [float(i % 2 == 0) for i in range(40) if i != 7]


def test_verdicts_do_not_depend_on_the_number_of_workers(math_reward: MathReward) -> None:
    pairs = [(row["gold"], row["text"]) for row in ANSWERS]
    single = MathReward(RewardConfig(name="math_verify", timeout=TIMEOUT, num_workers=1))
    assert judge(single, pairs) == judge(math_reward, pairs)
    assert len(worker_processes()) == 3
    single.close()


def test_workers_are_reused(math_reward: MathReward) -> None:
    judge(math_reward, [("1", "\\boxed{1}")])
    workers = worker_processes()
    assert len(workers) == 2
    judge(math_reward, [("1", "\\boxed{1.5}")])
    assert worker_processes() == workers


TRAINER = """
import math, os, signal, sys
import psutil
import torch
from apo_megatron.rewards.workers import WorkerPool

if __name__ == "__main__":
    pool = WorkerPool(1, 1.0)
    assert pool.map(math.sqrt, [(4.0,)]) == [2.0]
    children = psutil.Process().children()
    maps = [m.path for child in children for m in child.memory_maps()]
    print(any("libtorch" in path for path in maps), *[child.pid for child in children], flush=True)
    if sys.argv[1] == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize("end", ["killed", "normal"])
def test_workers_load_no_torch_and_end_with_their_trainer(tmp_path: Path, end: str) -> None:
    script = tmp_path / "trainer.py"
    script.write_text(TRAINER)
    done = subprocess.run([sys.executable, script, end], capture_output=True, text=True, timeout=60, env=ENV)
    has_torch, *pids = done.stdout.split()
    assert has_torch == "False" and len(pids) == 2, done.stderr  # a worker, and the tracker of semaphores
    assert done.returncode == (-signal.SIGKILL if end == "killed" else 0), done.stderr
    deadline = time.monotonic() + 10
    while any(psutil.pid_exists(int(pid)) for pid in pids) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(psutil.pid_exists(int(pid)) for pid in pids)


def test_equal_answers_are_verified_once(math_reward: MathReward, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[str, str]] = []
    run = math_reward._workers.map

    def counted(function: Callable[..., Any], tasks: Sequence[tuple[Any, ...]]) -> list[Any]:
        seen.extend(tasks)
        return run(function, tasks)

    monkeypatch.setattr(math_reward._workers, "map", counted)
    texts = ["First way: $\\boxed{-577}$", "Second way.\n\\boxed{-577}", "\\boxed{577}"]
    for _ in range(2):
        rewards = math_reward.score(problem(answer="-577"), [completion(text) for text in texts])
        assert rewards == [1.0, 1.0, 0.0]
    assert len(seen) == 2


def test_cut_answers_are_wrong_and_aborted_ones_not_judged(math_reward: MathReward) -> None:
    answers = [
        completion("\\boxed{1}"),
        completion("\\boxed{1}", "length"),
        completion("\\boxed{1}", "abort"),
    ]
    right, cut, aborted = math_reward.score(problem(answer=1), answers)
    assert (right, cut) == (1.0, 0.0) and math.isnan(aborted)


@pytest.mark.parametrize("fields", [{}, {"answer": None}, {"answer": ""}, {"answer": True}, {"answer": [1]}])
@pytest.mark.parametrize("name", ["math_verify", "exact_match", "multiple_choice"])
def test_a_bad_gold_answer_is_named_before_anything_runs(name: str, fields: dict[str, Any]) -> None:
    with pytest.raises(DataError, match="'p7'.*'answer'"):
        build_reward(RewardConfig(name=name)).score(problem(**fields), [])


def test_numbers_as_gold_answers_and_another_column(math_reward: MathReward) -> None:
    assert judge(math_reward, [(1e-05, "\\boxed{0.00001}"), (12, "\\boxed{12}")]) == [1.0, 1.0]  # type: ignore[list-item]
    reward = build_reward(RewardConfig(name="exact_match", answer_field="solution"))
    assert reward.score(problem(solution="a  b"), [completion("a b\n"), completion("ab")]) == [1.0, 0.0]
    assert dict(reward.required_fields) == {"solution": object}


# Workers


def double(value: int) -> int:
    return 2 * value


def process_id(seconds: float) -> int:
    time.sleep(seconds)
    return os.getpid()


def fail(value: int) -> int:
    raise KeyError(value)


def end_process(value: int) -> int:
    if value == 3:
        os._exit(7)
    return value


def spin(value: int) -> int:
    return value if value else 9**9**9  # minutes, inside one operation that listens to no signal handler


@pytest.fixture
def pool() -> Iterator[WorkerPool]:
    pool = WorkerPool(2, timeout=1.0)
    yield pool
    pool.close()


def test_a_worker_that_is_killed_amid_a_task_is_replaced(pool: WorkerPool) -> None:
    others = worker_processes()
    while len({*pool.map(process_id, [(0.2,), (0.2,)])}) < 2:  # until both have started
        pass
    started = [worker for worker in worker_processes() if worker not in others]
    assert len(started) == 2

    def kill_one() -> None:
        time.sleep(0.3)
        started[0].send_signal(signal.SIGKILL)

    killer = threading.Thread(target=kill_one)
    killer.start()
    found = pool.map(process_id, [(0.7,), (0.7,)])
    killer.join()
    assert sorted(value is None for value in found) == [False, True]
    assert pool.map(double, [(i,) for i in range(100)]) == [2 * i for i in range(100)]
    assert len(worker_processes()) == len(others) + 2


def test_a_task_that_ends_its_worker_is_lost_alone(pool: WorkerPool) -> None:
    assert pool.map(end_process, [(i,) for i in range(12)]) == [None if i == 3 else i for i in range(12)]


def test_a_task_that_cannot_be_interrupted_is_killed(pool: WorkerPool) -> None:
    pool.map(double, [(1,)])
    begun = time.monotonic()
    assert pool.map(spin, [(0,), (1,), (0,), (2,)]) == [None, 1, None, 2]
    assert time.monotonic() - begun < 30  # one second each, on a busy machine


def test_what_a_task_raises_is_an_error_of_the_reward(pool: WorkerPool) -> None:
    with pytest.raises(RewardError, match="KeyError"):
        pool.map(fail, [(1,)])
    assert pool.map(double, [(4,)]) == [8]


def test_workers_that_cannot_start_are_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("apo_megatron.rewards.workers.START_SECONDS", 3.0)
    with pytest.raises(RewardError, match="could not be started"):
        WorkerPool(1, 1.0, preload=["no_such_module"]).map(double, [(1,)])


# Finding the answer


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("\\boxed{1}", "1"),
        ("\\boxed{1} \\boxed{2}", "2"),
        ("\\boxed{\\frac{1}{2}}", "\\frac{1}{2}"),
        ("\\boxed{\\{1\\}}", "\\{1\\}"),
        ("\\boxed{a\\}", None),
        ("\\boxed{1", None),
        ("\\boxed{ \\boxed{2}", "2"),
        ("\\boxed{x \\boxed{2}}", "x \\boxed{2}"),
        ("} \\boxed{3}", "3"),
        ("\\fbox {4}", "4"),
        ("42", None),
        ("\\boxed{5}" + "x" * MAX_TEXT, None),
    ],
)
def test_last_box(text: str, expected: str | None) -> None:
    assert boxed_answer(text) == expected


def test_final_answer() -> None:
    assert final_answer("so $\\boxed{50}\\%$ of it") == "$\\boxed{50}$\\%"
    assert final_answer("\\boxed{1}\n$\\boxed{2}$ and $\\boxed{3}$.") == "$\\boxed{2}$ and $\\boxed{3}$"
    assert final_answer("\\boxed{2}, thus \\boxed{2}") == "$\\boxed{2}$"
    assert final_answer("  the answer is 4 ") == "the answer is 4"
    assert final_answer("x" * MAX_TAIL + "\nAnswer: 4") == "Answer: 4"
    assert len(final_answer("x" * 10**6)) == MAX_TAIL


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("\\boxed{B}", "B"),
        ("\\boxed{(b)}", "B"),
        ("\\boxed{\\text{(C)}}", "C"),
        ("\\boxed{\\textbf{D}}", "D"),
        ("\\boxed{B. Paris}", "B"),
        ("\\boxed{Paris}", None),
        ("\\boxed{A} or rather \\boxed{B}", "B"),
        ("The answer is (C).", "C"),
        ("Answer: D", "D"),
        ("answer is **B**", "B"),
        ("The correct option is $E$", "E"),
        ("The answer is A. No, the answer is B.", "B"),
        ("The answer is a long story", None),
        ("The answer: I think so", None),
        ("The answer is Berlin", None),
        ("Some thoughts.\nB", "B"),
        ("Some thoughts.\n(B)", "B"),
        ("", None),
        ("answer" + " " * 10_000 + "B", None),
        ("\n" * 200_000 + "B", "B"),
    ],
)
def test_letter_of_a_choice(text: str, letter: str | None) -> None:
    assert chosen_letter(text) == letter


def test_multiple_choice() -> None:
    reward = build_reward(RewardConfig(name="multiple_choice"))
    answers = [completion("\\boxed{C}"), completion("\\boxed{B}"), completion("no idea")]
    assert reward.score(problem(answer="(c)"), answers) == [1.0, 0.0, 0.0]
    with pytest.raises(DataError, match="'p7'.*'answer' is 'Paris'"):
        reward.score(problem(answer="Paris"), [])


# Format, weights, functions of one's own


def test_format_matches_the_whole_answer_within_the_deadline() -> None:
    pattern = "<think>.*</think>.*\\\\boxed\\{.+\\}\\W*"
    reward: Any = build_reward(RewardConfig(name="format", format_pattern=pattern))
    good, bad = "<think>\n1\n</think> so $\\boxed{1}$.\n", "x <think>1</think> \\boxed{1}"
    assert reward.score(problem(), [completion(good), completion(bad), completion(good, "length")]) == [
        1,
        0,
        0,
    ]
    reward.close()
    reward = build_reward(RewardConfig(name="format", format_pattern="(a|aa)+", timeout=1.0))
    rewards = reward.score(problem(), [completion("a" * 60 + "b"), completion("aaa")])
    reward.close()
    assert math.isnan(rewards[0]) and rewards[1] == 1.0


def length_reward(prompt: Prompt, completions: Sequence[Completion]) -> list[float]:
    return [prompt.fields["scale"] * len(answer.text) for answer in completions]


def never_sure(prompt: Prompt, completions: Sequence[Completion]) -> list[float]:
    return [math.nan for _ in completions]


def broken(prompt: Prompt, completions: Sequence[Completion]) -> Any:
    if prompt.fields["how"] == "raise":
        raise ZeroDivisionError("by zero")
    return {"short": [1.0], "text": ["1", "1"], "infinite": [1.0, math.inf], "number": 1.0}[
        prompt.fields["how"]
    ]


HERE = "tests.test_rewards"


def test_a_function_of_ones_own() -> None:
    reward = build_reward(RewardConfig(name=f"{HERE}:length_reward"))
    assert reward.score(problem(scale=0.5), [completion("ab"), completion("")]) == [1.0, 0.0]
    assert reward.score(problem(), []) == []


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("maths", "reward.name='maths' is unknown: choose one of countdown, exact_match"),
        ("no_such_module:f", "reward.name='no_such_module:f': cannot import 'no_such_module'"),
        (":f", "reward.name=':f': cannot import ''"),
        (f"{HERE}:nothing", f"reward.name='{HERE}:nothing': {HERE} has no function 'nothing'"),
        (f"{HERE}:HERE", "has no function 'HERE'"),
    ],
)
def test_a_name_that_cannot_be_found(name: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        build_reward(RewardConfig(name=name))
    assert message in str(caught.value)
    with pytest.raises(ConfigError, match=r"reward\.rewards\[0\]\.name"):
        build_reward(RewardConfig.model_validate({"rewards": [{"name": name}]}))


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("raise", "ZeroDivisionError: by zero"),
        ("short", "a list of 2 numbers"),
        ("number", "a list of 2 numbers"),
        ("text", "a reward is '1'"),
        ("infinite", "a reward is 'inf'"),
    ],
)
def test_a_function_that_fails_is_named(how: str, message: str) -> None:
    reward = build_reward(RewardConfig(name=f"{HERE}:broken"))
    with pytest.raises(RewardError, match=f"{HERE}:broken, prompt 'p7': .*{message}"):
        reward.score(problem(how=how), [completion(""), completion("")])


def test_several_rewards_are_added_up_with_their_weights() -> None:
    terms = [
        {"name": "exact_match", "weight": 0.7},
        {"name": "multiple_choice", "weight": 0.2},
        {"name": f"{HERE}:length_reward", "weight": 0.1},
    ]
    reward = build_reward(RewardConfig.model_validate({"rewards": terms}))
    assert dict(reward.required_fields) == {"answer": str}
    answers = [completion("B"), completion("answer: B"), completion("C")]
    assert reward.score(problem(answer="B", scale=1), answers) == [1.0, 1.1, 0.1]
    assert isinstance(reward, TermReward)
    assert reward.score_terms([problem(answer="B", scale=1)], [answers]) == [
        [(1.0, 1.0, 1.0), (0.0, 1.0, 9.0), (0.0, 0.0, 1.0)]
    ]
    unsure = RewardConfig.model_validate({"rewards": [*terms, {"name": f"{HERE}:never_sure", "weight": 0.1}]})
    assert math.isnan(build_reward(unsure).score(problem(answer="B", scale=1), answers)[0])


def test_groups_of_a_step_are_scored_in_one_batch(math_reward: MathReward) -> None:
    groups = [
        SampleGroup(problem(answer=i), [Sample(completion(f"\\boxed{{{j}}}")) for j in range(3)])
        for i in range(4)
    ]
    score_groups(groups, math_reward, ObjectiveConfig())
    assert [[sample.reward for sample in group.samples] for group in groups] == [
        [float(i == j) for j in range(3)] for i in range(4)
    ]
