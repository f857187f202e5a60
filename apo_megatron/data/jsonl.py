"""Reads JSONL so that everything wrong with a file is reported with its line."""

from __future__ import annotations

import codecs
import gzip
import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from apo_megatron.data.rows import Row, describe
from apo_megatron.errors import DataError


def read_jsonl(path: str | Path) -> Iterator[Row]:
    """Every line of ``path`` (gzipped: .gz) as a row, lines counted from 1; blank lines are passed over.

    Raises DataError, naming file and line, for a file that cannot be read or holds no row, and for a line
    that is no JSON object in UTF-8.
    """
    num_rows = 0
    line_number = 0
    path = Path(path)
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            for line_number, line in enumerate(file, start=1):
                if line_number == 1:
                    line = line.removeprefix(codecs.BOM_UTF8)
                if not line.strip():
                    continue
                num_rows += 1
                place = f"{path}:{line_number}"
                yield Row(place, f"line-{line_number}", _parse(line, place))
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise DataError(
            f"{path}: damaged after line {line_number} ({error}); expected a whole gzip file: copy it again"
        ) from error
    except OSError as error:
        raise DataError(
            f"{path}: cannot be read ({error.strerror}); expected a JSONL file: check the path in the "
            "configuration, or create the data first"
        ) from error
    if num_rows == 0:
        raise DataError(f"{path}: holds no rows; expected JSONL, one object a line")


def _parse(line: bytes, place: str) -> dict[str, Any]:
    try:
        row = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise DataError(
            f"{place}: not UTF-8 ({error.reason} at byte {error.start}): re-encode the file"
        ) from error
    except (ValueError, RecursionError) as error:  # ValueError: malformed, or an integer of absurd length
        raise DataError(f"{place}: malformed JSON ({error}): JSONL holds one whole object a line") from error
    if not isinstance(row, dict):
        raise DataError(f'{place}: found {describe(row)}, expected an object such as {{"prompt": ...}}')
    return row
