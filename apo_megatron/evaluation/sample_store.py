"""Judged samples on disk: appended as they come, so that a killed evaluation goes on where it was."""

from __future__ import annotations

import fcntl
import json
import os
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any

from apo_megatron.errors import ConfigError, DataError
from apo_megatron.evaluation.result import JudgedSample
from apo_megatron.files import write_atomically

SETTINGS_FILE = "settings.json"
LOCK_FILE = ".lock"
_FIELDS = tuple(JudgedSample.__dataclass_fields__)


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Nobody else writes into ``folder`` inside. Raises ConfigError where somebody does."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / LOCK_FILE).open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # gone with the process, however that ends
        except BlockingIOError:
            raise ConfigError(
                f"output_dir={folder}: another evaluation is writing there: wait for it, or name another "
                "folder"
            ) from None
        yield


def claim_folder(folder: Path, settings: Mapping[str, Any], num_samples: int) -> list[int]:
    """Make ``folder`` for samples drawn with ``settings`` (plain containers), or go on in it.

    Returns the numbers of samples per problem that were asked for so far and are below ``num_samples``, in
    ascending order, and that. Raises DataError where the folder has samples of other settings: they must not
    be mixed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / SETTINGS_FILE
    wanted = json.loads(json.dumps(settings))  # as it will be read
    stages: list[int] = []
    weights: str | None = None
    if path.exists():
        found, stages, weights = _read_settings(path)
        _require_equal(folder, found, wanted)
    elif any(folder.glob("*.jsonl")):
        raise DataError(
            f"{folder}: has samples, but no {SETTINGS_FILE} that says how they were drawn: remove the "
            "folder, or name another output_dir"
        )
    if not stages or num_samples > stages[-1]:
        stages.append(num_samples)
        _write_settings(path, {"settings": wanted, "num_samples": stages, "weights": weights})
    return [stage for stage in stages if stage < num_samples] + [num_samples]


def pin_weights(folder: Path, weights: str) -> None:
    """Note which weights servers have; raises DataError where samples of other ones are there already."""
    path = folder / SETTINGS_FILE
    settings, stages, before = _read_settings(path)
    if before is None:
        _write_settings(path, {"settings": settings, "num_samples": stages, "weights": weights})
    else:
        _require_equal(folder, {"weights of the servers": before}, {"weights of the servers": weights})


def _write_settings(path: Path, content: Mapping[str, Any]) -> None:
    write_atomically(path, json.dumps(content, indent=1) + "\n")


def _read_settings(path: Path) -> tuple[dict[str, Any], list[int], str | None]:
    """What samples were drawn with, how many were asked for, and which weights servers had, if known."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        stages = [int(number) for number in content["num_samples"]]
        return dict(content["settings"]), stages, content["weights"]
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"{path}: not what an evaluation has written ({type(error).__name__}: {error}): remove the "
            "folder, or name another output_dir"
        ) from error


def _require_equal(folder: Path, found: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
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
        self._file = path.open("ab")
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
