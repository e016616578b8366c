"""Books as passages in random order, so that short runs and few held-out sequences see many books."""

from __future__ import annotations

import gzip
import json
import lzma
import random
from pathlib import Path

from lagless.lab.data import Document, train_tokenizer

_PASSAGE = 2000  # characters
_TRAINING = 4000  # passages, 8 MB
VOCABULARY = 512
# The model of the studies of optimizers.
LLAMA = {
    "hidden_size": 64,
    "intermediate_size": 176,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 256,
    "tie_word_embeddings": True,
}


def prepare(data: Path, out: Path) -> dict[str, str]:
    """Training, validation and test passages and a tokenizer in ``out``; the fields of a recipe that name them.

    Args:
        data: the folder with ``corpus/classic_books_train.txt.xz`` and ``corpus/classic_books_valid.txt.xz``, books
            separated by
            ``<|endoftext|>``. Of the held-out books, every second passage is for choosing settings, the others are for
            reporting.
        out: where to write, and where to find what is there already.
    """
    paths = {part: out / f"{part}.jsonl.gz" for part in ("train", "valid", "test")}
    tokenizer = out / "tokenizer"
    if not tokenizer.is_dir():
        out.mkdir(parents=True, exist_ok=True)
        training = _passages(data / "corpus" / "classic_books_train.txt.xz")[:_TRAINING]
        held_out = _passages(data / "corpus" / "classic_books_valid.txt.xz")
        for part, passages in (("train", training), ("valid", held_out[::2]), ("test", held_out[1::2])):
            with gzip.open(paths[part], "wt", encoding="utf-8") as file:
                file.writelines(json.dumps({"text": passage}) + "\n" for passage in passages)
        documents = [Document(str(number), passage) for number, passage in enumerate(training)]
        train_tokenizer(documents, VOCABULARY).save_pretrained(tokenizer)
    return {
        "data.path": str(paths["train"]),
        "data.validation_path": str(paths["valid"]),
        "model.tokenizer": str(tokenizer),
    }


def _passages(path: Path) -> list[str]:
    with lzma.open(path, "rt", encoding="utf-8") as file:
        books = file.read().split("<|endoftext|>")
    passages = [book[i : i + _PASSAGE] for book in map(str.strip, books) for i in range(0, len(book), _PASSAGE)]
    random.Random(0).shuffle(passages)
    return passages
