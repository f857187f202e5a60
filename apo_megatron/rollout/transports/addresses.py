"""Where servers are, seen from a rank."""

from __future__ import annotations

import ipaddress
import os
import socket
from pathlib import Path
from urllib.parse import urlsplit


def machine_id() -> str:
    """The same for all processes that share this machine's memory: the kernel's boot and its /dev/shm."""
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return f"{boot}/{os.stat('/dev/shm').st_dev}"


def address_towards(url: str) -> str:
    """The address of this machine that the server at ``url`` can reach. Raises OSError where it has none."""
    host, port = _host_and_port(url)
    family, kind, protocol, _, target = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind, protocol) as probe:
        probe.connect(target)  # sends nothing: the system decides which way it would go
        return str(probe.getsockname()[0])


def is_here(url: str, is_main_machine: bool) -> bool:
    """Whether the server at ``url`` runs on this machine; at a loopback address it is on rank 0's."""
    host, _ = _host_and_port(url)
    try:
        family, kind, protocol, _, target = socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM)[0]
        if ipaddress.ip_address(target[0]).is_loopback:
            return is_main_machine
        with socket.socket(family, kind, protocol) as probe:
            probe.bind(target)  # only to an address of this machine
    except OSError:
        return False
    return True


def _host_and_port(url: str) -> tuple[str, int]:
    parts = urlsplit(url)
    return parts.hostname or "", parts.port or (443 if parts.scheme == "https" else 80)
