"""The file system of the run directory: speed, space, whole renames, and whether other nodes can see it."""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from apo_megatron.diagnosis.finding import Finding, Section

SECTION = Section("Run directory")
_MIB, _GIB = 2**20, 2**30
PROBE_BYTES = 256 * _MIB
_BLOCK_BYTES = 8 * _MIB
_MAX_SECONDS = 2.0  # of writing: a slow file system is known to be slow before the end
_CHECKPOINT_BYTES = 14  # a parameter: bf16, and fp32 weight and moments of the optimizer
_MIN_FREE_BYTES = 20 * _GIB
_SLOW_BYTES_PER_SECOND = 100 * _MIB
_SHARED = {
    "nfs",
    "nfs4",
    "lustre",
    "gpfs",
    "beegfs",
    "ceph",
    "fuse.ceph",
    "cifs",
    "wekafs",
    "fuse.glusterfs",
    "9p",
}
_IN_MEMORY = {"tmpfs", "ramfs"}


@dataclass(frozen=True)
class Speed:
    """Bytes a second."""

    write: float
    read: float


def check_storage(run_dir: str | Path, probe_bytes: int = PROBE_BYTES) -> list[Finding]:
    """All of this module, in ``run_dir`` or the nearest folder above that exists. Leaves nothing behind."""
    path = Path(run_dir).absolute()
    folder = next(candidate for candidate in (path, *path.parents) if candidate.is_dir())
    if not os.access(folder, os.W_OK):
        return [
            SECTION.problem("folder", f"{folder} is not writable", "name another --run-dir, or train.run_dir")
        ]
    findings = [check_kind(folder), check_space(folder)]
    if shutil.disk_usage(folder).free < 2 * probe_bytes:
        return findings
    try:
        with tempfile.TemporaryDirectory(dir=folder, prefix=".doctor_") as probe:
            findings += [check_speed(measure(Path(probe, "data"), probe_bytes)), check_rename(Path(probe))]
    except OSError as error:
        findings.append(
            SECTION.problem("writing", f"{folder}: {error.strerror}", "look at quota and mount options")
        )
    return findings


def check_kind(folder: Path, mounts: str | None = None) -> Finding:
    """Whether ranks on other nodes would see it, by the kind of file system."""
    kind = file_system_of(folder, Path("/proc/self/mountinfo").read_text() if mounts is None else mounts)
    if kind in _SHARED:
        return SECTION.ok("file system", f"{folder}: {kind}, which other nodes can mount")
    if kind in _IN_MEMORY:
        return SECTION.warning(
            "file system",
            f"{folder}: {kind}, in memory: checkpoints are gone with the machine",
            "name a folder on a disk",
        )
    return SECTION.ok(
        "file system", f"{folder}: {kind}, of this machine; a run on several nodes needs a shared one"
    )


def file_system_of(folder: Path, mounts: str) -> str:
    """The kind of the mount that ``folder`` lies on; ``mounts`` is /proc/self/mountinfo."""
    best, kind = "", "unknown"
    real = str(folder.resolve())
    for line in mounts.splitlines():
        before, _, after = line.partition(" - ")
        point = before.split()[4].encode().decode("unicode_escape")  # a space is written \040
        if (real + "/").startswith(point.rstrip("/") + "/") and len(point) >= len(best):
            best, kind = point, after.split()[0]
    return kind


def check_space(folder: Path) -> Finding:
    """What is free."""
    free = shutil.disk_usage(folder).free
    found = f"{free / _GIB:.0f} GiB free"
    if free < _MIN_FREE_BYTES:
        return SECTION.warning(
            "disk space",
            f"{found}: room for few checkpoints ({_CHECKPOINT_BYTES} bytes a parameter each)",
            "free some, name another run_dir, or keep fewer: checkpoint.keep_last",
        )
    return SECTION.ok("disk space", found)


def measure(path: Path, num_bytes: int) -> Speed:
    """Write to ``path`` until it is on the disk, then read it back from there."""
    block = os.urandom(_BLOCK_BYTES)  # nothing that a file system could compress
    written, start = 0, time.perf_counter()
    with path.open("wb", buffering=0) as file:
        while written < num_bytes and time.perf_counter() - start < _MAX_SECONDS:
            written += file.write(block[: num_bytes - written])
        os.fsync(file.fileno())
        write = written / (time.perf_counter() - start)
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)  # else it is read from memory
    read, start = 0, time.perf_counter()
    with path.open("rb", buffering=0) as file:
        while (chunk := file.read(_BLOCK_BYTES)) and time.perf_counter() - start < _MAX_SECONDS:
            read += len(chunk)
    return Speed(write, read / (time.perf_counter() - start))


def check_speed(speed: Speed) -> Finding:
    """Checkpoints are written by all ranks at once, while training waits for the copy to end."""
    found = f"writes {speed.write / _MIB:.0f} MiB/s to the disk, reads {speed.read / _MIB:.0f} MiB/s"
    if speed.write < _SLOW_BYTES_PER_SECOND:
        seconds = _CHECKPOINT_BYTES * 1e9 / speed.write
        return SECTION.warning(
            "speed",
            f"{found}: a checkpoint of a billion parameters would take {seconds / 60:.0f} min from one node",
            "write checkpoints less often, or name a folder on a local or parallel file system",
        )
    return SECTION.ok("speed", found)


def check_rename(folder: Path) -> Finding:
    """That a new name takes the place of an old one: every file of a run is written aside first."""
    old, new = folder / "old", folder / "new"
    old.write_text("old")
    new.write_text("new")
    os.replace(new, old)
    if new.exists() or old.read_text() != "new":
        return SECTION.problem("rename", "does not replace a file", "name a folder on another file system")
    return SECTION.ok("rename", "replaces a file as a whole")
