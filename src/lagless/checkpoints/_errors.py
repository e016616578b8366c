"""Errors for unusable checkpoints and folders."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path


class CheckpointError(Exception):
    """A checkpoint or folder cannot be used; the message names the file, the cause and the remedy."""


@contextmanager
def reporting(path: Path) -> Generator[None]:
    """Turn errors of the operating system inside the block into a :class:`CheckpointError`.

    Args:
        path: named in the message where the error names no file.
    """
    try:
        yield
    except OSError as error:
        cause = error.strerror or str(error)
        raise CheckpointError(
            f"{error.filename or path}: cannot be read ({cause}). Check the path and its permissions."
        ) from error
