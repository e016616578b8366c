"""The text of the demo: the standard library of this machine's Python, or the user's own, split by file."""

from __future__ import annotations

import hashlib
import os
import platform
import sysconfig
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Literal

from lagless.lab.data import Document

Split = Literal["train", "validation", "test"]
SPLITS: tuple[Split, ...] = ("train", "validation", "test")

_CORPUS_BYTES = 12_000_000
# Less than this is too short to learn from, or to tell two averages apart on.
_SMALLEST_BYTES: dict[Split, int] = {"train": 100_000, "validation": 10_000, "test": 10_000}
# A file as large as this would be most of what is held out, so it is trained on.
_LARGEST_HELD_OUT = 150_000
# With fewer files than this, a split by file is a matter of luck: they are cut into pieces first.
_FEW_FILES = 40
_PIECE_BYTES = 4_000

# Tests and tables are not what a person reads, and other people's packages differ from machine to machine.
_SKIPPED = {"site-packages", "dist-packages", "test", "tests", "idle_test", "encodings", "lib2to3", "pydoc_data"}
_SUFFIXES = {".py", ".txt", ".rst"}


@dataclass(frozen=True)
class Corpus:
    """Documents by split, in a fixed order, and what they are in words."""

    description: str
    documents: dict[Split, list[Document]]

    def nbytes(self, split: Split) -> int:
        """Bytes of text in a split."""
        return sum(document.nbytes for document in self.documents[split])


def load_corpus(files: Sequence[str | PathLike[str]] | None = None) -> Corpus:
    """The standard library of the running interpreter, or ``files``, split into train, validation and test.

    The split is by whole file, 80, 10 and 10 %, by a hash of the file's name: what is held out comes from files that
    were never trained on. A few large files are cut into pieces first, and the split is by piece.

    Args:
        files: text files; None or none for the standard library.

    Raises:
        ValueError: if there is too little text, or a file cannot be read as UTF-8.
    """
    if not files:
        documents = _standard_library()
        description = f"source and documentation of the standard library of Python {platform.python_version()}"
    else:
        documents = _read_files([Path(file) for file in files])
        description = f"{len(files)} file{'s' if len(files) != 1 else ''} given with --data"
        if len(documents) < _FEW_FILES:
            documents = [piece for document in documents for piece in _cut(document)]
            description += f", cut into {len(documents)} pieces"
    corpus = Corpus(description, _split(documents))
    for split, smallest in _SMALLEST_BYTES.items():
        if corpus.nbytes(split) < smallest:
            total = sum(corpus.nbytes(s) for s in SPLITS)
            where = "--data" if files else f"the standard library in {_library_folder()}"
            remedy = "Give more text" if files else "Give text of your own with --data FILE..."
            raise ValueError(
                f"{where}: {total:,} bytes of text, of which {corpus.nbytes(split):,} for {split}; "
                f"at least {smallest:,} are needed there. {remedy} (a megabyte is comfortable)."
            )
    return corpus


def _library_folder() -> Path:
    return Path(sysconfig.get_paths()["stdlib"])


def _standard_library() -> list[Document]:
    root = _library_folder()
    documents = list(_language_reference())
    for path in sorted(root.rglob("*")):
        name = path.relative_to(root).as_posix()
        if path.suffix in _SUFFIXES and not _SKIPPED.intersection(name.split("/")) and path.is_file():
            try:
                documents.append(Document(name, path.read_text(encoding="utf-8")))
            except (OSError, UnicodeDecodeError):
                continue  # a few sources are in older encodings
    return documents


def _language_reference() -> Iterator[Document]:
    """The chapters of the language reference behind ``help()``, as text instead of as Python literals."""
    try:
        from pydoc_data.topics import topics
    except ImportError:  # some distributions leave it out
        return
    yield Document("pydoc_data/topics", "\n\n".join(topics[name] for name in sorted(topics)))


def _read_files(paths: Sequence[Path]) -> list[Document]:
    parent = Path(os.path.commonpath([path.absolute().parent for path in paths]))
    documents = []
    for path in paths:
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"--data: {path} is not UTF-8 text ({error}). Convert it, or leave it out.") from error
        except OSError as error:
            raise ValueError(f"--data: cannot read {path} ({error.strerror}). Give text files, not folders.") from error
        documents.append(Document(path.absolute().relative_to(parent).as_posix(), text))
    return documents


def _cut(document: Document) -> Iterator[Document]:
    """Pieces of about 4 kB that end at line ends."""
    lines: list[str] = []
    size = number = 0
    for line in document.text.splitlines(keepends=True):
        lines.append(line)
        size += len(line.encode())
        if size >= _PIECE_BYTES:
            yield Document(f"{document.name}#{number}", "".join(lines))
            lines, size, number = [], 0, number + 1
    if lines:
        yield Document(f"{document.name}#{number}", "".join(lines))


def _split(documents: Sequence[Document]) -> dict[Split, list[Document]]:
    split: dict[Split, list[Document]] = {name: [] for name in SPLITS}
    seen: set[str] = set()
    total = 0
    # In the order of the hash, so that the cap on the total takes a random part of every split.
    for document in sorted(documents, key=lambda document: (_fraction(document.name), document.name)):
        if not document.text.strip() or document.text in seen:
            continue
        seen.add(document.text)  # a copy of a file must not be held out and trained on
        part = _fraction(f"split {document.name}")
        large = document.nbytes > _LARGEST_HELD_OUT
        chosen: Split = "train" if large or part < 0.8 else "validation" if part < 0.9 else "test"
        split[chosen].append(document)
        total += document.nbytes
        if total >= _CORPUS_BYTES:
            break
    return split


def _fraction(name: str) -> float:
    """A number in [0, 1) that is the same on every machine."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") / 2**64
