"""Rows of a data set of the hub, a local file or a saved folder."""

from __future__ import annotations

import bz2
import gzip
import lzma
from collections.abc import Callable
from pathlib import Path
from typing import Any

from datasets import Dataset, DatasetDict, IterableDataset, load_dataset, load_from_disk

_BUILDERS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}
_COMPRESSED: dict[str, Callable[..., Any]] = {".gz": gzip.open, ".xz": lzma.open, ".bz2": bz2.open}
SEPARATOR = "<|endoftext|>"


def read_rows(
    path: str,
    *,
    config: str | None = None,
    split: str = "train",
    separator: str = SEPARATOR,
    streaming: bool = False,
) -> Dataset | IterableDataset:
    """The rows of a data set.

    Args:
        path: a local file or folder of ``save_to_disk``; anything else is a data set of the hub.
        config: of a data set of the hub.
        split: of a data set of the hub or a saved folder; a file is one split.
        separator: what separates the documents of a .txt file; they become rows with one column ``text``.
        streaming: read a data set of the hub as it is iterated over, instead of downloading all of it.

    Raises:
        ValueError: if there is no such data set or split, or the file cannot be read.
    """
    local = Path(path)
    if local.is_dir():
        return _saved(local, split)
    if local.is_file():
        return _file(local, separator)
    if local.is_absolute() or _kind(local) is not None or path.startswith("."):
        raise ValueError(
            f"data: {path} does not exist. Give a file, a folder of save_to_disk, or a data set of the hub."
        )
    try:
        return load_dataset(path, config, split=split, streaming=streaming)
    except Exception as error:  # of the hub, of the network, of the data set's own making
        where = f" ({config})" if config else ""
        raise ValueError(
            f"data: {path}{where}, split {split}, is no local file and cannot be had from the hub "
            f"({_first_line(error)}). Check the name and the network, or give a local file with --set data.path=FILE."
        ) from error


def _kind(path: Path) -> str | None:
    suffixes = path.suffixes[-2:]
    if suffixes and suffixes[-1] in _COMPRESSED:
        suffixes.pop()
    return suffixes[-1] if suffixes and suffixes[-1] in {*_BUILDERS, ".txt"} else None


def _saved(folder: Path, split: str) -> Dataset:
    try:
        found = load_from_disk(folder)
    except FileNotFoundError as error:
        raise ValueError(f"data: {folder} is no folder of save_to_disk. Give a file in it instead.") from error
    if isinstance(found, Dataset):
        return found
    if split not in found:
        raise ValueError(f"data: {folder} has no split {split}; it has {', '.join(map(str, found))}.")
    return found[split]


def _file(path: Path, separator: str) -> Dataset:
    kind = _kind(path)
    if kind is None:
        known = ", ".join([*_BUILDERS, ".txt"])
        raise ValueError(f"data: {path} is none of {known} (or of these with {', '.join(_COMPRESSED)}). Convert it.")
    try:
        if kind == ".txt":
            with _COMPRESSED.get(path.suffix, open)(path, "rt", encoding="utf-8") as file:
                documents = [text for piece in file.read().split(separator) if (text := piece.strip("\n"))]
            return Dataset.from_dict({"text": documents})
        found = load_dataset(_BUILDERS[kind], data_files=str(path), split="train")
    except (OSError, EOFError, UnicodeDecodeError, lzma.LZMAError) as error:
        raise ValueError(f"data: {path} cannot be read ({_first_line(error)}).") from error
    except Exception as error:  # datasets wraps whatever its readers raise
        cause = error.__cause__ or error
        raise ValueError(f"data: {path} is no readable {kind} file ({_first_line(cause)}).") from error
    assert isinstance(found, Dataset) and not isinstance(found, DatasetDict)
    return found


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
