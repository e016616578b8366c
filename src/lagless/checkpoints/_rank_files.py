"""Weights in one file per rank, as verl saves them: ``model_world_size_4_rank_0.pt`` and so on.

Each file is a state dict of DTensors. What a pickle says of them is read without running anything that it names: the
part a rank holds, how the tensor is cut, and its whole shape.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lagless.checkpoints._chunks import ChunkedPlace, PlainChunk, covers
from lagless.checkpoints._errors import CheckpointError
from lagless.checkpoints._readers import Place
from lagless.checkpoints._safetensors_format import NAMES, TensorInfo
from lagless.checkpoints._torch_archive import ArchivedTensor, ShardedTensor, TorchArchive

_FILE = re.compile(r"model_world_size_(\d+)_rank_(\d+)\.pt")
_MERGE = "Merge the checkpoint with python -m verl.model_merger, and average what that writes."


def rank_files(folder: Path) -> list[Path]:
    """Return the files of the ranks in ``folder`` in the order of the ranks; none if it has no such files."""
    found = {file.name: match for file in folder.iterdir() if (match := _FILE.fullmatch(file.name))}
    return [folder / name for name in sorted(found, key=lambda name: int(found[name][2]))]


def open_rank_files(files: list[Path]) -> dict[str, tuple[TensorInfo, Place]]:
    """Find the tensors that the files of all ranks make up.

    Raises:
        CheckpointError: if a rank's file is missing or damaged, or tensors are cut in another way than along one
            dimension over all ranks.
    """
    folder = files[0].parent
    sizes = {int(match[1]) for file in files if (match := _FILE.fullmatch(file.name))}
    if len(sizes) != 1 or len(files) != max(sizes):
        raise CheckpointError(
            f"{folder}: has {len(files)} files model_world_size_*_rank_*.pt of runs on "
            f"{', '.join(map(str, sorted(sizes)))} ranks; each rank's is needed, of one run. Copy the "
            "checkpoint again, or leave it out."
        )
    states = [_state(file) for file in files]
    if any(state.keys() != states[0].keys() for state in states):
        raise CheckpointError(f"{folder}: the files of the ranks hold different tensors. {_MERGE}")
    return {name: _join(name, files, [state[name] for state in states]) for name in states[0]}


def _state(file: Path) -> Mapping[str, tuple[ArchivedTensor | ShardedTensor, int]]:
    try:
        with file.open("rb") as opened:
            archive = TorchArchive(opened)
            found: dict[str, tuple[ArchivedTensor | ShardedTensor, int]] = {}
            for name, item in dict(archive.content).items():
                local: Any = item.local if isinstance(item, ShardedTensor) else item
                if not isinstance(local, ArchivedTensor) or not local.is_row_major or local.dtype not in NAMES:
                    raise ValueError(f"{name!r} is a {type(item).__name__} that cannot be read")
                found[str(name)] = item, archive.begin(local)
            return found
    except Exception as error:  # damaged files raise many kinds
        raise CheckpointError(f"{file}: cannot be read as one rank's state dict ({error}). {_MERGE}") from error


def _join(
    name: str, files: list[Path], parts: list[tuple[ArchivedTensor | ShardedTensor, int]]
) -> tuple[TensorInfo, Place]:
    first = parts[0][0]
    if isinstance(first, ArchivedTensor):  # the same on every rank
        info = TensorInfo(first.dtype, first.shape)
        zeros = (0,) * len(first.shape)
        return info, ChunkedPlace(files[0], info, (PlainChunk(files[0], parts[0][1], info.nbytes, zeros, info.shape),))
    info = TensorInfo(first.local.dtype, first.shape)
    cut = [dim for dim in first.dims if dim is not None]
    if len(cut) > 1 or (cut and len(first.dims) > 1):
        raise CheckpointError(
            f"{files[0]}: tensor {name!r} is cut over a mesh of {len(first.dims)} dimensions. {_MERGE}"
        )
    chunks: list[PlainChunk] = []
    at = 0
    for file, (part, begin) in zip(files, parts, strict=True):
        assert isinstance(part, ShardedTensor)
        sizes = part.local.shape
        offsets = tuple(at if cut and dim == cut[0] else 0 for dim in range(len(sizes)))
        chunks.append(PlainChunk(file, begin, part.local.extent * info.dtype.itemsize, offsets, sizes))
        at += sizes[cut[0]] if cut else 0
        if not cut:
            break  # each rank holds the whole
    if not covers(info.shape, [(chunk.offsets, chunk.sizes) for chunk in chunks]):
        raise CheckpointError(f"{files[0]}: the parts of tensor {name!r} do not make up {info}. {_MERGE}")
    filled = tuple(chunk for chunk in chunks if 0 not in chunk.sizes)
    return info, ChunkedPlace(files[0], info, filled)
