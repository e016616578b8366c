"""One average, uploaded to a repository of its own on the Hugging Face hub."""

from __future__ import annotations

from os import PathLike
from pathlib import Path
from typing import Any

from lagless.checkpoints import (
    CARD,
    RECORD,
    CheckpointError,
    absolute_path,
    base_model_of,
    foreign_files,
    holds_weights,
    model_card,
    own_files,
    read_object,
    records_average,
)


def push_to_hub(
    folder: str | PathLike[str],
    repo_id: str,
    *,
    private: bool | None = None,
    revision: str | None = None,
    commit_message: str | None = None,
    base_model: str | None = None,
    token: str | None = None,
    endpoint: str | None = None,
) -> str:
    """Upload an average that lagless wrote to a repository of its own, and return the address of the commit.

    The repository is created if it is not there. Uploaded are the files on the list in ``lagless.json``, weights,
    configuration, tokenizer and card; of an average without a card, one is made.

    Args:
        folder: an averaged model: what ``lagless average`` or a callback wrote.
        repo_id: ``owner/name``. The name of the base model is refused.
        private: whether a repository that is created is private; None for the account's default.
        revision: the branch; None for the main one.
        commit_message: None for one that names the average.
        base_model: on the hub, for the card; None for the one that the configuration names.
        token: of the account; None for the one that ``hf auth login`` keeps.
        endpoint: address of the hub; None for the usual one.

    Raises:
        CheckpointError: if the folder is no average, holds several, or holds files that lagless did not write.
        ValueError: if ``repo_id`` is not of the form ``owner/name``, or is the base model's.
    """
    from huggingface_hub import CommitOperationAdd, HfApi

    folder = absolute_path(folder)
    record = _record(folder)
    base = base_model or base_model_of(folder)
    if repo_id.count("/") != 1 or not all(repo_id.split("/")):
        raise ValueError(f"repo_id={repo_id!r}; it must be OWNER/NAME, as of a repository on the hub.")
    if repo_id == base:
        raise ValueError(f"repo_id={repo_id!r} is the base model; give the average a repository of its own.")
    files = {path.relative_to(folder).as_posix(): path for path in sorted(own_files(folder))}
    operations = [CommitOperationAdd(name, path) for name, path in files.items() if name != CARD]
    card: Path | bytes
    if CARD in files and base_model is None:
        card = files[CARD]
    else:
        card = model_card(record, folder, base).encode()
    operations.append(CommitOperationAdd(CARD, card))
    api = HfApi(endpoint=endpoint, token=token)
    api.create_repo(repo_id, private=private, exist_ok=True)
    if revision is not None:
        api.create_branch(repo_id, branch=revision, exist_ok=True)
    message = commit_message or f"Average {record.get('name') or ''} at step {record.get('step')}".replace("  ", " ")
    return str(api.create_commit(repo_id, operations, commit_message=message, revision=revision).commit_url)


def _record(folder: Path) -> dict[str, Any]:
    """What ``folder`` says of the average in it.

    Raises:
        CheckpointError: if there is not just one.
    """
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: no such folder. Give the folder of an average.")
    if not records_average(folder) or not holds_weights(folder):
        inner = sorted(entry.parent for entry in folder.glob(f"*/{RECORD}") if records_average(entry.parent))
        hint = (
            f"It holds the averages {', '.join(path.name for path in inner)}: give the folder of one of them."
            if inner
            else "Give a folder that lagless average or a callback wrote."
        )
        raise CheckpointError(f"{folder}: holds no average of its own (weights beside a {RECORD}). {hint}")
    if foreign := foreign_files(folder):
        raise CheckpointError(
            f"{folder}: holds {', '.join(foreign[:3])}{', ...' if foreign[3:] else ''}, which lagless did not write or "
            "which changed since. Move what is not to be uploaded away; or upload the folder with hf upload."
        )
    return read_object(folder / RECORD, "Repair it, or write the average again.")
