"""Models of several runs that are to be merged."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from lagless.checkpoints._alike import check_alike
from lagless.checkpoints._checkpoint import Checkpoint
from lagless.checkpoints._errors import CheckpointError, reporting
from lagless.checkpoints._model_settings import check_settings
from lagless.checkpoints._one_run import refuse_links
from lagless.checkpoints._open import holds_weights, open_checkpoint
from lagless.checkpoints._paths import StrPath, absolute_path
from lagless.checkpoints._run_folder import look_into
from lagless.checkpoints._spare_weights import refuse_spare_weights


@dataclass(frozen=True)
class Models:
    """Models of one architecture, such as those of runs with other seeds or data; their order means nothing.

    Attributes:
        checkpoints: the open models.
        names: as much of each path's end as tells it from the others.
    """

    checkpoints: tuple[Checkpoint, ...]
    names: tuple[str, ...]


def find_models(paths: Sequence[StrPath]) -> Models:
    """Open models of several runs, to be merged with one weight each.

    Args:
        paths: two or more. Each is a model or adapter, a folder or file; or a run folder without weights of its own,
            which stands for its last checkpoint.

    Raises:
        CheckpointError: if there are fewer than two, two are the same files, or they differ in a tensor or in a setting
            that gives weights their meaning.
    """
    if len(paths) < 2:
        raise CheckpointError(f"models: {len(paths)} given ({', '.join(map(str, paths))}); a merge needs two or more.")
    checkpoints = [open_checkpoint(_model_in(absolute_path(path))) for path in paths]
    check_alike(checkpoints)
    with reporting(checkpoints[-1].path):
        refuse_links(checkpoints)
        check_settings(checkpoints)
        for checkpoint in checkpoints:
            refuse_spare_weights(checkpoint)
    return Models(tuple(checkpoints), tuple(_names([checkpoint.path.absolute() for checkpoint in checkpoints])))


def _model_in(path: Path) -> Path:
    with reporting(path):
        if path.is_dir() and not holds_weights(path) and (found := look_into(path)) is not None:
            return found.checkpoints[-1][1]
    return path


def _names(paths: Sequence[Path]) -> list[str]:
    for length in range(1, max(len(path.parts) for path in paths) + 1):
        names = ["/".join(path.parts[-length:]) for path in paths]
        if len(set(names)) == len(names):
            return names
    raise CheckpointError(f"models: {paths[0]} is given twice; it would count twice. Leave one of them out.")
