"""Held-out documents, and their split into the parts that fit, choose and report."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lagless.lab.data import read_rows
from lagless.lab.evaluation import held_out_documents

LEAST_DOCUMENTS = 10
SHARES: Mapping[str, float] = {"fit": 0.5, "choose": 0.2, "report": 0.3}
"""The share of each part, in tokens."""


@dataclass(frozen=True)
class Document:
    """One document of held-out data.

    Attributes:
        content: its text, or its row as JSON; what tells it from others.
        items: what a loss is called with, piece by piece: windows of tokens, or the row.
        size: how many targets it has, for cross-entropy; 1 for a loss of one's own.
    """

    content: str
    items: tuple[Any, ...]
    size: int = 1


@dataclass(frozen=True)
class Part:
    """The documents of one part, in a fixed order."""

    name: str
    documents: tuple[Document, ...]

    @property
    def size(self) -> int:
        """Targets in all."""
        return sum(document.size for document in self.documents)

    @property
    def digest(self) -> str:
        """SHA-256 of the contents, in order."""
        digest = hashlib.sha256()
        for document in self.documents:
            digest.update(_hash(document.content).encode())
        return digest.hexdigest()


@dataclass(frozen=True)
class Parts:
    """Three parts; a document in two of them is refused with a ValueError.

    Attributes:
        fit: its loss is what the weights minimise.
        choose: its loss chooses among ridges and modes.
        report: its loss is reported; nothing was chosen on it.
    """

    fit: Part
    choose: Part
    report: Part

    def __post_init__(self) -> None:
        seen: set[str] = set()
        for document in (*self.fit.documents, *self.choose.documents, *self.report.documents):
            if document.content in seen:
                raise ValueError(
                    f"documents: one that begins {document.content[:60]!r} is in more than one part, or twice in one; "
                    "what is fitted or chosen on cannot be reported on."
                )
            seen.add(document.content)


def text_documents(data: str, tokenizer: Any, length: int) -> list[Document]:
    """Read held-out documents for cross-entropy; see :func:`lagless.lab.evaluation.held_out_documents`."""
    found = held_out_documents(data, tokenizer, length=length)
    return [
        Document(content, tuple(windows), sum(len(ids) - max(start, 1) for ids, start in windows))
        for content, windows in found.items()
    ]


def row_documents(data: str) -> list[Document]:
    """Read the rows of held-out data for a loss of one's own; equal rows count once."""
    rows = read_rows(data)
    found = {json.dumps(row, sort_keys=True, ensure_ascii=False, default=str): row for row in rows}
    return [Document(content, (row,)) for content, row in found.items()]


def split_documents(documents: Iterable[Document], seed: int = 0) -> Parts:
    """Split documents into parts of about :data:`SHARES` of the targets, by a hash of their content.

    Args:
        documents: no two of the same content.
        seed: another one gives another split.

    Raises:
        ValueError: if there are fewer than :data:`LEAST_DOCUMENTS`, or a document is there twice.
    """
    ordered = sorted(documents, key=lambda document: _hash(f"{seed} {document.content}"))
    if len(ordered) < LEAST_DOCUMENTS:
        raise ValueError(
            f"data: {len(ordered)} documents; at least {LEAST_DOCUMENTS} are needed, since fitting, choosing and "
            "reporting each take documents of their own. Give more text, or end the documents of a .txt file with "
            "<|endoftext|>."
        )
    parts: dict[str, list[Document]] = {name: [] for name in SHARES}
    sizes = dict.fromkeys(SHARES, 0)
    for i, document in enumerate(ordered):
        # The first few go round, so that no part is without a document however much their lengths differ.
        names: Sequence[str] = list(SHARES)
        name = names[i % 3] if i < 6 else min(names, key=lambda name: (sizes[name] + document.size) / SHARES[name])
        parts[name].append(document)
        sizes[name] += document.size
    return Parts(**{name: Part(name, tuple(found)) for name, found in parts.items()})


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
