"""An output folder that comes into being complete or not at all."""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Iterable
from pathlib import Path

from lagless.checkpoints._errors import CheckpointError

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

    Args:
        out: the folder to be made; its parents are made as needed.

    >>> import tempfile
    >>> folder = Path(tempfile.mkdtemp()) / "out"
    >>> with Destination(folder) as temporary:
    ...     _ = (temporary / "file").write_text("x")
    >>> [entry.name for entry in folder.iterdir()]
    ['file']
    """

    def __init__(self, out: Path) -> None:
        # A link is followed: the folder it names is replaced, the link stays.
        self._out = out.resolve()
        self._temporary = self._sibling("tmp")
        self._made_parents: list[Path] = []

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
        old = self._sibling("old")
        try:
            if self._out.exists():
                os.rename(self._out, old)
            os.rename(self._temporary, self._out)
        except BaseException as error:
            if old.exists() and not self._out.exists():
                os.rename(old, self._out)
            if isinstance(error, OSError):
                raise CheckpointError(
                    f"{self._out}: cannot be put in place ({error.strerror}). Choose another output folder."
                ) from error
            raise
        if old.exists():
            shutil.rmtree(old)

    def _sibling(self, word: str) -> Path:
        return self._out.parent / f".{self._out.name}.{word}-{secrets.token_hex(4)}"
