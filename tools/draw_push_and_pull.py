"""Draws docs/push_and_pull.png: what one wrong token does to a small soft-max under GRPO and under APO.

    python -m tools.draw_push_and_pull [--out docs/push_and_pull.png]

Nothing is sketched: the policy is a vector of logits, and every update is a step along the gradient of this
package's own loss functions.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from matplotlib.axes import Axes
from torch import Tensor

from apo_megatron.config import ObjectiveConfig
from apo_megatron.objectives import LossInputs, build_objective

PICTURE = Path(__file__).resolve().parent.parent / "docs" / "push_and_pull.png"
SUPPORT_SIZE = 8
# pi_ref likes eight tokens and leaves 4 % to eight others. pi_theta has drifted: the wrong token takes
# more, and of the rest as much lies outside the Top-K as inside.
REFERENCE: tuple[float, ...] = (0.60, 0.11, 0.08, 0.06, 0.04, 0.03, 0.02, 0.02, *(0.04 / 8,) * 8)
POLICY: tuple[float, ...] = (0.70, 0.045, 0.035, 0.025, 0.018, 0.012, 0.009, 0.006, *(0.15 / 8,) * 8)
WRONG = 0  # the sampled token y, the likeliest of both
STEP_SIZE = 0.5
NUM_UPDATES = 30
PULLS = {0.0: "GRPO", 0.1: "APO, pull 0.1", 0.2: "APO, pull 0.2"}  # 0.0 stands for the vanilla loss
COLORS = {0.0: "#D55E00", 0.1: "#0072B2", 0.2: "#56B4E9"}  # Okabe and Ito, 2008
INSIDE = "#DDE9F3"


@dataclass(frozen=True)
class Toy:
    """A soft-max over a few tokens, and one wrong token that is punished again and again."""

    logits: Tensor  # [V] fp64
    reference: Tensor  # [V] fp64, log-probs

    @staticmethod
    def start() -> Toy:
        policy, reference = (torch.tensor(p, dtype=torch.float64).log() for p in (POLICY, REFERENCE))
        return Toy(policy, reference)

    def gradient(self, pull: float) -> Tensor:
        """[V]: d loss / d logits of the wrong token with A = -1, before anything moved since it was drawn."""
        logits = self.logits.clone().requires_grad_()
        log_probs = logits.log_softmax(0)
        support = self.reference.topk(SUPPORT_SIZE).indices
        support = support[support != WRONG]
        is_plain = pull == 0
        cfg = ObjectiveConfig(loss_mode="vanilla" if is_plain else "apo_ratio", apo_pull_coeff=pull)
        inputs = LossInputs(
            log_probs=log_probs[WRONG : WRONG + 1],
            old_log_probs=log_probs[WRONG : WRONG + 1].detach(),
            advantages=-torch.ones(1, dtype=torch.float64),
            entropy=torch.zeros(1, dtype=torch.float64),
            sequence_ids=torch.zeros(1, dtype=torch.int64),
            anchor_log_mass=log_probs[support].logsumexp(0, keepdim=True),
            reference_anchor_log_mass=self.reference[support].logsumexp(0, keepdim=True),
        )
        loss = build_objective(cfg).spec.function(inputs, cfg).loss.sum()
        (gradient,) = torch.autograd.grad(loss, logits)
        return gradient

    def updated(self, pull: float) -> Toy:
        return Toy(self.logits - STEP_SIZE * self.gradient(pull), self.reference)

    @property
    def probs(self) -> Tensor:
        """[V]"""
        return self.logits.softmax(0)


def trajectory(pull: float) -> Tensor:
    """[NUM_UPDATES + 1, V]: the policy before each update and after the last."""
    toys = [Toy.start()]
    for _ in range(NUM_UPDATES):
        toys.append(toys[-1].updated(pull))
    return torch.stack([toy.probs for toy in toys])


def draw(path: Path) -> None:
    """Three panels: the two policies, one update token by token, many updates."""
    from apo_megatron.telemetry.plots import DPI, LOOK, plt  # matplotlib takes a second

    with plt.rc_context(LOOK):
        figure, (before, one, many) = plt.subplots(1, 3, figsize=(11, 3.5), layout="constrained")
        _draw_policies(before)
        _draw_update(one)
        _draw_updates(many)
        figure.savefig(path, dpi=DPI)
        plt.close(figure)


def _draw_tokens(axis: Axes, shift: float, heights: Sequence[float], color: str, label: str) -> None:
    axis.bar([place + shift for place in range(len(POLICY))], heights, 0.4, color=color, label=label)


def _mark_support(axis: Axes) -> None:
    axis.axvspan(-0.5, SUPPORT_SIZE - 0.5, color=INSIDE, zorder=0)
    axis.set_xticks(range(len(POLICY)), ["y", *[""] * (len(POLICY) - 1)])
    axis.set_xlim(-0.6, len(POLICY) - 0.4)
    axis.set_xlabel("tokens; shaded: Top-K of the reference")


def _draw_policies(axis: Axes) -> None:
    _mark_support(axis)
    _draw_tokens(axis, -0.2, REFERENCE, "#666666", "reference")
    _draw_tokens(axis, 0.2, POLICY, "#E69F00", "policy")
    axis.set_yscale("log")
    axis.set_title("y was sampled, and is wrong")
    axis.set_ylabel("probability")
    axis.legend()


def _draw_update(axis: Axes) -> None:
    _mark_support(axis)
    for pull, shift in ((0.0, -0.2), (0.1, 0.2)):
        _draw_tokens(axis, shift, (-Toy.start().gradient(pull)).tolist(), COLORS[pull], PULLS[pull])
    axis.axhline(0, color="#000000", lw=0.8)
    axis.set_ylim(-0.02, 0.075)
    drops = [f"{-Toy.start().gradient(pull)[WRONG]:.2f}" for pull in (0.0, 0.1)]
    axis.text(WRONG + 0.6, -0.015, f"y: {drops[0]}, with APO {drops[1]}", fontsize=9)
    axis.set_title("One update: -d loss / d logit")
    axis.legend()


def _draw_updates(axis: Axes) -> None:
    support = slice(1, SUPPORT_SIZE)
    reference_mass = torch.tensor(REFERENCE)[support].sum()
    for pull, label in PULLS.items():
        probs = trajectory(pull)
        ratios = probs[:, support].sum(1) / reference_mass
        axis.plot(
            ratios.tolist(), color=COLORS[pull], lw=2, label=f"{label}: y ends at {probs[-1, WRONG]:.2f}"
        )
    axis.axhline(1, color="#666666", lw=1, ls=":")
    axis.set_ylim(0, 3)
    axis.set_xlabel("updates on the same wrong token")
    axis.set_title("Anchor ratio a = P / Z")
    axis.legend(loc="lower right")


def main(argv: Sequence[str] | None = None) -> None:
    """The command line (default: that of the process)."""
    parser = argparse.ArgumentParser(description="Draws the picture of push and pull.")
    parser.add_argument("--out", type=Path, default=PICTURE, help="PNG to write (default: %(default)s)")
    draw(parser.parse_args(argv).out)


if __name__ == "__main__":
    main()
