"""Training sequences with spans of other sequences in them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from datasets import Dataset

if TYPE_CHECKING:
    from lagless.lab.recipes import SpanNoise


def replace_spans(sequences: Dataset, noise: SpanNoise) -> Dataset:
    """A share q of the sequences get U(least, most) of their blocks replaced by spans of random other sequences.

    What becomes of a sequence depends on its number and ``noise.seed`` alone, and spans are taken from clean sequences.

    Args:
        sequences: with one column ``input_ids`` of sequences of one length.
        noise: the noise section of a recipe.

    Raises:
        ValueError: if there is one sequence only, or a block is longer than a sequence.

    Reference:
        Nayak et al., arXiv 2605.20756, pretraining on noisy data.
    """
    length = len(sequences[0]["input_ids"])
    if len(sequences) < 2:
        raise ValueError(
            "data.noise: replaces spans by those of other sequences, and there is one only. Give more text."
        )
    if noise.block > length:
        raise ValueError(f"data.noise.block={noise.block} is longer than data.sequence_length={length}.")
    clean = sequences.with_format("numpy")

    def corrupted(row: dict[str, list[int]], index: int) -> dict[str, np.ndarray]:
        random = np.random.default_rng((noise.seed, index))
        tokens = np.array(row["input_ids"])
        if random.random() >= noise.sequences:
            return {"input_ids": tokens}
        blocks = length // noise.block
        replaced = round(random.uniform(noise.least, noise.most) * blocks)
        for block in random.choice(blocks, replaced, replace=False):
            donor = (index + random.integers(1, len(clean))) % len(clean)
            start = random.integers(0, length - noise.block + 1)
            span = clean[int(donor)]["input_ids"][start : start + noise.block]
            tokens[block * noise.block : (block + 1) * noise.block] = span
        return {"input_ids": tokens}

    return sequences.map(corrupted, with_indices=True, features=sequences.features)
