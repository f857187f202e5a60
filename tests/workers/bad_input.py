"""Runs that must be refused, in the same processes: the message of each."""

from __future__ import annotations

from typing import Any

from apo_megatron.config import load_config
from apo_megatron.config.schema import RLConfig
from apo_megatron.train import train


def messages(payload: dict[str, Any]) -> dict[str, str]:
    """{scenario: "ErrorClass: message"} of ``train`` with the overrides of each scenario."""
    found = {}
    for name, overrides in payload["scenarios"].items():
        try:
            train(load_config(RLConfig, payload["config"], overrides))
        except (ValueError, KeyError, RuntimeError) as error:
            found[name] = f"{type(error).__name__}: {error}"
        else:
            found[name] = "no error"
    return found
