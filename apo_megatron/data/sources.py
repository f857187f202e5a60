"""Rows of a data set in any form: a JSONL or Parquet file, a local directory, or an id on the hub."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pyarrow
from pyarrow import parquet

from apo_megatron.data.jsonl import read_jsonl
from apo_megatron.data.rows import Row
from apo_megatron.errors import DataError

FILE_SUFFIXES = (".jsonl", ".json", ".ndjson", ".parquet")
DEFAULT_SPLIT = "train"
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_ROWS_PER_BATCH = 1024  # of a Parquet file, in memory at once


def read_source(path: str | Path, subset: str | None = None, split: str | None = None) -> Iterator[Row]:
    """All rows, in their order.

    ``path`` is a Parquet file (``.parquet``), a JSONL file (any other name), a local directory that
    ``datasets.load_dataset`` opens, or a hub id (``owner/name`` where nothing local has that name). The last
    two have a ``split`` (default: train) and may have a ``subset``. Raises DataError naming the source, and
    the row where it lies there.
    """
    local = Path(path)
    is_hub_id = bool(_HUB_ID.fullmatch(str(path))) and local.suffix not in FILE_SUFFIXES
    if local.is_dir() or (is_hub_id and not local.exists()):
        return _read_dataset(str(path), subset, split or DEFAULT_SPLIT)
    if subset is not None or split is not None:
        raise DataError(
            f"{path}: found split={split}, subset={subset} for a file, which has neither: leave them out, or "
            "name a directory or a hub id"
        )
    return _read_parquet(local) if local.suffix == ".parquet" else read_jsonl(path)


def _read_parquet(path: Path) -> Iterator[Row]:
    num_rows = 0
    try:
        with parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=_ROWS_PER_BATCH):
                for values in batch.to_pylist():
                    num_rows += 1
                    yield Row(f"{path}: row {num_rows}", f"row-{num_rows}", values)
    except (OSError, pyarrow.ArrowException) as error:
        raise DataError(
            f"{path}: cannot be read after row {num_rows} ({_first_line(error)}); expected a Parquet file: "
            "check the path in the configuration, or write the file anew"
        ) from error
    if num_rows == 0:
        raise DataError(f"{path}: holds no rows")


def _read_dataset(path: str, subset: str | None, split: str) -> Iterator[Row]:
    # Half a second to import: for those who use it. Data sets that bring code of their own are refused by it.
    import datasets

    name = f"{path} ({'' if subset is None else f'{subset}, '}{split})"
    try:
        rows = datasets.load_dataset(path, name=subset, split=split)
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        cause = error.__cause__ or error  # "An error occurred while generating the dataset" has one
        raise DataError(
            f"{name}: cannot be read ({_first_line(cause)}); expected a hub id, or a directory of Parquet or "
            "JSONL files: check the path, subset and split in the configuration"
        ) from error
    for number, values in enumerate(rows, start=1):
        yield Row(f"{name}: row {number}", f"row-{number}", values)
    if len(rows) == 0:
        raise DataError(f"{name}: holds no rows")


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:300]
