"""Weights in a file written by ``torch.save``."""

from __future__ import annotations

import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from lagless._validation import is_mapping
from lagless.checkpoints._errors import CheckpointError
from lagless.checkpoints._inert_pickle import Record
from lagless.checkpoints._readers import FilePlace, Place, StridedPlace
from lagless.checkpoints._safetensors_format import NAMES, TensorInfo
from lagless.checkpoints._torch_archive import ArchivedTensor, TorchArchive
from lagless.checkpoints._weight_names import AVERAGE_KEYS, NOT_WEIGHTS, STATE_KEYS, is_other_state

_DEEPEST = 20  # levels of dictionaries in a file
_CONVERT = "Save the weights as safetensors (safetensors.torch.save_file) and average those."


def open_torch(path: Path) -> dict[str, tuple[TensorInfo, Place]]:
    """Find the tensors of a torch file; their elements are not read.

    The file holds a state dict, or a dict with a state dict under one of the keys of ``STATE_KEYS``; an average beside
    it (``AVERAGE_KEYS``) is left alone. Nothing in it is run: other objects than tensors are passed over beside the
    state dict, and refused in it.

    Raises:
        CheckpointError: if the file is damaged, was written before torch 1.6, holds several state dicts or none, or
            a tensor in it cannot be averaged.
    """
    try:
        with path.open("rb") as file:
            if not zipfile.is_zipfile(file):
                raise ValueError("not a zip archive")
            archive = TorchArchive(file)
            return {name: _open_tensor(path, name, item, archive) for name, item in _state(path, archive.content)}
    except CheckpointError:
        raise
    except Exception as error:  # zipfile and pickle raise many kinds for damaged files
        first = (str(error).splitlines() or [type(error).__name__])[0]
        raise CheckpointError(
            f"{path}: cannot be read as a torch file ({first}). It is damaged, compressed, still being written, or of "
            f"the format before torch 1.6. {_CONVERT}"
        ) from error


def open_entry(path: Path, key: str) -> tuple[TensorInfo, Place]:
    """Find the one tensor of a torch file: the file's own content, or what lies under ``key`` in it.

    Raises:
        CheckpointError: if the file is damaged, or holds something else.
    """
    try:
        with path.open("rb") as file:
            archive = TorchArchive(file)
            content = archive.content
            return _open_tensor(path, key, content[key] if is_mapping(content) else content, archive)
    except CheckpointError:
        raise
    except Exception as error:  # zipfile and pickle raise many kinds for damaged files
        raise CheckpointError(
            f"{path}: cannot be read as a torch file with one tensor ({error}). {_CONVERT}"
        ) from error


def _state(path: Path, content: Any) -> list[tuple[str, Any]]:
    """The names and tensors of the one state dict in a file."""
    found = dict(_states(content, ())) if is_mapping(content) else {}
    if any(place and place[0] in STATE_KEYS for place in found):  # the live weights; their average is no iterate
        found = {place: None for place in found if not place or place[0] not in AVERAGE_KEYS}
    if len(found) > 1:
        places = " and ".join(repr(".".join(map(str, place))) if place else "the top" for place in found)
        raise CheckpointError(
            f"{path}: holds matrices under {places}, and these may be different weights. Save the ones that are meant "
            "alone."
        )
    inner = [content[key] for key in STATE_KEYS if is_mapping(content) and _tensors(content.get(key))]
    state: Any = next(iter([*inner, content]))
    if not is_mapping(state) or not state:
        raise CheckpointError(f"{path}: holds a {type(state).__name__}, not a state dict. {_CONVERT}")
    return list(state.items())


def _states(content: Mapping[Any, Any], place: tuple[Any, ...]) -> Iterator[tuple[tuple[Any, ...], None]]:
    """Where matrices lie that may be weights; dictionaries of numbers, as in metrics, hold none."""
    if len(place) > _DEEPEST:
        return
    if any(len(tensor.shape) > 1 and not is_other_state(f".{name}") for name, tensor in _tensors(content).items()):
        yield place, None
    for key, value in content.items():
        if is_mapping(value) and not NOT_WEIGHTS.search(str(key)):
            yield from _states(value, (*place, key))


def _tensors(value: Any) -> dict[Any, ArchivedTensor]:
    """The tensors that are entries of ``value`` itself."""
    items = value.items() if is_mapping(value) else ()
    return {key: item for key, item in items if isinstance(item, ArchivedTensor)}


def _open_tensor(path: Path, name: Any, item: Any, archive: TorchArchive) -> tuple[TensorInfo, Place]:
    if isinstance(name, str) and isinstance(item, Record) and type(item).__name__.startswith("_rebuild"):
        raise CheckpointError(
            f"{path}: tensor {name!r} is of a kind that cannot be averaged ({type(item).__name__}): sparse, quantized, "
            "a subclass or without data. Convert the checkpoints to dense bfloat16 or float32 first."
        )
    if not isinstance(name, str) or not isinstance(item, ArchivedTensor):
        raise CheckpointError(
            f"{path}: entry {name!r} is a {type(item).__name__}, not a tensor; a state dict is looked for at the top "
            f"and under {', '.join(STATE_KEYS)}. {_CONVERT}"
        )
    if item.dtype not in NAMES:
        raise CheckpointError(
            f"{path}: tensor {name!r} is {item.dtype}, which cannot be averaged. Convert the checkpoints to dense "
            "bfloat16 or float32 first."
        )
    info, begin = TensorInfo(item.dtype, item.shape), archive.begin(item)
    if item.is_row_major:
        return info, FilePlace(path, begin)
    return info, StridedPlace(path, begin, info, item.strides, item.extent)
