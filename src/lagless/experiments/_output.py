"""Output folders that are replaced only if the same command wrote them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path


def check_output(out: Path, overwrite: bool, records: Sequence[str], writer: str) -> None:
    """Refuse an output folder whose replacement would destroy something.

    Args:
        out: the folder to be made.
        overwrite: whether to replace what ``writer`` wrote before.
        records: files that ``writer`` puts into every folder.
        writer: who writes, for the message.

    Raises:
        ValueError: if ``out`` is a file, is not empty (without ``overwrite``), or was not written by ``writer``.
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
