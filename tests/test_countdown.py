"""The Countdown example: verifier, reward, generated data and model, shipped configurations."""

from __future__ import annotations

import importlib.util
import itertools
import json
import math
import random
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from apo_megatron.config import RewardConfig, RLConfig, SFTConfig, load_config
from apo_megatron.config.data import PromptFormat
from apo_megatron.data.demonstrations import load_demonstrations
from apo_megatron.data.prompts import load_prompts
from apo_megatron.data.tokenizer import check_tokenizer, load_tokenizer
from apo_megatron.errors import DataError
from apo_megatron.rewards import build_reward, countdown
from apo_megatron.rewards.countdown import verify
from apo_megatron.types import Completion, FinishReason, Prompt

EXAMPLE = Path(__file__).resolve().parent.parent / "examples" / "countdown"
METHODS = ("grpo", "apo", "grpo_kl", "kl_on_wrong")
NUMBERS, TARGET = [4, 4, 15, 2, 13], 58


def right_answers(numbers: list[int], target: int) -> set[str]:
    """Every right answer, by trying all of them; written apart from the verifier on purpose."""

    def apply(a: int, symbol: str, b: int) -> int:
        return {"+": a + b, "-": a - b, "*": a * b}[symbol]

    return {
        f"{a} {p} {b} {q} {c}"
        for a, b, c in itertools.permutations(numbers, 3)
        for p, q in itertools.product("+-*", repeat=2)
        if apply(apply(a, p, b), q, c) == target
    }


@pytest.mark.parametrize(
    ("numbers", "target"),
    [(NUMBERS, TARGET), ([1, 1, 2, 3, 5], 6), ([7, 7, 7, 7, 7], 56), ([1, 2, 3, 4, 5], -7)],
)
def test_verifier_agrees_with_brute_force(numbers: list[int], target: int) -> None:
    right = right_answers(numbers, target)
    assert right
    operands = [str(n) for n in range(16)]
    for a, p, b, q, c in itertools.product(operands, "+-*", operands, "+-*", operands):
        text = f"{a} {p} {b} {q} {c}"
        assert verify(numbers, target, text) == (text in right), text


def test_verifier_on_mutated_answers() -> None:
    rng = random.Random(0)
    right = sorted(right_answers(NUMBERS, TARGET))
    alphabet = "0123456789+-*/ ().;:=\n\t\x00_e\u0664\uff14\u00b2\u2212\u00d7\u2003\ud800"
    num_right = 0
    for _ in range(30_000):
        text = list(rng.choice(right))
        for _ in range(rng.randint(1, 3)):
            at = rng.randrange(len(text) + 1)
            text[at : at + rng.randint(0, 1)] = rng.choice(alphabet) * rng.randint(0, 1)
        mutated = "".join(text)
        num_right += mutated.strip(" ") in right
        assert verify(NUMBERS, TARGET, mutated) == (mutated.strip(" ") in right), repr(mutated)
    assert 100 < num_right < 15_000  # both outcomes were tried


@pytest.mark.parametrize(
    "text",
    [
        "",
        " ",
        "58",
        "4 * 15",
        "4 * 15 - 2 ;",
        "4 * 15 - 2 + 4 - 4",
        "4*15-2",
        "4  * 15 - 2",
        "4 * 15 - 2\n",
        "4\t* 15 - 2",
        "04 * 15 - 2",
        "+4 * 15 - 2",
        "4.0 * 15 - 2",
        "4 * 1_5 - 2",
        "4 \u00d7 15 - 2",
        "4 * 15 \u2212 2",
        "\uff14 * 15 - 2",
        "\u0664 * 15 - 2",
        "2 * 2 * 15",  # uses 2 twice, there is one
        "13 * 4 + 6",  # 6 was not given
        "2 - 4 * 15",  # -30: from left to right, no precedence
        "__import__('os').abort() * 15 - 2",
        "9" * 100_000 + " * 15 - 2",
        "4 " * 100_000,
        "( " * 100_000,
    ],
)
def test_verifier_refuses(text: str) -> None:
    assert verify(NUMBERS, TARGET, "4 * 15 - 2")
    assert verify(NUMBERS, TARGET, text) is False


def test_verifier_uses_equal_numbers_as_often_as_given_and_works_from_left_to_right() -> None:
    assert verify([4, 4, 15, 2, 13], 10, "4 + 4 + 2")
    assert not verify([4, 3, 15, 2, 13], 10, "4 + 4 + 2")
    assert verify([1, 2, 3], 9, "1 + 2 * 3")
    assert not verify([1, 2, 3], 7, "1 + 2 * 3")
    assert verify([2, 5], 10, "2 * 5", num_used=2)


def completion(text: str, finish_reason: FinishReason = "stop") -> Completion:
    return Completion(np.zeros(1, np.int32), np.zeros(1, np.float32), text, finish_reason, ((0, 1),))


def problem(**fields: Any) -> Prompt:
    return Prompt("p7", "4 4 15 2 13 = 58 :", np.zeros(1, np.int32), fields)


def test_reward_needs_an_answer_that_ended_by_itself() -> None:
    reward = build_reward(RewardConfig())
    answers = [completion("4 * 15 - 2"), completion("4 * 15 - 2", "length"), completion("4 * 15 - 4")]
    assert reward.score(problem(numbers=NUMBERS, target=TARGET), answers) == [1.0, 0.0, 0.0]
    aborted = reward.score(problem(numbers=NUMBERS, target=TARGET), [completion("4 * 15 - 2", "abort")])
    assert math.isnan(aborted[0])


def test_reward_judges_equal_texts_once(monkeypatch: pytest.MonkeyPatch) -> None:
    judged: list[str] = []
    monkeypatch.setattr(countdown, "verify", lambda numbers, target, text: not judged.append(text))  # type: ignore[func-returns-value]
    reward = build_reward(RewardConfig())
    rewards = reward.score(problem(numbers=NUMBERS, target=TARGET), [completion("a"), completion("b")] * 8)
    assert judged == ["a", "b"]
    assert rewards == [1.0] * 16


@pytest.mark.parametrize(
    ("fields", "column"),
    [
        ({"target": 58}, "numbers"),
        ({"numbers": NUMBERS}, "target"),
        ({"numbers": "4 4 15", "target": 58}, "numbers"),
        ({"numbers": [4, 4.5], "target": 58}, "numbers"),
        ({"numbers": NUMBERS, "target": True}, "target"),
    ],
)
def test_reward_names_prompt_and_column_of_a_bad_row(fields: dict[str, Any], column: str) -> None:
    with pytest.raises(DataError, match=f"'p7'.*'{column}'"):
        build_reward(RewardConfig()).score(problem(**fields), [completion("4 * 15 - 2")])


@pytest.fixture(scope="module")
def prepare() -> ModuleType:
    spec = importlib.util.spec_from_file_location("countdown_prepare", EXAMPLE / "prepare.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # its dataclasses look themselves up
    spec.loader.exec_module(module)
    return module


SIZES = {"num_demonstrations": 20_000, "num_train": 3_000, "num_heldout": 200}


@pytest.fixture(scope="module")
def data(prepare: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("countdown") / "data"
    prepare.prepare(out, seed=0, heldout_seed=1, **SIZES)
    return out


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def numbers_and_target(prompt: str) -> tuple[list[int], int]:
    *numbers, equals, target, colon = prompt.split(" ")
    assert (equals, colon) == ("=", ":")
    return list(map(int, numbers)), int(target)


def test_no_training_row_is_a_held_out_problem(prepare: ModuleType, data: Path) -> None:
    def held_out(rows: list[dict[str, Any]]) -> np.ndarray:
        numbers, targets = zip(*(numbers_and_target(row["prompt"]) for row in rows), strict=True)
        return prepare.is_held_out(np.array(numbers), np.array(targets))

    assert not held_out(read(data / "sft.jsonl")).any()
    assert not held_out(read(data / "train.jsonl")).any()
    heldout = read(data / "heldout.jsonl")
    assert held_out(heldout).all()
    assert len({(*sorted(row["numbers"]), row["target"]) for row in heldout}) == SIZES["num_heldout"]


def test_split_takes_a_tenth_whatever_the_order_of_the_numbers(prepare: ModuleType) -> None:
    problems = prepare.random_problems(50_000, np.random.default_rng(5))
    held_out = prepare.is_held_out(problems.numbers, problems.targets)
    assert held_out.mean() == pytest.approx(0.1, abs=0.01)
    shuffled = np.random.default_rng(6).permuted(problems.numbers, axis=1)
    assert (prepare.is_held_out(shuffled, problems.targets) == held_out).all()


def test_rows_are_solvable_problems_in_range(data: Path) -> None:
    for row in read(data / "heldout.jsonl") + read(data / "train.jsonl")[:200]:
        assert numbers_and_target(row["prompt"]) == (row["numbers"], row["target"])
        assert len(row["numbers"]) == 5 and all(1 <= n <= 15 for n in row["numbers"])
        assert 1 <= row["target"] <= 100
        assert right_answers(row["numbers"], row["target"])
    assert [row["id"] for row in read(data / "train.jsonl")[:2]] == ["train-0", "train-1"]


def test_about_thirty_percent_of_the_demonstrations_are_wrong(data: Path) -> None:
    rows = read(data / "sft.jsonl")
    assert len(rows) == SIZES["num_demonstrations"]
    wrong = np.mean([not verify(*numbers_and_target(row["prompt"]), row["response"]) for row in rows])
    assert 0.27 < wrong < 0.30  # a shuffled target now and then is the old one


def test_prepare_is_deterministic_and_keeps_held_out_problems_apart_from_the_seed(
    prepare: ModuleType, data: Path, tmp_path: Path
) -> None:
    again = prepare.prepare(tmp_path / "again", seed=0, heldout_seed=1, **SIZES)
    assert len(again) == 8
    for path in again:
        assert path.read_bytes() == (data / path.relative_to(tmp_path / "again")).read_bytes(), path
    prepare.prepare(tmp_path / "again", seed=1, heldout_seed=1, **SIZES)  # over what is there
    for path in again:
        same = path.read_bytes() == (data / path.relative_to(tmp_path / "again")).read_bytes()
        assert same == (path.name not in ("sft.jsonl", "train.jsonl", "model.safetensors")), path
    assert [path.name for path in tmp_path.iterdir()] == ["again"]  # nothing left aside


def test_tokenizer_round_trip(prepare: ModuleType, data: Path) -> None:
    tokenizer = load_tokenizer(data / "init")
    assert len(prepare.WORDS) == 107
    assert tokenizer.convert_tokens_to_ids(list(prepare.WORDS)) == list(range(107))
    check_tokenizer(tokenizer, json.loads((data / "init" / "config.json").read_text())["vocab_size"], "init")
    ids = tokenizer("4 * 15 - 2", add_special_tokens=False)["input_ids"]
    assert ids == [4, 103, 15, 102, 2]
    assert tokenizer.decode(ids) == "4 * 15 - 2"
    assert tokenizer.eos_token_id == 106
    assert tokenizer.decode([*ids, 106], skip_special_tokens=True) == "4 * 15 - 2"


def test_loaders_read_what_prepare_writes(data: Path) -> None:
    tokenizer = load_tokenizer(data / "init")
    fields = build_reward(RewardConfig()).required_fields
    prompts = load_prompts(data / "heldout.jsonl", tokenizer, PromptFormat(), 16, fields)
    assert len(prompts) == SIZES["num_heldout"]
    assert all(len(prompt.token_ids) == 8 for prompt in prompts)
    demonstrations = load_demonstrations(data / "sft.jsonl", tokenizer, "prompt", "response", 16)
    assert len(demonstrations) == SIZES["num_demonstrations"]
    assert (demonstrations.prompt_lengths == 8).all()
    assert (np.diff(demonstrations.offsets) == 14).all()


def test_initial_model(data: Path) -> None:
    weights = load_file(data / "init" / "model.safetensors")
    assert 110_000 < sum(weight.size for weight in weights.values()) < 120_000
    assert weights["lm_head.weight"].shape == weights["model.embed_tokens.weight"].shape == (107, 64)
    for name in ("self_attn.o_proj", "mlp.down_proj"):  # scaled by 1 / sqrt(2 * number of layers)
        assert weights[f"model.layers.1.{name}.weight"].std() == pytest.approx(0.01, rel=0.05)
    assert weights["model.layers.1.mlp.up_proj.weight"].std() == pytest.approx(0.02, rel=0.05)


def test_configurations_are_the_recipe() -> None:
    sft = load_config(SFTConfig, EXAMPLE / "sft.yaml")
    assert (sft.train.num_steps, sft.train.batch_size, sft.optimizer.lr) == (1500, 256, 2e-3)
    configs = {name: load_config(RLConfig, EXAMPLE / f"{name}.yaml") for name in METHODS}
    for name, cfg in configs.items():
        assert cfg.train.run_dir == f"runs/demo/{name}"
        assert cfg.model.hf_path == f"{sft.train.run_dir}/hf"
        assert (cfg.train.num_steps, cfg.rollout.group_size, cfg.train.num_mini_batches) == (250, 16, 4)
    objectives = {name: cfg.objective for name, cfg in configs.items()}
    assert objectives["apo"].loss_mode == "apo_ratio" and objectives["apo"].apo_pull_coeff == 0.15
    assert objectives["grpo_kl"].use_kl_loss and objectives["kl_on_wrong"].use_kl_loss_on_wrong
    assert not objectives["grpo"].use_kl_loss and not objectives["grpo"].use_kl_loss_on_wrong


def test_methods_differ_only_in_their_objective() -> None:
    def rest(name: str) -> dict[str, Any]:
        values = load_config(RLConfig, EXAMPLE / f"{name}.yaml").model_dump()
        del values["objective"], values["train"]["run_dir"]
        return values

    assert all(rest(name) == rest("grpo") for name in METHODS)
