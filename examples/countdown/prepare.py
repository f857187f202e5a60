"""Writes everything the Countdown example starts from: problems, demonstrations, an untrained tiny model.

    python examples/countdown/prepare.py --out runs/demo/data --seed 0

A problem is five numbers in 1..15 and a target in 1..100, ``4 4 15 2 13 = 58 :``. An answer combines exactly
three of the numbers by + - *, worked out from left to right: ``4 * 15 - 2``. One token per number.

A tenth of all problems, chosen by a hash of sorted numbers and target, is held out: no row of sft.jsonl or
train.jsonl, not even one with a shuffled target, is such a problem. Where settings are to be chosen
(compare.py), one half of that tenth gives validation problems, the other half test problems, and neither has
any of heldout.jsonl.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM
from transformers.utils.logging import disable_progress_bar

NUM_GIVEN = 5
NUM_USED = 3
LARGEST_NUMBER = 15
LARGEST_TARGET = 100
LARGEST_INTERMEDIATE = 400
OPERATORS = ("+", "-", "*")
WORDS = (*map(str, range(LARGEST_TARGET + 1)), *OPERATORS, "=", ":", ";")  # word i has token id i
EOS = ";"
SHUFFLED_SHARE = 0.3  # imperfect demonstrations: their answer reaches another target


@dataclass(frozen=True)
class Problems:
    """N problems, each with one of its answers."""

    numbers: np.ndarray  # [N, NUM_GIVEN] int64
    targets: np.ndarray  # [N] int64
    answers: np.ndarray  # [N, 2 * NUM_USED - 1] int64, token ids of number, operator, number, ...

    def __len__(self) -> int:
        return len(self.targets)

    def select(self, rows: np.ndarray | slice) -> Problems:
        """The problems at ``rows`` (indices, mask or slice)."""
        return Problems(self.numbers[rows], self.targets[rows], self.answers[rows])


def random_problems(count: int, rng: np.random.Generator) -> Problems:
    """At most ``count`` problems: random expressions, without those that leave the allowed range."""
    numbers = rng.integers(1, LARGEST_NUMBER + 1, (count, NUM_GIVEN))
    chosen = np.argsort(rng.random((count, NUM_GIVEN)), axis=1)[:, :NUM_USED]
    used = np.take_along_axis(numbers, chosen, axis=1)
    operators = rng.integers(0, len(OPERATORS), (count, NUM_USED - 1))
    values = used[:, 0]
    allowed = np.ones(count, dtype=bool)
    for i in range(NUM_USED - 1):
        number = used[:, i + 1]
        values = np.choose(operators[:, i], [values + number, values - number, values * number])
        allowed &= (values >= 0) & (values <= LARGEST_INTERMEDIATE)
    allowed &= (values >= 1) & (values <= LARGEST_TARGET)
    answers = np.empty((count, 2 * NUM_USED - 1), dtype=np.int64)
    answers[:, 0::2] = used
    answers[:, 1::2] = WORDS.index(OPERATORS[0]) + operators
    return Problems(numbers, values, answers).select(allowed)


def problem_keys(numbers: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """[N] int64: a hash of problems, numbers [N, NUM_GIVEN] and targets [N], whatever their order."""
    key = np.zeros(len(targets), dtype=np.int64)
    for column in (*np.sort(numbers, axis=1).T, targets):
        key = (key * 1_000_003 + column) % 2_147_483_647
    return key


def is_held_out(numbers: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """Whether problems, numbers [N, NUM_GIVEN] and targets [N], belong to the held-out tenth: [N] bool."""
    return problem_keys(numbers, targets) % 10 == 0


def draw_problems(count: int, rng: np.random.Generator, accept: Callable[[Problems], np.ndarray]) -> Problems:
    """``count`` problems for which ``accept`` (problems -> [N] bool) holds."""
    drawn: list[Problems] = []
    while sum(map(len, drawn)) < count:
        problems = random_problems(max(2 * count, 256), rng)
        drawn.append(problems.select(accept(problems)))
    return Problems(
        np.concatenate([p.numbers for p in drawn])[:count],
        np.concatenate([p.targets for p in drawn])[:count],
        np.concatenate([p.answers for p in drawn])[:count],
    )


def training_problems(count: int, rng: np.random.Generator) -> Problems:
    """``count`` problems outside the held-out tenth."""
    return draw_problems(count, rng, lambda p: ~is_held_out(p.numbers, p.targets))


def held_out_problems(count: int, rng: np.random.Generator) -> Problems:
    """``count`` different problems of the held-out tenth."""
    return different_problems(count, rng, lambda p: is_held_out(p.numbers, p.targets))


def fresh_problems(count: int, rng: np.random.Generator, half: int, known: Problems) -> Problems:
    """``count`` different problems of one ``half`` (0 or 1) of the held-out tenth, none of them ``known``."""
    known_keys = problem_keys(known.numbers, known.targets)

    def accept(p: Problems) -> np.ndarray:
        keys = problem_keys(p.numbers, p.targets)
        return (keys % 20 == 10 * half) & ~np.isin(keys, known_keys)

    return different_problems(count, rng, accept)


def different_problems(
    count: int, rng: np.random.Generator, accept: Callable[[Problems], np.ndarray]
) -> Problems:
    """``count`` problems for which ``accept`` holds, no two the same but for the order of their numbers."""
    problems = draw_problems(2 * count, rng, accept)
    keys = np.column_stack([np.sort(problems.numbers, axis=1), problems.targets])
    first_of_each = np.sort(np.unique(keys, axis=0, return_index=True)[1])
    if len(first_of_each) < count:
        raise ValueError(f"there are not {count} different held-out problems: ask for fewer")
    return problems.select(first_of_each[:count])


def shuffle_targets(problems: Problems, share: float, rng: np.random.Generator) -> np.ndarray:
    """Targets [N], about ``share`` of them taken from other problems; no problem becomes a held-out one."""
    targets = problems.targets.copy()
    pending = np.flatnonzero(rng.random(len(problems)) < share)
    while pending.size:
        targets[pending] = problems.targets[rng.integers(0, len(problems), pending.size)]
        pending = pending[is_held_out(problems.numbers[pending], targets[pending])]
    return targets


def prompt_texts(numbers: np.ndarray, targets: np.ndarray) -> list[str]:
    """``4 4 15 2 13 = 58 :`` for every problem."""
    return [
        f"{' '.join(map(str, given))} = {target} :"
        for given, target in zip(numbers.tolist(), targets.tolist(), strict=True)
    ]


def demonstration_rows(count: int, seed: int) -> Iterable[dict[str, Any]]:
    """Rows of sft.jsonl: problems, each with one answer, which in SHUFFLED_SHARE of them is wrong."""
    rng = np.random.default_rng([seed, 1])
    problems = training_problems(count, rng)
    prompts = prompt_texts(problems.numbers, shuffle_targets(problems, SHUFFLED_SHARE, rng))
    for prompt, answer in zip(prompts, problems.answers.tolist(), strict=True):
        yield {"prompt": prompt, "response": " ".join(WORDS[token] for token in answer)}


def problem_rows(problems: Problems, name: str) -> Iterable[dict[str, Any]]:
    """Rows of train.jsonl and heldout.jsonl: what the reward needs, without an answer."""
    numbers, targets = problems.numbers.tolist(), problems.targets.tolist()
    prompts = prompt_texts(problems.numbers, problems.targets)
    for i, (prompt, given, target) in enumerate(zip(prompts, numbers, targets, strict=True)):
        yield {"id": f"{name}-{i}", "prompt": prompt, "numbers": given, "target": target}


def write_jsonl(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    with path.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


def write_tokenizer(folder: Path) -> None:
    """A tokenizer of whole words for the closed vocabulary WORDS; EOS ends an answer."""
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=EOS).save_pretrained(folder)
    # transformers 5 writes a class name of its own, which older releases (SGLang pins one) do not know.
    config_path = folder / "tokenizer_config.json"
    config = json.loads(config_path.read_text()) | {"tokenizer_class": "PreTrainedTokenizerFast"}
    config_path.write_text(json.dumps(config, indent=2) + "\n")


def write_initial_model(folder: Path, seed: int) -> None:
    """A Qwen3-shaped model of 114k random parameters.

    Not Qwen2: for that model type transformers 5 loads Qwen2's own tokenizer whatever tokenizer.json says.
    Not Llama: at this size it learns the task more slowly (norms on queries and keys help).
    """
    config = Qwen3Config(
        vocab_size=len(WORDS),
        hidden_size=64,
        intermediate_size=176,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        head_dim=16,
        max_position_embeddings=64,
        rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
        tie_word_embeddings=False,
        eos_token_id=WORDS.index(EOS),
        bos_token_id=None,
        dtype="float32",
    )
    torch.manual_seed(seed)
    model = Qwen3ForCausalLM(config)
    with torch.no_grad():
        for layer in model.model.layers:  # GPT-2: the residual stream grows with depth, scale what adds to it
            layer.self_attn.o_proj.weight.div_(math.sqrt(2 * config.num_hidden_layers))
            layer.mlp.down_proj.weight.div_(math.sqrt(2 * config.num_hidden_layers))
    model.save_pretrained(folder)


def prepare(
    out: Path,
    seed: int,
    heldout_seed: int,
    num_demonstrations: int,
    num_train: int,
    num_heldout: int,
    num_validation: int = 0,
    num_test: int = 0,
) -> list[Path]:
    """Write the data set and the model under ``out``; the files written. Same options, same bytes."""
    train = training_problems(num_train, np.random.default_rng([seed, 2]))
    heldout = held_out_problems(num_heldout, np.random.default_rng([heldout_seed, 3]))
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f"{out.name}.") as temporary:
        aside = Path(temporary)
        write_jsonl(aside / "sft.jsonl", demonstration_rows(num_demonstrations, seed))
        write_jsonl(aside / "train.jsonl", problem_rows(train, "train"))
        write_jsonl(aside / "heldout.jsonl", problem_rows(heldout, "heldout"))
        for half, (part, count) in enumerate((("validation", num_validation), ("test", num_test))):
            if count:
                rng = np.random.default_rng([heldout_seed, 4 + half])
                rows = problem_rows(fresh_problems(count, rng, half, heldout), part)
                write_jsonl(aside / f"{part}.jsonl", rows)
        write_initial_model(aside / "init", seed)
        write_tokenizer(aside / "init")
        files = sorted(path.relative_to(aside) for path in aside.rglob("*") if path.is_file())
        for name in files:  # whole files appear at once: an interrupted run leaves none half written
            (out / name).parent.mkdir(parents=True, exist_ok=True)
            os.replace(aside / name, out / name)
    return [out / name for name in files]


def positive_int(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"found {value}, expected 1 or more")
    return value


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--out", type=Path, required=True, help="directory to write into")
    for name, default, meaning in (
        ("--num-demonstrations", 1500 * 256, "rows of sft.jsonl"),
        ("--num-train", 250 * 64, "rows of train.jsonl"),
        ("--num-heldout", 200, "rows of heldout.jsonl"),
    ):
        parser.add_argument(name, type=positive_int, default=default, help=f"{meaning} (default: {default})")
    for name in ("validation", "test"):
        parser.add_argument(
            f"--num-{name}",
            type=positive_int,
            default=0,
            help=f"rows of {name}.jsonl (default: none)",
        )
    parser.add_argument("--seed", type=int, default=0, help="of training data and weights (default: 0)")
    parser.add_argument("--heldout-seed", type=int, default=2, help="of the held-out problems (default: 2)")
    options = parser.parse_args()
    disable_progress_bar()
    for path in prepare(**vars(options)):
        print(f"wrote {path} ({path.stat().st_size:,} bytes)")


if __name__ == "__main__":
    main()
