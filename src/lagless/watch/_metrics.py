"""``metrics.jsonl``: one line for each thing measured or told, appended whole, and mended after a crash."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

NAME = "metrics.jsonl"


class Metrics:
    """The file of metrics, which only grows.

    Args:
        out: the output folder.
    """

    def __init__(self, out: Path) -> None:
        self.path = out / NAME
        self._mend()

    def append(self, row: dict[str, Any]) -> None:
        """Add a line.

        Args:
            row: as :func:`plain` makes it.

        Raises:
            OSError: if the disk is full; the file then ends as before, or is mended at the next start.
        """
        line = (json.dumps(row, ensure_ascii=False) + "\n").encode()
        descriptor = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            size = os.fstat(descriptor).st_size
            if os.write(descriptor, line) != len(line):
                os.ftruncate(descriptor, size)
                raise OSError(28, "No space left on device", str(self.path))
        finally:
            os.close(descriptor)

    def rows(self) -> Iterator[dict[str, Any]]:
        """Yield what the lines say, oldest first."""
        if not self.path.exists():
            return
        with self.path.open(encoding="utf-8") as file:
            for line in file:
                try:
                    row = json.loads(line)
                except ValueError:
                    continue
                if isinstance(row, dict):
                    yield row

    def _mend(self) -> None:
        """Cut off a last line that a crash has left unfinished."""
        if not self.path.exists():
            return
        content = self.path.read_bytes()
        if content and not content.endswith(b"\n"):
            os.truncate(self.path, content.rfind(b"\n") + 1)


def plain(row: dict[str, Any]) -> dict[str, Any]:
    """Return a row as it is written: with the time, and null in place of numbers that are not finite."""
    return {"time": round(time.time(), 3), **{key: _plain(value) for key, value in row.items()}}


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
