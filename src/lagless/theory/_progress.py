"""An optional progress bar."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TypeVar

T = TypeVar("T")


def track(items: Sequence[T], show: bool, description: str) -> Iterable[T]:
    """``items``, with a progress bar if ``show``."""
    if not show:
        return items
    from rich.progress import track as bar

    return bar(items, description=description)
