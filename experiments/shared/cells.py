"""Write finished work at once and completely, so that an interruption costs the piece in progress and no more."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from lagless.checkpoints import atomic_file


def store(path: Path, content: Any, *, indent: int | None = None) -> None:
    """Write JSON atomically: readers see the old file or the complete new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    separators = (",", ":") if indent is None else None
    text = json.dumps(content, indent=indent, separators=separators, allow_nan=False)
    with atomic_file(path) as partial:
        partial.write_text(text + "\n", encoding="utf-8")


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
    with atomic_file(path) as partial, partial.open("wb") as file:
        np.save(file, array)


def array_once(path: Path, compute: Callable[[], np.ndarray]) -> np.ndarray:
    """Return the array in ``path``, computing and writing it first if it is missing."""
    if not path.is_file():
        store_array(path, compute())
    return np.load(path)
