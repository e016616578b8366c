"""Rows of evaluation data, from the hub or a local file."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

_BUILDERS = {".json": "json", ".jsonl": "json", ".parquet": "parquet", ".csv": "csv", ".txt": "text"}


def read_rows(
    source: str, columns: Sequence[str] = (), split: str | None = "test", name: str | None = None
) -> list[dict[str, Any]]:
    """The rows of a local file (JSON lines, parquet, CSV, or text as one row; perhaps compressed) or of the hub.

    Args:
        source: the file, or the name of a data set on the hub.
        columns: what the rows must have.
        split: of a data set on the hub; None for its test split, or where there is none, for the 1 % of the rows of its
            train split that recipes hold out by default.
        name: configuration of a data set on the hub.

    Raises:
        ValueError: if the file is missing or of an unknown type, or lacks a column, or is empty.
    """
    from datasets import Dataset, load_dataset

    path = Path(source).expanduser()
    if path.is_file():
        builder = next((_BUILDERS[suffix] for suffix in path.suffixes if suffix in _BUILDERS), None)
        if builder is None:
            raise ValueError(f"data={source!r}: its type is not one of {', '.join(_BUILDERS)} (perhaps compressed).")
        whole: dict[str, Any] = {"sample_by": "document"} if builder == "text" else {}
        rows = load_dataset(builder, data_files=str(path), split="train", **whole)
    elif path.exists() or path.is_absolute() or any(suffix in _BUILDERS for suffix in path.suffixes):
        raise ValueError(f"data={source!r} is no file. Give a file, or the name of a data set on the hub.")
    else:
        rows = load_dataset(source, name, split=split) if split is not None else _test_rows(source, name)
    assert isinstance(rows, Dataset)  # one split was asked for
    if missing := [column for column in columns if column not in rows.column_names]:
        raise ValueError(
            f"data={source!r} has no column {', '.join(missing)}; it has {', '.join(rows.column_names)}, and "
            f"{', '.join(columns)} are needed."
        )
    if not len(rows):
        raise ValueError(f"data={source!r} is empty.")
    return rows.to_list()


def _test_rows(source: str, name: str | None) -> Any:
    from datasets import get_dataset_split_names, load_dataset

    from lagless.lab.data import is_held_out

    splits = get_dataset_split_names(source, name)
    if "test" in splits:
        return load_dataset(source, name, split="test")
    if "train" not in splits:
        raise ValueError(f"data={source!r} has the splits {', '.join(splits)}; name one with --split.")
    return load_dataset(source, name, split="train").filter(lambda row, index: is_held_out(index), with_indices=True)
