"""The memory of the device that a rank would use."""

from __future__ import annotations

import torch


def gpu_memory_bytes() -> int | None:
    """Of the first GPU; None where there is none."""
    return torch.cuda.get_device_properties(0).total_memory if torch.cuda.is_available() else None
