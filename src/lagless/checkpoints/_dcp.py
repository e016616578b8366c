"""Checkpoints of ``torch.distributed.checkpoint``: a description named ``.metadata``, and files of chunks beside it.

The description is a pickle. It is read without running anything that it names: every class becomes an inert record.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

from lagless.checkpoints._chunks import CONVERT, Chunk, ChunkedPlace, covers
from lagless.checkpoints._errors import CheckpointError
from lagless.checkpoints._inert_pickle import InertUnpickler
from lagless.checkpoints._safetensors_format import NAMES, TensorInfo
from lagless.checkpoints._weight_names import NOT_WEIGHTS, STATE_KEYS, depth_of_state, is_other_state

METADATA = ".metadata"
_FOLDERS = (".", "pytorch_model_fsdp_0")  # the latter as Accelerate and the Trainer of transformers name it


def find_dcp(folder: Path) -> Path | None:
    """The DCP checkpoint in ``folder``, if there is one."""
    return next((folder / name for name in _FOLDERS if (folder / name / METADATA).is_file()), None)


def open_dcp(folder: Path) -> tuple[dict[str, tuple[TensorInfo, ChunkedPlace]], list[Path], list[str]]:
    """The weights in a DCP checkpoint, the files that hold them, and the keys of tensors that are no weights.

    Weights are what was saved under one of the keys of ``STATE_KEYS``, at any depth, or, without those, at the top
    level. Optimizer states, random states and everything else nested are left alone.

    Raises:
        CheckpointError: if the description is not understood or does not fit the files, or if there are no weights in
            it, or under several keys.
    """
    path = folder / METADATA
    try:
        with path.open("rb") as file:
            metadata = InertUnpickler(file).load().state
        stored = {(index.state["fqn"], _offsets(index)): info.state for index, info in metadata["storage_data"].items()}
        tensors = {
            key: entry.state
            for key, entry in metadata["state_dict_metadata"].items()
            if type(entry).__name__ == "TensorStorageMetadata"
        }
        mapping: dict[str, tuple[Any, ...]] = metadata["planner_data"] or {}
        names = _weight_names({key: mapping.get(key, (key,)) for key in tensors}, folder)
        if not names:
            top = {str(mapping.get(key, (key,))[0]) for key in metadata["state_dict_metadata"]}
            raise CheckpointError(
                f"{folder}: holds no weights, only other states: {', '.join(sorted(top)[:8])}. Looked at the top level "
                f"and, at any depth, under {', '.join(STATE_KEYS)}. Give the checkpoint that holds them."
            )
        places = {name: _place(folder, key, tensors[key], stored) for key, name in names.items()}
        _refuse_shared_bytes(folder, places)
    except CheckpointError:
        raise
    except Exception as error:  # a pickle can fail in any way
        raise CheckpointError(
            f"{path}: not the description of a checkpoint of torch.distributed.checkpoint ({error!r}). It is damaged "
            f"or of another version. {CONVERT}"
        ) from error
    files = sorted({chunk.path for _, place in places.values() for chunk in place.chunks})
    return places, [path, *files], sorted(tensors.keys() - names.keys())


def _weight_names(paths: dict[str, tuple[Any, ...]], folder: Path) -> dict[str, str]:
    """The keys that are weights, and the name of each in its state dict.

    Args:
        paths: where each lay in what was saved.
        folder: to speak of.
    """
    found: dict[tuple[Any, ...], dict[str, tuple[Any, ...]]] = {}
    for key, path in paths.items():
        depth = depth_of_state(path)
        # A name with dots is that of a parameter, unless it begins or ends like an optimizer's.
        levels = path[:-1] if depth or "." in key else path
        if not any(NOT_WEIGHTS.search(str(level)) for level in levels) and not is_other_state(key):
            found.setdefault(path[:depth], {})[key] = path[depth:]
    top = {key: path for key, path in found.pop((), {}).items() if len(path) == 1}
    if len(found) > 1:
        places = " and ".join(repr(".".join(map(str, place))) for place in found)
        raise CheckpointError(f"{folder}: holds weights under {places}. Save one of them alone.")
    chosen = next(iter(found.values()), top)
    return {key: ".".join(map(str, path)) for key, path in chosen.items()}


def _place(folder: Path, key: str, entry: dict[str, Any], stored: dict[Any, Any]) -> tuple[TensorInfo, ChunkedPlace]:
    dtype, shape = entry["properties"].state[0], tuple(entry["size"])
    if dtype not in NAMES:
        raise CheckpointError(
            f"{folder / METADATA}: tensor {key!r} is {dtype}, which cannot be averaged. Save weights as bfloat16 or "
            "float32."
        )
    info = TensorInfo(dtype, shape)
    chunks: list[Chunk] = []
    boxes = [(tuple(chunk.state["offsets"]), tuple(chunk.state["sizes"])) for chunk in entry["chunks"]]
    if not covers(shape, boxes):
        raise CheckpointError(
            f"{folder / METADATA}: the chunks of tensor {key!r} do not make up {info}, each element once. The save did "
            "not finish, or several are mixed: leave this checkpoint out."
        )
    for offsets, sizes in boxes:
        if 0 in sizes:
            continue
        where = stored[key, offsets]
        file = folder / where["relative_path"]
        if where.get("transform_descriptors") or file.parent != folder:
            raise CheckpointError(f"{file}: chunks are compressed, or outside of the checkpoint's folder. {CONVERT}")
        if not file.is_file():
            raise CheckpointError(
                f"{str(file)!r}: this file of the checkpoint is missing. Copy the checkpoint again, or leave it out."
            )
        chunks.append(Chunk(file, where["offset"], where["length"], offsets, sizes))
    return info, ChunkedPlace(chunks[0].path if chunks else folder / METADATA, info, tuple(chunks))


def _refuse_shared_bytes(folder: Path, places: Mapping[str, tuple[TensorInfo, ChunkedPlace]]) -> None:
    """Refuse chunks of which two lie in the same bytes of a file."""
    chunks = [(c.path, c.begin, c.begin + c.length, name) for name, (_, place) in places.items() for c in place.chunks]
    for (path, _, stop, one), (other_path, begin, _, other) in pairwise(sorted(chunks)):
        if path == other_path and begin < stop:
            raise CheckpointError(
                f"{folder / METADATA}: chunks of {one!r} and {other!r} share bytes of {path.name}. The description is "
                "damaged: leave this checkpoint out."
            )


def _offsets(index: Any) -> tuple[int, ...]:
    return tuple(index.state.get("offset") or ())
