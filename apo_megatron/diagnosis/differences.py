"""How far two results of ``run_one_step`` are apart."""

from __future__ import annotations

from typing import Any


def relative_differences(found: dict[str, Any], expected: dict[str, Any]) -> dict[str, float]:
    """The largest of each kind: |a - b| / |b| of losses and gradient norms, ||a - b|| / ||b|| of parameters.

    Both are results of ``run_one_step`` on rank 0, with the same parameters.
    """
    parameters = expected["parameters"]
    assert found["parameters"].keys() == parameters.keys()
    return {
        "loss": max(abs(a - b) / abs(b) for a, b in zip(found["losses"], expected["losses"], strict=True)),
        "grad_norm": max(
            abs(a - b) / b for a, b in zip(found["grad_norms"], expected["grad_norms"], strict=True)
        ),
        "parameters": max(
            float((found["parameters"][name] - value).norm() / value.norm())
            for name, value in parameters.items()
        ),
    }
