"""What demo.py and compare.py run: commands, each with a folder of its own and a stamp when it is done."""

from __future__ import annotations

import json
import os
import shlex
import statistics
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from apo_megatron.telemetry.progress import duration

ROOT = Path(__file__).resolve().parents[2]
HERE = Path(__file__).resolve().parent
BASE = "base"
STAMP = "stage.json"  # in the folder of a finished stage: its command and how long it took
BASE_OVERRIDE = "evaluation.at_start="

# Seconds of a stage on two cores, until this run has measured its own. The last three: on one core.
EXPECTED_SECONDS = {
    "data": 10.0,
    "sft": 150.0,
    "embedded": 180.0,  # RL, by its engine
    "sglang": 950.0,
    "cold start": 170.0,
    "evaluation": 20.0,
    "run": 50.0,
}


@dataclass(frozen=True)
class Stage:
    """One command. ``folder`` is all it writes, and is removed before it starts."""

    title: str
    kind: str  # key of EXPECTED_SECONDS
    folder: Path
    command: tuple[str, ...]
    results: tuple[Path, ...]  # files that exist when it has finished

    def is_finished(self) -> bool:
        """Whether its results are there, made by this very command (whoever evaluates the base)."""
        stamp = self.folder / STAMP
        if not stamp.exists() or self.missing():
            return False
        return _identity(json.loads(stamp.read_text())["command"]) == _identity(self.command)

    def missing(self) -> list[str]:
        """Results that are not there."""
        return [short(path) for path in self.results if not path.exists()]

    def write_stamp(self, seconds: float) -> None:
        """It has finished, in so many seconds."""
        stamp = {"command": list(self.command), "seconds": round(seconds, 1)}
        (self.folder / STAMP).write_text(json.dumps(stamp, indent=1))


class StageFailed(Exception):
    """A stage ended with ``code`` (as a shell would report it)."""

    def __init__(self, message: str, code: int) -> None:
        super().__init__(message)
        self.code = code


class Progress:
    """Counts stages, and estimates from the stages that ran how long the others take.

    ``kinds``: of all stages; ``side_by_side``: how many run at a time.
    """

    def __init__(self, kinds: Sequence[str], side_by_side: int = 1) -> None:
        self._left = Counter(kinds)
        self._total = len(kinds)
        self._side_by_side = side_by_side
        self._measured: defaultdict[str, list[float]] = defaultdict(list)
        self._started = time.monotonic()

    @property
    def elapsed(self) -> float:
        return time.monotonic() - self._started

    @property
    def seconds_left(self) -> float:
        """The estimate."""
        seconds = sum(
            count * statistics.fmean(self._measured[kind] or [EXPECTED_SECONDS[kind]])
            for kind, count in self._left.items()
        )
        return seconds / self._side_by_side

    @property
    def counter(self) -> str:
        """``3/12`` of the stage after those that are done."""
        return f"{self._total - self._left.total() + 1}/{self._total}"

    def header(self, title: str) -> str:
        return (
            f"\n=== stage {self.counter}: {title} | elapsed {duration(self.elapsed)} | "
            f"expected about {duration(self.seconds_left)} more"
        )

    def finish(self, kind: str, seconds: float | None) -> None:
        """One stage is done; ``seconds`` None = it was already finished."""
        self._left[kind] -= 1
        if seconds is not None:
            self._measured[kind].append(seconds)


def data_stage(folder: Path, seed: int, options: Sequence[str] = ()) -> Stage:
    """prepare.py into ``folder``, with further ``options``."""
    command = (sys.executable, str(HERE / "prepare.py"), "--out", str(folder), "--seed", str(seed))
    return Stage(
        f"problems and demonstrations (seed {seed})",
        "data",
        folder,
        relative((*command, *options)),
        (folder / "heldout.jsonl", folder / "init" / "config.json"),
    )


def sft_stage(folder: Path, seed: int, nproc: int, quick: Sequence[str] = (), kind: str = "sft") -> Stage:
    """The cold start of the untrained model in the folder "data" beside ``folder``; ``quick``: overrides."""
    overrides = (
        f"model.hf_path={folder.parent / 'data' / 'init'}",
        f"data.train_path={folder.parent / 'data' / 'sft.jsonl'}",
        f"train.run_dir={folder}",
        f"train.seed={seed}",
        *quick,
    )
    command = program(nproc, "apo_megatron.sft", HERE / "sft.yaml", overrides)
    return Stage(f"cold start (seed {seed})", kind, folder, command, (folder / "hf" / "config.json",))


def program(nproc: int, module: str, config: Path, overrides: Sequence[str]) -> tuple[str, ...]:
    """A training command, by torchrun where it has several ranks."""
    if nproc == 1:  # the YAML files say TP = 2, which one process cannot have
        alone = (sys.executable, "-m", module, "--config", str(config))
        return relative((*alone, *overrides, "parallel.tensor_parallel_size=1"))
    script = Path(sys.executable).parent / "torchrun"
    launcher = (str(script),) if script.exists() else (sys.executable, "-m", "torch.distributed.run")
    command = (*launcher, "--standalone", "--nproc-per-node", str(nproc), "-m", module)
    return relative((*command, "--config", str(config), *overrides))


def relative(command: Sequence[str]) -> tuple[str, ...]:
    """Paths below ROOT (where all commands run) made relative, so that they can be read."""
    return tuple(part.replace(f"{ROOT}{os.sep}", "") for part in command)


def short(path: Path) -> str:
    """The same for one path."""
    return str(path).replace(f"{ROOT}{os.sep}", "")


def shell(command: Sequence[str]) -> str:
    """For a shell in ROOT; one line an override."""
    parts = [shlex.quote(part) for part in command]
    is_override = ["=" in part for part in command]
    head = " ".join(part for part, own_line in zip(parts, is_override, strict=True) if not own_line)
    tail = [part for part, own_line in zip(parts, is_override, strict=True) if own_line]
    return " \\\n    ".join([f"OMP_NUM_THREADS=1 {head}", *tail])


def _identity(command: Sequence[str]) -> list[str]:
    return [part for part in command if not part.startswith(BASE_OVERRIDE)]
