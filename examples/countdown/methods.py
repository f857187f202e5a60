"""The methods that compare.py compares: one line each. A new one needs no more than its line."""

from __future__ import annotations

from dataclasses import dataclass

BASELINE, LOSS, ADVANTAGE = "baseline", "policy loss", "advantage estimator"
FAMILIES = (BASELINE, LOSS, ADVANTAGE)

# What --tune tries, six settings for every method: learning rates, and values of its own coefficient.
LEARNING_RATES_WITH_COEFFICIENT = (1e-4, 2e-4)  # x 3 values
LEARNING_RATES_ALONE = (5e-5, 7e-5, 1e-4, 1.4e-4, 2e-4, 2.8e-4)

# Right answers alone reach the reward of 1 that counts as solved; nearly all answers have the form.
_TWO_REWARDS = (
    "reward.rewards=[{name: countdown, weight: 1.0}, {name: format, weight: 0.2}]",
    r"reward.format_pattern='\d+ [-+*] \d+ [-+*] \d+'",
)


@dataclass(frozen=True)
class Coefficient:
    """The setting that matters most for a method, with its grid."""

    field: str  # section.field
    values: tuple[float, float, float]

    @property
    def name(self) -> str:
        return self.field.rsplit(".", maxsplit=1)[-1]


@dataclass(frozen=True)
class Method:
    """Overrides of compare.yaml, as on the command line."""

    label: str
    family: str
    settings: tuple[str, ...] = ()
    tuned: Coefficient | None = None


@dataclass(frozen=True)
class Trial:
    """One setting of a method: its learning rate and coefficient, None = as configured."""

    learning_rate: float | None = None
    coefficient: float | None = None

    def words(self, method: Method) -> tuple[str, ...]:
        """As overrides."""
        words = [] if self.learning_rate is None else [f"optimizer.lr={self.learning_rate:g}"]
        if self.coefficient is not None and method.tuned is not None:
            words.append(f"{method.tuned.field}={self.coefficient:g}")
        return tuple(words)

    def name(self, method: Method) -> str:
        """What is tried, fit for a folder: ``lr_0.0002-clip_high_4``."""
        parts = (word.partition("=") for word in self.words(method))
        names = [f"{field.rsplit('.', maxsplit=1)[-1]}_{value}" for field, _, value in parts]
        return "-".join(names) or "as_configured"


def trials(method: Method) -> list[Trial]:
    """The six settings of ``method`` that --tune tries."""
    if method.tuned is None:
        return [Trial(lr) for lr in LEARNING_RATES_ALONE]
    return [Trial(lr, value) for lr in LEARNING_RATES_WITH_COEFFICIENT for value in method.tuned.values]


def _over(field: str, *values: float) -> Coefficient:
    low, middle, high = values
    return Coefficient(f"objective.{field}", (low, middle, high))


def _loss(label: str, name: str, tuned: Coefficient | None = None, *settings: str) -> Method:
    return Method(label, LOSS, (f"objective.loss_mode={name}", *settings), tuned)


def _advantage(label: str, name: str, tuned: Coefficient | None = None, *settings: str) -> Method:
    return Method(label, ADVANTAGE, (f"objective.advantage_estimator={name}", *settings), tuned)


_KL = ("objective.use_kl_loss=true", "objective.kl_loss_coeff=0.02")
_KL_ON_WRONG = ("objective.use_kl_loss_on_wrong=true", "objective.kl_loss_coeff=0.05")
_DR_GRPO = (
    "objective.advantage_estimator=dr_grpo",
    "objective.loss_aggregation=seq-mean-token-sum-norm",
    "objective.loss_aggregation_constant=6",
)
_DAPO = ("rollout.drop_zero_spread=true",)  # clip-higher and token-mean are in base.yaml
_RIGHT_WEIGHT = _over("w_reinforce.right_weight", 0.05, 0.1, 0.2)
_APO = ("objective.loss_mode=apo_ratio", "objective.apo_pull_coeff=0.15")

METHODS: dict[str, Method] = {
    "grpo": Method("GRPO", BASELINE),
    "grpo_kl": Method("GRPO + KL", BASELINE, _KL, _over("kl_loss_coeff", 0.01, 0.02, 0.05)),
    "kl_on_wrong": Method("KL on wrong", BASELINE, _KL_ON_WRONG, _over("kl_loss_coeff", 0.02, 0.05, 0.1)),
    "dr_grpo": Method("Dr.GRPO", BASELINE, _DR_GRPO),
    "dapo": Method("DAPO", BASELINE, _DAPO, _over("clip_high", 0.2, 0.28, 0.4)),
    "apo": Method("APO", BASELINE, _APO, _over("apo_pull_coeff", 0.1, 0.15, 0.2)),
    # policy losses, with GRPO's advantages
    "cispo": _loss("CISPO", "cispo", _over("cispo.clip_high", 2, 4, 8)),
    "dispo": _loss("DISPO", "dispo", _over("dispo.right_clip_high", 5, 10, 20)),
    "sapo": _loss("SAPO", "sapo", _over("sapo.wrong_temperature", 1.05, 2, 4)),
    "gppo": _loss("GPPO", "gppo", _over("gppo.wrong_gradient", 0.25, 0.5, 1)),
    "dcpo_clip": _loss("DCPO clip", "dcpo_clip", _over("dcpo.clip_high", 0.14, 0.28, 0.56)),
    "dppo_tv": _loss("DPPO (TV)", "dppo_tv", _over("dppo.max_decrease", 0.1, 0.2, 0.4)),
    # advantage estimators, with GRPO's loss
    "rloo": _advantage("RLOO", "rloo"),
    "reinforce_plus_plus_baseline": _advantage("REINFORCE++", "reinforce_plus_plus_baseline"),
    "opo": _advantage("OPO", "opo"),
    "psr": _advantage("PSR", "psr"),
    "nsr": _advantage("NSR", "nsr"),
    "w_reinforce": _advantage(
        "W-REINFORCE", "w_reinforce", _over("w_reinforce.right_weight", 0.05, 0.1, 0.2)
    ),
    "passk": _advantage("Pass@k training", "passk", _over("passk.k", 2, 4, 8)),
    "pkpo": _advantage("PKPO", "pkpo", _over("pkpo.k", 2, 4, 8)),
    "gdpo": _advantage("GDPO", "gdpo", None, *_TWO_REWARDS),
    "dvao": _advantage("DVAO", "dvao", None, *_TWO_REWARDS),
}
