"""Corrections for an engine that is not quite the policy: formulas, gradients, metrics, every layout."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from apo_megatron.config import ObjectiveConfig
from apo_megatron.objectives import MetricSums, build_objective, mismatch_metrics, mismatch_weights
from tests.distributed import run_distributed
from tests.objective_cases import MODES, Case, config, inputs_of, make_case, token_weights
from tests.test_objective_call import plain_token_losses
from tests.tiny_models import make_tiny_model

CORRECTIONS: dict[str, dict[str, Any]] = {
    "tis": {"mismatch_correction": "tis", "tis_cap": 1.5},
    "icepop": {"mismatch_correction": "icepop", "icepop_low": 0.6, "icepop_high": 1.8},
}
INF = math.inf


def rollout_log_probs(case: Case) -> Tensor:
    """pi_rollout, so far from pi_old that both corrections have work on both sides."""
    generator = torch.Generator().manual_seed(7)
    return case.old_log_probs - torch.randn(len(case.targets), generator=generator, dtype=torch.float64)


def plain_weight(ratio: float, cfg: ObjectiveConfig) -> float:
    if cfg.mismatch_correction == "tis":
        return min(ratio, cfg.tis_cap)
    return ratio if cfg.icepop_low <= ratio <= cfg.icepop_high else 0.0


# --- the formulas ---------------------------------------------------------------------------------


@pytest.mark.parametrize("correction", CORRECTIONS)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("setting", ["plain", "dual_clip", "kl", "kl_on_wrong", "entropy", "per_sequence"])
def test_the_policy_loss_is_weighted_and_nothing_else(correction: str, mode: str, setting: str) -> None:
    cfg = config(mode, setting).model_copy(update=CORRECTIONS[correction])
    case = make_case()
    rollout = rollout_log_probs(case)
    inputs = dataclasses.replace(inputs_of(case, cfg), rollout_log_probs=rollout)
    aggregation = token_weights(case, cfg)
    loss, metrics = build_objective(cfg)(inputs, aggregation)

    ratios = (case.old_log_probs - rollout).exp().tolist()
    weights = torch.tensor([plain_weight(ratio, cfg) for ratio in ratios], dtype=torch.float64)
    without = {"use_kl_loss": False, "use_kl_loss_on_wrong": False, "entropy_coeff": 0.0}
    policy = plain_token_losses(case, cfg.model_copy(update=without), case.logits)
    regularizers = plain_token_losses(case, cfg, case.logits) - policy
    expected = (aggregation * (weights * policy + regularizers)).sum()
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(
        torch.autograd.grad(loss, case.logits)[0],
        torch.autograd.grad(expected, case.logits)[0],
        rtol=1e-10,
        atol=1e-12,
    )
    sums = MetricSums()
    sums.add(metrics)
    assert sums.finalize()["policy_loss"] == pytest.approx((weights * policy).mean().item())
    assert (weights == 0).any() if correction == "icepop" else (weights == cfg.tis_cap).any()
    assert ((weights > 0) & (weights != 1) & (weights < 1.5)).any()


@pytest.mark.parametrize(
    ("correction", "ratios", "expected"),
    [
        ("tis", [0.0, 0.1, 1.0, 1.5, 1.51, INF], [math.exp(-20), 0.1, 1.0, 1.5, 1.5, 1.5]),
        ("icepop", [0.0, 0.59, 0.61, 1.0, 1.79, 1.81, INF], [0.0, 0.0, 0.61, 1.0, 1.79, 0.0, 0.0]),
    ],
)
def test_weights_at_their_bounds(correction: str, ratios: list[float], expected: list[float]) -> None:
    cfg = ObjectiveConfig(**CORRECTIONS[correction])
    old = torch.tensor(ratios, dtype=torch.float64).log().clamp(max=300.0)
    found = mismatch_weights(old, torch.zeros_like(old), cfg)
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64))


def test_the_bounds_of_icepop_belong_to_it() -> None:
    cfg = ObjectiveConfig(mismatch_correction="icepop", icepop_low=1.0, icepop_high=1.0)
    same = torch.randn(9, dtype=torch.float64)
    assert mismatch_weights(same, same, cfg).tolist() == [1.0] * 9


def test_a_masked_token_has_no_gradient() -> None:
    cfg = ObjectiveConfig(loss_mode="vanilla", **CORRECTIONS["icepop"])
    case = make_case()
    inputs = inputs_of(case, cfg)
    masked = torch.arange(len(case.targets)) % 2 == 0
    rollout = torch.where(masked, -INF, inputs.old_log_probs)  # the engine held the token impossible
    loss, _ = build_objective(cfg)(
        dataclasses.replace(inputs, rollout_log_probs=rollout), token_weights(case, cfg)
    )
    gradient = torch.autograd.grad(loss, case.logits)[0]
    assert (gradient[masked] == 0).all() and (gradient[~masked] != 0).any()


@pytest.mark.parametrize("mode", MODES)
def test_engines_that_agree_need_no_correction(mode: str) -> None:
    """Weights of exactly 1 change nothing, to the bit."""
    results = []
    for settings in ({}, *CORRECTIONS.values()):
        cfg = config(mode, "kl").model_copy(update=settings)
        case = make_case()
        inputs = dataclasses.replace(inputs_of(case, cfg), rollout_log_probs=case.old_log_probs)
        loss, _ = build_objective(cfg)(inputs, token_weights(case, cfg))
        results.append((loss.item(), torch.autograd.grad(loss, case.logits)[0]))
    for loss_value, gradient in results[1:]:
        assert loss_value == results[0][0] and torch.equal(gradient, results[0][1])


def test_a_correction_declares_its_need() -> None:
    assert "rollout_log_probs" in build_objective(ObjectiveConfig(mismatch_correction="tis")).needs
    assert "rollout_log_probs" not in build_objective(ObjectiveConfig()).needs


# --- the metrics ----------------------------------------------------------------------------------


def finalized(old: Tensor, rollout: Tensor, cfg: ObjectiveConfig) -> dict[str, float]:
    sums = MetricSums()
    for part in (slice(0, 3), slice(3, 3), slice(3, None)):
        sums.add(mismatch_metrics(old[part], rollout[part], cfg))
    return sums.finalize()


def plain_metrics(old: np.ndarray, rollout: np.ndarray, cfg: ObjectiveConfig) -> dict[str, float]:
    gap, ratio = np.abs(old - rollout), np.exp(old - rollout)
    bounds = {"none": (0.0, INF), "tis": (0.0, cfg.tis_cap), "icepop": (cfg.icepop_low, cfg.icepop_high)}
    low, high = bounds[cfg.mismatch_correction]
    quantiles = {"p05": 0.05, "p50": 0.5, "p95": 0.95, "max": 1.0}
    return {
        "mismatch/log_prob_gap_mean": gap.mean(),
        "mismatch/log_prob_gap_max": gap.max(),
        "mismatch/kl_k3": (ratio - 1 - np.log(ratio)).mean(),
        "mismatch/ratio": ratio.mean(),
        "mismatch/corrected_share": ((ratio < low) | (ratio > high)).mean(),
        **{
            f"mismatch/ratio_{key}": np.quantile(ratio, q, method="inverted_cdf")
            for key, q in quantiles.items()
        },
    }


def assert_metrics(found: dict[str, float], expected: dict[str, float], rel: float) -> None:
    assert {name for name in found if name.startswith("mismatch/")} == expected.keys()
    for name, value in expected.items():
        is_binned = name.endswith(("_p05", "_p50", "_p95", "_max"))
        assert found[name] == pytest.approx(value, rel=0.0236 if is_binned else rel, abs=1e-12), name


@pytest.mark.parametrize("settings", [{}, *CORRECTIONS.values()], ids=["none", *CORRECTIONS])
def test_metrics_are_those_of_the_definitions(settings: dict[str, Any]) -> None:
    cfg, case = ObjectiveConfig(**settings), make_case()
    rollout = rollout_log_probs(case)
    found = finalized(case.old_log_probs, rollout, cfg)
    assert_metrics(found, plain_metrics(case.old_log_probs.numpy(), rollout.numpy(), cfg), rel=1e-9)
    assert (found["mismatch/corrected_share"] > 0) is bool(settings)


def test_a_token_that_the_engine_held_impossible_is_seen() -> None:
    old, rollout = torch.zeros(4, dtype=torch.float64), torch.tensor([0.0, 0.0, -INF, 0.0]).double()
    found = finalized(old, rollout, ObjectiveConfig())
    assert found["mismatch/log_prob_gap_max"] == pytest.approx(1e20)
    assert found["mismatch/ratio_p50"] == pytest.approx(1.0)


# --- in the actor, on every layout ----------------------------------------------------------------

LAYOUTS: dict[str, dict[str, Any]] = {
    "dp2": {},
    "tp2": {"tensor_parallel_size": 2},
    "tp2_sp": {"tensor_parallel_size": 2, "sequence_parallel": True},
    "pp2": {"pipeline_parallel_size": 2},
    "pp2_vpp2": {"pipeline_parallel_size": 2, "virtual_pipeline_parallel_size": 2},
}
OBJECTIVES: dict[str, dict[str, Any]] = {
    "none": {"loss_mode": "vanilla", "support_telemetry": False},
    "tis": {"loss_mode": "vanilla", "support_telemetry": False, **CORRECTIONS["tis"]},
    "icepop": {"loss_mode": "apo_ratio", "apo_pull_coeff": 0.15, **CORRECTIONS["icepop"]},
    "trusted": {"loss_mode": "vanilla", "support_telemetry": False, "old_log_probs": "rollout"},
}
TEMPERATURE = 0.8


@dataclasses.dataclass(frozen=True)
class Plain:
    """What transformers says of some sequences."""

    model: Any
    sequences: list[dict[str, Any]]

    def log_probs(self, sequence: dict[str, Any], temperature: float) -> Tensor:
        """[L - 1, V]: of the tokens after each but the last."""
        logits = self.model(sequence["tokens"][None]).logits[0, :-1]
        return (logits / temperature).log_softmax(-1)

    def response(self, sequence: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """[R, V] at the temperature of training, and the sampled tokens [R]."""
        start = sequence["prompt_length"]
        return self.log_probs(sequence, TEMPERATURE)[start - 1 :], sequence["tokens"][start:]

    def update(self, cfg: ObjectiveConfig) -> tuple[float, float]:
        """Loss and gradient norm at theta = old = reference, with token-mean."""
        losses = []
        for sequence in self.sequences:
            log_probs, targets = self.response(sequence)
            sampled = log_probs.gather(-1, targets[:, None])[:, 0]
            trusted = cfg.old_log_probs == "rollout"
            ratio = torch.exp(sampled - (sequence["rollout"] if trusted else sampled.detach()))
            if cfg.loss_mode == "apo_ratio" and sequence["advantage"] < 0:
                top = log_probs.topk(cfg.apo_topk, dim=-1).indices
                mass = (log_probs.exp().gather(-1, top) * (top != targets[:, None])).sum(-1)
                ratio = cfg.apo_push_coeff * ratio - cfg.apo_pull_coeff * mass / mass.detach()
            clipped = ratio.clamp(1 - cfg.clip_low, 1 + cfg.clip_high)
            loss = torch.maximum(-sequence["advantage"] * ratio, -sequence["advantage"] * clipped)
            if cfg.mismatch_correction != "none":
                rho = (sampled.detach() - sequence["rollout"]).exp().tolist()
                loss = loss * torch.tensor([plain_weight(value, cfg) for value in rho])
            losses.append(loss)
        self.model.zero_grad()
        total = torch.cat(losses).mean()
        total.backward()
        gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
        return float(total.detach()), float(torch.cat([g.flatten() for g in gradients]).norm())


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Plain:
    path = make_tiny_model(tmp_path_factory.mktemp("mismatch"), "qwen2", num_layers=4)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="eager")
    model.get_input_embeddings().padding_idx = None  # see plain_reference.py
    generator = torch.Generator().manual_seed(2)
    found = Plain(model, [])
    for prompt, response, advantage in ((3, 6, 1.2), (5, 9, -0.8), (2, 1, 0.9), (4, 7, -1.1), (6, 4, 1.0)):
        tokens = torch.randint(2, 107, (prompt + response,), generator=generator)
        sequence = {"tokens": tokens, "prompt_length": prompt, "advantage": advantage}
        with torch.no_grad():
            log_probs, targets = found.response(sequence)
        noise = torch.randn(response, generator=generator)
        sequence["rollout"] = log_probs.gather(-1, targets[:, None])[:, 0] - noise
        found.sequences.append(sequence)
    return found


@pytest.fixture(scope="module")
def by_rank(plain: Plain) -> list[dict[str, dict[str, Any]]]:
    payload = {
        "model_path": plain.model.config._name_or_path,
        "temperature": TEMPERATURE,
        "sequences": plain.sequences,
        "layouts": LAYOUTS,
        "objectives": OBJECTIVES,
    }
    return run_distributed(2, "tests.workers.mismatch:run_layouts", payload)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_scores_are_those_of_transformers_at_temperature_one(
    layout: str, plain: Plain, by_rank: list[dict[str, dict[str, Any]]]
) -> None:
    scores = by_rank[0][layout]["scores"]
    assert by_rank[1][layout]["scores"] == scores  # to the bit
    assert by_rank[0][layout]["dtypes"] == ["float32"] * len(plain.sequences)
    for sequence, found in zip(plain.sequences, scores, strict=True):
        with torch.no_grad():
            log_probs = plain.log_probs(sequence, temperature=1.0)
        expected = log_probs.gather(-1, sequence["tokens"][1:, None])[:, 0]
        np.testing.assert_allclose(found, expected.numpy(), atol=1e-5, rtol=0)


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_corrected_update_is_that_of_plain_torch(
    layout: str, objective: str, plain: Plain, by_rank: list[dict[str, dict[str, Any]]]
) -> None:
    found = by_rank[0][layout]["updates"][objective]
    assert by_rank[1][layout]["updates"][objective] == found
    loss, grad_norm = plain.update(ObjectiveConfig(**OBJECTIVES[objective]))
    assert found["loss"] == pytest.approx(loss, rel=1e-5)
    assert found["grad_norm"] == pytest.approx(grad_norm, rel=1e-5)


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_mismatch_of_a_step_is_measured(
    layout: str, objective: str, plain: Plain, by_rank: list[dict[str, dict[str, Any]]]
) -> None:
    found = by_rank[0][layout]["updates"][objective]
    if objective == "trusted":
        assert not [name for name in found if name.startswith("mismatch/")]
        return
    rollout = torch.cat([sequence["rollout"] for sequence in plain.sequences]).double().numpy()
    old = []
    for sequence in plain.sequences:
        with torch.no_grad():
            log_probs, targets = plain.response(sequence)
        old.append(log_probs.gather(-1, targets[:, None])[:, 0])
    cfg = ObjectiveConfig(**OBJECTIVES[objective])
    assert_metrics(found, plain_metrics(torch.cat(old).double().numpy(), rollout, cfg), rel=1e-4)


def test_the_corrections_of_these_sequences_differ(plain: Plain) -> None:
    """Otherwise the comparisons above would prove less than they seem to."""
    found = [plain.update(ObjectiveConfig(**objective)) for objective in OBJECTIVES.values()]
    for one, other in zip(found, found[1:], strict=False):
        assert abs(one[1] - other[1]) > 1e-2 * one[1]
