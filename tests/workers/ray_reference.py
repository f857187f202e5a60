"""The run that the Ray launcher is compared with: the same configuration, started as torchrun would."""

from __future__ import annotations

from typing import Any

from apo_megatron.config import RLConfig
from apo_megatron.train import train


def run(payload: dict[str, Any]) -> None:
    train(RLConfig.model_validate(payload))
