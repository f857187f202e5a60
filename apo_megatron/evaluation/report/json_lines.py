"""JSON from files that others wrote, with errors that name file and line."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeVar

import orjson
from pydantic import TypeAdapter, ValidationError

from apo_megatron.errors import DataError

Row = TypeVar("Row")


def parse_json(text: bytes) -> Any:
    """One JSON value. Lone surrogates, which a model can emit and Unicode cannot hold, become U+FFFD.

    Raises ValueError.
    """
    try:
        return orjson.loads(text)
    except orjson.JSONDecodeError:
        pass
    try:
        # The standard library reads lone surrogates, and leaves it to us to get rid of them.
        lenient = json.dumps(json.loads(text), ensure_ascii=False)
    except RecursionError as error:
        raise ValueError("too deeply nested") from error
    return json.loads(lenient.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace"))


def read_json_lines(path: Path, rows: TypeAdapter[Row]) -> Iterator[tuple[int, Row]]:
    """(line number from 1, row) of every line, one in memory at a time.

    A last line without its end is what a killed run leaves: it is left out if it cannot be read. Raises
    DataError for a file that is missing and for every other line that is not a row.
    """
    try:
        file = path.open("rb")
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}") from error
    with file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                row = rows.validate_python(parse_json(line))
            except ValidationError as error:
                raise DataError(f"{path}, line {number}: {first_problem(error)}") from error
            except ValueError as error:
                if not line.endswith(b"\n"):
                    return
                raise DataError(f"{path}, line {number}: not JSON ({error})") from error
            yield number, row


def first_problem(error: ValidationError) -> str:
    """The first finding as "field: what is wrong", without the input, which may be long or hostile."""
    found = error.errors(include_url=False, include_input=False)[0]
    place = ".".join(map(str, found["loc"]))
    return f"{place}: {found['msg']}" if place else found["msg"]
