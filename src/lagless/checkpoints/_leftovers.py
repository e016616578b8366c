"""What stands beside an output folder while runs write it, and what becomes of it when they end or are killed.

``.OUT.lock-OWNER`` is held by the owner as long as it lives. ``.OUT.tmp-OWNER`` is being written. ``.OUT.old-OWNER`` is
whole: the folder that was replaced or, for a moment before that, the one that replaces it.
"""

from __future__ import annotations

import os
import shutil
import warnings
from contextlib import suppress
from pathlib import Path

from lagless.checkpoints._contents import foreign_files, remove_own_files, some
from lagless.checkpoints._owners import Owner, owners, stem, take_over


def beside(out: Path, word: str, owner: Owner) -> Path:
    """The place beside ``out`` for what ``word`` says: lock, tmp or old."""
    return out.parent / f".{stem(out)}.{word}-{owner}"


def clear_leftovers(out: Path) -> None:
    """Remove what killed runs left beside ``out``; put the old folder back if it was to be replaced and is missing."""
    for owner, lock in owners(out.parent, f".{stem(out)}.lock-"):
        if (held := take_over(owner, lock, beside(out, "tmp", owner))) is not None:
            try:
                if settle(out, owner):
                    lock.unlink(missing_ok=True)
            finally:
                os.close(held)


def settle(out: Path, owner: Owner) -> bool:
    """Clean up after an owner, alive or dead: what is temporary goes, a former folder is put back or removed.

    A former folder with files that lagless did not write is kept under a visible name, and a warning says so.

    Returns:
        Whether nothing of the owner's is left.
    """
    temporary, old = beside(out, "tmp", owner), beside(out, "old", owner)
    try:
        if old.is_dir() and not os.path.lexists(out):
            os.rename(old, out)
        # Before the second of two renames there are both; what is at ``out`` then came from elsewhere.
        elif old.is_dir() and (temporary.is_dir() or not remove_own_files(old)):
            kept = out.with_name(f"{stem(out)}.kept-{owner.token}")
            os.rename(old, kept)
            holds = some(foreign_files(kept)) or "an earlier result"
            warnings.warn(
                f"{kept}: holds {holds}, which was at {out} while that was being replaced and which lagless may not "
                "remove. Move it where it belongs.",
                stacklevel=2,
            )
    except OSError:
        return False  # the next run tries again
    shutil.rmtree(temporary, ignore_errors=True)
    return not temporary.exists()


def tell_rivals(out: Path, owner: Owner) -> None:
    """Tell other runs that write ``out`` who was first."""
    for _, lock in _rivals(out, owner):
        with suppress(OSError), lock.open("r+") as file:
            before = os.stat(file.fileno())
            file.seek(0, os.SEEK_END)
            file.write(f"{owner.words}\n")
            file.flush()
            os.utime(lock, ns=(before.st_atime_ns, before.st_mtime_ns))  # it tells how long its owner is quiet


def winner(out: Path, owner: Owner) -> str:
    """Who wrote ``out`` before this owner did, in words."""
    # In this order: a run tells its rivals before it lets go of its own lock.
    present = [rival.words for rival, _ in _rivals(out, owner)]
    told: list[str] = []
    with suppress(OSError):
        told = beside(out, "lock", owner).read_text().splitlines()
    return f"another run of lagless ({' or '.join(told[:1] or present) or 'it has ended'})"


def _rivals(out: Path, owner: Owner) -> list[tuple[Owner, Path]]:
    return [(other, place) for other, place in owners(out.parent, f".{stem(out)}.lock-") if other != owner]
