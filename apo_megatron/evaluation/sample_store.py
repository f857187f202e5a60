"""Judged samples on disk: appended as they come, so that a killed evaluation goes on where it was."""

from __future__ import annotations

import json
import os
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any

from apo_megatron.errors import DataError
from apo_megatron.evaluation.result import JudgedSample
from apo_megatron.files import write_atomically

SETTINGS_FILE = "settings.json"
_FIELDS = tuple(JudgedSample.__dataclass_fields__)


def claim_folder(folder: Path, settings: Mapping[str, Any]) -> None:
    """Make ``folder`` for samples drawn with ``settings`` (plain containers), or go on in it.

    Raises DataError where it has samples of other settings: they must not be mixed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / SETTINGS_FILE
    wanted = json.loads(json.dumps(settings))  # as it will be read
    if not path.exists():
        write_atomically(path, json.dumps(wanted, indent=1) + "\n")
        return
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DataError(f"{path}: malformed JSON ({error}): remove the folder, or use another one") from error
    differing = [name for name in {**wanted, **found} if wanted.get(name) != found.get(name)]
    if differing:
        shown = "; ".join(f"{name}: {found.get(name)} there, {wanted.get(name)} now" for name in differing)
        raise DataError(
            f"{folder}: has samples of other settings ({shown}). To evaluate anew, name another output_dir "
            "or remove that folder; to go on, give the settings of before"
        )


def read_samples(folder: Path) -> Iterator[JudgedSample]:
    """Every sample once, file by file. A last line that was not written to its end is passed over.

    Raises DataError, naming file and line, for one that is no sample.
    """
    seen: defaultdict[str, set[int]] = defaultdict(set)
    for path in sorted(folder.glob("*.jsonl")):
        with path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                if not line.endswith(b"\n"):
                    break
                sample = _parse(line, f"{path}:{number}")
                if sample.sample not in seen[sample.problem]:
                    seen[sample.problem].add(sample.sample)
                    yield sample


def _parse(line: bytes, place: str) -> JudgedSample:
    try:
        values = json.loads(line)
        return JudgedSample(**{name: values[name] for name in _FIELDS})
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"{place}: not a sample that an evaluation has written ({type(error).__name__}: {error}); remove "
            "that line: its sample is drawn anew"
        ) from error


class SampleWriter:
    """Appends samples to one rank's file in ``folder``. Use as a context manager."""

    def __init__(self, folder: Path, rank: int) -> None:
        path = folder / f"rank_{rank:05d}.jsonl"
        self._file = path.open("ab+")
        self._file.truncate(_whole_bytes(path))

    def write(self, samples: Sequence[JudgedSample]) -> None:
        """On disk when this returns."""
        lines = [json.dumps(asdict(sample)) + "\n" for sample in samples]
        self._file.write("".join(lines).encode("ascii"))
        self._file.flush()
        os.fsync(self._file.fileno())

    def __enter__(self) -> SampleWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()


def _whole_bytes(path: Path) -> int:
    """Where the last whole line ends."""
    size = path.stat().st_size
    with path.open("rb") as file:
        while size > 0:
            start = max(0, size - (1 << 16))
            file.seek(start)
            end = file.read(size - start).rfind(b"\n")
            if end >= 0:
                return start + end + 1
            size = start
    return 0
