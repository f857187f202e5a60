"""The machine beside its GPUs: memory, limits of processes, ports, the cache of models."""

from __future__ import annotations

import os
import resource
import socket
import threading
from collections.abc import Callable, Mapping
from pathlib import Path

import psutil

from apo_megatron.diagnosis.finding import Finding, Section

SECTION = Section("Machine")
_GIB = 2**30
_SHARED_MEMORY = Path("/dev/shm")
_MIN_SHARED_BYTES = _GIB  # a container has 64 MiB where nobody asks for more
_MIN_OPEN_FILES = 4096
_MIN_PORTS = 1000  # of the range that the system hands out
_PORT_RANGE = Path("/proc/sys/net/ipv4/ip_local_port_range")
_CPU_QUOTA = Path("/sys/fs/cgroup/cpu.max")
_MEMORY_LIMIT = Path("/sys/fs/cgroup/memory.max")
_INFINIBAND = Path("/sys/class/infiniband")
_TORCHRUN_PORT = 29500  # what torchrun takes where none is given
_SECONDS_TO_RESOLVE = 2.0


def check_host() -> list[Finding]:
    """All of this module."""
    return [
        check_processors(),
        check_memory(),
        check_shared_memory(),
        check_open_files(),
        check_locked_memory(),
        check_port(int(os.environ.get("MASTER_PORT", _TORCHRUN_PORT))),
        check_port_range(),
        check_host_name(),
        check_model_cache(os.environ),
    ]


def check_processors() -> Finding:
    """CPU cores of this process, and how many threads torch would start on each rank."""
    cores: float = len(os.sched_getaffinity(0))
    quota = _read(_CPU_QUOTA).split()
    limited = ""
    if len(quota) == 2 and quota[0] != "max" and int(quota[0]) / int(quota[1]) < cores:
        cores = int(quota[0]) / int(quota[1])
        limited = ", the container's limit"
    threads = os.environ.get("OMP_NUM_THREADS")
    found = (
        f"{cores:g} for this process{limited}, OMP_NUM_THREADS {'is not set' if threads is None else threads}"
    )
    if cores < 2:
        return SECTION.warning(
            "CPU cores", found, "ask for two or more a rank: rewards are verified beside training"
        )
    return SECTION.ok("CPU cores", found)


def check_memory() -> Finding:
    """Host memory that is free, within the container's limit."""
    memory = psutil.virtual_memory()
    total, free = memory.total, memory.available
    limit = _read(_MEMORY_LIMIT).strip()
    limited = ""
    if limit.isdigit() and int(limit) < total:
        total, free, limited = int(limit), min(free, int(limit)), ", the container's limit"
    return SECTION.ok("host memory", f"{free / _GIB:.0f} GiB free of {total / _GIB:.0f} GiB{limited}")


def check_shared_memory(folder: Path = _SHARED_MEMORY, min_bytes: int = _MIN_SHARED_BYTES) -> Finding:
    """Where NCCL and the weights for servers on this machine go from process to process."""
    subject = str(folder)
    advice = "in a container: docker run --shm-size=16g, or --ipc=host"
    if not os.access(folder, os.W_OK):
        return SECTION.problem(subject, "missing, or not writable", advice)
    status = os.statvfs(folder)
    free, total = status.f_bavail * status.f_frsize, status.f_blocks * status.f_frsize
    found = f"{_size(free)} free of {_size(total)}"
    if free < min_bytes:
        return SECTION.warning(
            subject, f"{found}: NCCL and the transport of weights between processes need more", advice
        )
    return SECTION.ok(subject, found)


def check_open_files() -> Finding:
    """Connections to servers, files of the data and checkpoints, libraries."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    found = f"{_limit(soft)}, may be raised to {_limit(hard)}"
    if soft != resource.RLIM_INFINITY and soft < _MIN_OPEN_FILES:
        return SECTION.warning(
            "open files", found, f"ulimit -n {_MIN_OPEN_FILES} or more, in the shell or sbatch script"
        )
    return SECTION.ok("open files", found)


def check_locked_memory() -> Finding:
    """InfiniBand registers memory, which counts against this limit."""
    soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    if soft == resource.RLIM_INFINITY:
        return SECTION.ok("locked memory", "unlimited")
    found = f"{_size(soft)}"
    if _INFINIBAND.is_dir() and any(_INFINIBAND.iterdir()):
        return SECTION.warning(
            "locked memory",
            f"{found}, and this machine has InfiniBand, which registers memory",
            "ulimit -l unlimited (docker: --ulimit memlock=-1; Slurm: PropagateResourceLimitsExcept=MEMLOCK)",
        )
    return SECTION.ok("locked memory", f"{found}; no InfiniBand here, which would need more")


def check_port(port: int) -> Finding:
    """Whether torchrun's rendezvous could listen."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
        except OSError as error:
            return SECTION.warning(
                f"port {port}",
                f"is taken ({error.strerror}): a second torchrun on this machine would end at its start",
                "torchrun --standalone chooses a free one; or --master-port",
            )
    return SECTION.ok(f"port {port}", "free, for torchrun")


def check_port_range(path: Path = _PORT_RANGE) -> Finding:
    """The ports that the system hands out, to stores, servers and connections."""
    bounds = _read(path).split()
    if len(bounds) != 2:
        return SECTION.ok("ports handed out", "the system does not say which")
    first, last = map(int, bounds)
    found = f"{first} to {last}"
    if last - first < _MIN_PORTS:
        return SECTION.warning("ports handed out", f"{found}: few", f"widen {path}")
    return SECTION.ok("ports handed out", found)


def check_host_name(resolve: Callable[[str], object] = socket.gethostbyname) -> Finding:
    """Processes find each other by these names; one that does not resolve hangs the rendezvous."""
    own = socket.gethostname()
    for name, advice in (
        ("localhost", "add the line '127.0.0.1 localhost' to /etc/hosts"),
        (own, f"add {own} to /etc/hosts, or give torchrun --local-addr and --master-addr as numbers"),
    ):
        problem = _why_unresolved(name, resolve)
        if problem:
            return SECTION.warning("host names", f"{name} {problem}", advice)
    return SECTION.ok("host names", f"localhost and {own} resolve")


def check_model_cache(environment: Mapping[str, str]) -> Finding:
    """Where models of the hub lie; nothing is asked of the hub."""
    home = environment.get("HF_HOME") or "~/.cache/huggingface"
    folder = Path(environment.get("HF_HUB_CACHE") or Path(home, "hub")).expanduser()
    offline = environment.get("HF_HUB_OFFLINE", "0").upper() in ("1", "ON", "YES", "TRUE")
    nearest = next(path for path in (folder, *folder.parents) if path.exists())
    kept = len(list(folder.glob("models--*"))) if folder.is_dir() else 0
    found = f"{folder}, {kept} model(s){', offline' if offline else ''}"
    if not os.access(nearest, os.W_OK):
        return SECTION.warning(
            "model cache",
            f"{found}: not writable, so nothing can be downloaded",
            "set HF_HOME to a folder that all ranks share and may write, or name local directories",
        )
    return SECTION.ok("model cache", found)


def _why_unresolved(name: str, resolve: Callable[[str], object]) -> str:
    """ "" where it resolves in time: a name server that is gone can take a minute."""
    answer = ["takes long to resolve"]

    def ask() -> None:
        try:
            resolve(name)
            answer[0] = ""
        except OSError as error:
            answer[0] = f"does not resolve ({error.strerror})"

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(_SECONDS_TO_RESOLVE)
    return answer[0]


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""


def _limit(value: int) -> str:
    return "unlimited" if value == resource.RLIM_INFINITY else str(value)


def _size(num_bytes: int) -> str:
    return f"{num_bytes / _GIB:.1f} GiB" if num_bytes >= _GIB else f"{num_bytes / 2**20:.0f} MiB"
