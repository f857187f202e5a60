"""GPUs, driver and communication against torch's build."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from importlib import import_module
from typing import Any

from packaging.version import Version

from apo_megatron.diagnosis.finding import Finding, Section
from apo_megatron.diagnosis.installed import version_of

SECTION = Section("GPUs")
_GIB = 2**30
_SECONDS_TO_IMPORT = 30.0
_ACROSS_SOCKETS = {"NODE", "SYS"}  # over the links between CPUs


def check_gpus() -> list[Finding]:
    """All of this module."""
    try:
        facts: Any = import_module("apo_megatron.parallel.device_facts")  # imports torch
    except (ImportError, OSError) as error:  # OSError: a shared library that is missing or of another build
        return [
            SECTION.problem(
                "torch",
                f"cannot be imported: {error}",
                "install it again in a fresh environment; LD_LIBRARY_PATH may point to other libraries",
            )
        ]
    devices, driver = facts.torch_devices(), facts.read_driver()
    findings = [check_build(devices, driver)]
    if devices.gpus:
        findings += [*check_devices(devices), *check_links(devices, driver), check_nccl(devices)]
        findings.append(check_transformer_engine())
    return findings


def check_build(devices: Any, driver: Any) -> Finding:
    """Whether this torch can use the GPUs that the driver knows. Takes TorchDevices, Driver or None."""
    subject = "torch and driver"
    built_for = (
        f"torch is built for CUDA {devices.cuda_version}" if devices.cuda_version else "torch is a CPU build"
    )
    if driver is None:
        if not devices.gpus:
            return SECTION.ok(subject, f"no NVIDIA GPU here: runs use the CPU, with gloo ({built_for})")
        return SECTION.ok(subject, f"{built_for}; nvidia-smi is not here to ask for the driver")
    found = f"{built_for}, driver {driver.version} serves CUDA up to {driver.cuda_version}"
    if devices.gpus:
        return SECTION.ok(subject, found)
    if devices.cuda_version is None:
        return SECTION.problem(
            subject,
            f"{driver.num_gpus} GPU(s), but {built_for}: runs would use the CPU",
            "install torch's CUDA build: docs/installation.md",
        )
    is_known = driver.cuda_version[:1].isdigit()  # N/A in a container that was given no libcuda
    if is_known and Version(devices.cuda_version).major > Version(driver.cuda_version).major:
        return SECTION.problem(
            subject, found, "update the driver, or install a torch that is built for an older CUDA"
        )
    return SECTION.problem(
        subject,
        f"{found}, but torch sees none of the {driver.num_gpus} GPU(s)",
        "look at CUDA_VISIBLE_DEVICES, at what the container was given, and at nvidia-smi for errors",
    )


def check_devices(devices: Any) -> Iterator[Finding]:
    """What there is, and whether torch has kernels for it. Takes TorchDevices."""
    kinds = Counter(devices.gpus)
    for gpu, number in kinds.items():
        found = f"{number} x {gpu.name}, {gpu.memory_bytes / _GIB:.0f} GiB, {gpu.capability}"
        if devices.has_kernels_for(gpu):
            yield SECTION.ok("GPU", found)
        else:
            yield SECTION.problem(
                "GPU",
                f"{found}: this torch has kernels for {', '.join(devices.architectures)} only",
                "install a build of torch that names this architecture",
            )
    if len(kinds) > 1:
        yield SECTION.warning(
            "GPU",
            "they differ: every step waits for the slowest, and the smallest memory is the limit",
            "choose equal ones with CUDA_VISIBLE_DEVICES",
        )


def check_links(devices: Any, driver: Any) -> Iterator[Finding]:
    """How GPUs reach each other. Takes TorchDevices, Driver or None."""
    if len(devices.gpus) < 2:
        return
    links = driver.links if driver is not None else {}
    if links:
        kinds = Counter(links.values())
        described = ", ".join(f"{kind} for {number} pair(s)" for kind, number in kinds.most_common())
        if far := sorted(pair for pair, kind in links.items() if kind in _ACROSS_SOCKETS):
            yield SECTION.warning(
                "links between GPUs",
                f"{described}; {far[0][0]} and {far[0][1]}, for one, reach each other across CPU sockets",
                "keep tensor parallelism within GPUs that are joined by NVLink or one PCIe switch",
            )
        else:
            yield SECTION.ok("links between GPUs", described)
    if devices.without_peer_access:
        first, second = devices.without_peer_access[0]
        yield SECTION.warning(
            "peer access",
            f"{len(devices.without_peer_access)} pair(s), such as {first} and {second}, use host memory",
            "expected without NVLink on some PCIe boards; a virtual machine or IOMMU may switch it off",
        )


def check_nccl(devices: Any) -> Finding:
    """The library that torch loads against the package that came with it. Takes TorchDevices."""
    packaged = version_of(devices.nccl_distribution)
    if packaged is not None and Version(packaged).release[:3] != Version(devices.nccl_version).release[:3]:
        return SECTION.warning(
            "NCCL",
            f"torch loads {devices.nccl_version}, installed with it is {packaged}",
            "another libnccl comes first: look at LD_LIBRARY_PATH and LD_PRELOAD",
        )
    return SECTION.ok("NCCL", str(devices.nccl_version))


def check_transformer_engine() -> Finding:
    """That what is installed can be loaded: its libraries belong to one build of torch. Seconds."""
    subject, module = "TransformerEngine", "transformer_engine.pytorch"
    version = version_of("transformer-engine")
    if version is None:
        return SECTION.warning(
            subject,
            "not installed: the model runs on Megatron's local layers, slower and with more memory",
            'pip install --no-build-isolation "apo_megatron[gpu]": docs/installation.md',
        )
    try:
        result = subprocess.run(
            [sys.executable, "-c", f"import {module}"],
            capture_output=True,
            text=True,
            timeout=_SECONDS_TO_IMPORT,
        )
    except subprocess.TimeoutExpired:
        return SECTION.warning(
            subject, f"{version}: its import takes more than {_SECONDS_TO_IMPORT:.0f} s", ""
        )
    if result.returncode != 0:
        why = (result.stderr.strip().splitlines() or [f"exit code {result.returncode}"])[-1]
        return SECTION.problem(
            subject,
            f"{version} cannot be loaded: {why}",
            "build it again for this torch, with --no-build-isolation --force-reinstall --no-deps: "
            "docs/installation.md",
        )
    return SECTION.ok(subject, version)
