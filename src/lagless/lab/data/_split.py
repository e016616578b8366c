"""Which rows are held out: decided row by row, so that it needs neither their number nor their order of arrival."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

from datasets import Dataset, IterableDataset

from lagless.lab.data._rows import SEPARATOR, read_rows

if TYPE_CHECKING:
    from lagless.lab.recipes import Source

TensorTable = Dataset | IterableDataset


def split_rows(source: Source, *, streaming: bool = False) -> tuple[TensorTable, TensorTable]:
    """Training rows and held-out rows.

    Where the source names no held-out examples, each row, or each group of rows that agree in ``group_column``, is held
    out with probability ``validation_fraction``, by a hash of its number or group and ``split_seed``.

    Args:
        source: the data section of a recipe.
        streaming: of a data set of the hub, read only what is used.

    Raises:
        ValueError: if the data cannot be read, or one of the parts is empty.
    """
    separator = getattr(source, "separator", SEPARATOR)
    rows = read_rows(source.path, config=source.config, split=source.split, separator=separator, streaming=streaming)
    if source.validation_path is not None:
        return rows, read_rows(source.validation_path, separator=separator, streaming=streaming)
    if source.validation_split is not None:
        return rows, read_rows(source.path, config=source.config, split=source.validation_split, streaming=streaming)
    group = source.group_column
    require_columns(rows, [group] if group else [], source.path, "data.group_column")

    def held_out(row: dict[str, object], index: int) -> bool:
        key = row[group] if group else index
        return _fraction(f"{source.split_seed} {key}") < source.validation_fraction

    train = rows.filter(lambda row, index: not held_out(row, index), with_indices=True)
    validation = rows.filter(held_out, with_indices=True)
    if isinstance(train, Dataset) and isinstance(validation, Dataset) and not (len(train) and len(validation)):
        raise ValueError(
            f"data: of {len(train) + len(validation)} rows in {source.path}, {len(validation)} are held out and "
            f"{len(train)} are left to train on. Change data.validation_fraction={source.validation_fraction}, give "
            "held-out examples with data.validation_path, or cut a text into more documents with data.separator."
        )
    return train, validation


def require_columns(rows: TensorTable, columns: list[str], path: str, field: str) -> None:
    """Refuse rows without the columns that ``field`` names."""
    present = rows.column_names or list(next(iter(rows), {}))
    if missing := [name for name in columns if name not in present]:
        raise ValueError(
            f"{field}: {path} has no column {', '.join(missing)}; it has {', '.join(present)}. "
            "Name the right ones with --set."
        )


def _fraction(name: str) -> float:
    """A number in [0, 1) that is the same on every machine."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") / 2**64
