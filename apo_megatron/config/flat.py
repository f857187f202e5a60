"""Settings without their sections: ``{"train.seed": 0, ...}``, as they are written in overrides."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel

from apo_megatron.config.describe import section_of


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """{dotted name: value}, of nested mappings."""
    found: dict[str, Any] = {}
    for name, value in values.items():
        is_section = isinstance(value, Mapping)
        found |= flat(value, f"{prefix}{name}.") if is_section else {f"{prefix}{name}": value}
    return found


def default_settings(cls: type[BaseModel]) -> dict[str, Any]:
    """{dotted name: default as in JSON} of every setting of a configuration that has a default."""
    return flat(_defaults(cls))


def _defaults(section: type[BaseModel]) -> dict[str, Any]:
    given: dict[str, Any] = {}
    of_sections: dict[str, Any] = {}
    for name, field in section.model_fields.items():
        inner = section_of(field)
        if not field.is_required():
            given[name] = field.get_default(call_default_factory=True)
        elif inner is not None:
            of_sections[name] = _defaults(inner)
    return section.model_construct(**given).model_dump(mode="json", include=set(given)) | of_sections
