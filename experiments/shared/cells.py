"""Write finished work at once and completely, so that an interruption costs the piece in progress and no more."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np


def store(path: Path, content: Any, *, indent: int | None = None) -> None:
    """Write JSON atomically: readers see the old file or the complete new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    separators = (",", ":") if indent is None else None
    text = json.dumps(content, indent=indent, separators=separators, allow_nan=False)
    partial.write_text(text + "\n", encoding="utf-8")
    os.replace(partial, path)


def load(path: Path) -> Any:
    """Read a JSON file."""
    return json.loads(path.read_text(encoding="utf-8"))


def once(path: Path, compute: Callable[[], Any]) -> Any:
    """Return the JSON in ``path``, computing and writing it first if it is missing."""
    if not path.is_file():
        store(path, compute())
    return load(path)


def store_array(path: Path, array: np.ndarray) -> None:
    """Write a ``.npy`` file atomically."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    with partial.open("wb") as file:
        np.save(file, array)
    os.replace(partial, path)


def array_once(path: Path, compute: Callable[[], np.ndarray]) -> np.ndarray:
    """Return the array in ``path``, computing and writing it first if it is missing."""
    if not path.is_file():
        store_array(path, compute())
    return np.load(path)
