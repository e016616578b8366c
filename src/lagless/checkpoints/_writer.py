"""Ready-to-load model folders, written range by range at final offsets while averages stream by."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Generator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from lagless.checkpoints._atomic_folder import atomic_folder
from lagless.checkpoints._descriptors import spare_descriptors
from lagless.checkpoints._errors import CheckpointError
from lagless.checkpoints._layout import Layout
from lagless.checkpoints._permissions import Permissions
from lagless.checkpoints._readers import Bytes, byte_view
from lagless.checkpoints._sidecar_files import copy_sidecar_files
from lagless.execution import Ranks


class ModelWriter:
    """Writes G model folders at once; a context manager, and a consumer for
    :func:`lagless.posthoc._weighted_sums.stream_product`.

    On entry every weight file is made at its full size, so that a full disk shows before any work is done. On a normal
    exit the files are forced onto the disk and the folders appear under their names; on an error nothing is left.

    Args:
        out: the output folder.
        names: one folder in ``out`` per row of a block; a single ``""`` makes ``out`` itself the model folder.
        layout: the weight files, the same for all rows.
        companions: the folder whose configuration and tokenizer go along, or a file of weights in it; None for none.
        dtype: the type for ``config.json`` to name; ``"auto"`` leaves it as it is.
        ranks: processes that write into the same folders; all of them enter and leave together, and the first makes the
            folders and puts them in place.
        overwrite: whether what lagless wrote to ``out`` before may be replaced.
        permissions: the most that group and others get on what is written.
        dequantized: whether ``companions`` say that the weights are quantized, which those written are not.

    Raises:
        CheckpointError: if the disk is full or fails, if ``out`` changed while the work went on, or if a value does not
            fit into float16.
    """

    def __init__(
        self,
        out: Path,
        names: Sequence[str],
        layout: Layout,
        companions: Path | None = None,
        dtype: str = "auto",
        ranks: Ranks | None = None,
        overwrite: bool = True,
        permissions: Permissions = Permissions(),  # noqa: B008 (immutable)
        dequantized: bool = False,
    ) -> None:
        self._out, self._names, self._layout = out, list(names), layout
        self._companions, self._dtype, self._overwrite = companions, dtype, overwrite
        self._permissions, self._dequantized = permissions, dequantized
        self._ranks = ranks or Ranks()
        self._stack = ExitStack()
        self._folders: list[Path] = []
        self._descriptors: dict[Path, int] = {}
        self._free = 0

    def __enter__(self) -> ModelWriter:
        existing = next(parent for parent in self._out.resolve().parents if parent.exists())
        self._free = shutil.disk_usage(existing).free
        with ExitStack() as stack:
            (temporary, *_) = self._ranks.together(lambda: self._make(stack) if self._ranks.rank == 0 else Path())
            self._folders = [temporary / name for name in self._names]
            stack.callback(self._close)
            self._ranks.together(self._open)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, kind: type[BaseException] | None, *details: object) -> None:
        if kind is None:
            # What other ranks wrote is on the disk before the first one puts the folders in place.
            self._ranks.together(self._sync)
            self._ranks.together(lambda: self._stack.__exit__(None, None, None))
        else:
            self._stack.__exit__(kind, *details)  # type: ignore[arg-type]

    def __call__(self, name: str, start: int, block: Tensor, /) -> None:
        """Write one range of one tensor into every folder; safe from several threads."""
        file, begin = self._layout.places[name]
        info = self._layout.tensors[name]
        position = begin + start * info.dtype.itemsize
        with self._reporting():
            for folder, row in zip(self._folders, block, strict=True):
                values = row.to(info.dtype)
                if info.dtype == torch.float16 and row.dtype != torch.float16:
                    self._check_overflow(name, row, values)
                self._write(folder / file, position, byte_view(values.contiguous()))

    def write_texts(self, name: str, texts: Sequence[str]) -> None:
        """Put a text file into every folder; the first of several ranks writes."""

        def write() -> None:
            with self._reporting():
                for folder, text in zip(self._folders, texts, strict=True):
                    self._write_text(folder / name, text)

        self._ranks.together(lambda: write() if self._ranks.rank == 0 else None)

    def _make(self, stack: ExitStack) -> Path:
        temporary = stack.enter_context(atomic_folder(self._out, self._overwrite, self._permissions))
        with self._reporting():
            for name in self._names:
                self._prepare(temporary / name)
        return temporary

    def _open(self) -> None:
        with self._reporting():
            paths = [folder / file.name for folder in self._folders for file in self._layout.files]
            for path in paths[: spare_descriptors()]:
                self._descriptors[path] = os.open(path, os.O_RDWR)

    def _prepare(self, folder: Path) -> None:
        folder.mkdir(exist_ok=True)
        self._permissions.apply_to(folder)
        for file in self._layout.files:
            path = folder / file.name
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600 | (0o066 & self._permissions.files))
            try:
                _allocate(descriptor, file.size)
            finally:
                os.close(descriptor)
            self._write(path, 0, np.frombuffer(file.header, dtype=np.uint8))
        if self._layout.index is not None:
            name, text = self._layout.index
            self._write_text(folder / name, text)
        if self._companions is not None:
            copy_sidecar_files(self._companions, folder, self._dtype, self._dequantized)

    def _write_text(self, path: Path, text: str) -> None:
        path.write_text(text, encoding="utf-8")
        self._permissions.apply_to(path)

    def _write(self, path: Path, position: int, content: Bytes) -> None:
        known = self._descriptors.get(path)
        descriptor = os.open(path, os.O_RDWR) if known is None else known
        try:
            while content.size:
                count = os.pwrite(descriptor, content.data, position)
                content, position = content[count:], position + count
        finally:
            if known is None:
                os.close(descriptor)

    def _check_overflow(self, name: str, before: Tensor, after: Tensor) -> None:
        if (
            not torch.isfinite(after.sum(dtype=torch.float32))
            and (torch.isfinite(before) & ~torch.isfinite(after)).any()
        ):
            raise CheckpointError(
                f"{self._out}: tensor {name!r} reaches {float(before.abs().max()):g}, more than float16 can hold "
                "(65504). Choose dtype bfloat16 or float32."
            )

    def _sync(self) -> None:
        with self._reporting():
            for descriptor in self._descriptors.values():
                os.fsync(descriptor)

    def _close(self) -> None:
        while self._descriptors:
            os.close(self._descriptors.popitem()[1])

    @contextmanager
    def _reporting(self) -> Generator[None]:
        try:
            yield
        except OSError as error:
            needed = self._layout.nbytes * len(self._names)
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise CheckpointError(
                    f"{self._out}: the disk is full: {needed:,} bytes are needed in all, {self._free:,} were free. "
                    "Free some space, write fewer models at once, or choose another output folder."
                ) from error
            raise CheckpointError(
                f"{self._out}: writing failed ({error.strerror or error}). Nothing was kept; check the disk."
            ) from error


def _allocate(descriptor: int, size: int) -> None:
    """Give a file its full size, and the disk space that goes with it where the system can reserve it."""
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(descriptor, 0, size)
    elif os.fstatvfs(descriptor).f_bavail * os.fstatvfs(descriptor).f_frsize < size:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    else:
        os.ftruncate(descriptor, size)
