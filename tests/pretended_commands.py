"""Commands of compare.py that only pretend: what they leave, with numbers that are drawn."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

NUM_SAMPLES, NUM_PROBLEMS = 32, 20


def settings_of(command: Sequence[str]) -> dict[str, str]:
    """The overrides of a command; the last one counts."""
    return dict(part.split("=", 1) for part in command if "=" in part)


class FakeExecutor:
    """Writes what each command would; ``counts`` (settings -> right answers of the problems) may be None:
    the command fails."""

    num_slots = 2

    def __init__(self, counts: Callable[[dict[str, str]], list[int] | None]) -> None:
        self._counts = counts
        self._ended: list[tuple[int, int]] = []
        self.commands: list[Sequence[str]] = []

    def start(self, slot: int, command: Sequence[str], log: Path, limit: int) -> None:
        self.commands.append(command)
        self._ended.append((slot, self._run(command, log)))

    def wait(self) -> tuple[int, int]:
        return self._ended.pop(0)

    def _run(self, command: Sequence[str], log: Path) -> int:
        settings = settings_of(command)
        if "--out" in command:
            folder = Path(command[command.index("--out") + 1])
            (folder / "init").mkdir(parents=True)
            (folder / "heldout.jsonl").touch()
            (folder / "init" / "config.json").touch()
        elif "apo_megatron.sft" in command:
            folder = Path(settings["train.run_dir"])
            (folder / "hf").mkdir(parents=True)
            (folder / "hf" / "config.json").touch()
        else:
            found = self._counts(settings)
            if found is None:
                log.write_text("step 1/2\nerror: the loss is not finite\n")
                return 2
            is_base = "apo_megatron.evaluate" in command
            folder = Path(settings["output_dir" if is_base else "train.run_dir"])
            folder.mkdir(parents=True)
            content = {"pass_at_k": {"1": 0.0}, "num_samples": NUM_SAMPLES, "num_correct": found}
            (folder / "metrics.jsonl").write_text('{"step": 1, "reward": 0.25}\n')
            name = "results.json" if is_base else "evaluation_final.json"
            wrapped = {"benchmarks": {"countdown": content}} if is_base else content
            (folder / name).write_text(json.dumps(wrapped))
        return 0

    def runs(self) -> list[dict[str, str]]:
        """The trainings since the last call."""
        found = [settings_of(c) for c in self.commands if "apo_megatron.train" in c]
        self.commands.clear()
        return found


def draw(settings: dict[str, str]) -> list[int]:
    """Right answers, the same for the same settings."""
    words = sorted(word for word in settings.items() if "path" not in word[0] and "dir" not in word[0])
    rng = np.random.default_rng(list(json.dumps(words).encode()))
    return rng.binomial(NUM_SAMPLES, rng.beta(0.3, 1.5, NUM_PROBLEMS)).tolist()
