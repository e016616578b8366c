"""An output folder that comes into being complete or not at all."""

from __future__ import annotations

import errno
import os
import secrets
import shutil
import stat
from collections.abc import Iterable
from pathlib import Path

from lagless.checkpoints._errors import CheckpointError
from lagless.checkpoints._exchange import exchange

RECORD = "lagless.json"


def check_destination(out: Path, sources: Iterable[Path], overwrite: bool) -> None:
    """Refuse an output folder that would destroy something.

    Args:
        out: the folder to be made.
        sources: folders and files that are read.
        overwrite: whether a folder of averages that exists already may be replaced.

    Raises:
        CheckpointError: if ``out`` is a file, has anything in it (without ``overwrite``), has anything in it that was
            not written here (with ``overwrite``), or holds a source.
    """
    resolved = out.resolve()
    for source in sources:
        link_and_target = source.absolute(), source.resolve()
        if any(place.is_relative_to(resolved) for place in link_and_target):
            raise CheckpointError(
                f"{out}: the output folder holds {source}, which is read. Choose another output folder."
            )
    if out.is_symlink() and not out.exists():
        raise CheckpointError(f"{out}: is a link that leads nowhere. Remove it, or choose another output folder.")
    if out.exists() and not out.is_dir():
        raise CheckpointError(f"{out}: is a file. Choose another output folder.")
    if not out.is_dir() or not any(out.iterdir()):
        return
    if not overwrite:
        raise CheckpointError(
            f"{out}: the output folder is not empty. Choose another one, or replace it with overwrite (--overwrite)."
        )
    if strangers := [entry.name for entry in sorted(out.iterdir()) if not _written_here(out, entry)]:
        raise CheckpointError(
            f"{out}: overwrite replaces the whole folder, and lagless did not write {', '.join(strangers[:5])} in it. "
            "Choose another folder, or remove this one yourself."
        )


def _written_here(out: Path, entry: Path) -> bool:
    return (out / RECORD).is_file() or (entry / RECORD).is_file()


class Destination:
    """A temporary folder beside ``out`` that takes its name when complete, and vanishes on any error.

    What ``out`` holds when this object is made is replaced, in one step where the file system can. If that has changed
    when the work is complete, ``out`` stays as it is and the new folder is discarded.

    Args:
        out: the folder to be made; its parents are made as needed.
        overwrite: whether what ``out`` holds when this object is made may be replaced.

    Raises:
        CheckpointError: if ``out`` cannot be made, or changed while the work went on.

    >>> import tempfile
    >>> folder = Path(tempfile.mkdtemp()) / "out"
    >>> with Destination(folder) as temporary:
    ...     _ = (temporary / "file").write_text("x")
    >>> [entry.name for entry in folder.iterdir()]
    ['file']
    """

    def __init__(self, out: Path, overwrite: bool = True) -> None:
        # A link is followed: the folder it names is replaced, the link stays.
        self._out = out.resolve()
        self._temporary = self._sibling("tmp")
        self._made_parents: list[Path] = []
        self._seen = _contents(self._out) if overwrite else {}

    def __enter__(self) -> Path:
        parent = self._out.parent
        self._made_parents = [p for p in (parent, *parent.parents) if not p.exists()]
        try:
            self._temporary.mkdir(parents=True)
        except OSError as error:
            raise CheckpointError(
                f"{self._out}: cannot be made ({error.strerror}). Check the path and its permissions."
            ) from error
        return self._temporary

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is None:
                self._replace()
        finally:
            if self._temporary.exists():
                shutil.rmtree(self._temporary, ignore_errors=True)
                for made in self._made_parents:
                    if made.is_dir() and not any(made.iterdir()):
                        made.rmdir()

    def _replace(self) -> None:
        try:
            if not self._seen:
                # Renaming a folder fails on anything but nothing or an empty folder: what appeared meanwhile stays.
                os.rename(self._temporary, self._out)
                return
            self._require_unchanged(self._out)
            if exchange(self._temporary, self._out):
                try:
                    self._require_unchanged(self._temporary)
                except CheckpointError:
                    exchange(self._temporary, self._out)
                    raise
                return
            self._replace_in_two_steps()
        except OSError as error:
            if error.errno in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
                raise self._changed() from error
            raise CheckpointError(
                f"{self._out}: cannot be put in place ({error.strerror}). Choose another output folder."
            ) from error

    def _replace_in_two_steps(self) -> None:
        """For file systems without an exchange: a process killed in between leaves the old folder beside ``out``."""
        old = self._sibling("old")
        os.rename(self._out, old)
        try:
            self._require_unchanged(old)
            os.rename(self._temporary, self._out)
        except BaseException:
            if not self._out.exists():
                os.rename(old, self._out)
            raise
        shutil.rmtree(old)

    def _require_unchanged(self, folder: Path) -> None:
        if _contents(folder) != self._seen:
            raise self._changed()

    def _changed(self) -> CheckpointError:
        winner = "another run of lagless wrote it" if (self._out / RECORD).is_file() else "lagless did not write it"
        if self._seen:
            winner = "files in it are not those that were there at the start"
        return CheckpointError(
            f"{self._out}: changed while the work went on ({winner}). It stays as it is, and the new result was "
            "discarded. Choose another output folder, or move this one away, and run again."
        )

    def _sibling(self, word: str) -> Path:
        return self._out.parent / f".{self._out.name}.{word}-{secrets.token_hex(4)}"


def _contents(folder: Path) -> dict[str, tuple[int, int, int]]:
    """Inode, size and time of change of all that is in ``folder``; nothing if there is no such folder.

    Of folders only the inode counts: what is in them is looked at itself.
    """
    found = {}
    for entry in sorted(folder.rglob("*")) if folder.is_dir() else []:
        status = entry.lstat()
        is_folder = stat.S_ISDIR(status.st_mode)
        found[str(entry.relative_to(folder))] = (
            (status.st_ino, 0, 0) if is_folder else (status.st_ino, status.st_size, status.st_mtime_ns)
        )
    return found
