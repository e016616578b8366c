"""Weights in one file, or a few, per parameter: nanotron's ``model/`` and DeepSpeed's universal ``zero/``."""

from __future__ import annotations

import math
import re
from pathlib import Path

from lagless.checkpoints._chunks import Box, ChunkedPlace, PlainChunk, covers
from lagless.checkpoints._errors import CheckpointError
from lagless.checkpoints._readers import FilePlace, Place
from lagless.checkpoints._safetensors_format import Stored, TensorInfo, read_header, read_metadata
from lagless.checkpoints._torch_file import open_entry

_Opened = tuple[dict[str, tuple[TensorInfo, Place]], list[Path]]

_NANOTRON = re.compile(
    r"model_(?P<name>.+?)(_pp-rank-\d+-of-\d+_tp-rank-\d+-of-\d+(_exp-rank-\d+-of-\d+)?)?\.safetensors"
)
_CONVERT = "Convert the checkpoint with nanotron's own converter, and average what that writes."


def is_nanotron(folder: Path) -> bool:
    """Whether ``folder`` is a checkpoint of nanotron."""
    return (folder / "model").is_dir() and (
        (folder / "checkpoint_metadata.json").is_file() or (folder / "model_config.json").is_file()
    )


def open_nanotron(folder: Path) -> _Opened:
    """Find the parameters of a checkpoint of nanotron; parts of tensor-parallel ranks are put together.

    Raises:
        CheckpointError: if there are none, or parts do not make up a parameter.
    """
    root = folder / "model"
    groups: dict[str, list[Path]] = {}
    for file in sorted(root.rglob("model_*.safetensors")):
        if match := _NANOTRON.fullmatch(file.name):
            name = ".".join([*file.parent.relative_to(root).parts, match["name"]])
            groups.setdefault(name, []).append(file)
    if not groups:
        raise CheckpointError(f"{root}: holds no parameters of nanotron (model_*.safetensors). Leave this one out.")
    places = {name: _nanotron_parameter(name, files) for name, files in groups.items()}
    return places, [file for files in groups.values() for file in files]


def _nanotron_parameter(name: str, files: list[Path]) -> tuple[TensorInfo, Place]:
    parts = [_data_of(file) for file in files]
    if len(files) == 1:
        return parts[0].info, FilePlace(files[0], parts[0].offset)
    dtype = parts[0].info.dtype
    shape: tuple[int, ...] = ()
    chunks: list[PlainChunk] = []
    for file, part in zip(files, parts, strict=True):
        try:
            shape, pairs = _cut_of(file)
        except (KeyError, ValueError):
            raise CheckpointError(
                f"{file}: does not say which part of {name!r} it holds, of {len(files)} files. {_CONVERT}"
            ) from None
        chunks += [_chunk(file, part, *_boxes(local, part.info.shape), *_boxes(whole, shape)) for local, whole in pairs]
    info = TensorInfo(dtype, shape)
    if {part.info.dtype for part in parts} != {dtype} or not covers(shape, [(c.offsets, c.sizes) for c in chunks]):
        raise CheckpointError(f"{files[0].parent}: the parts of {name!r} do not make up {info}. {_CONVERT}")
    return info, ChunkedPlace(files[0], info, tuple(chunks))


def _data_of(file: Path) -> Stored:
    header = read_header(file)
    if "data" not in header:
        raise CheckpointError(f"{file}: holds no tensor 'data', as every parameter of nanotron does. {_CONVERT}")
    return header["data"]


_Slices = list[tuple[int | None, int | None]]


def _cut_of(file: Path) -> tuple[tuple[int, ...], list[tuple[_Slices, _Slices]]]:
    """The shape of the whole parameter, and slices of the file's tensor with the slices of the whole that they are."""
    metadata = read_metadata(file)
    shape = tuple(int(size) for size in re.findall(r"\d+", metadata["unsharded_shape"].replace("np.int64", "")))
    pairs: list[tuple[_Slices, _Slices]] = []
    for pair in metadata["local_global_slices_pairs"].split(";"):
        local, whole = ([_bounds(part) for part in side.split("|")] for side in pair.split("#"))
        pairs.append((local, whole))
    return shape, pairs


def _bounds(text: str) -> tuple[int | None, int | None]:
    begin, stop, step = (None if number == "None" else int(number) for number in text.split(","))
    if step not in (None, 1):
        raise ValueError(text)
    return begin, stop


def _boxes(slices: _Slices, shape: tuple[int, ...]) -> Box:
    offsets = tuple(begin or 0 for begin, _ in slices)
    stops = (size if stop is None else stop for (_, stop), size in zip(slices, shape, strict=True))
    return offsets, tuple(stop - begin for begin, stop in zip(offsets, stops, strict=True))


def _chunk(
    file: Path,
    part: Stored,
    local_offsets: tuple[int, ...],
    local_sizes: tuple[int, ...],
    offsets: tuple[int, ...],
    sizes: tuple[int, ...],
) -> PlainChunk:
    if local_sizes != sizes or local_sizes[1:] != part.info.shape[1:]:
        raise CheckpointError(
            f"{file}: holds {part.info}, of which a part of shape {list(local_sizes)} is not whole rows. {_CONVERT}"
        )
    row = math.prod(part.info.shape[1:]) * part.info.dtype.itemsize
    begin = part.offset + (local_offsets[0] if local_offsets else 0) * row
    return PlainChunk(file, begin, math.prod(sizes) * part.info.dtype.itemsize, offsets, sizes)


def universal_folder(folder: Path) -> Path | None:
    """Return the folder of parameters in a universal checkpoint of DeepSpeed, if ``folder`` is one."""
    zero = folder / "zero"
    if zero.is_dir() and any((entry / "fp32.pt").is_file() for entry in zero.iterdir()):
        return zero
    return None


def open_universal(zero: Path) -> _Opened:
    """Find the float32 master weights of a universal checkpoint of DeepSpeed; optimizer states are left alone.

    Raises:
        CheckpointError: if a parameter's file is missing or damaged.
    """
    places: dict[str, tuple[TensorInfo, Place]] = {}
    files: list[Path] = []
    for entry in sorted(zero.iterdir()):
        if not entry.is_dir():
            continue
        file = entry / "fp32.pt"
        if not file.is_file():
            raise CheckpointError(
                f"{file}: is missing, as if the conversion had not finished. Convert the checkpoint again."
            )
        places[entry.name] = open_entry(file, "param")
        files.append(file)
    return places, files
