"""Fixed held-out sequences from a file of text, of problems with answers, or of conversations."""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch

from lagless.lab.cross_entropy import IGNORED
from lagless.lab.evaluation._loss import Sequences
from lagless.lab.evaluation._rows import read_rows

SEPARATOR = "<|endoftext|>"
"""What ends a document in a text file."""
_PAIRS = (("question", "answer"), ("instruction", "output"), ("prompt", "completion"))

Window = tuple[list[int], int]
"""Token ids, and the position at which the targets begin."""


def held_out_sequences(
    data: str, tokenizer: Any, *, length: int, count: int | None = 200, seed: int = 0, split: str | None = None
) -> Sequences:
    """Held-out sequences, the same ones for the same seed.

    Text (a column ``text``, or a ``.txt`` file with its documents separated by ``<|endoftext|>``) is joined with
    end-of-text tokens and cut into windows that do not overlap. Of conversations (``messages``), the last reply counts;
    of ``question`` and ``answer``, ``instruction`` and ``output``, ``prompt`` and ``completion``, the second. Questions
    read ``Question: ...``, ``Answer: ...``, as in the tasks; the others go through the tokenizer's chat template.

    Args:
        data: a file or the name of a data set on the hub.
        tokenizer: the model's.
        length: tokens per sequence; longer examples are left out.
        count: how many sequences; the default is the paper's. None for all.
        seed: of the choice.
        split: of a data set on the hub; None for test, or where there is none, the 1 % that recipes hold out of train.

    Raises:
        ValueError: if the data have none of these columns, the tokenizer has no chat template where one is needed, or
            there are fewer sequences than asked for.

    Reference:
        Block and Zhang, *EMA Without the Lag*, arXiv 2508.00180, Section 5.1: 200 held-out sequences.
    """
    rows = read_rows(data, split=split)
    if _is_text(rows, data):
        found = _windows((row["text"] for row in rows), tokenizer, length)
    else:
        examples = (_example(row, tokenizer) for row in rows)
        found = [(tokens, start) for tokens, start in examples if start < len(tokens) <= length]
    if not found or (count is not None and len(found) < count):
        raise ValueError(
            f"data={data!r} gives {len(found)} sequences of up to {length} tokens, and {count} are asked for. Ask for "
            "fewer, or change length."
        )
    chosen = (
        found if count is None else [found[i] for i in sorted(random.Random(seed).sample(range(len(found)), count))]
    )
    return pad(chosen)


def held_out_documents(data: str, tokenizer: Any, *, length: int, split: str | None = None) -> dict[str, list[Window]]:
    """Return held-out documents by their content, each cut into windows; what is there twice counts once.

    A document is a text of its own (a row, or what :data:`SEPARATOR` ends), a conversation, or a question with its
    answer, read as :func:`held_out_sequences` reads them. No window spans two documents; all of a text is used.

    Args:
        data: a file or the name of a data set on the hub.
        tokenizer: the model's.
        length: tokens per window at most; longer examples are left out.
        split: of a data set on the hub; None for test, or where there is none, the 1 % that recipes hold out of train.

    Returns:
        By text (or row, as JSON), the windows: token ids, and the position at which the targets begin.

    Raises:
        ValueError: if the data have no column that can be used, or nothing is left.
    """
    rows = read_rows(data, split=split)
    found: dict[str, list[Window]] = {}
    if _is_text(rows, data):
        end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
        texts = list(dict.fromkeys(_texts(row["text"] for row in rows)))
        for text, ids in zip(texts, tokenizer(texts, verbose=False)["input_ids"] if texts else [], strict=True):
            stream = [*ids, *end]
            windows = [stream[i : i + length] for i in range(0, len(stream), length)]
            found[text] = [(window, 0) for window in windows if len(window) > 1]
    else:
        for row in rows:
            tokens, start = _example(row, tokenizer)
            if start < len(tokens) <= length:
                found[json.dumps(row, sort_keys=True, ensure_ascii=False)] = [(tokens, start)]
    found = {text: windows for text, windows in found.items() if windows}
    if not found:
        raise ValueError(f"data={data!r} gives no document of up to {length} tokens. Change the data, or length.")
    return found


def pad(windows: Sequence[Window]) -> Sequences:
    """Return windows as padded tensors of tokens and labels."""
    tokens = torch.zeros(len(windows), max(len(ids) for ids, _ in windows), dtype=torch.long)
    labels = torch.full_like(tokens, IGNORED)
    for row, (ids, start) in enumerate(windows):
        tokens[row, : len(ids)] = torch.tensor(ids, dtype=torch.int64)
        labels[row, start : len(ids)] = tokens[row, start : len(ids)]
    return Sequences(tokens, labels)


def _is_text(rows: Sequence[Mapping[str, Any]], data: str) -> bool:
    """Tell rows of text from rows with a part that counts, and refuse what is neither."""
    columns = rows[0].keys()
    if "text" in columns:
        return True
    if "messages" in columns or any(columns >= set(pair) for pair in _PAIRS):
        return False
    raise ValueError(
        f"data={data!r} has columns {', '.join(columns)}; held-out data need text, messages, "
        f"{' or '.join(' and '.join(pair) for pair in _PAIRS)}."
    )


def _texts(texts: Iterable[str]) -> list[str]:
    return [part.strip() for text in texts for part in text.split(SEPARATOR) if part.strip()]


def _windows(texts: Iterable[str], tokenizer: Any, length: int) -> list[Window]:
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    documents = _texts(texts)
    stream = [token for ids in tokenizer(documents, verbose=False)["input_ids"] for token in (*ids, *end)]
    return [(stream[i : i + length], 0) for i in range(0, len(stream) - length + 1, length)]


def _example(row: Mapping[str, Any], tokenizer: Any) -> tuple[list[int], int]:
    """The tokens of an example, and where what counts begins."""
    if "question" in row:
        prompt, whole = f"Question: {row['question']}\nAnswer:", f"Question: {row['question']}\nAnswer: {row['answer']}"
        end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
        return [*tokenizer(whole)["input_ids"], *end], len(tokenizer(prompt)["input_ids"])
    if tokenizer.chat_template is None:
        raise ValueError("the tokenizer has no chat template, which conversations and instructions are put through.")
    messages = row.get("messages") or _conversation(row)
    before = tokenizer.apply_chat_template(messages[:-1], add_generation_prompt=True, return_dict=False)
    return tokenizer.apply_chat_template(messages, return_dict=False), len(before)


def _conversation(row: Mapping[str, Any]) -> list[dict[str, str]]:
    asked, reply = next(pair for pair in _PAIRS if pair[0] in row)
    question = "\n\n".join(part for part in (row[asked], row.get("input")) if part)
    return [{"role": "user", "content": question}, {"role": "assistant", "content": row[reply]}]
