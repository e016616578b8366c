"""Rows as conversations: lists of messages with a role and a content."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from lagless.lab.data._split import require_columns

if TYPE_CHECKING:
    from lagless.lab.recipes import SftData


def conversations(
    rows: Dataset, data: SftData, tokenizer: PreTrainedTokenizerBase, *, keep: int | None = None
) -> Dataset:
    """Rows with one column ``messages``, as TRL's trainer takes them.

    Args:
        rows: with the columns that ``data`` names.
        data: the data section of a recipe.
        tokenizer: whose chat template counts the tokens of a conversation.
        keep: how many to keep, at random with ``data.split_seed``; None for all.

    Raises:
        ValueError: if a column is missing or is no conversation, or none is short enough.
    """
    pair = [data.prompt_column, data.input_column, data.response_column]
    if data.prompt_column is not None:
        require_columns(rows, [name for name in pair if name], data.path, "data.prompt_column")
        convert = _from_columns
    else:
        require_columns(rows, [data.messages_column], data.path, "data.messages_column")
        convert = _from_messages
    if keep is not None:
        # More than are kept, since some may be too long.
        rows = rows.shuffle(seed=data.split_seed).select(range(min(len(rows), 4 * keep)))
    workers = data.processes if data.processes > 1 and len(rows) > 10_000 else None
    found = rows.map(convert, fn_kwargs={"data": data}, remove_columns=rows.column_names, num_proc=workers)
    if data.too_long == "drop":
        found = found.filter(
            lambda row: len(tokenizer.apply_chat_template(row["messages"], return_dict=False)) <= data.max_length,
            num_proc=workers,
        )
    if not len(found):
        raise ValueError(
            f"data.max_length={data.max_length}: every conversation of {data.path} is longer. Choose more, or "
            "data.too_long=truncate."
        )
    return found if keep is None else found.select(range(min(len(found), keep)))


def _from_columns(row: dict[str, Any], data: SftData) -> dict[str, Any]:
    prompt, extra = str(row[data.prompt_column or ""]), row.get(data.input_column or "")
    if extra:
        prompt = f"{prompt}\n\n{extra}"
    turns = (("user", prompt), ("assistant", str(row[data.response_column or ""])))
    return {"messages": [{"role": role, "content": content} for role, content in turns]}


def _from_messages(row: dict[str, Any], data: SftData) -> dict[str, Any]:
    messages = row[data.messages_column]
    if not (isinstance(messages, list) and messages and all({"role", "content"} <= m.keys() for m in messages)):
        raise ValueError(
            f"data.messages_column: a row of {data.path} has {str(messages)[:80]!r} in {data.messages_column}, which "
            "is no list of {role, content}. For pairs give data.prompt_column and data.response_column."
        )
    return {"messages": [{"role": m["role"], "content": m["content"]} for m in messages]}
