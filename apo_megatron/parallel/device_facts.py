"""What torch and the driver say about this machine's GPUs. Nothing is allocated on them."""

from __future__ import annotations

import re
import shutil
import subprocess
from dataclasses import dataclass

import torch

_SECONDS_FOR_DRIVER = 5.0
_ANSI = re.compile(r"\x1b\[[0-9;]*m")


@dataclass(frozen=True)
class Gpu:
    name: str
    memory_bytes: int
    capability: str  # as the compiler names it: sm_90


@dataclass(frozen=True)
class TorchDevices:
    """What this build of torch can use. The versions are None in a CPU build."""

    cuda_version: str | None
    nccl_version: str | None
    architectures: tuple[str, ...]  # that it has kernels for: sm_80, ..., compute_90
    gpus: tuple[Gpu, ...]
    without_peer_access: tuple[tuple[int, int], ...]  # pairs that reach each other through host memory only

    @property
    def nccl_distribution(self) -> str | None:
        """The package that brings NCCL to this build."""
        return None if self.cuda_version is None else f"nvidia-nccl-cu{self.cuda_version.partition('.')[0]}"

    def has_kernels_for(self, gpu: Gpu) -> bool:
        """Compiled for it or for an older one of its generation, or compilable for it."""
        wanted = int(gpu.capability.removeprefix("sm_"))
        for name in self.architectures:
            kind, _, digits = name.partition("_")
            number = int(re.sub(r"\D", "", digits))
            if number <= wanted and (kind == "compute" or number // 10 == wanted // 10):
                return True
        return False


@dataclass(frozen=True)
class Driver:
    """What nvidia-smi says."""

    version: str
    cuda_version: str  # the newest runtime that it serves
    num_gpus: int
    links: dict[tuple[int, int], str]  # pair of GPUs -> NV18, PIX, PXB, PHB, NODE, SYS


def num_gpus() -> int:
    """GPUs that torch can use."""
    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def torch_devices() -> TorchDevices:
    """Versions in this build, and the GPUs that it sees."""
    count = num_gpus()
    properties = [torch.cuda.get_device_properties(index) for index in range(count)]
    built_for = torch.version.cuda
    return TorchDevices(
        cuda_version=built_for,
        nccl_version=".".join(map(str, torch.cuda.nccl.version())) if built_for is not None else None,
        architectures=tuple(torch.cuda.get_arch_list()) if count else (),
        gpus=tuple(Gpu(p.name, p.total_memory, f"sm_{p.major}{p.minor}") for p in properties),
        without_peer_access=tuple(
            (first, second)
            for first in range(count)
            for second in range(first + 1, count)
            if not torch.cuda.can_device_access_peer(first, second)
        ),
    )


def read_driver() -> Driver | None:
    """None where there is no driver, or it does not answer."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return None
    try:
        summary = _output(program)
        topology = _output(program, "topo", "-m")
        names = _output(program, "--list-gpus")
    except (OSError, subprocess.SubprocessError):
        return None
    versions = re.search(r"Driver Version: (\S+)\s+CUDA Version: (\S+)", summary)
    if versions is None:
        return None
    return Driver(versions[1], versions[2], len(names.splitlines()), read_topology(topology))


def read_topology(matrix: str) -> dict[tuple[int, int], str]:
    """The links between GPUs in the table of ``nvidia-smi topo -m``; {} for anything else."""
    rows = [_ANSI.sub("", line).split() for line in matrix.splitlines()]
    gpus = [row for row in rows if row and re.fullmatch(r"GPU\d+", row[0]) and "X" in row]
    links = {}
    for first, row in enumerate(gpus):
        for second in range(first + 1, len(gpus)):
            links[first, second] = row[second + 1]
    return links


def _output(*command: str) -> str:
    return subprocess.run(
        command, capture_output=True, text=True, check=True, timeout=_SECONDS_FOR_DRIVER
    ).stdout
