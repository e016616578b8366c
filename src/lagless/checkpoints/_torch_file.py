"""Weights in a file written by ``torch.save``: mapped into memory, unpickled by the weights-only unpickler alone."""

from __future__ import annotations

import pickle
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lagless.checkpoints._errors import CheckpointError
from lagless.checkpoints._safetensors_format import NAMES

STATE_KEYS = ("state_dict", "model", "model_state_dict", "module")
NOT_WEIGHTS = re.compile(r"optimizer|scheduler|scaler|rng_state|training_args|trainer_state", re.IGNORECASE)

_CONVERT = "Save the weights as safetensors (safetensors.torch.save_file) and average those."


def load_mapped(path: Path) -> dict[str, Tensor]:
    """The tensors of a torch file, memory-mapped.

    The file holds a state dict, or a dict with a state dict under one of the keys of ``STATE_KEYS``.

    Raises:
        CheckpointError: if the file is damaged, cannot be mapped, needs more than weights-only unpickling, or holds
            anything but tensors.
    """
    try:
        content: Any = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{path}: holds more than tensors, and unpickling arbitrary objects can run arbitrary code, so it is "
            f"refused. {_CONVERT}"
        ) from error
    except Exception as error:  # torch raises RuntimeError, ValueError, EOFError and more for damaged and legacy files
        first = (str(error).splitlines() or [type(error).__name__])[0]
        raise CheckpointError(
            f"{path}: cannot be mapped as a torch file ({first}). It is damaged, still being written, or of the "
            f"format before torch 1.6. {_CONVERT}"
        ) from error
    state = next((content[key] for key in STATE_KEYS if _holds_tensors(content, key)), content)
    if not isinstance(state, Mapping) or not state:
        raise CheckpointError(f"{path}: holds a {type(state).__name__}, not a state dict. {_CONVERT}")
    for name, value in state.items():
        if not isinstance(name, str) or not isinstance(value, Tensor):
            raise CheckpointError(
                f"{path}: entry {name!r} is a {type(value).__name__}, not a tensor; a state dict is looked for at the "
                f"top and under {', '.join(STATE_KEYS)}. {_CONVERT}"
            )
        if value.layout != torch.strided or value.is_quantized or value.dtype not in NAMES:
            raise CheckpointError(
                f"{path}: tensor {name!r} is {value.dtype}, {value.layout}, which cannot be averaged. Convert the "
                "checkpoints to dense bfloat16 or float32 first."
            )
    return dict(state)


def _holds_tensors(content: Any, key: str) -> bool:
    inner = content.get(key) if isinstance(content, Mapping) else None
    return isinstance(inner, Mapping) and any(isinstance(value, Tensor) for value in inner.values())
