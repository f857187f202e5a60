"""One row of a data set, wherever it came from, with columns that say what is wrong with them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, get_args

from apo_megatron.errors import DataError

_TYPE_NAMES: dict[type, str] = {
    str: "a string",
    bool: "true or false",
    int: "an integer",
    float: "a number",
    list: "a list",
    dict: "an object",
    type(None): "null",
}


@dataclass(frozen=True)
class Row:
    """Its values, and what to call it."""

    place: str  # in errors: train.jsonl:3, train.parquet: row 3, owner/name (train): row 3
    name: str  # its prompt id where it has none of its own: line-3, row-3
    values: dict[str, Any]

    def column(self, column: str, kind: Any = object, meaning: str | None = None) -> Any:
        """The value of ``column``: a name, or a dotted path into objects (``reward_model.ground_truth``).

        A column whose own name has the dots goes first. ``kind`` is the type that the value must have (str,
        int, str | int, ...; object takes any) and ``meaning`` what the column stands for, where that is not
        its name. Raises DataError, naming row and column, for a missing or wrongly typed one.
        """
        title = repr(column) if meaning in (None, column) else f"{column!r} ({meaning!r})"
        value = self._find(column, title)
        kinds = get_args(kind) or (kind,)
        # To Python true is a number; to a reward it is a mistake in the file.
        is_stray_bool = isinstance(value, bool) and bool not in kinds and object not in kinds
        if is_stray_bool or not isinstance(value, kinds):
            expected = " or ".join(_TYPE_NAMES.get(k, k.__name__) for k in kinds)
            raise DataError(f"{self.place}: column {title} is {describe(value)}, expected {expected}")
        return value

    def without(self, column: str) -> dict[str, Any]:
        """All columns but that one. What a dotted path leads through stays."""
        return {name: value for name, value in self.values.items() if name != column}

    def _find(self, column: str, title: str) -> Any:
        if column in self.values:
            return self.values[column]
        value: Any = self.values
        reached: list[str] = []
        for part in column.split("."):
            if not isinstance(value, Mapping) or part not in value:
                raise DataError(
                    f"{self.place}: column {title} is missing, found {_contents(value, '.'.join(reached))}; "
                    "add it to the file, or name the right column in the configuration"
                )
            value = value[part]
            reached.append(part)
        return value


def describe(value: Any) -> str:
    """Type and beginning of a value: ``a string ("ab")``."""
    shown = json.dumps(value, default=repr)[:40]
    return f"{_TYPE_NAMES.get(type(value), type(value).__name__)} ({shown})"


def _contents(value: Any, column: str) -> str:
    inside = f" in {column!r}" if column else ""
    if not isinstance(value, Mapping):
        return f"{describe(value)}{inside}"
    return f"columns{inside}: {', '.join(map(repr, value)) or 'none'}"
