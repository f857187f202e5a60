"""The variants of APO outside the loss: the Top-P support on one and two ranks, the averaged reference."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from apo_megatron.actor.snapshot import AveragedWeights
from apo_megatron.parallel.vocab_shard import VocabShard
from tests.distributed import run_distributed
from tests.workers.top_p import results_of

NUM_TOKENS, VOCAB_SIZE, PADDED, TEMPERATURE = 60, 45, 48, 0.7
MASSES = (0.999999, 0.9, 0.5, 0.1, None)


def objective(topk: int, mass: float | None, exclude: bool) -> dict[str, Any]:
    variants = {} if mass is None else {"support_mass": mass}
    return {"apo_topk": topk, "apo_exclude_sampled": exclude, "apo_variants": variants}


OBJECTIVES = [
    *(objective(8, mass, exclude) for mass in MASSES for exclude in (True, False)),
    objective(1, 0.5, True),
    objective(VOCAB_SIZE + 1, 0.9, True),  # more than there are
    objective(VOCAB_SIZE + 1, 0.9999999, True),
]


def make_payload() -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    reference, noise = torch.randn(2, NUM_TOKENS, PADDED, generator=generator, dtype=torch.float64)
    reference = reference * torch.linspace(0.1, 6, NUM_TOKENS)[:, None]  # from nearly even to nearly sure
    targets = torch.randint(VOCAB_SIZE, (NUM_TOKENS,), generator=generator)
    targets[::2] = reference[::2, :VOCAB_SIZE].argmax(-1)
    return {
        "reference": reference,
        "policy": reference + noise,
        "targets": targets,
        "vocab_size": VOCAB_SIZE,
        "temperature": TEMPERATURE,
        "objectives": OBJECTIVES,
    }


def plain(payload: dict[str, Any], cfg: dict[str, Any]) -> dict[str, Any]:
    """Token by token: sort, take while the mass before is too small, leave the sampled token out."""
    reference, policy = (
        (payload[name][:, :VOCAB_SIZE] / TEMPERATURE).softmax(-1) for name in ("reference", "policy")
    )
    mass, found = cfg["apo_variants"].get("support_mass", 2.0), []
    for t, y in enumerate(payload["targets"].tolist()):
        support: list[int] = []
        for token in reference[t].argsort(descending=True)[: cfg["apo_topk"]].tolist():
            if reference[t, support].sum() < mass:
                support.append(token)
        anchor = [token for token in support if token != y or not cfg["apo_exclude_sampled"]]
        found.append(
            {
                "support": set(anchor),
                "coverage": reference[t, support].sum(),
                "anchor_mass": reference[t, anchor].sum(),
                "support_coverage": policy[t, support].sum(),
                "sampled_in_support": torch.tensor(float(y in support)),
                "size": torch.tensor(len(support)),
            }
        )
    return {
        name: [row[name] for row in found] if name == "support" else torch.stack([row[name] for row in found])
        for name in found[0]
    }


def check(payload: dict[str, Any], results: list[dict[str, Any]]) -> None:
    for cfg, found in zip(OBJECTIVES, results, strict=True):
        expected = plain(payload, cfg)
        ids = found["support_ids"]
        assert ids.shape == (NUM_TOKENS, cfg["apo_topk"]) and ids.dtype == torch.int32
        assert [{i for i in row if i >= 0} for row in ids.tolist()] == expected["support"], cfg
        for name in ("coverage", "anchor_mass"):
            values = found["anchor_log_mass"].exp() if name == "anchor_mass" else found[name]
            torch.testing.assert_close(values.double(), expected[name].double(), rtol=1e-12, atol=1e-14)
        for name in ("support_coverage", "sampled_in_support"):
            mean = expected[name].double().mean().item()
            assert found["metrics"][name] == pytest.approx(mean, rel=1e-12), (cfg, name)


def test_the_support_is_the_smallest_prefix_that_reaches_the_mass() -> None:
    payload = make_payload()
    shard = VocabShard(0, PADDED, VOCAB_SIZE)
    check(payload, [results_of(payload, cfg, shard) for cfg in OBJECTIVES])
    sizes = plain(payload, objective(8, 0.9, True))["size"]
    assert sizes.min() == 1 and sizes.max() == 8 and len(sizes.unique()) > 4  # the cases reach everything
    shares = plain(payload, objective(8, 0.5, True))["sampled_in_support"].mean()
    assert 0.2 < shares < 0.8


def test_the_support_is_the_same_with_the_vocabulary_on_two_ranks() -> None:
    payload = make_payload()
    for results in run_distributed(2, "tests.workers.top_p:run", payload):
        check(payload, results)


# --- the averaged reference -----------------------------------------------------------------------


def parameters(dtype: torch.dtype) -> list[torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(1)
    return [torch.nn.Parameter(torch.randn(*s, generator=generator).to(dtype)) for s in ((3, 4), (5,))]


def bits(weights: list[torch.nn.Parameter]) -> list[Tensor]:
    return [weight.detach().clone() for weight in weights]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_average_is_that_of_a_plain_recomputation(dtype: torch.dtype) -> None:
    weights, decay = parameters(dtype), 0.9
    averaged = AveragedWeights(weights, decay)
    expected = [weight.detach().double() for weight in weights]
    for step in range(5):
        for weight in weights:
            weight.data += 0.1 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(step)).to(
                dtype
            )
        averaged.update()
        expected = [
            decay * a + (1 - decay) * w.double() for a, w in zip(expected, bits(weights), strict=True)
        ]
        current = bits(weights)
        with averaged.in_place():
            for weight, value in zip(weights, expected, strict=True):
                tolerance = 1e-6 if dtype == torch.float32 else 2**-8
                torch.testing.assert_close(weight.detach().double(), value, rtol=tolerance, atol=1e-7)
        assert all(map(torch.equal, bits(weights), current))
        for (_, average), value in zip(averaged.averages, expected, strict=True):
            assert average.dtype == torch.float32
            torch.testing.assert_close(average.double(), value, rtol=1e-6, atol=1e-7)


def test_steps_too_small_for_bf16_are_not_lost() -> None:
    """1 % of the way from 1 to 1.0078125, its neighbour in bf16: 100 steps of it come close."""
    weight = torch.nn.Parameter(torch.ones(1, dtype=torch.bfloat16))
    averaged = AveragedWeights([weight], decay=0.99)
    weight.data += 2**-7
    for _ in range(100):
        averaged.update()
        with averaged.in_place():
            pass
    expected = 1 + (1 - 0.99**100) * 2**-7
    assert averaged.averages[0][1].item() == pytest.approx(expected, abs=2e-6)
    with averaged.in_place():
        assert weight.item() == 1 + 2**-7  # the nearest, where an average in bf16 would still be 1


def test_before_the_first_update_the_average_is_what_the_weights_were() -> None:
    weights = parameters(torch.bfloat16)
    start, averaged = bits(weights), AveragedWeights(weights, 0.5)
    for weight in weights:
        weight.data.zero_()
    with averaged.in_place():
        assert all(map(torch.equal, bits(weights), start))
    assert all(not weight.any() for weight in weights)
