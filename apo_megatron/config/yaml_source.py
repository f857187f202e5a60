"""YAML text as plain values, with the line of every key and the keys that were given twice."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import yaml

KeyPath = tuple[str, ...]


class YamlError(ValueError):
    """Text that is not YAML. ``line`` counts from 1; None where the parser gives none."""

    def __init__(self, message: str, line: int | None = None) -> None:
        super().__init__(message)
        self.line = line


@dataclass(frozen=True)
class YamlSource:
    """What a YAML text says."""

    values: Any  # plain containers and scalars; None where the text is empty
    lines: dict[KeyPath, int] = field(default_factory=dict)  # of every key, from 1; the first one of twins
    repeated: list[tuple[KeyPath, int]] = field(default_factory=list)  # keys given again, and where


class _ConfigLoader(yaml.SafeLoader):
    """The safe loader without two surprises of YAML 1.1: 1e-6 is a number, 2026-01-31 stays text."""


_ConfigLoader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:timestamp"]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_ConfigLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?(\.\d+|\d+(\.\d*)?)[eE][-+]?\d+$"), list("-+.0123456789")
)


def read_yaml(text: str) -> YamlSource:
    """Read one YAML document. Safe: plain values only. Raises YamlError."""
    try:
        loader = _ConfigLoader(text)
        root = loader.get_single_node()
        if root is None:
            return YamlSource(None)
        source = YamlSource(loader.construct_document(root))
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        raise YamlError(error.problem or str(error), mark.line + 1 if mark else None) from error
    except (yaml.YAMLError, ValueError) as error:  # ValueError: an explicit tag that its text does not fit
        raise YamlError(" ".join(str(error).split())) from error
    for path, line in _keys(root, (), set()):
        if path in source.lines:
            source.repeated.append((path, line))
        else:
            source.lines[path] = line
    return source


def _keys(node: yaml.Node, path: KeyPath, seen: set[int]) -> Iterator[tuple[KeyPath, int]]:
    if not isinstance(node, yaml.CollectionNode) or id(node) in seen:  # seen: an alias may point back
        return
    seen.add(id(node))
    if isinstance(node, yaml.SequenceNode):
        for number, item in enumerate(node.value):
            yield from _keys(item, (*path, str(number)), seen)
        return
    for key, value in node.value:
        if isinstance(key, yaml.ScalarNode):
            yield (*path, key.value), key.start_mark.line + 1
            yield from _keys(value, (*path, key.value), seen)
