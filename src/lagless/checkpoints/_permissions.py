"""Who may read what is made from files: nobody who may not read those."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from lagless.checkpoints._checkpoint import Checkpoint

_OTHERS = 0o077  # bits of the group and of everybody; the owner's are left as they are


class Permissions(NamedTuple):
    """The most that group and others may get; the umask can take more away."""

    files: int = _OTHERS
    folders: int = _OTHERS

    def apply_to(self, path: Path) -> None:
        """Take from a file or folder what exceeds these."""
        mode = path.stat().st_mode
        allowed = self.folders if path.is_dir() else self.files
        if mode & _OTHERS & ~allowed:
            path.chmod(mode & 0o7777 & (~_OTHERS | allowed))


def permissions_of(checkpoints: Iterable[Checkpoint]) -> Permissions:
    """Return what group and others have on the weights of all checkpoints, and on all folders they lie in."""
    files = folders = _OTHERS
    for checkpoint in checkpoints:
        for file in checkpoint.files:
            files &= file.stat().st_mode
        if checkpoint.path.is_dir():
            folders &= checkpoint.path.stat().st_mode
    return Permissions(files, folders)
