"""A file that is there whole or not at all."""

from __future__ import annotations

import os
import sys
from collections.abc import Generator
from contextlib import contextmanager
from os import PathLike
from pathlib import Path

from lagless.checkpoints._durability import sync
from lagless.checkpoints._owners import claim, owners, stem, take_over
from lagless.checkpoints._permissions import Permissions

_SUFFIX = ".partial"


@contextmanager
def atomic_file(path: str | PathLike[str]) -> Generator[Path]:
    """Write a file atomically.

    Inside the ``with`` block an empty file under a temporary name takes the content. At its end that is forced onto the
    disk and takes the name ``path``; on an error it is removed. What runs that were killed left of such files for the
    same ``path`` is removed at the start.

    The file has the permissions that the process gives to new files, without those that a file which it replaces did
    not have.

    Args:
        path: the file to be written; its folder exists.

    Yields:
        The temporary path, to be written in place.

    Raises:
        OSError: if the file cannot be written; ``path`` is then as before.

    >>> import tempfile
    >>> file = Path(tempfile.mkdtemp()) / "result.json"
    >>> with atomic_file(file) as partial:
    ...     _ = partial.write_text("{}")
    >>> file.read_text()
    '{}'
    """
    path = Path(path)
    prefix = f".{stem(path)}."
    for dead, left in owners(path.parent, prefix, _SUFFIX):
        if (held := take_over(dead, left)) is not None:
            left.unlink(missing_ok=True)
            os.close(held)
    _, partial, lock = claim(lambda owner: path.parent / f"{prefix}{owner}{_SUFFIX}")
    if sys.platform == "win32":  # where an open file cannot be renamed
        os.close(lock)
    try:
        yield partial
        if path.exists():
            Permissions(files=path.stat().st_mode).apply_to(partial)
        sync(partial)
        os.replace(partial, path)
        sync(path.parent)
    finally:
        partial.unlink(missing_ok=True)
        if sys.platform != "win32":
            os.close(lock)
