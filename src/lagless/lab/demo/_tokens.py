"""From documents to the token sequences to train and evaluate on."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from lagless.lab.data import Document, end_of_text


def encode(tokenizer: PreTrainedTokenizerFast, documents: Sequence[Document]) -> list[Tensor]:
    """The tokens of each document, between two end-of-text tokens."""
    end = end_of_text(tokenizer)
    encoded = tokenizer.backend_tokenizer.encode_batch_fast([document.text for document in documents])
    return [torch.tensor([end, *one.ids, end], dtype=torch.int64) for one in encoded]


def random_batches(tokens: Sequence[Tensor], batch_size: int, length: int, seed: int) -> Iterator[Tensor]:
    """Endless batches (B, length) of sequences that start at random places of the concatenated documents."""
    stream = torch.cat(list(tokens))
    generator = torch.Generator().manual_seed(seed)
    offsets = torch.arange(length, dtype=torch.int64)
    while True:
        starts = torch.randint(len(stream) - length + 1, (batch_size, 1), dtype=torch.int64, generator=generator)
        yield stream[starts + offsets]


def held_out_sequences(tokens: Sequence[Tensor], length: int, count: int) -> tuple[Tensor, Tensor]:
    """About ``count`` sequences spread evenly over the documents, and the document of each.

    Returns:
        (N, length) tokens and (N,) document numbers, N ≤ ``count``. No two sequences overlap.
    """
    pieces = [
        (piece, number)
        for number, document in enumerate(tokens)
        for piece in document.split(length)
        if len(piece) == length
    ]
    chosen = [pieces[i * len(pieces) // count] for i in range(count)] if len(pieces) > count else pieces
    return torch.stack([piece for piece, _ in chosen]), torch.tensor(
        [number for _, number in chosen], dtype=torch.int64
    )
