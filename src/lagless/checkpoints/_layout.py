"""Which tensor goes to which byte of which file, decided before anything is written."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from lagless.checkpoints._safetensors_format import TensorInfo, build_header, total_bytes

OUTPUT_DTYPES: dict[str, torch.dtype] = {
    "float64": torch.float64,
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}

_UNITS = {
    "": 1,
    "B": 1,
    "KB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
    "TB": 10**12,
    "KIB": 2**10,
    "MIB": 2**20,
    "GIB": 2**30,
    "TIB": 2**40,
}


@dataclass(frozen=True)
class File:
    """A safetensors file to be written.

    Attributes:
        name: its name.
        header: its first bytes.
        size: its size in bytes, header included.
    """

    name: str
    header: bytes
    size: int


@dataclass(frozen=True)
class Layout:
    """The weight files of one model folder.

    Attributes:
        tensors: type and shape of each tensor as written.
        files: the safetensors files.
        places: for each tensor, its file and the byte at which it begins there.
        index: name and content of the index of shards; None for a single file.
    """

    tensors: dict[str, TensorInfo]
    files: tuple[File, ...]
    places: dict[str, tuple[str, int]]
    index: tuple[str, str] | None

    @property
    def nbytes(self) -> int:
        """Size of all files together."""
        return sum(file.size for file in self.files)

    def share(self, rank: int, ranks: int) -> list[str]:
        """The tensors that fall to one of several ranks: those of whole files, for each of which one rank alone writes.

        (Ranges of one file written from several machines can spoil each other on a network file system.)
        """
        loads, mine = [0] * ranks, set[str]()
        for file in sorted(self.files, key=lambda file: file.size, reverse=True):
            least = loads.index(min(loads))
            loads[least] += file.size
            if least == rank:
                mine.add(file.name)
        return [name for name, (file, _) in self.places.items() if file in mine]


def plan_layout(
    tensors: Mapping[str, TensorInfo],
    dtype: str = "auto",
    max_shard_size: int | str = "5GB",
    adapter: bool = False,
    stem: str | None = None,
) -> Layout:
    """Lay out a model folder as ``save_pretrained`` names it.

    Args:
        tensors: the tensors as they are stored.
        dtype: the type of floating-point tensors as written: ``"auto"`` keeps each tensor's own, or one of
            ``OUTPUT_DTYPES``.
        max_shard_size: bytes per file, as a number or like ``"5GB"`` or ``"500MiB"``; a larger tensor gets a file of
            its own.
        adapter: write one ``adapter_model.safetensors``, never shards: PEFT reads no other.
        stem: how the files are named; None for ``model``, or ``adapter_model``.

    Raises:
        ValueError: if ``dtype`` or ``max_shard_size`` is not understood.
    """
    if dtype != "auto" and dtype not in OUTPUT_DTYPES:
        raise ValueError(f"dtype={dtype!r}; it must be one of 'auto', {', '.join(map(repr, OUTPUT_DTYPES))}.")
    limit = parse_size(max_shard_size)
    written = {
        name: TensorInfo(OUTPUT_DTYPES[dtype], info.shape) if dtype != "auto" and info.dtype.is_floating_point else info
        for name, info in tensors.items()
    }
    stem = stem or ("adapter_model" if adapter else "model")
    shards = [written] if adapter else _cut(written, limit)
    if len(shards) == 1:
        names = [f"{stem}.safetensors"]
    else:
        names = [f"{stem}-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
    files: list[File] = []
    places: dict[str, tuple[str, int]] = {}
    for name, shard in zip(names, shards, strict=True):
        header, offsets = build_header(shard)
        files.append(File(name, header, len(header) + total_bytes(shard.values())))
        places |= {tensor: (name, offset) for tensor, offset in offsets.items()}
    index = None
    if len(shards) > 1:
        metadata = {
            "total_parameters": sum(info.numel for info in written.values()),
            "total_size": total_bytes(written.values()),
        }
        weight_map = {tensor: places[tensor][0] for tensor in sorted(places)}
        index = (
            f"{stem}.safetensors.index.json",
            json.dumps({"metadata": metadata, "weight_map": weight_map}, indent=2) + "\n",
        )
    return Layout(written, tuple(files), places, index)


def parse_size(size: int | str) -> int:
    """A number of bytes from a number or a string; KB, MB, GB are powers of 1000, KiB, MiB, GiB of 1024.

    Raises:
        ValueError: if it is not a positive size.

    >>> parse_size("5GB"), parse_size("1.5 MiB")
    (5000000000, 1572864)
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", str(size))
    if not match or match[2].upper() not in _UNITS or (number := int(float(match[1]) * _UNITS[match[2].upper()])) < 1:
        raise ValueError(
            f"size {size!r} is not understood; give bytes, or a number with KB, MB, GB, KiB, MiB or GiB, e.g. '5GB'."
        )
    return number


def _cut(tensors: Mapping[str, TensorInfo], limit: int) -> list[dict[str, TensorInfo]]:
    shards: list[dict[str, TensorInfo]] = [{}]
    size = 0
    for name, info in tensors.items():
        if shards[-1] and size + info.nbytes > limit:
            shards.append({})
            size = 0
        shards[-1][name] = info
        size += info.nbytes
    return shards
