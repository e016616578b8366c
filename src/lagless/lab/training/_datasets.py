"""From a recipe to what its trainer iterates over."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from datasets import Dataset, IterableDataset
from transformers import PreTrainedTokenizerBase

from lagless.lab.data import conversations, packed, replace_spans, split_rows
from lagless.lab.recipes import PretrainingData, Recipe, SftData
from lagless.lab.training._model import build_tokenizer


class Prepared(NamedTuple):
    """What a trainer needs beside the model.

    Attributes:
        tokenizer: of the model.
        train: conversations, or token sequences.
        validation: likewise, held out.
        available: training examples before any were left out; None where nobody has counted them.
    """

    tokenizer: PreTrainedTokenizerBase
    train: Dataset
    validation: Dataset
    available: int | None


def prepare(recipe: Recipe, *, few: int | None = None) -> Prepared:
    """The data of a recipe.

    Args:
        recipe: the recipe.
        few: prepare so many training sequences at most, for a rehearsal.

    Raises:
        ValueError: if the data or the tokenizer are not there, or do not fit each other or the recipe.
    """
    data, held_out = recipe.data, recipe.evaluation.sequences
    if isinstance(data, SftData):
        train, validation = split_rows(data)
        assert isinstance(train, Dataset) and isinstance(validation, Dataset)
        tokenizer = build_tokenizer(recipe, ())
        return Prepared(
            tokenizer,
            conversations(train, data, tokenizer, keep=few),
            conversations(validation, data, tokenizer, keep=held_out),
            len(train),
        )
    train, validation = split_rows(data, streaming=True)
    tokenizer = build_tokenizer(recipe, _texts(train, data))
    steps, batch = recipe.training.max_steps, recipe.training.batch_size
    count = few or (steps and steps * batch)
    sequences = _packed(train, "train", data, tokenizer, count)
    if data.noise is not None:
        sequences = replace_spans(sequences, data.noise)
    validation = _packed(validation, "validation", data, tokenizer, held_out)
    return Prepared(tokenizer, sequences, validation, None if few else len(sequences))


def _packed(
    rows: Dataset | IterableDataset,
    part: str,
    data: PretrainingData,
    tokenizer: PreTrainedTokenizerBase,
    count: int | None,
) -> Dataset:
    files = [Path(path) for path in (data.path, data.validation_path) if path and Path(path).is_file()]
    # Noise comes later, and the length is told separately.
    section = data.model_dump_json(exclude={"noise", "sequence_length"})
    identity = [section, part, *((str(file), file.stat().st_mtime_ns, file.stat().st_size) for file in files)]
    return packed(
        rows,
        tokenizer,
        column=data.text_column,
        length=data.sequence_length,
        count=count,
        source=f"{data.path} ({part})",
        identity=identity,
    )


def _texts(rows: Dataset | IterableDataset, data: PretrainingData) -> Iterator[str]:
    for row in rows:
        if data.text_column not in row:
            return  # packing says so
        yield dict(row)[data.text_column]
