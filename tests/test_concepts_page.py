"""The numbers that docs/concepts.md gives are those of the computation behind its picture."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tools import draw_push_and_pull as toy

PAGE = (Path(__file__).resolve().parent.parent / "docs" / "concepts.md").read_text()
SUPPORT = slice(1, toy.SUPPORT_SIZE)  # without y, the first
OUTSIDE = slice(toy.SUPPORT_SIZE, None)
PUSH, PULL, CLIP_LOW = 1.05, 0.1, 0.2


def masses() -> tuple[float, float]:
    """P and Z at the start."""
    return sum(toy.POLICY[SUPPORT]), sum(toy.REFERENCE[SUPPORT])


def test_one_update() -> None:
    start = toy.Toy.start()
    plain, anchored = -start.gradient(0.0), -start.gradient(PULL)
    torch.testing.assert_close(plain[1:], start.probs[1:])  # GRPO: every other token by its probability
    gain = anchored / plain
    mass, reference_mass = masses()
    assert gain[SUPPORT] == pytest.approx(PUSH + PULL * (1 - mass) / reference_mass)
    assert gain[OUTSIDE] == pytest.approx(PUSH - PULL * mass / reference_mass)
    inside, outside = (f"{100 * (gain[part][0] - 1):.0f} %" for part in (SUPPORT, OUTSIDE))
    assert f"APO gives those inside {inside} more, and those outside {outside} more than GRPO" in PAGE


@pytest.mark.parametrize("pull", [0.1, 0.2])
def test_the_pull_ends_by_itself(pull: float) -> None:
    limit = (PUSH - (1 - CLIP_LOW)) / pull
    assert f"{limit:g} with " in PAGE
    probs = toy.trajectory(pull)
    ratios = probs[:, SUPPORT].sum(1) / masses()[1]
    is_last = ratios[1:] == ratios[:-1]
    assert is_last.any() and not is_last[0]
    first = int(is_last.nonzero()[0])
    assert ratios[first - 1] < limit <= ratios[first] and bool(is_last[first:].all())


def test_the_picture_is_drawn(tmp_path: Path) -> None:
    toy.main(["--out", str(tmp_path / "picture.png")])
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")
    assert toy.PICTURE.exists()
