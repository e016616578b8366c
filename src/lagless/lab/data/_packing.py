"""Text as token sequences of one length."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
from datasets import Dataset, Features, IterableDataset, List, Value
from datasets.fingerprint import Hasher
from transformers import PreTrainedTokenizerBase

from lagless.lab.data._split import require_columns

_DOCUMENTS_AT_ONCE = 64


def packed(
    rows: Dataset | IterableDataset,
    tokenizer: PreTrainedTokenizerBase,
    *,
    column: str,
    length: int,
    count: int | None = None,
    source: str,
    identity: object,
) -> Dataset:
    """Documents joined with end-of-text tokens and cut into sequences; what is left at the end is not used.

    Args:
        rows: documents.
        tokenizer: with an end-of-text token.
        column: of the text.
        length: tokens in a sequence.
        count: stop after so many sequences; None for all.
        source: where the rows are from, for messages.
        identity: what tells these rows from others. The sequences are kept in the cache of ``datasets``, and found
            there again for the same identity, tokenizer, length and count.

    Returns:
        A data set with one column ``input_ids``.

    Raises:
        ValueError: if the column or the end-of-text token is missing, or there is not one sequence.
    """
    require_columns(rows, [column], source, "data.text_column")
    if tokenizer.eos_token_id is None:
        raise ValueError("model: its tokenizer has no end-of-text token, which is to separate documents.")
    backend: Any = getattr(tokenizer, "backend_tokenizer", None)
    vocabulary = backend.to_str() if backend else sorted(tokenizer.get_vocab().items())
    arguments = {"rows": rows, "tokenizer": tokenizer, "column": column, "length": length, "count": count}
    if next(_sequences(**arguments), None) is None:
        raise ValueError(
            f"data.sequence_length={length}: {source} has fewer tokens. Give more text, or a smaller length."
        )
    found = Dataset.from_generator(
        _sequences,
        features=Features({"input_ids": List(Value("int32"), length=length)}),
        gen_kwargs=arguments,
        fingerprint=Hasher.hash([identity, vocabulary, column, length, count]),
    )
    assert isinstance(found, Dataset)
    return found


def _sequences(
    rows: Iterable[dict[str, str]], tokenizer: PreTrainedTokenizerBase, column: str, length: int, count: int | None
) -> Iterator[dict[str, np.ndarray]]:
    for sequence in itertools.islice(_cut(_tokens(rows, tokenizer, column), length), count):
        yield {"input_ids": sequence}


def _tokens(rows: Iterable[dict[str, str]], tokenizer: PreTrainedTokenizerBase, column: str) -> Iterator[np.ndarray]:
    documents = iter(rows)
    while batch := [row[column] for row in itertools.islice(documents, _DOCUMENTS_AT_ONCE)]:
        encoded: Any = tokenizer(batch, add_special_tokens=False, verbose=False)["input_ids"]
        yield np.concatenate([np.array([*ids, tokenizer.eos_token_id], dtype=np.int32) for ids in encoded])


def _cut(pieces: Iterable[np.ndarray], length: int) -> Iterator[np.ndarray]:
    left = np.empty(0, dtype=np.int32)
    for piece in pieces:
        stream = np.concatenate([left, piece])
        whole = len(stream) // length * length
        yield from stream[:whole].reshape(-1, length)
        left = stream[whole:]
