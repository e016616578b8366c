"""The zip archives of ``torch.save``: which tensors are in them, and at which byte of the file each begins.

The pickle is read without running anything that it names, and elements are found by position instead of being mapped
into memory: a mapping of a file that shrinks ends the process, a read of it is an error that can be reported.
"""

from __future__ import annotations

import io
import math
import struct
import sys
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from typing import IO, Any

import torch

from lagless._validation import is_mapping, is_tuple
from lagless.checkpoints._inert_pickle import InertUnpickler, Record

_LOCAL_HEADER = struct.Struct("<4s5HIIIHH")
_ENCRYPTED, _UTF8 = 1, 1 << 11  # flags of a zip record


@dataclass(frozen=True)
class Storage:
    """The memory that tensors of an archive share: the record ``key``, ``nbytes`` long; of one type, unless None."""

    key: str
    dtype: torch.dtype | None
    nbytes: int


@dataclass(frozen=True)
class ArchivedTensor:
    """A tensor as its pickle describes it; ``offset`` and ``strides`` count elements of its storage."""

    storage: Storage
    dtype: torch.dtype
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    offset: int

    def __post_init__(self) -> None:
        counts = (*self.shape, *self.strides, self.offset)
        if len(self.shape) != len(self.strides) or not all(type(n) is int and n >= 0 for n in counts):
            raise ValueError(f"a tensor has shape {self.shape}, strides {self.strides} and offset {self.offset}")
        if self.extent and (self.offset + self.extent) * self.dtype.itemsize > self.storage.nbytes:
            raise ValueError(f"a tensor of shape {self.shape} goes beyond its storage of {self.storage.nbytes} bytes")

    @property
    def extent(self) -> int:
        """Elements of the storage from the tensor's first to its last; 0 without elements."""
        if 0 in self.shape:
            return 0
        return 1 + sum((size - 1) * stride for size, stride in zip(self.shape, self.strides, strict=True))

    @property
    def is_row_major(self) -> bool:
        """Whether the elements lie one after the other, the last index fastest."""
        if 0 in self.shape:
            return True
        expected = [math.prod(self.shape[i + 1 :]) for i in range(len(self.shape))]
        steps = zip(self.shape, self.strides, expected, strict=True)
        return all(size == 1 or stride == wanted for size, stride, wanted in steps)


@dataclass(frozen=True)
class ShardedTensor:
    """One rank's part of a DTensor, as its pickle describes it.

    Attributes:
        local: the part.
        shape: of the whole.
        dims: per dimension of the mesh, the dimension that is cut along it; None where ranks hold the same.
    """

    local: ArchivedTensor
    shape: tuple[int, ...]
    dims: tuple[int | None, ...]

    @property
    def dtype(self) -> torch.dtype:
        """The type of the elements."""
        return self.local.dtype


class TorchArchive:
    """An open file of ``torch.save``.

    Args:
        file: the archive, opened for reading.

    Attributes:
        content: what was saved, with an :class:`ArchivedTensor` for each tensor and inert records for other objects.

    Raises:
        ValueError: if records are missing, compressed, or do not fit what the pickle says. Damaged files raise other
            errors of ``zipfile`` and ``pickle`` too.
    """

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self._begins: dict[str, int] = {}
        with zipfile.ZipFile(file) as archive:
            self._records = {record.filename: record for record in archive.infolist()}
            if len(self._records) != len(archive.infolist()):
                raise ValueError("several records have one name")
            pickles = [name for name in self._records if name == "data.pkl" or name.endswith("/data.pkl")]
            if len(pickles) != 1 or any(name.endswith("constants.pkl") for name in self._records):
                raise ValueError("no archive of torch.save: it needs one record data.pkl, and holds no TorchScript")
            self._folder = pickles[0].removesuffix("data.pkl")
            order = self._folder + "byteorder"
            if order in self._records and archive.read(order).decode() != sys.byteorder:
                raise ValueError(f"saved on a machine of the other byte order ({archive.read(order).decode()}-endian)")
            self.content = _Unpickler(io.BytesIO(archive.read(pickles[0]))).load()

    def begin(self, tensor: ArchivedTensor) -> int:
        """Return the byte of the file at which the first element of ``tensor`` lies.

        Raises:
            ValueError: if the record is missing, compressed or encrypted, or is of another size than its storage.
        """
        key = tensor.storage.key
        if key not in self._begins:
            self._begins[key] = self._data_begin(tensor.storage)
        return self._begins[key] + tensor.offset * tensor.dtype.itemsize

    def _data_begin(self, storage: Storage) -> int:
        name = f"{self._folder}data/{storage.key}"
        record = self._records.get(name)
        if record is None:
            raise ValueError(f"record {name} is missing")
        self._file.seek(record.header_offset)
        header = self._file.read(_LOCAL_HEADER.size)
        signature, _, flags, method, *_, name_length, extra = _LOCAL_HEADER.unpack(header)
        encoded = record.orig_filename.encode("utf-8" if record.flag_bits & _UTF8 else "cp437")
        if signature != b"PK\x03\x04" or self._file.read(name_length) != encoded:
            raise ValueError(f"record {name} is not where the archive's directory says")
        if {record.compress_type, method} != {zipfile.ZIP_STORED}:
            raise ValueError(f"record {name} is compressed")
        if (record.flag_bits | flags) & _ENCRYPTED:
            raise ValueError(f"record {name} is encrypted")
        if not record.file_size == record.compress_size == storage.nbytes:
            raise ValueError(f"record {name} has {record.file_size} bytes, its storage {storage.nbytes}")
        begin = record.header_offset + _LOCAL_HEADER.size + name_length + extra
        if begin + record.file_size > self._end_of(record):
            raise ValueError(f"record {name} runs into the one that follows it")
        return begin

    def _end_of(self, record: zipfile.ZipInfo) -> int:
        """The byte at which another record begins, or the file ends."""
        later = [r.header_offset for r in self._records.values() if r.header_offset > record.header_offset]
        return min(later, default=self._file.seek(0, io.SEEK_END))


class _Unpickler(InertUnpickler):
    def find_class(self, module: str, name: str) -> Any:
        if module in ("torch._utils", "torch._tensor") and name in _REBUILDERS:
            return _REBUILDERS[name]
        if module in ("torch", "torch.storage") and name.endswith("Storage"):
            return _STORAGE_TYPES.get(name, name)
        return super().find_class(module, name)

    def persistent_load(self, pid: Any) -> Storage:
        kind, dtype, key, _, count = pid
        if kind != "storage" or not isinstance(key, str) or type(count) is not int or count < 0:
            raise ValueError(f"a storage is described by {pid!r}")
        if isinstance(dtype, str):
            raise ValueError(f"a storage is a {dtype}, which is not known")
        return Storage(key, dtype, count * (1 if dtype is None else dtype.itemsize))


_STORAGE_TYPES: Mapping[str, torch.dtype | None] = {
    "UntypedStorage": None,
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
    "ComplexFloatStorage": torch.complex64,
    "ComplexDoubleStorage": torch.complex128,
}


def _tensor_v2(
    storage: Storage, offset: int, size: Any, stride: Any, grad: Any = None, hooks: Any = None, metadata: Any = None
) -> ArchivedTensor:
    if metadata:
        raise ValueError(f"a tensor is {' and '.join(map(str, metadata))}: save a copy (clone) of it")
    if storage.dtype is None:
        raise ValueError("a tensor without a type")
    return ArchivedTensor(storage, storage.dtype, tuple(size), tuple(stride), offset)


def _tensor_v3(
    storage: Storage,
    offset: int,
    size: Any,
    stride: Any,
    grad: Any,
    hooks: Any,
    dtype: torch.dtype,
    metadata: Any = None,
) -> ArchivedTensor:
    if metadata:
        raise ValueError(f"a tensor is {' and '.join(map(str, metadata))}: save a copy (clone) of it")
    return ArchivedTensor(storage, dtype, tuple(size), tuple(stride), offset)


def _parameter(data: Any, *_: Any) -> Any:
    return data


def _wrapper(kind: Any, dtype: torch.dtype, size: Any, *_: Any) -> Any:
    return tuple(size)


def _from_type(rebuild: Any, kind: Any, args: Any, state: Any) -> Any:
    """A DTensor's part; for every other subclass of a tensor a record that nobody can take for one."""
    # A class with slots has its state as a pair: its dictionary, and its slots.
    held: Any = next((part for part in state if is_mapping(part)), None) if is_tuple(state) else state
    local = held.get("_local_tensor") if is_mapping(held) else None
    if rebuild is not _wrapper or getattr(kind, "__name__", "") != "DTensor" or not isinstance(local, ArchivedTensor):
        return type("_rebuild_from_type_v2", (Record,), {})()
    dims: list[int | None] = []
    for placement in held["_spec"].state["placements"]:
        name = type(placement).__name__
        if name not in ("Shard", "Replicate"):
            raise ValueError(f"a tensor is placed as {name}")
        dims.append(int(placement.state["dim"]) if name == "Shard" else None)
    return ShardedTensor(local, _wrapper(*args), tuple(dims))


_REBUILDERS: Mapping[str, Any] = {
    "_rebuild_wrapper_subclass": _wrapper,
    "_rebuild_from_type_v2": _from_type,
    "_rebuild_tensor_v2": _tensor_v2,
    "_rebuild_tensor_v3": _tensor_v3,
    "_rebuild_parameter": _parameter,
    "_rebuild_parameter_with_state": _parameter,
}
