"""The prompts of the closed-loop tasks: read from the hub or a file, checked, chosen once and for all by a seed.

These functions are what the task files beside them name as ``custom_dataset``; the harness calls them with the task's
metadata.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from datasets import Dataset

from lagless.lab.evaluation._answers import extract_number
from lagless.lab.evaluation._arithmetic import problems
from lagless.lab.evaluation._rows import read_rows

_LETTERS = "ABCDEFGHIJ"

Document = dict[str, Any]


def gsm8k(data: str | None = None, prompts: int | None = 128, seed: int = 0, **_: object) -> dict[str, Dataset]:
    """``prompts`` problems of the test split of GSM8K, or of a file that has its columns."""

    def document(row: Mapping[str, Any]) -> Document:
        gold = extract_number(row["answer"])
        if "####" not in row["answer"] or gold is None:
            raise ValueError(f"answer {row['answer'][-60:]!r} does not end in '#### N', as GSM8K's answers do.")
        return {"question": row["question"], "target": row["answer"], "gold": str(gold)}

    rows = read_rows(data or "openai/gsm8k", ("question", "answer"), name="main", split="test")
    return {"test": _chosen(rows, document, prompts, seed)[0]}


def boolq(data: str | None = None, prompts: int | None = 64, seed: int = 0, **_: object) -> dict[str, Dataset]:
    """``prompts`` questions of the validation split of BoolQ, and five others of it as examples."""

    def document(row: Mapping[str, Any]) -> Document:
        gold = "yes" if row["answer"] else "no"
        return {"question": row["question"], "passage": row["passage"], "target": gold, "gold": gold}

    rows = read_rows(data or "google/boolq", ("question", "passage", "answer"), split="validation")
    test, examples = _chosen(rows, document, prompts, seed, examples=5)
    return {"test": test, "fewshot": examples}


def mmlu(
    subject: str, data: str | None = None, prompts: int | None = 64, seed: int = 0, **_: object
) -> dict[str, Dataset]:
    """``prompts`` questions of the test split of one MMLU subject; a file holds all subjects, named in ``subject``."""

    def document(row: Mapping[str, Any]) -> Document:
        answer, choices = row["answer"], list(row["choices"])
        gold = answer if isinstance(answer, str) else _LETTERS[answer]
        listed = "\n".join(f"({letter}) {choice}" for letter, choice in zip(_LETTERS, choices, strict=False))
        return {"question": row["question"], "choices": choices, "listed": listed, "target": gold, "gold": gold}

    rows = read_rows(data or "cais/mmlu", ("question", "choices", "answer", "subject"), name=subject, split="test")
    of_subject = [row for row in rows if row["subject"] == subject]
    if not of_subject:
        raise ValueError(f"data={data!r} has no questions of subject {subject!r}.")
    return {"test": _chosen(of_subject, document, prompts, seed)[0]}


def arithmetic(prompts: int | None = 128, seed: int = 0, level: int = 1, **_: object) -> dict[str, Dataset]:
    """The first ``prompts`` different problems of the test split of generated arithmetic."""
    found: dict[str, Document] = {}
    count = prompts or 128
    for problem in itertools.islice(problems("test", seed, level), 20 * count):
        gold = str(extract_number(problem.answer))
        found.setdefault(problem.key, {"question": problem.question, "target": problem.answer, "gold": gold})
        if len(found) == count:
            break
    else:
        raise ValueError(
            f"prompts={prompts}: level {level} has only about {len(found)} different problems for testing."
        )
    return {"test": Dataset.from_list([{"id": i} | document for i, document in enumerate(found.values())])}


def _chosen(
    rows: Sequence[Mapping[str, Any]],
    document: Callable[[Mapping[str, Any]], Document],
    prompts: int | None,
    seed: int,
    examples: int = 0,
) -> tuple[Dataset, Dataset]:
    """Prompts (None: all) and, apart from them, examples: the same for the same seed, each with its row as ``id``."""
    count = len(rows) - examples if prompts is None else prompts
    if not 1 <= count <= len(rows) - examples:
        raise ValueError(
            f"prompts={prompts}: the data has {len(rows)} rows, {examples} of which are examples; it must be from 1 to "
            f"{len(rows) - examples}."
        )
    order = random.Random(seed).sample(range(len(rows)), count + examples)

    def taken(ids: Iterable[int]) -> Dataset:
        return Dataset.from_list([{"id": i} | document(rows[i]) for i in ids])

    return taken(sorted(order[examples:])), taken(order[:examples])
