"""Results as JSON files, and output folders that are replaced only if the same command wrote them."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lagless.checkpoints import CheckpointError, atomic_file, check_destination


def check_output(out: Path, overwrite: bool, records: Sequence[str], writer: str) -> None:
    """Refuse an output folder whose replacement would destroy something.

    Args:
        out: the folder to be made.
        overwrite: whether to replace what ``writer`` wrote before.
        records: files that ``writer`` puts into every folder.
        writer: who writes, for the message.

    Raises:
        ValueError: if ``out`` is a file, is not empty (without ``overwrite``), or holds what ``writer`` did not write.
    """
    if out.exists() and not out.is_dir():
        raise ValueError(f"out={str(out)!r} is a file. Choose another folder.")
    if not out.is_dir() or not any(out.iterdir()):
        return
    if not overwrite:
        raise ValueError(f"out={str(out)!r} is not empty. Choose another folder, or replace it with --overwrite.")
    if missing := [name for name in records if not (out / name).is_file()]:
        raise ValueError(
            f"out={str(out)!r}: --overwrite replaces the whole folder, and {writer} did not write this one (it has no "
            f"{' and '.join(missing)}). Choose another folder, or remove this one yourself."
        )
    try:
        check_destination(out, [], overwrite)
    except CheckpointError as error:
        raise ValueError(str(error)) from error


def write_json(path: Path, record: dict[str, Any]) -> None:
    """Write a record at once or not at all; numbers that are not finite become null."""
    write_text(path, json.dumps(_finite(record), indent=2, ensure_ascii=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write a text file at once or not at all."""
    with atomic_file(path) as partial:
        partial.write_text(text, encoding="utf-8")


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
