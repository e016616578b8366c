"""Tokens to train on, and held-out documents, each of the same number of tokens.

A document is what the standard errors resample: a book, a stretch of consecutive scenes, a handful of stories.
"""

from __future__ import annotations

import lzma
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from transformers import PreTrainedTokenizerBase

SEPARATOR = "<|endoftext|>"


@dataclass(frozen=True)
class HeldOut:
    """Windows of tokens from documents that nothing is trained on.

    Attributes:
        windows: shape (documents, windows of each, length + 1).
        names: of the documents.
    """

    windows: np.ndarray
    names: tuple[str, ...]


def read_documents(file: Path) -> list[str]:
    """Return the documents of an ``.xz`` file, which lines ``<|endoftext|>`` separate."""
    with lzma.open(file, "rt", encoding="utf-8") as text:
        return [document.strip() for document in text.read().split(SEPARATOR) if document.strip()]


def tokens_of(tokenizer: PreTrainedTokenizerBase, text: str) -> np.ndarray:
    """Return the token ids of a text, without special tokens, as uint16."""
    pieces = [text[i : i + 20_000] for i in range(0, len(text), 20_000)]
    ids = [tokenizer(piece, add_special_tokens=False)["input_ids"] for piece in pieces]
    return np.concatenate([np.asarray(part, dtype=np.uint16) for part in ids])


def evenly_spaced_windows(tokens: np.ndarray, count: int, length: int) -> np.ndarray:
    """Return ``count`` windows of ``length + 1`` tokens, evenly spaced, apart from title and end and from each other.

    Raises:
        ValueError: if the document is too short for them.
    """
    if tokens.size < count * (length + 1):
        raise ValueError(f"a document of {tokens.size} tokens has no {count} windows of {length + 1}; leave it out.")
    starts = ((np.arange(count) + 0.5) / count * (tokens.size - length - 1)).astype(int)
    return np.stack([tokens[start : start + length + 1] for start in starts])


def held_out(documents: Sequence[tuple[str, np.ndarray]], count: int, length: int) -> HeldOut:
    """Return ``count`` windows of each named document."""
    windows = np.stack([evenly_spaced_windows(tokens, count, length) for _, tokens in documents])
    return HeldOut(windows, tuple(name for name, _ in documents))


def random_windows(tokens: np.ndarray, seed: int, steps: int, batch: int, length: int) -> np.ndarray:
    """Return the starts of the training windows, shape (steps, batch): uniform over the corpus, decided by the seed.

    Runs of one seed and batch size see the same tokens in the same order, whatever their learning rate.
    """
    return np.random.default_rng(seed).integers(0, tokens.size - length - 1, size=(steps, batch))
