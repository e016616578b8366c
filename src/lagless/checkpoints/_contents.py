"""Which files of an output folder lagless wrote: its record lists them."""

from __future__ import annotations

import contextlib
import json
import os
import re
import stat
from collections.abc import Callable, Iterable, Iterator
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from lagless._validation import is_object
from lagless._version import __version__

RECORD = "lagless.json"
_WEIGHTS = re.compile(r"(adapter_)?model(-\d+-of-\d+)?\.safetensors(\.index\.json)?")
_BESIDE_WEIGHTS = (
    *("config.json", "generation_config.json", "adapter_config.json", "tokenizer.json", "tokenizer_config.json"),
    *("tokenizer.model", "special_tokens_map.json", "added_tokens.json", "vocab.json", "vocab.txt", "merges.txt"),
    *("normalizer.json", "spiece.model", "*.spm", "*.bpe.model", "*.tiktoken", "*.jinja", "chat_template.json"),
    *("*processor_config.json", "LICENSE*", "NOTICE*", "training_args.bin"),
)
"""What versions wrote that kept no list. Code and cards are not among it, for they may be somebody's own."""

_Listed = dict[str, Any] | bool
"""Names and sizes; True for a record without them, False where there is no record."""


def list_files(folder: Path) -> None:
    """Write into the record of ``folder``, and of every folder in it that has one, which files belong to it.

    A folder without a record gets one. Files below a folder that has its own record are on that one's list.
    """
    holders = [Path(place) for place, _, names in os.walk(folder) if RECORD in names or Path(place) == folder]
    for holder in sorted(holders, reverse=True):
        path = holder / RECORD
        record: dict[str, Any] = {"lagless": __version__}
        if path.is_file():
            record = json.loads(path.read_text(encoding="utf-8"))
        inner = [other for other in holders if other != holder and other.is_relative_to(holder)]
        record["files"] = {
            file.relative_to(holder).as_posix(): file.stat().st_size
            for file in _files(holder)
            if file != path and not any(file.is_relative_to(i) and file != i / RECORD for i in inner)
        }
        # A name that is no text is escaped, as JSON allows.
        path.write_text(json.dumps(record, indent=2, ensure_ascii=False) + "\n", "utf-8", "backslashreplace")


def foreign_files(folder: Path) -> list[str]:
    """Return what is in ``folder`` and not on the list of its record: files added or changed, links, empty folders.

    Records of earlier versions have no list. The names that those versions gave the files of a model count for them.
    """
    own = set(own_files(folder))
    own_folders = _folders_of(folder, own)
    found: list[Path] = []
    for place, folders, names in os.walk(folder):
        here = Path(place)
        found += [here / name for name in names if here / name not in own]
        found += [here / name for name in folders if (here / name).is_symlink()]
        if not names and not folders and here != folder and here not in own_folders:
            found.append(here)
    return sorted(str(path.relative_to(folder)) for path in found)


def some(names: list[str]) -> str:
    """Up to three of ``names``, for a message."""
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def records_average(folder: Path) -> bool:
    """Whether the record of ``folder`` is that of an average; else it only lists files, or there is none."""
    try:
        record = json.loads((folder / RECORD).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return False
    except (OSError, ValueError, RecursionError):
        return True  # nothing else has that name
    return not isinstance(record, dict) or record.keys() != {"lagless", "files"}


def own_files(folder: Path) -> Iterator[Path]:
    """Yield the files in ``folder`` that are on the list of its record, every record after what it lists."""
    yield from _own(folder, folder, _listed(folder))


def remove_own_files(folder: Path) -> bool:
    """Remove what is on the list of the record of ``folder``, then the folders that this leaves empty.

    Should the process be killed meanwhile, the record still lists what is left. What may not be removed, for lack of
    permission, stays.

    Returns:
        Whether ``folder`` is gone.
    """
    own = list(own_files(folder))
    own_folders = sorted(_folders_of(folder, own), reverse=True)
    for path in own:
        if path.name == RECORD:
            _each(os.rmdir, [inner for inner in own_folders if path.parent in inner.parents])
        _each(os.unlink, [path])
    _each(os.rmdir, [*own_folders, folder])
    return not folder.exists()


def _own(place: Path, holder: Path, listed: _Listed) -> Iterator[Path]:
    """Own files in ``place``, whose nearest record is in ``holder``."""
    with os.scandir(place) as scan:
        entries = sorted(scan, key=lambda entry: entry.name)
    for entry in entries:
        path = Path(entry.path)
        if entry.is_dir(follow_symlinks=False):
            inner = _listed(path)
            if inner is False:
                yield from _own(path, holder, listed)
            # Of folders with a record of their own, only those count that the outer record knows.
            elif not isinstance(listed, dict) or (path / RECORD).relative_to(holder).as_posix() in listed:
                yield from _own(path, path, inner)
        elif entry.name != RECORD and _is_listed(path, holder, listed):
            yield path
    if listed is not False and place == holder:
        yield place / RECORD


def _is_listed(path: Path, holder: Path, listed: _Listed) -> bool:
    status = path.lstat()
    if listed is False or not stat.S_ISREG(status.st_mode):
        return False
    if listed is True:
        return _WEIGHTS.fullmatch(path.name) is not None or any(
            fnmatch(path.name, pattern) for pattern in _BESIDE_WEIGHTS
        )
    return listed.get(path.relative_to(holder).as_posix()) == status.st_size


def _listed(folder: Path) -> _Listed:
    path = folder / RECORD
    if path.is_symlink() or not path.is_file():
        return False
    try:
        files = json.loads(path.read_text(encoding="utf-8"))["files"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return True
    return files if is_object(files) else True


def _folders_of(folder: Path, own: Iterable[Path]) -> set[Path]:
    """The folders in ``folder`` that hold files on its lists, or held some."""
    listed = [
        path.parent / name
        for path in own
        if path.name == RECORD and isinstance(names := _listed(path.parent), dict)
        for name in names
    ]
    parents = {parent for path in (*own, *listed) for parent in path.parents}
    return {parent for parent in parents if parent != folder and parent.is_relative_to(folder)}


def _files(folder: Path) -> Iterator[Path]:
    for place, _, names in os.walk(folder):
        yield from (Path(place) / name for name in sorted(names))


def _each(remove: Callable[[Path], None], paths: Iterable[Path]) -> None:
    for path in paths:
        with contextlib.suppress(OSError):
            remove(path)
