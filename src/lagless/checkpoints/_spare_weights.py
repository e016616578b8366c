"""Weights in the folder of a checkpoint that are none of its own files."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path

from lagless.checkpoints._checkpoint import Checkpoint
from lagless.checkpoints._errors import CheckpointError
from lagless.checkpoints._layouts import SUFFIXES, step_named
from lagless.checkpoints._open import open_file
from lagless.checkpoints._run_folder import holds_averages
from lagless.checkpoints._weight_names import NOT_WEIGHTS, is_other_state

# The same model in another format beside the files that are read, as from_pretrained chooses among them.
_SAME_MODEL = re.compile(r"(model|pytorch_model)(-\d+-of-\d+)?\.(safetensors|bin)|consolidated[\w.-]*")
_DEEPEST = 3  # levels of folders


def refuse_spare_weights(checkpoint: Checkpoint) -> None:
    """Refuse a checkpoint whose folder holds matrices in other files than those that are read.

    Examples are the dense layers of sentence transformers, a second adapter, parts of a diffusion pipeline. Left alone
    are states of training, averages, and checkpoints in the folder.

    Raises:
        CheckpointError: naming the file.
    """
    if not checkpoint.path.is_dir():
        return  # that very file was asked for
    for file in _weight_files(checkpoint.folder, 0):
        if file in checkpoint.files or (file.parent == checkpoint.folder and _SAME_MODEL.fullmatch(file.name)):
            continue
        try:
            tensors = open_file(file)
        except CheckpointError:
            continue  # no weights that could be averaged
        if any(
            info.dtype.is_floating_point and len(info.shape) > 1 and not is_other_state(f".{name}")
            for name, (info, _) in tensors.items()
        ):
            raise CheckpointError(
                f"{file}: holds weights that would be left out beside {checkpoint.files[0].name}. Give the files that "
                f"are meant as a list, e.g. checkpoint-*/{checkpoint.files[0].name}, and average the others apart "
                "(with --steps); or move these away."
            )


def _weight_files(folder: Path, depth: int) -> Iterator[Path]:
    for entry in sorted(folder.iterdir()):
        if entry.name.startswith(".") or NOT_WEIGHTS.search(entry.name) or is_other_state(f"x.{entry.stem}"):
            continue  # DeepSpeed names files by the state they hold: exp_avg.pt
        if entry.is_dir():
            inside = depth < _DEEPEST and not entry.is_symlink() and os.access(entry, os.R_OK | os.X_OK)
            if inside and not step_named(entry) and not holds_averages(entry):
                yield from _weight_files(entry, depth + 1)
        elif entry.name.endswith(SUFFIXES) and entry.is_file():
            yield entry
