"""Reads YAML plus ``section.field=value`` overrides into a frozen config; writes the resolved one.

Everything that is wrong is reported in one ConfigError, a line each: ``file:line: section.field: ...``.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from apo_megatron.config.base_files import read_with_bases
from apo_megatron.config.describe import (
    choices_of,
    describe_type,
    describe_value,
    is_optional,
    item_section_of,
    section_of,
)
from apo_megatron.config.yaml_source import KeyPath, YamlError, read_yaml
from apo_megatron.errors import ConfigError
from apo_megatron.files import write_atomically

Config = TypeVar("Config", bound=BaseModel)
# Names that other frameworks and papers have for a choice, and whose spelling is nearer to another one.
_KNOWN_AS = {"grpo": "vanilla", "ppo": "vanilla", "apo": "apo_ratio"}


def load_config(cls: type[Config], path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Defaults < YAML at ``path`` < overrides (``section.field=value``, the value read as YAML).

    The YAML may begin with ``base: other.yaml``, whose values then lie under its own (``base_files.py``).

    Raises ConfigError with one line for each problem: a file that is not there or not YAML, keys that are
    unknown (the nearest known one is named), given twice or missing, values of a wrong type or out of
    bounds, overrides of unknown fields, broken rules of the schema.
    """
    source = read_with_bases(Path(path))
    problems, origins = list(source.problems), source.origins
    for override in overrides:
        problems += _apply_override(cls, source.values, origins, override)
    try:
        config = cls.model_validate(source.values)
    except ValidationError as error:
        for details in error.errors(include_url=False):
            problems += _explain(cls, details, origins, str(path))
    if problems:
        raise ConfigError(_message(str(path), problems))
    return config


def dump_config(cfg: BaseModel, path: str | Path) -> None:
    """Write the resolved config as YAML that ``load_config`` reads back to an equal config.

    A reader never sees half a file.
    """
    write_atomically(path, yaml.safe_dump(cfg.model_dump(mode="json"), sort_keys=False, allow_unicode=True))


def _apply_override(
    cls: type[BaseModel], values: dict[str, Any], origins: dict[KeyPath, str], override: str
) -> list[str]:
    """Put one override into ``values`` and ``origins``; the problem with it, if any."""
    origin = f"override {override}"
    name, equals, text = override.partition("=")
    key = tuple(part.strip() for part in name.split("."))
    if not equals:
        return [f"{origin}: expected section.field=value"]
    parent = _section_at(cls, key[:-1])
    if parent is None or key[-1] not in parent.model_fields:
        return [f"{origin}: {_unknown(cls, key)}"]
    info = parent.model_fields[key[-1]]
    section = section_of(info)
    if section is not None and not (text.strip() == "null" and is_optional(info)):
        example = f"{name}.{next(iter(section.model_fields))}"
        return [f"{origin}: {name} is a section: name one of its fields, as in {example}=..."]
    try:
        value = read_yaml(text).values
    except YamlError as error:
        return [f"{origin}: the value is not YAML: {error}"]
    for part in key[:-1]:
        if values.get(part) is None:  # missing, or an optional section that is not there
            values[part] = {}
        values = values[part]
        if not isinstance(values, dict):
            return []  # the file has something else than a section there, which validation reports
    values[key[-1]] = value
    origins[key] = origin
    return []


def _explain(
    cls: type[BaseModel], details: ErrorDetails, origins: dict[KeyPath, str], path: str
) -> Iterator[str]:
    """One finding of pydantic in our words: where, which field, what was found, what was expected."""
    key = tuple(map(str, details["loc"]))
    place = next((origins[key[:n]] for n in range(len(key), 0, -1) if key[:n] in origins), path)
    if details["type"] == "value_error":
        for broken_rule in str(details["ctx"]["error"]).splitlines():
            yield f"{place}: {'.'.join(key)}: {broken_rule}" if key else f"{place}: {broken_rule}"
        return
    if details["type"] in ("extra_forbidden", "invalid_key"):
        yield f"{place}: {_unknown(cls, key)}"
        return
    while (parent := _section_at(cls, key[:-1])) is None:  # an item of a list: explain the whole field
        key = key[:-1]
    info = parent.model_fields[key[-1]]
    if details["type"] == "missing":
        meaning = f" ({info.description})" if info.description else ""
        yield f"{place}: {'.'.join(key)}: missing, expected {describe_type(info)}{meaning}"
    else:
        found = describe_value(details["input"])
        choices = choices_of(info)
        known_as = _KNOWN_AS.get(str(details["input"]).lower())
        near = [known_as] if known_as in choices else get_close_matches(str(details["input"]), choices, n=1)
        advice = f"; did you mean {near[0]}?" if near else ""
        name = ".".join(map(str, details["loc"]))
        yield f"{place}: {name}: found {found}, expected {describe_type(info)}{advice}"


def _section_at(cls: type[BaseModel], key: KeyPath) -> type[BaseModel] | None:
    """The section class at ``key``, also in a list of sections (sources.0); None where no section is."""
    section: type[BaseModel] | None = cls
    item: type[BaseModel] | None = None  # of the list of sections that the last part named
    for part in key:
        if item is not None and part.isdigit():
            section, item = item, None
            continue
        if section is None or part not in section.model_fields:
            return None
        info = section.model_fields[part]
        section, item = section_of(info), item_section_of(info)
    return section


def _unknown(cls: type[BaseModel], key: KeyPath) -> str:
    """Says that ``key`` is unknown, and which known name is nearest."""
    known_part = key[:-1]
    while (section := _section_at(cls, known_part)) is None:
        known_part = known_part[:-1]
    name = key[len(known_part)]
    fields = list(section.model_fields)
    near = get_close_matches(name, fields, n=1)
    elsewhere = [dotted for dotted in _dotted_names(cls) if dotted.split(".")[-1] == key[-1]]
    if elsewhere:
        advice = f"did you mean {' or '.join(elsewhere)}?"
    elif near:
        advice = f"did you mean {'.'.join((*known_part, near[0]))}?"
    else:
        advice = f"known in {'.'.join(known_part) or 'the file'}: {', '.join(fields)}"
    return f"{'.'.join(key)}: unknown field, {advice}"


def _dotted_names(cls: type[BaseModel], prefix: str = "") -> Iterator[str]:
    for name, info in cls.model_fields.items():
        section = section_of(info)
        if section is None:
            yield f"{prefix}{name}"
        else:
            yield from _dotted_names(section, f"{prefix}{name}.")


def _message(path: str, problems: Sequence[str]) -> str:
    if len(problems) == 1:
        return problems[0]
    return "\n  ".join([f"{path}: {len(problems)} problems", *problems])
