"""Which rows are held out: decided by hashes of rows, so that a stream of unknown length is split like a file."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import TYPE_CHECKING

from datasets import Dataset, IterableDataset

from lagless.lab.data._rows import SEPARATOR, read_rows

if TYPE_CHECKING:
    from lagless.lab.recipes import Source

TensorTable = Dataset | IterableDataset


def split_rows(source: Source, *, streaming: bool = False) -> tuple[TensorTable, TensorTable]:
    """Training rows and held-out rows.

    Where the source names no held-out examples, each row, or each group of rows that agree in ``group_column``, is held
    out with probability ``validation_fraction``, by a hash of its number or group and ``split_seed``. Where that leaves
    one part of a file empty, the row (or group) nearest to the threshold goes there; of a text without groups, the last
    ``validation_fraction`` of every document is held out instead, so that a single book can be trained on.

    Args:
        source: the data section of a recipe.
        streaming: of a data set of the hub, read only what is used.

    Raises:
        ValueError: if the data cannot be read, or there is one row (or group) and no way to cut it.
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
        return is_held_out(row[group] if group else index, source.split_seed, source.validation_fraction)

    if isinstance(rows, Dataset):
        return _split_file(source, rows, rows[group] if group else range(len(rows)))
    train = rows.filter(lambda row, index: not held_out(row, index), with_indices=True)
    return train, rows.filter(held_out, with_indices=True)


def is_held_out(key: object, seed: int = 42, fraction: float = 0.01) -> bool:
    """Tell whether a row, or a group of rows, is held out: with probability ``fraction``, the same on every machine.

    The defaults are those of recipes.

    Args:
        key: number of the row, or the group.
        seed: of the split.
        fraction: share that is held out.
    """
    return _fraction(f"{seed} {key}") < fraction


def _split_file(source: Source, rows: Dataset, keys: Sequence[object]) -> tuple[Dataset, Dataset]:
    """Split rows whose number is known, so that neither part is empty."""
    places = {key: _fraction(f"{source.split_seed} {key}") for key in keys}
    held_out = {key for key, place in places.items() if place < source.validation_fraction}
    if not 0 < len(held_out) < len(places):
        column = getattr(source, "text_column", None)
        if column in rows.column_names and source.group_column is None and len(rows):
            return _cut_documents(rows, column, source.validation_fraction)
        if len(places) < 2:
            what = f"{len(rows)} rows in {source.path}"
            if source.group_column is not None:
                what += f", which are {len(places)} groups of data.group_column={source.group_column!r}"
            raise ValueError(
                f"data: of {what}, some are to be held out and some to be trained on. Give more examples, or held-out "
                "ones with data.validation_path."
            )
        held_out = held_out or {min(places, key=places.__getitem__)}
        if len(held_out) == len(places):
            held_out.remove(max(places, key=places.__getitem__))
    held = [index for index, key in enumerate(keys) if key in held_out]
    return rows.select([index for index, key in enumerate(keys) if key not in held_out]), rows.select(held)


def _cut_documents(rows: Dataset, column: str, fraction: float) -> tuple[Dataset, Dataset]:
    """Return all but the last ``fraction`` of every document, and the rest; words stay whole."""
    heads, tails = [], []
    for text in rows[column]:
        cut = round(len(text) * (1.0 - fraction))
        space = next((i for i in range(cut, len(text)) if text[i].isspace()), cut)
        heads.append(text[:space])
        tails.append(text[space:])
    return Dataset.from_dict({column: heads}), Dataset.from_dict({column: tails})


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
