"""Held-out documents that the run was trained on, where its data are known."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from lagless.lab.data import split_rows
from lagless.lab.learn._documents import Document
from lagless.lab.recipes import PretrainingData, load_recipe

_RECIPE = "recipe.yaml"


def refuse_trained_on(run: Path, documents: Sequence[Document]) -> None:
    """Refuse held-out documents that are among those a run was trained on.

    The recipe that ``lagless train`` leaves in the run's folder names the data; they are compared where they are a
    local file or folder. Without a recipe nothing is known. Documents are compared whole.

    Raises:
        ValueError: with the number of such documents, and the beginning of one.
    """
    recipe = run / _RECIPE
    if not recipe.is_file() or not (source := load_recipe(recipe).data) or not Path(source.path).exists():
        return
    held_out = {document.content.strip() for document in documents}
    column = source.text_column if isinstance(source, PretrainingData) else None
    common = held_out.intersection(_contents(split_rows(source)[0], column))
    if common:
        raise ValueError(
            f"data: {len(common)} of {len(held_out)} documents are among those the run was trained on, as {recipe} has "
            f"it; one begins {min(common)[:60]!r}. Weights fitted on them would be as overfitted as the run: give "
            "text that was held out."
        )


def _contents(rows: Any, column: str | None) -> Iterator[str]:
    for row in rows:
        yield json.dumps(row, sort_keys=True, ensure_ascii=False) if column is None else str(row[column]).strip()
