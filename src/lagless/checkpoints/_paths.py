"""Paths as users write them."""

from __future__ import annotations

import os
from pathlib import Path

StrPath = str | os.PathLike[str]


def absolute_path(path: StrPath) -> Path:
    """Return ``path`` with ``~`` replaced by the home folder, and independent of the working folder; links stay."""
    return Path(os.path.abspath(Path(path).expanduser()))
