"""Reads JSONL so that everything wrong with a file is reported with its line."""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from apo_megatron.errors import DataError

_JSON_NAMES: dict[type, str] = {
    str: "a string",
    bool: "true or false",
    int: "an integer",
    float: "a number",
    list: "a list",
    dict: "an object",
    type(None): "null",
}


def read_rows(path: str | Path, columns: Mapping[str, type]) -> Iterator[tuple[int, dict[str, Any]]]:
    """Line number (from 1) and object of every line of ``path``; blank lines are passed over.

    Every row holds ``columns``, each with a value of the given type (str, int, list, ...). Raises
    DataError, naming file and line, for a file that cannot be read or holds no row, for a line that is no
    JSON object in UTF-8, and for a missing or wrongly typed column.
    """
    num_rows = 0
    try:
        with Path(path).open("rb") as file:
            for line_number, line in enumerate(file, start=1):
                if line_number == 1:
                    line = line.removeprefix(codecs.BOM_UTF8)
                if not line.strip():
                    continue
                num_rows += 1
                row = _parse(line, f"{path}:{line_number}")
                for name, kind in columns.items():
                    _check_column(row, name, kind, f"{path}:{line_number}")
                yield line_number, row
    except OSError as error:
        raise DataError(
            f"{path}: cannot be read ({error.strerror}); expected a JSONL file: check the path in the "
            "configuration, or create the data first"
        ) from error
    if num_rows == 0:
        raise DataError(f"{path}: holds no rows; expected JSONL, one object a line")


def _parse(line: bytes, where: str) -> dict[str, Any]:
    try:
        row = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise DataError(
            f"{where}: not UTF-8 ({error.reason} at byte {error.start}): re-encode the file"
        ) from error
    except (ValueError, RecursionError) as error:  # ValueError: malformed, or an integer of absurd length
        raise DataError(f"{where}: malformed JSON ({error}): JSONL holds one whole object a line") from error
    if not isinstance(row, dict):
        raise DataError(f'{where}: found {_describe(row)}, expected an object such as {{"prompt": ...}}')
    return row


def _check_column(row: dict[str, Any], name: str, kind: type, where: str) -> None:
    if name not in row:
        found = ", ".join(map(repr, row)) or "none"
        raise DataError(
            f"{where}: column {name!r} is missing, found columns: {found}; add it to the file, or name the "
            "right column in the configuration"
        )
    value = row[name]
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise DataError(f"{where}: column {name!r} is {_describe(value)}, expected {_JSON_NAMES[kind]}")


def _describe(value: Any) -> str:
    return f"{_JSON_NAMES[type(value)]} ({json.dumps(value)[:40]})"
