"""kill -9 at moments of saving: always the previous or the new checkpoint is there, whole."""

from __future__ import annotations

import random
import signal
from pathlib import Path
from typing import Any

import torch

from tests.distributed import DistributedRun, run_distributed
from tests.tiny_models import make_tiny_model

TARGET = "tests.workers.crash:save_and_die"
NUM_RANDOM = 20
NUM_LAST = 10  # and one by one: the last moments of a save, around the renames


def _restored(log: str) -> tuple[int, int] | None:
    """(step, life that saved it) as the rank has printed it."""
    for line in log.splitlines():
        if line.startswith("restored "):
            _, step, life = line.split()
            return int(step), int(life)
    return None


def test_a_killed_save_leaves_the_previous_or_the_new_checkpoint(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    (tmp_path / "digests").mkdir()
    payload: dict[str, Any] = {
        "model_path": str(make_tiny_model(tmp_path / "model", "qwen2", num_layers=1)),
        "folder": str(tmp_path / "checkpoints"),
        "digests": str(tmp_path / "digests"),
        "sequences": [torch.randint(2, 107, (n,), generator=generator) for n in (5, 4, 6, 3)],
        "dying_rank": 0,
        "deadly": None,
    }
    moments: dict[bool, list[int]] = {}  # by async_save, then by rank
    for life, is_async in enumerate((False, True, False)):  # the first has no older checkpoint to remove
        results = run_distributed(2, TARGET, payload | {"life": life, "async_save": is_async})
        moments[is_async] = [result["moments"] for result in results]

    draw = random.Random(0)
    crashes = []
    for number in range(NUM_RANDOM):
        is_async, rank = bool(number % 2), draw.randrange(2)
        # The last quarter: just after the save.
        crashes.append((is_async, rank, draw.randint(1, moments[is_async][rank] * 4 // 3)))
    crashes += [(False, 0, moments[False][0] - back) for back in range(NUM_LAST)]

    possible, steps = {(3, 2)}, []
    for life, (is_async, rank, deadly) in enumerate(crashes, 3):
        crash = payload | {"life": life, "async_save": is_async, "dying_rank": rank, "deadly": deadly}
        with DistributedRun(2, TARGET, crash) as run:
            codes = run.exit_codes(timeout=60)
            assert codes[rank] == -signal.SIGKILL, (crash, run.log(0), run.log(1))
            run.kill(1 - rank)
            found = _restored(run.log(rank))
        assert found in possible, (life, crashes[life - 4], found, possible)
        assert found is not None
        steps.append(found[0])
        possible = {found, (found[0] + 1, life)}
    # Both ends were met: saves that were undone, and saves that were complete.
    assert 5 < len(set(steps)) < len(crashes) - 5
