"""A YAML file and those that it builds on (``base: other.yaml``) as one set of values."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from apo_megatron.config.describe import describe_value
from apo_megatron.config.yaml_source import KeyPath, YamlError, YamlSource, read_yaml
from apo_megatron.errors import ConfigError

BASE = "base"


@dataclass(frozen=True)
class FileValues:
    """What a file and its bases say together."""

    values: dict[str, Any]
    origins: dict[KeyPath, str]  # of every key, ``file:line``
    problems: list[str]  # keys that are given twice in one file


def read_with_bases(path: Path, above: tuple[Path, ...] = ()) -> FileValues:
    """Read ``path`` over its base, and that over its own. ``above`` are the files that led here.

    Sections, and mappings in them, are merged key by key; anything else (a list, a number, null) replaces
    what the base has. Raises ConfigError for a file that cannot be read or is no configuration, and for bases
    that go round in a circle.
    """
    source = _read_file(path)
    own = FileValues(
        values=source.values,
        origins={key: f"{path}:{line}" for key, line in source.lines.items()},
        problems=[
            f"{path}:{line}: {'.'.join(key)}: given twice, first on line {source.lines[key]}: keep one"
            for key, line in source.repeated
        ],
    )
    if BASE not in own.values:
        return own
    name, where = own.values.pop(BASE), f"{own.origins.pop((BASE,))}: {BASE}"
    if not isinstance(name, str):
        raise ConfigError(f"{where}: found {describe_value(name)}, expected another YAML file")
    base_path = path.parent / name
    chain = (*above, path)
    if base_path.resolve() in {file.resolve() for file in chain}:
        circle = " -> ".join(map(str, (*chain, base_path)))
        raise ConfigError(f"{where}: files build on each other in a circle ({circle}): take one base out")
    if not base_path.is_file():
        raise ConfigError(f"{where}: found no file {base_path}: expected a path relative to {path.parent}")
    return _merged(read_with_bases(base_path, chain), own)


def _merged(base: FileValues, own: FileValues) -> FileValues:
    origins = dict(base.origins)
    values = _merge(base.values, own.values, (), origins)
    return FileValues(values, origins | own.origins, base.problems + own.problems)


def _merge(
    base: dict[str, Any], own: dict[str, Any], path: KeyPath, origins: dict[KeyPath, str]
) -> dict[str, Any]:
    """Both in one; takes from ``origins`` the keys of the base that are replaced."""
    merged = dict(base)
    for name, value in own.items():
        key = (*path, str(name))
        before = merged.get(name)
        if isinstance(before, dict) and isinstance(value, dict):
            merged[name] = _merge(before, value, key, origins)
            continue
        merged[name] = value
        for replaced in [known for known in origins if known[: len(key)] == key]:
            del origins[replaced]
    return merged


def _read_file(path: Path) -> YamlSource:
    try:
        source = read_yaml(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path}: cannot read the configuration: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not UTF-8 text (byte {error.start}): a configuration is YAML") from error
    except YamlError as error:
        place = str(path) if error.line is None else f"{path}:{error.line}"
        raise ConfigError(f"{place}: not YAML: {error}") from error
    if not isinstance(source.values, dict):
        raise ConfigError(
            f"{path}: found {describe_value(source.values)}, expected sections with their fields, as in "
            "docs/configuration.md"
        )
    return source
