"""The methods that compare.py compares: one line each. A new one needs no more than its line."""

from __future__ import annotations

from dataclasses import dataclass

BASELINE, LOSS, VARIANT, ADVANTAGE, SAMPLES = (
    "baseline",
    "policy loss",
    "variant of APO",
    "advantage estimator",
    "choice of samples",
)
FAMILIES = (BASELINE, LOSS, VARIANT, ADVANTAGE, SAMPLES)

# What --tune tries, six settings for every method: learning rates, and values of its most important setting.
LEARNING_RATES = (1e-4, 2e-4)  # x 3 values
LEARNING_RATES_ALONE = (5e-5, 7e-5, 1e-4, 1.4e-4, 2e-4, 2.8e-4)  # of a method with nothing to set

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
    others: tuple[str, ...] = ()  # fields that get the same value

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
    data: str = ""  # what it trains on, where that is not what the others do


@dataclass(frozen=True)
class Trial:
    """One setting of a method: its learning rate and coefficient, None = as configured."""

    learning_rate: float | None = None
    coefficient: float | None = None

    def words(self, method: Method) -> tuple[str, ...]:
        """As overrides."""
        words = [] if self.learning_rate is None else [f"optimizer.lr={self.learning_rate:g}"]
        if self.coefficient is not None and method.tuned is not None:
            fields = (method.tuned.field, *method.tuned.others)
            words += [f"{field}={self.coefficient:g}" for field in fields]
        return tuple(words)

    def name(self, method: Method) -> str:
        """What is tried, fit for a folder: ``lr_0.0002-clip_high_4``."""
        names = [] if self.learning_rate is None else [f"lr_{self.learning_rate:g}"]
        if self.coefficient is not None and method.tuned is not None:
            names.append(f"{method.tuned.name}_{self.coefficient:g}")
        return "-".join(names) or "as_configured"


def trials(method: Method) -> list[Trial]:
    """The six settings of ``method`` that --tune tries."""
    if method.tuned is None:
        return [Trial(lr) for lr in LEARNING_RATES_ALONE]
    return [Trial(lr, value) for lr in LEARNING_RATES for value in method.tuned.values]


def _over(field: str, low: float, middle: float, high: float, *others: str) -> Coefficient:
    return Coefficient(f"objective.{field}", (low, middle, high), tuple(f"objective.{o}" for o in others))


# Of the methods that have nothing of their own but keep GRPO's clip.
_CLIP_HIGH = _over("clip_high", 0.2, 0.28, 0.4)
_CLIP_LOW = _over("clip_low", 0.1, 0.2, 0.3)


def _loss(label: str, name: str, tuned: Coefficient | None, *settings: str) -> Method:
    return Method(label, LOSS, (f"objective.loss_mode={name}", *settings), tuned)


def _variant(label: str, tuned: Coefficient, *settings: str) -> Method:
    return Method(label, VARIANT, (*_APO, *settings), tuned)


def _advantage(label: str, name: str, tuned: Coefficient = _CLIP_HIGH, *settings: str) -> Method:
    return Method(label, ADVANTAGE, (f"objective.advantage_estimator={name}", *settings), tuned)


_KL = ("objective.use_kl_loss=true", "objective.kl_loss_coeff=0.02")
_KL_ON_WRONG = ("objective.use_kl_loss_on_wrong=true", "objective.kl_loss_coeff=0.05")
_DR_GRPO = (
    "objective.advantage_estimator=dr_grpo",
    "objective.loss_aggregation=seq-mean-token-sum-norm",
    "objective.loss_aggregation_constant=6",
)
_DAPO = ("rollout.drop_zero_spread=true",)  # clip-higher and token-mean are in base.yaml
_APO = ("objective.loss_mode=apo_ratio", "objective.apo_pull_coeff=0.15")
_PULL = _over("apo_pull_coeff", 0.1, 0.15, 0.2)
# The bounds of the authors are those of answers of thousands of tokens; here an answer has six.
_GSPO = ("objective.gspo.clip_low=0.04", "objective.gspo.clip_high=0.04")
# GBPO and KL-Cov follow the sign of r - 1: at r = 1 this must not be the rounding of engine against actor.
_EXACT_OLD = ("objective.old_log_probs=recompute",)

METHODS: dict[str, Method] = {
    "grpo": Method("GRPO", BASELINE, (), _CLIP_HIGH),
    "grpo_kl": Method("GRPO + KL", BASELINE, _KL, _over("kl_loss_coeff", 0.01, 0.02, 0.05)),
    "kl_on_wrong": Method("KL on wrong", BASELINE, _KL_ON_WRONG, _over("kl_loss_coeff", 0.02, 0.05, 0.1)),
    "dr_grpo": Method("Dr.GRPO", BASELINE, _DR_GRPO, _CLIP_HIGH),
    "dapo": Method("DAPO", BASELINE, _DAPO, _CLIP_HIGH, "draws more prompts, until enough groups are mixed"),
    "apo": Method("APO", BASELINE, _APO, _PULL),
    # policy losses, with GRPO's advantages
    "cispo": _loss("CISPO", "cispo", _over("cispo.clip_high", 2, 4, 8)),
    "dispo": _loss("DISPO", "dispo", _over("dispo.right_clip_high", 5, 10, 20)),
    "sapo": _loss("SAPO", "sapo", _over("sapo.wrong_temperature", 1.05, 2, 4)),
    "gppo": _loss("GPPO", "gppo", _over("gppo.wrong_gradient", 0.25, 0.5, 1)),
    "dcpo_clip": _loss("DCPO clip", "dcpo_clip", _over("dcpo.clip_high", 0.14, 0.28, 0.56)),
    "dppo_tv": _loss("DPPO (TV)", "dppo_tv", _over("dppo.max_decrease", 0.1, 0.2, 0.4)),
    "gspo": _loss("GSPO", "gspo", _over("gspo.clip_high", 4e-3, 4e-2, 0.2, "gspo.clip_low"), *_GSPO),
    "ctpo": _loss("CTPO", "ctpo", _over("ctpo.high", 0.025, 0.05, 0.1)),
    "vespo": _loss("VESPO", "vespo", _over("vespo.wrong_decay", 1, 2, 4)),
    "simko": _loss("SimKO", "simko", _over("simko.mix", 0.01, 0.05, 0.1)),
    "topk_forward_kl": _loss("Top-K KL", "topk_forward_kl", _over("topk_forward_kl.weight", 0.02, 0.05, 0.1)),
    "clip_cov": _loss("Clip-Cov", "clip_cov", _over("clip_cov.share", 2e-4, 2e-3, 2e-2)),
    "kl_cov": _loss("KL-Cov", "kl_cov", _over("kl_cov.share", 2e-3, 2e-2, 2e-1), *_EXACT_OLD),
    "bapo": _loss("BAPO", "bapo", _over("bapo.target", 0.25, 0.5, 1)),
    "dmpo": _loss("DMPO", "dmpo", _over("dmpo.coeff", 1, 2, 4)),
    "p3o": _loss("P3O", "p3o", None),
    "gbpo": _loss("GBPO", "gbpo", _over("gbpo.temperature", 0.1, 0.3, 1), *_EXACT_OLD),
    # variants of APO
    "apo_detached": _variant("APO, pull detached", _PULL, "objective.apo_variants.detach_pull=true"),
    "apo_adaptive": _variant(
        "APO, adaptive pull",
        _over("apo_variants.target_anchor_ratio", 0.5, 1, 2),
        "objective.apo_variants.target_anchor_ratio=1",
    ),
    "apo_scheduled": _variant(
        "APO, pull to 0.05",
        _PULL,
        "objective.apo_variants.final_pull_coeff=0.05",
        "objective.apo_variants.schedule_steps=100",
    ),
    "apo_average": _variant(
        "APO, averaged reference",
        _over("apo_variants.reference_decay", 0.9, 0.99, 0.999),
        "objective.apo_variants.reference_decay=0.99",
    ),
    "apo_top_p": _variant(
        "APO, Top-P",
        _over("apo_variants.support_mass", 0.8, 0.9, 0.95),
        "objective.apo_variants.support_mass=0.9",
    ),
    # advantage estimators, with GRPO's loss
    "rloo": _advantage("RLOO", "rloo"),
    "reinforce_plus_plus_baseline": _advantage("REINFORCE++", "reinforce_plus_plus_baseline"),
    "opo": _advantage("OPO", "opo"),
    "psr": _advantage("PSR", "psr"),
    "nsr": _advantage("NSR", "nsr", _CLIP_LOW),
    "w_reinforce": _advantage(
        "W-REINFORCE", "w_reinforce", _over("w_reinforce.right_weight", 0.05, 0.1, 0.2)
    ),
    "passk": _advantage("Pass@k training", "passk", _over("passk.k", 2, 4, 8)),
    "pkpo": _advantage("PKPO", "pkpo", _over("pkpo.k", 2, 4, 8)),
    "gdpo": _advantage("GDPO", "gdpo", _CLIP_HIGH, *_TWO_REWARDS),
    "dvao": _advantage("DVAO", "dvao", _CLIP_HIGH, *_TWO_REWARDS),
    "riskpo": _advantage(
        "RiskPO", "riskpo", _over("riskpo.cvar_weight", 0.5, 1.5, 3), "objective.riskpo.bundle_size=4"
    ),
    # each prompt is seen once here, so that the statistics of its visits are those of its one group
    "dcpo": _advantage("DCPO", "dcpo"),
    # which samples are trained on; Knapsack's numbers of samples need prompts that come again
    "d3s": Method(
        "D3S",
        SAMPLES,
        ("rollout.sample_filter=d3s",),
        Coefficient("rollout.d3s.first_share", (0.25, 0.5, 0.75)),
        "trains on a part of the samples",
    ),
}
