"""The folder of a run's checkpoints: written aside, renamed, then named by ``latest``. One process writes.

step_000010/    state.json, config.yaml, random_state/, hf/, and Megatron's files
latest          the name of the checkpoint to go on from, moved last
.step_*         unfinished or being removed: never read, taken away by the next save
"""

from __future__ import annotations

import math
import re
import secrets
import shutil
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from apo_megatron.actor.checkpoint_state import CheckpointState
from apo_megatron.errors import CheckpointError
from apo_megatron.files import make_durable, write_atomically

STATE_FILE = "state.json"
LATEST_FILE = "latest"
_NAME = re.compile(r"step_\d{6,}")
_PROBE_BYTES = 2**20


class CheckpointFolder:
    """The checkpoints below ``root``.

    Of those up to the newest step ``keep_last`` stay (0: all), and the ``keep_best`` with the highest
    ``best_metric``; never is the one removed that ``latest`` names.
    """

    def __init__(
        self, root: str | Path, keep_last: int = 0, keep_best: int = 0, best_metric: str | None = None
    ) -> None:
        self.root = Path(root)
        self._keep_last, self._keep_best, self._best_metric = keep_last, keep_best, best_metric

    def path(self, step: int) -> Path:
        """Where the checkpoint after ``step`` completed steps lies."""
        return self.root / f"step_{step:06d}"

    def latest(self) -> Path | None:
        """The checkpoint to go on from. Raises CheckpointError where ``latest`` holds no name of one."""
        pointer = self.root / LATEST_FILE
        if not pointer.exists():
            return None
        name = self._latest_name()
        if not _NAME.fullmatch(name):
            raise CheckpointError(f"{pointer}: holds {name[:80]!r}, expected a name such as step_000010")
        if not (self.root / name).is_dir():
            raise CheckpointError(
                f"{pointer}: names {name}, which is not there: write the name of another step_* folder into "
                "that file, or start anew in another train.run_dir"
            )
        return self.root / name

    def read(self, folder: Path) -> CheckpointState:
        """The state of a checkpoint. Raises CheckpointError where a file is missing or not whole."""
        state = CheckpointState.read(folder / STATE_FILE)
        for name, num_bytes in state.files.items():
            path = folder / name
            found = path.stat().st_size if path.is_file() else None
            if found != num_bytes:
                problem = "missing" if found is None else f"{found} bytes found"
                raise CheckpointError(
                    f"{path}: {problem}, {num_bytes} bytes expected: the checkpoint is damaged. Write the "
                    f"name of an older step_* folder into {self.root / LATEST_FILE}, or start anew in "
                    "another train.run_dir"
                )
        return state

    def begin(self, step: int) -> Path:
        """A new folder to write into. What crashes left behind is removed."""
        assert self._latest_name() != self.path(step).name, "a checkpoint that ``latest`` names is replaced"
        self.discard_unfinished()
        # A name of its own: what a killed run may still be writing cannot end up in it.
        partial = self._hidden(self.path(step))
        partial.mkdir(parents=True)
        # A disk that is full already shows here, before the ranks are in the middle of an exchange.
        probe = partial / "probe"
        probe.write_bytes(bytes(_PROBE_BYTES))
        make_durable(probe)
        probe.unlink()
        return partial

    def complete(self, partial: Path, state: CheckpointState, *, keep_all: bool = False) -> Path:
        """Give the folder its name, move ``latest``, remove what is not to be kept unless all are."""
        sizes = {
            str(path.relative_to(partial)): path.stat().st_size
            for path in sorted(partial.rglob("*"))
            if path.is_file()
        }
        (partial / STATE_FILE).write_text(replace(state, files=sizes).to_json(), encoding="utf-8")
        _make_all_but_shards_durable(partial)
        final = self.path(state.step)
        if final.exists():  # of a run that went on from an older checkpoint: ``latest`` does not name it
            self._remove(final)
        partial.rename(final)
        write_atomically(self.root / LATEST_FILE, final.name)
        make_durable(self.root)
        if self._keep_last and not keep_all:
            self._prune(state.step)
        return final

    def discard_unfinished(self) -> None:
        """Take away, as far as possible, every folder that was not completed, or not removed to the end."""
        with suppress(OSError):
            for leftover in self.root.glob(".step_*"):
                shutil.rmtree(leftover, ignore_errors=True)

    def _prune(self, last_step: int) -> None:
        """Remove older checkpoints than that of ``last_step``.

        Newer ones are of a run that was given up for an older checkpoint: they do not count, and stay until
        one of the same step replaces them.
        """
        states = {}
        for path in self.root.glob("step_*"):
            try:
                state = CheckpointState.read(path / STATE_FILE)
            except CheckpointError:  # not ours to remove
                continue
            if state.step <= last_step:
                states[path] = state
        newest = sorted(states, key=lambda path: states[path].step)[-self._keep_last :]
        scores = {path: self._score(state) for path, state in states.items()}
        scored = [path for path in states if not math.isnan(scores[path])]
        ranked = sorted(scored, key=lambda path: (scores[path], states[path].step), reverse=True)
        kept = {*newest, *ranked[: self._keep_best], self.root / self._latest_name()}
        for path in states.keys() - kept:
            self._remove(path)

    def _score(self, state: CheckpointState) -> float:
        value = state.metrics.get(self._best_metric) if self._best_metric else None
        return math.nan if value is None else value

    def _latest_name(self) -> str:
        pointer = self.root / LATEST_FILE
        return pointer.read_text(encoding="utf-8", errors="replace").strip() if pointer.exists() else ""

    def _remove(self, folder: Path) -> None:
        # Renamed first: half a checkpoint must not stand under its name.
        hidden = self._hidden(folder)
        folder.rename(hidden)
        shutil.rmtree(hidden, ignore_errors=True)

    def _hidden(self, folder: Path) -> Path:
        return folder.with_name(f".{folder.name}.{secrets.token_hex(4)}")


def _make_all_but_shards_durable(folder: Path) -> None:
    """Have everything below ``folder`` on the disk; ranks do so with their own shards."""
    for path in (*folder.rglob("*"), folder):
        if path.suffix != ".distcp":
            make_durable(path)
