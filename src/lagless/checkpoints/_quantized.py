"""Weights stored in 8 bits with scales beside them, read as the numbers that they stand for.

A number is (code − zero point) × scale. Scales hold for the whole tensor, a row, a group of columns, or a block; which
of these it is follows from their shape. Formats:

    FP8 as transformers and DeepSeek write it     ``weight`` F8, ``weight_scale_inv`` per block
    FBGEMM, ModelOpt                              ``weight`` F8, ``weight_scale``
    compressed-tensors, 8 bits                    ``weight`` F8 or I8, ``weight_scale``, perhaps ``weight_zero_point``

What is read is float32. The type that an average of such checkpoints is written in is the one that the configuration
names for the model, bfloat16 where it names none.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from lagless._validation import is_list, is_mapping
from lagless.checkpoints._errors import CheckpointError
from lagless.checkpoints._json import read_object
from lagless.checkpoints._readers import Bytes, Place, Reader, byte_view
from lagless.checkpoints._safetensors_format import FLOAT8, TensorInfo

Places = Mapping[str, tuple[TensorInfo, Place]]

_METHODS = {"fp8", "fbgemm_fp8", "compressed-tensors", "modelopt"}
_FORMATS = {"float-quantized", "int-quantized", "naive-quantized", "dense"}  # of compressed-tensors, with 8 bits
_SCALES = ("_scale_inv", "_scale")
_OF_ACTIVATIONS = ("input_scale", "output_scale", "input_zero_point", "k_scale", "v_scale", "q_scale", "prob_scale")
_BEYOND = (
    "Read are FP8 (fp8, fbgemm_fp8, ModelOpt), and compressed-tensors with one 8-bit code per number. Dequantize the "
    "checkpoints to bfloat16 or float32 first, with the library that quantized them."
)


@dataclass(frozen=True)
class Dequantized:
    """Tensors of a quantized checkpoint as numbers.

    Attributes:
        places: the tensors as float32, scales left out.
        dtype: the type of the model before it was quantized.
        method: what quantized it.
        left_out: tensors that are about activations.
    """

    places: dict[str, tuple[TensorInfo, Place]]
    dtype: torch.dtype
    method: str
    left_out: list[str]


def dequantized(config: Path, places: Places) -> Dequantized | None:
    """Return quantized tensors as the numbers that they stand for; None where none are quantized.

    Args:
        config: the ``config.json`` of the checkpoint, if it has one.
        places: the tensors as stored.

    Raises:
        CheckpointError: if the method is another one, or a scale does not fit its tensor.
    """
    settings = read_object(config, "Repair the configuration, or leave this checkpoint out.") if config.exists() else {}
    quantization = _quantization(settings)
    coded = [name for name, (info, _) in places.items() if info.dtype in FLOAT8]
    if quantization is None and not coded:
        return None
    method = str(quantization.get("quant_method", "")) if quantization else "float8"
    if quantization is not None:
        _check_method(config, quantization, method)
        coded += [n for n, (info, _) in places.items() if info.dtype == torch.int8 and _scale_name(n, places)]
    block = quantization.get("weight_block_size") if quantization else None
    found: dict[str, tuple[TensorInfo, Place]] = {}
    used: set[str | None] = set()
    for name, (info, place) in places.items():
        if name in coded:
            scale, zero = _scale_name(name, places), f"{name}_zero_point"
            used |= {key for key in (scale, zero) if key in places}
            info, place = _wrap(name, info, place, places, scale, zero if zero in places else None, block)
        found[name] = info, place
    about = [n for n in found if n.rpartition(".")[2] in _OF_ACTIVATIONS or n.endswith(".weight_shape")]
    kept = {name: value for name, value in found.items() if name not in used and name not in about}
    return Dequantized(kept, _base_dtype(settings), method, about)


def _quantization(settings: Mapping[str, Any]) -> Mapping[str, Any] | None:
    for key in ("quantization_config", "compression_config"):
        if is_mapping(found := settings.get(key)) and found:
            return found
    return None


def _check_method(config: Path, quantization: Mapping[str, Any], method: str) -> None:
    form = quantization.get("format", "dense")
    groups = quantization.get("config_groups")
    bits: set[Any] = {
        weights.get("num_bits")
        for group in (groups.values() if is_mapping(groups) else ())
        if is_mapping(group) and is_mapping(weights := group.get("weights"))
    }
    if method not in _METHODS or (method == "compressed-tensors" and (form not in _FORMATS or not bits <= {8})):
        detail = f", format {form!r}, {', '.join(map(str, sorted(bits, key=str)))} bits" if bits else ""
        raise CheckpointError(
            f"{config}: the weights are quantized by {method or 'an unnamed method'!r}{detail}, and cannot be "
            f"averaged: an average of codes, or of their scales alone, means nothing. {_BEYOND}"
        )


def _scale_name(name: str, places: Places) -> str | None:
    return next((name + end for end in _SCALES if name + end in places), None)


def _base_dtype(settings: Mapping[str, Any]) -> torch.dtype:
    for part in (settings, settings.get("text_config")):
        if is_mapping(part):
            named = getattr(torch, str(part.get("dtype") or part.get("torch_dtype")), None)
            if isinstance(named, torch.dtype) and named.is_floating_point and named not in FLOAT8:
                return named
    return torch.bfloat16


def _wrap(
    name: str, info: TensorInfo, place: Place, places: Places, scale: str | None, zero: str | None, block: Any
) -> tuple[TensorInfo, Place]:
    if scale is None:
        raise CheckpointError(
            f"{place.path}: tensor {name!r} ({info}) is {info.dtype}, which cannot be averaged without its scale, and "
            f"there is no {name}_scale_inv or {name}_scale. {_BEYOND}"
        )
    scale_info, scale_place = places[scale]
    sizes = _block_sizes(place.path, name, info, scale_info, block)
    shape = tuple(math.ceil(size / step) for size, step in zip(info.shape, sizes, strict=True))
    zeros = None
    if zero is not None:
        zero_info, zero_place = places[zero]
        if zero_info.numel not in (1, scale_info.numel):
            raise CheckpointError(f"{place.path}: {zero!r} ({zero_info}) does not fit {scale!r} ({scale_info}).")
        zeros = _Table(zero_place, zero_info, shape)
    return TensorInfo(torch.float32, info.shape), CodedPlace(
        place, info, _Table(scale_place, scale_info, shape), zeros, sizes
    )


def _block_sizes(path: Path, name: str, info: TensorInfo, scale: TensorInfo, block: Any) -> tuple[int, ...]:
    """How many elements share a scale, per dimension."""
    if scale.numel == 1:
        return tuple(max(size, 1) for size in info.shape)
    shape = scale.shape
    if len(shape) == 1 and len(info.shape) > 1 and shape[0] == info.shape[0]:
        shape = (*shape, *(1 for _ in info.shape[1:]))  # one scale per row
    given: list[Any] = list(block) if is_list(block) else []
    given = [None] * (len(info.shape) - len(given)) + given
    sizes: list[int] = []
    for size, count, step in zip(info.shape, shape, given, strict=False):
        if isinstance(step, int) and step > 0 and math.ceil(size / step) == count:
            sizes.append(step)
        elif count and size % count == 0:
            sizes.append(max(size // count, 1))
        else:
            break
    if len(shape) != len(info.shape) or len(sizes) != len(info.shape) or not scale.dtype.is_floating_point:
        raise CheckpointError(
            f"{path}: the scale of {name!r} ({info}) is {scale}, which does not say which elements share a number"
            f"{f' (blocks of {block})' if block else ''}. {_BEYOND}"
        )
    return tuple(sizes)


@dataclass(frozen=True)
class _Table:
    """A small tensor beside the codes, read whole."""

    place: Place
    info: TensorInfo
    shape: tuple[int, ...]

    def read(self) -> Tensor:
        held = torch.empty(self.info.numel, dtype=self.info.dtype, device="cpu")
        with self.place.open(False) as reader:
            reader.read(0, byte_view(held))
        values = held.to(torch.float32)
        return values.expand(math.prod(self.shape)) if values.numel() == 1 else values


@dataclass(frozen=True)
class CodedPlace:
    """Where codes lie, and the scales that make numbers of them.

    Attributes:
        codes: where the codes lie.
        info: type and shape of the codes.
        scales: one per block.
        zeros: likewise; None for 0.
        sizes: of a block, per dimension.
    """

    codes: Place
    info: TensorInfo
    scales: _Table
    zeros: _Table | None
    sizes: tuple[int, ...]

    @property
    def path(self) -> Path:
        """The file, to name it in messages."""
        return self.codes.path

    def open(self, keep_open: bool) -> Reader:
        """A reader of the numbers, as float32."""
        return _CodedReader(self, self.codes.open(keep_open))


class _CodedReader:
    """Reads ranges of the numbers that codes stand for; scales are read with the first range."""

    def __init__(self, place: CodedPlace, source: Reader) -> None:
        self._place, self._source = place, source
        self._tables: tuple[Tensor, Tensor | None] | None = None

    def read(self, offset: int, out: Bytes) -> None:
        """Fill ``out`` with the numbers' bytes from ``offset`` on."""
        first, count = offset // 4, out.size // 4
        codes = torch.empty(count, dtype=self._place.info.dtype, device="cpu")
        self._source.read(first * codes.itemsize, byte_view(codes))
        values = codes.to(torch.float32)
        if self._tables is None:
            scales, zeros = self._place.scales, self._place.zeros
            self._tables = (scales.read(), None if zeros is None else zeros.read())
        scale, zero = self._tables
        which = self._blocks(first, count)
        values = (values if zero is None else values - zero[which]) * scale[which]
        out[:] = byte_view(values.contiguous())

    def _blocks(self, first: int, count: int) -> Tensor:
        """The block in which each of ``count`` elements from ``first`` on lies."""
        shape, sizes = self._place.info.shape, self._place.sizes
        index = torch.arange(first, first + count, dtype=torch.int64)
        block, stride = torch.zeros(count, dtype=torch.int64), 1
        for size, step in zip(reversed(shape), reversed(sizes), strict=True):
            block += (index % size) // step * stride
            index = index // size
            stride *= math.ceil(size / step)
        return block

    def __enter__(self) -> _CodedReader:
        self._source.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._source.__exit__(kind, error, trace)
