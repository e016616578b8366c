"""Sequences of a run's own data, with the tokens that its training counted."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from transformers import PreTrainedTokenizerBase

from lagless.lab.recipes import Recipe, SftData, load_recipe
from lagless.lab.training._datasets import prepare
from lagless.lab.training._folder import RECIPE

Counted = tuple[list[int], list[bool]]
"""Token ids, and which of them are in the loss."""


def counted_sequences(run: Path, part: Literal["train", "validation"], count: int) -> list[Counted]:
    """Return sequences of the data of a run of ``lagless train``, tokenized as there.

    Args:
        run: the run's folder, whose recipe says which data.
        part: training data, or what was held out from them.
        count: how many at most; of held-out data, no more than training evaluated.

    Raises:
        ValueError: if the folder has no recipe, or its data are not there.
    """
    if not (run / RECIPE).is_file():
        raise ValueError(f"{run}: has no {RECIPE}, so its data are not known. Give them by --data loss=FILE.")
    recipe = load_recipe(run / RECIPE)
    prepared = prepare(recipe, few=count)
    rows = getattr(prepared, part)
    rows = rows.select(range(min(count, len(rows))))
    return [_counted(row, recipe, prepared.tokenizer) for row in rows]


def _counted(row: Any, recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> Counted:
    if not isinstance(recipe.data, SftData):
        return row["input_ids"], [True] * len(row["input_ids"])
    by_role = recipe.data.loss_on == "assistant"
    found: Any = tokenizer.apply_chat_template(row["messages"], return_dict=True, return_assistant_tokens_mask=by_role)
    ids = found["input_ids"][: recipe.data.max_length]
    mask = found["assistant_masks"][: len(ids)] if by_role else [1] * len(ids)
    return ids, [bool(one) for one in mask]
