"""The state of an Averager as one safetensors file."""

from __future__ import annotations

import json
from contextlib import ExitStack
from os import PathLike
from pathlib import Path
from typing import IO, Any

import safetensors

from lagless.averaging._state import State
from lagless.checkpoints import Bytes, TensorInfo, atomic_file, build_header, byte_view
from lagless.execution import gather, ranks_of

_KEY = "lagless"


def save_file(state: State, path: str | PathLike[str]) -> None:
    """Write ``state`` to one safetensors file; it appears under its name only when complete.

    Sharded tensors are gathered one by one on all ranks, of which the first writes. Else every caller writes.
    """
    path, tensors = Path(path).expanduser(), state["tensors"]
    ranks = ranks_of(tensors.values())
    infos = {name: TensorInfo(tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    header, offsets = build_header(infos, {_KEY: json.dumps(state["meta"])})

    with ExitStack() as stack:
        files: list[IO[Any]] = []

        def begin() -> None:
            if ranks.rank == 0:
                path.parent.mkdir(parents=True, exist_ok=True)
                files.append(stack.enter_context(stack.enter_context(atomic_file(path)).open("wb")))
            write(header)

        def write(content: bytes | Bytes) -> None:
            for file in files:
                file.write(content)

        ranks.require_same(list(offsets), "the tensors")
        ranks.together(begin)
        for name in offsets:
            whole = gather(tensors[name])
            ranks.together(lambda whole=whole: write(byte_view(whole.cpu().contiguous())))
        ranks.together(stack.close)


def load_file(path: str | PathLike[str]) -> State:
    """Read what :func:`save_file` wrote.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if the file is damaged or no Averager wrote it.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        raise FileNotFoundError(f"no averager state at {path}; give the file that Averager.save wrote.")
    try:
        reader: Any = safetensors.safe_open(path, "pt")
        with reader as file:
            written: dict[str, str] = file.metadata() or {}
            meta = written.get(_KEY)
            if meta is None:
                raise ValueError(f"{path} is not an Averager's state; give the file that Averager.save wrote.")
            tensors = {name: file.get_tensor(name) for name in file.keys()}
    except safetensors.SafetensorError as error:
        raise ValueError(f"{path} is not a whole safetensors file ({error}); use an earlier checkpoint.") from error
    try:
        return {"tensors": tensors, "meta": json.loads(meta)}
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is damaged: its metadata is no JSON ({error}); use an earlier checkpoint.") from error
