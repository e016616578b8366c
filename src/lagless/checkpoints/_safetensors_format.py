"""The safetensors file format: an 8-byte length, a JSON header, then the tensors' bytes back to back.

Headers are read here, and not through the library, so that ranges of a tensor can be read with one system call into a
buffer that exists already, and so that a damaged file is refused with what is wrong with it.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from lagless._validation import is_list, is_object
from lagless.checkpoints._errors import CheckpointError
from lagless.checkpoints._json import parse_json

DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
FLOAT8 = (torch.float8_e4m3fn, torch.float8_e5m2)
NAMES: dict[torch.dtype, str] = {dtype: name for name, dtype in DTYPES.items()}

AVERAGER_KEY = "lagless"
"""Under this key of a file's metadata, the state of an Averager says what it is."""

_LENGTH = struct.Struct("<Q")
_LARGEST_HEADER = 100_000_000  # the limit of the safetensors library
_INCOMPLETE = "It is damaged, or still being written: copy or save it again, or leave this checkpoint out."


@dataclass(frozen=True)
class TensorInfo:
    """Type and shape of a stored tensor."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def numel(self) -> int:
        """Number of elements; 1 for a scalar."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Number of bytes it takes in a file."""
        return self.numel * self.dtype.itemsize

    def __str__(self) -> str:
        return f"{NAMES[self.dtype]} {list(self.shape)}"


class Stored(NamedTuple):
    """A tensor in a file: what it is and at which byte it begins."""

    info: TensorInfo
    offset: int


def read_header(path: Path) -> dict[str, Stored]:
    """The tensors of a safetensors file, in the order of their bytes.

    Raises:
        CheckpointError: if the file cannot be read, is truncated, or its header does not describe it.
    """
    header, begin, size = _read(path)
    metadata = header.pop("__metadata__", None)
    if isinstance(metadata, dict) and AVERAGER_KEY in metadata:
        raise CheckpointError(
            f"{path}: is the state of an Averager, not a model. Load it with Averager.load, beside the weights of its "
            "step."
        )
    return _check_layout(path, header, begin, size)


def read_metadata(path: Path) -> dict[str, str]:
    """Return the texts that a safetensors file carries beside its tensors.

    Raises:
        CheckpointError: if the file cannot be read, or its header is damaged.
    """
    metadata = _read(path)[0].get("__metadata__")
    return {str(key): str(value) for key, value in metadata.items()} if is_object(metadata) else {}


def _read(path: Path) -> tuple[dict[str, Any], int, int]:
    """The header of a file, the byte at which its data begins, and its size."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            start = file.read(_LENGTH.size)
            if start == b"version ":
                raise CheckpointError(
                    f"{path}: is a pointer of Git LFS, not the weights. Run git lfs pull in its folder."
                )
            length = _LENGTH.unpack(start)[0] if len(start) == _LENGTH.size else 0
            if not 2 <= length <= min(_LARGEST_HEADER, size - _LENGTH.size):
                raise CheckpointError(
                    f"{path}: not a complete safetensors file: it has {size} bytes and a header of {length} is "
                    f"announced. {_INCOMPLETE}"
                )
            text = file.read(length)
    except OSError as error:
        raise CheckpointError(
            f"{path}: cannot be read ({error.strerror}). Check the path and its permissions."
        ) from error
    try:
        header = parse_json(text)
        if not is_object(header):
            raise ValueError("not an object")
    except ValueError as error:  # also UnicodeDecodeError
        raise CheckpointError(f"{path}: its safetensors header is not JSON ({error}). {_INCOMPLETE}") from error
    return header, _LENGTH.size + length, size


def build_header(
    tensors: Mapping[str, TensorInfo], metadata: Mapping[str, str] | None = None
) -> tuple[bytes, dict[str, int]]:
    """The header of a file that holds ``tensors``, and the byte at which each of them begins, in the order of the file.

    Wider types come first, as the safetensors library orders them, so that every tensor is aligned to its element size.
    """
    order = sorted(tensors, key=lambda name: (-tensors[name].dtype.itemsize, name))
    header: dict[str, Any] = {"__metadata__": {"format": "pt", **(metadata or {})}}
    offsets: dict[str, int] = {}
    end = 0
    for name in order:
        info = tensors[name]
        offsets[name], end = end, end + info.nbytes
        header[name] = {"dtype": NAMES[info.dtype], "shape": list(info.shape), "data_offsets": [offsets[name], end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    begin = _LENGTH.size + len(text)
    return _LENGTH.pack(len(text)) + text, {name: begin + offset for name, offset in offsets.items()}


def _check_layout(path: Path, header: Mapping[str, Any], begin: int, size: int) -> dict[str, Stored]:
    found = {name: _entry(path, name, entry) for name, entry in header.items()}
    ordered = dict(sorted(found.items(), key=lambda item: (item[1].offset, item[1].info.nbytes)))
    end = 0
    for name, (info, offset) in ordered.items():
        if offset != end:
            raise CheckpointError(
                f"{path}: tensor {name!r} begins at byte {offset} of the data, not at {end}. {_INCOMPLETE}"
            )
        end += info.nbytes
    if begin + end > size:
        raise CheckpointError(
            f"{path} is truncated: its header promises {begin + end} bytes, the file has {size}. {_INCOMPLETE}"
        )
    if begin + end < size:
        raise CheckpointError(
            f"{path}: the file has {size} bytes, its header describes only {begin + end}. {_INCOMPLETE}"
        )
    return {name: Stored(info, begin + offset) for name, (info, offset) in ordered.items()}


def _entry(path: Path, name: str, entry: Any) -> Stored:
    try:
        kind, shape, (start, stop) = entry["dtype"], entry["shape"], entry["data_offsets"]
        if not (isinstance(kind, str) and is_list(shape) and all(map(_is_count, (*shape, start, stop)))):
            raise TypeError
    except (TypeError, KeyError, ValueError):
        raise CheckpointError(f"{path}: the header entry of tensor {name!r} is malformed. {_INCOMPLETE}") from None
    if kind not in DTYPES:
        raise CheckpointError(
            f"{path}: tensor {name!r} has type {kind}, which cannot be averaged (F64, F32, F16, BF16 can be; integers "
            "and BOOL are copied). Quantized weights carry scales: convert the checkpoints to bfloat16 or float32 "
            "first."
        )
    info = TensorInfo(DTYPES[kind], tuple(shape))
    if stop - start != info.nbytes:
        raise CheckpointError(
            f"{path}: tensor {name!r} ({info}) takes {info.nbytes} bytes, its header gives it {stop - start}. "
            f"{_INCOMPLETE}"
        )
    return Stored(info, start)


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def total_bytes(tensors: Iterable[TensorInfo]) -> int:
    """Bytes of all tensors together."""
    return sum(info.nbytes for info in tensors)
