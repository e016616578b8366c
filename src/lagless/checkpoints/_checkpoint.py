"""One stored checkpoint: which tensors it has, where their bytes are, reading a range of them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from lagless.checkpoints._errors import CheckpointError
from lagless.checkpoints._quantized import CodedPlace
from lagless.checkpoints._readers import Place, Reader, byte_view
from lagless.checkpoints._safetensors_format import TensorInfo, total_bytes


class Checkpoint:
    """A checkpoint whose tensors can be read range by range. Make one with :func:`open_checkpoint`.

    Attributes:
        path: the folder or file it was opened from.
        files: the files that hold its weights, shards in order.
        tensors: type and shape of each tensor, by name.
        is_adapter: whether these are the weights of a PEFT adapter.
        left_out: names of tensors that lie among the weights and belong to other states, as of an optimizer.
        folder: the folder in which the weights lie.
        companions: where configuration and tokenizer are: a folder, or the file of weights they lie beside.
        stem: how the files of weights are named, as ``model`` or ``diffusion_pytorch_model``.
        quantized: what quantized the weights, which are read as the numbers that they stand for; None for plain ones.
    """

    def __init__(
        self,
        path: Path,
        places: Mapping[str, tuple[TensorInfo, Place]],
        files: list[Path],
        is_adapter: bool,
        left_out: Sequence[str] = (),
        *,
        folder: Path | None = None,
        companions: Path | None = None,
        stem: str | None = None,
        quantized: tuple[str, torch.dtype] | None = None,
    ) -> None:
        self.path = path
        self.folder = folder or (path if path.is_dir() else path.parent)
        self.companions = companions or (self.folder if path.is_dir() else path)
        self.stem = stem or ("adapter_model" if is_adapter else "model")
        self.quantized, self._base_dtype = quantized or (None, None)
        self.files = tuple(files)
        self.is_adapter = is_adapter
        self.left_out = tuple(left_out)
        self.tensors = {name: info for name, (info, _) in places.items()}
        self._places = {name: place for name, (_, place) in places.items()}
        self._stamps = self._stamp()

    @property
    def written(self) -> dict[str, TensorInfo]:
        """Type and shape of each tensor as an average is written: those stored, or those before quantization."""
        base = self._base_dtype
        if base is None:
            return self.tensors
        numbers = (name for name, place in self._places.items() if isinstance(place, CodedPlace))
        return self.tensors | {name: TensorInfo(base, self.tensors[name].shape) for name in numbers}

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

    def restricted_to(self, names: Iterable[str]) -> Checkpoint:
        """The same checkpoint with those of its tensors alone."""
        places = {name: (self.tensors[name], self._places[name]) for name in names}
        return Checkpoint(
            self.path,
            places,
            list(self.files),
            self.is_adapter,
            self.left_out,
            folder=self.folder,
            companions=self.companions,
            stem=self.stem,
            quantized=None
            if self.quantized is None or self._base_dtype is None
            else (self.quantized, self._base_dtype),
        )

    def _stamp(self) -> list[tuple[int, int] | None]:
        return [(path.stat().st_size, path.stat().st_mtime_ns) if path.exists() else None for path in self.files]
