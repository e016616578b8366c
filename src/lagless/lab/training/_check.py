"""What can be found wrong with a run before anything is loaded."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from lagless.lab.recipes import NewModel, PretrainingData, Recipe
from lagless.lab.training._folder import check_folder
from lagless.lab.training._trainer import accumulation
from lagless.rules import require_updates


def check_run(recipe: Recipe, folder: Path) -> None:
    """Refuse a run that could not begin; data, model and accelerator are left to ``--dry-run``.

    Checked are the folder, the batch among the processes, that local files and folders exist, and that every average
    has an update.

    Args:
        recipe: of the run.
        folder: of the run.

    Raises:
        ValueError: naming the field or folder, and what to change.
    """
    check_folder(folder, recipe)
    accumulation(recipe)
    for field, path in _paths(recipe):
        if path is not None and _is_local(path) and not Path(path).expanduser().exists():
            raise ValueError(f"{field}: {path} does not exist. Give a file or folder, or a name of the hub.")
    steps = recipe.training.max_steps
    if steps is None:
        return
    for name, rule in recipe.averages().items():
        try:
            require_updates(rule, steps)
        except ValueError as error:
            raise ValueError(f"method.averages.{name}: {error}") from error


def _paths(recipe: Recipe) -> Iterator[tuple[str, str | None]]:
    data, model = recipe.data, recipe.model
    yield "data.path", data.path
    yield "data.validation_path", data.validation_path
    if isinstance(model, NewModel):
        yield "model.tokenizer", None if isinstance(model.tokenizer, int) else model.tokenizer
    else:
        yield "model.path", model.path
    if not isinstance(data, PretrainingData):
        yield "model.chat_template", model.chat_template


def _is_local(path: str) -> bool:
    """Tell a path from a name of the hub, which is NAME or OWNER/NAME without a suffix of a file."""
    suffixes = {".jsonl", ".json", ".csv", ".parquet", ".txt", ".gz", ".xz", ".bz2", ".jinja"}
    return path.startswith((".", "/", "~")) or path.count("/") > 1 or Path(path).suffix in suffixes
