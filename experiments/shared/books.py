"""Books to train on, and held-out books, plays and stories, in the tokens of one tokenizer."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from experiments.shared.cells import array_once, load, store, store_array
from experiments.shared.text import HeldOut, held_out, read_documents, tokens_of
from transformers import PreTrainedTokenizerBase

LENGTH = 128
TUNING_BOOKS, REPORTING_BOOKS = 24, 36
OTHER_DOCUMENTS = 24
WINDOWS = {"tuning": 3, "reporting": 6, "plays": 4, "stories": 4}  # of each document
SHAKESPEARE = "William Shakespeare/"
MOST_OF_A_BOOK = 250_000  # characters that are trained on


class Text:
    """The corpus in tokens, made once and kept in ``work``.

    Attributes:
        training: one long row of tokens.
        parts: held-out documents by the name of their part.
    """

    def __init__(self, data: Path, work: Path, tokenizer: PreTrainedTokenizerBase) -> None:
        self._data, self._work, self._tokenizer = data / "corpus", work / "tokens", tokenizer
        self.training = array_once(self._work / "training.npy", self._training)
        self.parts = {part: self._held_out(part, count) for part, count in WINDOWS.items()}

    def _books(self) -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
        """Training and held-out books with their names; which of the training file are held out is fixed here."""
        training = _named_books(self._data, "train")
        held = _named_books(self._data, "valid")
        long_enough = [i for i, (_, text) in enumerate(training) if len(text) > 20_000]
        drawn = np.random.default_rng(0).choice(long_enough, TUNING_BOOKS + REPORTING_BOOKS - len(held), replace=False)
        held = held + [training[i] for i in sorted(drawn)]
        # tinyshakespeare is held out as a whole, so no play of Shakespeare is trained on.
        rest = [book for i, book in enumerate(training) if i not in drawn and not book[0].startswith(SHAKESPEARE)]
        return rest, held

    def _training(self) -> np.ndarray:
        return np.concatenate([tokens_of(self._tokenizer, text[:MOST_OF_A_BOOK]) for _, text in self._books()[0]])

    def _held_out(self, part: str, count: int) -> HeldOut:
        names = self._work / f"{part}-{count}.json"
        if not names.is_file():
            made = held_out(
                [(name, tokens_of(self._tokenizer, text)) for name, text in self._texts(part)], count, LENGTH
            )
            store_array(self._work / f"{part}-{count}.npy", made.windows)
            store(names, list(made.names))
        return HeldOut(np.load(self._work / f"{part}-{count}.npy"), tuple(load(names)))

    def _texts(self, part: str) -> list[tuple[str, str]]:
        if part in ("tuning", "reporting"):
            held = self._books()[1]
            order = np.random.default_rng(1).permutation(len(held))
            chosen = order[:TUNING_BOOKS] if part == "tuning" else order[TUNING_BOOKS:]
            return [held[i] for i in sorted(chosen)]
        if part == "plays":
            text = (self._data / "tinyshakespeare.txt").read_text(encoding="utf-8")
            size = len(text) // OTHER_DOCUMENTS
            return [(f"characters from {i * size}", text[i * size : (i + 1) * size]) for i in range(OTHER_DOCUMENTS)]
        stories = read_documents(self._data / "tinystories_val.txt.xz")
        size = len(stories) // OTHER_DOCUMENTS
        groups = [stories[i * size : (i + 1) * size] for i in range(OTHER_DOCUMENTS)]
        return [(f"stories from {i * size}", "\n".join(group[:20])) for i, group in enumerate(groups)]


def _named_books(folder: Path, part: str) -> list[tuple[str, str]]:
    lines = (folder / f"classic_books_{part}_index.tsv").read_text(encoding="utf-8").splitlines()[1:]
    texts = read_documents(folder / f"classic_books_{part}.txt.xz")
    if len(lines) != len(texts):
        raise ValueError(f"classic_books_{part}: {len(texts)} books, but {len(lines)} lines in the index.")
    return [(line.split("\t")[1].removesuffix(".md"), text) for line, text in zip(lines, texts, strict=True)]
