"""What demo.py and compare.py run: commands, each with a folder of its own and a stamp when it is done."""

from __future__ import annotations

import hashlib
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

from apo_megatron.config.base_files import read_with_bases
from apo_megatron.errors import DataError
from apo_megatron.files import write_atomically
from apo_megatron.telemetry.progress import duration

ROOT = Path(__file__).resolve().parents[2]
HERE = Path(__file__).resolve().parent
BASE = "base"
STAMP = "stage.json"  # in the folder of a finished stage: its command, its digest and how long it took
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
LIMIT = 20  # times the expected seconds: what takes longer hangs


@dataclass(frozen=True)
class Stage:
    """One command. ``folder`` is all it writes, and is removed before it starts."""

    title: str
    kind: str  # key of EXPECTED_SECONDS
    folder: Path
    command: tuple[str, ...]
    results: tuple[Path, ...]  # files that exist when it has finished
    digest: str  # of the file that decides it beside the command, from digest_of()

    @property
    def limit(self) -> int:
        """Seconds after which it hangs."""
        return round(LIMIT * EXPECTED_SECONDS[self.kind])

    def is_finished(self) -> bool:
        """Whether its results are there, made by this very command (whoever evaluates the base)."""
        return not self.missing() and self.made_otherwise() == ""

    def made_otherwise(self) -> str | None:
        """How what has finished here was made otherwise than this would be, "" = not; None: nothing has."""
        path = self.folder / STAMP
        if not path.exists():
            return None
        stamp, now = json.loads(path.read_text()), shlex.join(self.command)
        if _identity(stamp["command"]) != _identity(self.command):
            return f"made by\n  {shlex.join(stamp['command'])}\nand now it would be\n  {now}"
        is_same = stamp.get("digest") == self.digest
        return "" if is_same else f"made before the script or YAML file changed of\n  {now}"

    def missing(self) -> list[str]:
        """Results that are not there."""
        return [short(path) for path in self.results if not path.exists()]

    def write_stamp(self, seconds: float) -> None:
        """It has finished, in so many seconds."""
        stamp = {"command": list(self.command), "digest": self.digest, "seconds": round(seconds, 1)}
        write_atomically(self.folder / STAMP, json.dumps(stamp, indent=1))


def refuse_others(stage: Stage, built_before: Sequence[str]) -> None:
    """A stage on which all folders beside its own but ``built_before`` are built is not made anew.

    Raises DataError where it was made otherwise than now, or is gone while one of those has finished.
    """
    beside, otherwise = stage.folder.parent, stage.made_otherwise()
    advice = f"delete {short(beside)}, or choose another --out"
    if otherwise:
        raise DataError(f"{short(stage.folder)} was {otherwise}\n{advice}")
    finished = [path.parent.relative_to(beside) for path in sorted(beside.rglob(STAMP))]
    built = [str(folder) for folder in finished if folder.parts[0] not in (stage.folder.name, *built_before)]
    if built and not stage.is_finished():
        raise DataError(
            f"{short(stage.folder)} is gone or not complete, and {len(built)} folders were built on it "
            f"({', '.join(built[:3])}{', ...' if len(built) > 3 else ''}): {advice}"
        )


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
        digest_of(HERE / "prepare.py"),
    )


def sft_stage(folder: Path, seed: int, nproc: int, quick: Sequence[str] = (), kind: str = "sft") -> Stage:
    """The cold start of the untrained model in the folder "data" beside ``folder``; ``quick``: overrides.

    Raises ConfigError for a YAML file that cannot be read.
    """
    overrides = (
        f"model.hf_path={folder.parent / 'data' / 'init'}",
        f"data.train_path={folder.parent / 'data' / 'sft.jsonl'}",
        f"train.run_dir={folder}",
        f"train.seed={seed}",
        *quick,
    )
    config = HERE / "sft.yaml"
    command = program(nproc, "apo_megatron.sft", config, overrides)
    results = (folder / "hf" / "config.json",)
    return Stage(f"cold start (seed {seed})", kind, folder, command, results, digest_of(config))


def program(nproc: int, module: str, config: Path, overrides: Sequence[str]) -> tuple[str, ...]:
    """A training command, by torchrun where it has several ranks."""
    if nproc == 1:  # the YAML files say TP = 2, which one process cannot have
        alone = (sys.executable, "-m", module, "--config", str(config))
        return relative((*alone, *overrides, "parallel.tensor_parallel_size=1"))
    script = Path(sys.executable).parent / "torchrun"
    launcher = (str(script),) if script.exists() else (sys.executable, "-m", "torch.distributed.run")
    command = (*launcher, "--standalone", "--nproc-per-node", str(nproc), "-m", module)
    return relative((*command, "--config", str(config), *overrides))


def digest_of(path: Path) -> str:
    """Of a script's text, or of what a YAML file and its bases say (comments count for nothing).

    Raises ConfigError for a YAML file that cannot be read.
    """
    if path.suffix == ".yaml":
        content = json.dumps(read_with_bases(path).values, sort_keys=True, default=str).encode()
    else:
        content = path.read_bytes()
    return hashlib.sha256(content).hexdigest()[:16]


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
    """Without the first word, which says where this machine has its interpreter."""
    return [part for part in command[1:] if not part.startswith(BASE_OVERRIDE)]
