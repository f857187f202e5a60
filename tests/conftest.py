"""Tests marked ``gpu`` are skipped where there is no CUDA device, and the longest files come first."""

from __future__ import annotations

import pytest

# Minutes each, most of them waiting. Files run side by side (make test): these must not begin last.
LONGEST_FIRST = (
    "test_sglang_training",
    "test_ray",
    "test_sglang_engine",
    "test_server",
    "test_transport",
    "test_readme",
    "test_layout_invariance",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    rank = {name: place for place, name in enumerate(LONGEST_FIRST)}
    items.sort(key=lambda item: rank.get(item.path.stem, len(rank)))
    gpu_items = [item for item in items if item.get_closest_marker("gpu")]
    if not gpu_items:
        return
    import torch  # seconds, and most selections have no such test

    if not torch.cuda.is_available():
        for item in gpu_items:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
