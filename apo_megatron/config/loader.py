"""Reads YAML plus ``section.field=value`` overrides into a frozen config; writes the resolved one."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from apo_megatron.errors import ConfigError

Config = TypeVar("Config", bound=BaseModel)


def load_config(cls: type[Config], path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Defaults < YAML at ``path`` < overrides. Raises ConfigError."""
    values: dict[str, Any] = yaml.safe_load(Path(path).read_text()) or {}
    for item in overrides:
        key, _, text = item.partition("=")
        *sections, name = key.split(".")
        target = values
        for section in sections:
            target = target.setdefault(section, {})
        target[name] = yaml.safe_load(text)
    try:
        return cls.model_validate(values)
    except ValidationError as error:
        raise ConfigError(str(error)) from error


def dump_config(cfg: BaseModel, path: str | Path) -> None:
    """Write the resolved config as YAML."""
    Path(path).write_text(yaml.safe_dump(cfg.model_dump(mode="json"), sort_keys=False))
