"""One stored checkpoint: which tensors it has, where their bytes are, reading a range of them."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from lagless.checkpoints._dcp import METADATA, find_dcp, open_dcp
from lagless.checkpoints._errors import CheckpointError
from lagless.checkpoints._readers import FilePlace, Place, Reader, TensorPlace, byte_view
from lagless.checkpoints._safetensors_format import TensorInfo, read_header, total_bytes
from lagless.checkpoints._torch_file import NOT_WEIGHTS, load_mapped

# In the order in which transformers and peft look for them; adapters are told apart by their name.
WEIGHT_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
ADAPTER_FILES = ("adapter_model.safetensors", "adapter_model.bin")
TORCH_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt")
SUFFIXES = (".safetensors", *TORCH_SUFFIXES)


class Checkpoint:
    """A checkpoint whose tensors can be read range by range. Make one with :func:`open_checkpoint`.

    Attributes:
        path: the folder or file it was opened from.
        files: the files that hold its weights, shards in order.
        tensors: type and shape of each tensor, by name.
        is_adapter: whether these are the weights of a PEFT adapter.
    """

    def __init__(
        self,
        path: Path,
        places: Mapping[str, tuple[TensorInfo, Place]],
        files: list[Path],
        is_adapter: bool,
    ) -> None:
        self.path = path
        self.files = tuple(files)
        self.is_adapter = is_adapter
        self.tensors = {name: info for name, (info, _) in places.items()}
        self._places = {name: place for name, (_, place) in places.items()}
        self._stamps = self._stamp()

    @property
    def folder(self) -> Path:
        """The folder in which the weights lie, and beside them configuration and tokenizer."""
        return self.path if self.path.is_dir() else self.path.parent

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return total_bytes(self.tensors.values())

    def file_of(self, name: str) -> Path:
        """The file in which the tensor ``name`` lies."""
        return self._places[name].path

    def reader(self, name: str, keep_open: bool = True) -> Reader:
        """Return a context manager that reads ranges of the bytes of ``name``; see :class:`Reader`."""
        return self._places[name].open(keep_open)

    def read_range(self, name: str, start: int, stop: int) -> Tensor:
        """Elements ``start`` to ``stop`` of the flattened tensor ``name``; reads those bytes alone."""
        info = self.tensors[name]
        if not 0 <= start <= stop <= info.numel:
            raise ValueError(
                f"read_range: [{start}, {stop}) is not a range of tensor {name!r}, which has {info.numel} elements."
            )
        out = torch.empty(stop - start, dtype=info.dtype, device="cpu")
        with self.reader(name) as reader:
            reader.read(start * info.dtype.itemsize, byte_view(out))
        return out

    def read_tensor(self, name: str) -> Tensor:
        """The tensor ``name``."""
        info = self.tensors[name]
        return self.read_range(name, 0, info.numel).reshape(info.shape)

    def check_unchanged(self) -> None:
        """Refuse weights that were rewritten since this checkpoint was opened.

        Raises:
            CheckpointError: if the size or time of a file differs.
        """
        for path, before, now in zip(self.files, self._stamps, self._stamp(), strict=True):
            if before != now:
                raise CheckpointError(
                    f"{path} changed while it was being read. Wait until it is written, then start again."
                )

    def _stamp(self) -> list[tuple[int, int] | None]:
        return [(path.stat().st_size, path.stat().st_mtime_ns) if path.exists() else None for path in self.files]


def open_checkpoint(path: str | os.PathLike[str]) -> Checkpoint:
    """Open a stored checkpoint without reading its weights.

    Args:
        path: a folder with ``model.safetensors``, ``adapter_model.safetensors``, ``pytorch_model.bin`` or
            ``adapter_model.bin``, or with the index and shards of one of the first two kinds; a folder that
            ``torch.distributed.checkpoint`` wrote, or with such a one named ``pytorch_model_fsdp_0`` in it; or one
            ``.safetensors``, ``.bin``, ``.pt``, ``.pth`` or ``.ckpt`` file.

    Raises:
        CheckpointError: if there are no weights, several candidates, a missing shard, a damaged file, or a type that
            cannot be averaged.
    """
    path = Path(path)
    if path.is_dir() and not _has_model_files(path) and (dcp := find_dcp(path)):
        _refuse_quantized(path / "config.json")
        places, files = open_dcp(dcp)
        return Checkpoint(path, places, files, is_adapter=False)
    main = _main_file(path) if path.is_dir() else path
    if not main.is_file():
        raise CheckpointError(f"{path}: no such checkpoint. Check the path (a broken link counts as missing).")
    is_adapter = main.name in ADAPTER_FILES
    if not is_adapter:  # an adapter is not quantized, even where its base model is
        _refuse_quantized(main.parent / "config.json")
    if main.name.endswith(".index.json"):
        places, files = _open_shards(main)
    else:
        places, files = _open_file(main), [main]
    if not places:
        raise CheckpointError(f"{main}: holds no tensors. Leave this checkpoint out.")
    return Checkpoint(path, places, files, is_adapter)


def holds_weights(folder: Path) -> bool:
    """Whether a folder has weights under one of the usual names."""
    return _has_model_files(folder) or find_dcp(folder) is not None


def _has_model_files(folder: Path) -> bool:
    return any((folder / name).exists() for name in (*WEIGHT_FILES, *ADAPTER_FILES))


def _main_file(folder: Path) -> Path:
    model, adapter = (
        [folder / name for name in names if (folder / name).exists()] for names in (WEIGHT_FILES, ADAPTER_FILES)
    )
    if model and adapter:
        raise CheckpointError(
            f"{folder}: has both {model[0].name} and {adapter[0].name}. Give the file that is meant instead of the "
            "folder."
        )
    if model or adapter:
        return (model or adapter)[0]
    names = sorted(entry.name for entry in folder.iterdir())
    others = [
        name for name in names if name.endswith(SUFFIXES) and not NOT_WEIGHTS.search(name) and (folder / name).is_file()
    ]
    if len(others) == 1 and "-of-" not in others[0]:
        return folder / others[0]
    raise CheckpointError(
        f"{folder}: no weights found. Looked for {', '.join((*WEIGHT_FILES, *ADAPTER_FILES))}, or one file "
        f"*{', *'.join(SUFFIXES)}; found {_listing(names)}. {_advice(names, others)}"
    )


def _advice(names: list[str], others: list[str]) -> str:
    if any("-of-" in name for name in others):
        return "These are shards without their index: copy the *.index.json file too."
    if others:
        return "Give the file that is meant instead of the folder."
    if any(name.startswith("pytorch_model_fsdp") or name.endswith(".distcp") for name in names):
        return f"This is a sharded state without {METADATA}, which is written last: its save did not finish."
    if any(name.startswith("global_step") or name == "zero_to_fp32.py" for name in names):
        return "This is a DeepSpeed state: run the zero_to_fp32.py beside it first."
    return "If it is still being written, wait, or leave this checkpoint out."


def _listing(names: list[str]) -> str:
    return (", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")) or "nothing"


def _open_file(path: Path) -> dict[str, tuple[TensorInfo, Place]]:
    if path.suffix == ".safetensors":
        return {name: (info, FilePlace(path, offset)) for name, (info, offset) in read_header(path).items()}
    if path.suffix in TORCH_SUFFIXES:
        mapped = load_mapped(path)
        return {name: (TensorInfo(t.dtype, tuple(t.shape)), TensorPlace(path, t)) for name, t in mapped.items()}
    raise CheckpointError(
        f"{path}: unknown kind of file; known are {', '.join(SUFFIXES)}. Convert the weights to safetensors."
    )


def _open_shards(index: Path) -> tuple[dict[str, tuple[TensorInfo, Place]], list[Path]]:
    weight_map = _weight_map(index)
    files = [index.parent / name for name in sorted(set(weight_map.values()))]
    for file in files:
        if not file.is_file():
            raise CheckpointError(
                f"{file}: this shard is missing, {index.name} lists it. Copy the checkpoint again, or leave it out."
            )
    shards = {file.name: _open_file(file) for file in files}
    places = {}
    for name, shard in weight_map.items():
        if name not in shards[shard]:
            raise CheckpointError(
                f"{index.parent / shard}: has no tensor {name!r}, which {index.name} places in it. The shards and the "
                "index are not of one save: copy the checkpoint again."
            )
        places[name] = shards[shard][name]
    return places, files


def _weight_map(index: Path) -> dict[str, str]:
    try:
        found = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        good = isinstance(found, dict) and all(
            isinstance(file, str) and Path(file).name == file for file in found.values()
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{index}: not an index of shards ({error!r}). Copy the checkpoint again, or leave it out."
        ) from error
    if not good:
        raise CheckpointError(
            f"{index}: weight_map must give each tensor a file beside the index. Copy the checkpoint again, or leave "
            "it out."
        )
    return found


def _refuse_quantized(config: Path) -> None:
    try:
        quantized = json.loads(config.read_text(encoding="utf-8")).get("quantization_config")
    except (OSError, ValueError, AttributeError):
        return
    if quantized:
        raise CheckpointError(
            f"{config}: the weights are quantized (quantization_config); an average of codes means nothing. "
            "Dequantize the checkpoints first."
        )
