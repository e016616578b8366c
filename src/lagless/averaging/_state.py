"""The state of an Averager: tensors under flat names and plain JSON, as a mapping or as one safetensors file."""

from __future__ import annotations

import json
import os
import secrets
from os import PathLike
from pathlib import Path
from typing import Any, TypedDict

import safetensors
from torch import Tensor

from lagless.checkpoints import Bytes, TensorInfo, build_header, byte_view
from lagless.execution import gather, ranks_of
from lagless.rules import same_rule

FORMAT = 1
_KEY = "lagless"


class State(TypedDict):
    """``tensors``: "{buffer}/{parameter}" → tensor. ``meta``: everything else, plain JSON."""

    tensors: dict[str, Tensor]
    meta: dict[str, Any]


def save_file(state: State, path: str | PathLike[str]) -> None:
    """Write ``state`` to one safetensors file; it appears under its name only when complete.

    Sharded tensors are gathered one by one on all ranks, of which the first writes. Else every caller writes.
    """
    path, tensors = Path(path), state["tensors"]
    ranks = ranks_of(tensors.values())
    # Replicas may save to one path at once, and processes on two machines can have the same id.
    partial = path.with_name(f".{path.name}.{secrets.token_hex(4)}.partial")
    infos = {name: TensorInfo(tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    header, offsets = build_header(infos, {_KEY: json.dumps(state["meta"])})

    def write(content: bytes | Bytes, mode: str) -> None:
        if ranks.rank == 0:
            path.parent.mkdir(parents=True, exist_ok=True)
            with partial.open(mode) as file:
                file.write(content)

    ranks.require_same(list(offsets), "the tensors")
    try:
        ranks.together(lambda: write(header, "wb"))
        for name in offsets:
            whole = gather(tensors[name])
            ranks.together(lambda whole=whole: write(byte_view(whole.cpu().contiguous()), "ab"))
        ranks.together(lambda: os.replace(partial, path) if ranks.rank == 0 else None)
    finally:
        if ranks.rank == 0:
            partial.unlink(missing_ok=True)


def load_file(path: str | PathLike[str]) -> State:
    """Read what :func:`save_file` wrote.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if the file is damaged or no Averager wrote it.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"no averager state at {path}; give the file that Averager.save wrote.")
    try:
        with safetensors.safe_open(path, "pt") as file:
            meta = (file.metadata() or {}).get(_KEY)
            if meta is None:
                raise ValueError(f"{path} is not an Averager's state; give the file that Averager.save wrote.")
            return {"tensors": {name: file.get_tensor(name) for name in file.keys()}, "meta": json.loads(meta)}
    except safetensors.SafetensorError as error:
        raise ValueError(f"{path} is not a whole safetensors file ({error}); use an earlier checkpoint.") from error


def match(state: State, expected: State) -> dict[str, Tensor]:
    """The tensors of ``state`` under the names of ``expected``; refused if it belongs to something else.

    Raises:
        ValueError: if rules, parameters, storage or base checkpoint differ, naming the first difference and the remedy.
    """
    try:
        meta, wanted, have, need = state["meta"], expected["meta"], state["tensors"], expected["tensors"]
        if meta["format"] != FORMAT:
            raise ValueError(
                f"averager state has format {meta['format']!r}; this lagless reads {FORMAT}. Update lagless."
            )
        given, own = meta["rules"], wanted["rules"]
        if given.keys() != own.keys() or not all(same_rule(given[name], own[name]) for name in own):
            raise ValueError(
                f"averager state was made with rules {meta['rules']}, this Averager has {wanted['rules']}. "
                "Make the Averager with the same rules and names, or start new averages."
            )
        if (meta["start"] or {}).get("fingerprint") != (wanted["start"] or {}).get("fingerprint"):
            raise ValueError(
                f"averager state was made with start={meta['start']}, this Averager has start={wanted['start']}. "
                "Give the same base checkpoint."
            )
        # Rules in another order share buffers under other names.
        theirs = {
            own: other
            for rule, names in wanted["buffers"].items()
            for own, other in zip(names, meta["buffers"][rule], strict=True)
        }
        counters = isinstance(meta["step"], int) and isinstance(meta["seed"], int)
        if not counters or meta["last"].keys() != wanted["last"].keys():
            raise KeyError("step, seed, last")
    except (KeyError, TypeError) as error:
        raise ValueError(f"this is not the state of an Averager ({error!r}); give what state_dict returned.") from error

    renamed = {name: "/".join([theirs[name.split("/", 1)[0]], name.split("/", 1)[1]]) for name in need}
    if set(renamed.values()) != have.keys():
        missing, surplus = sorted(set(renamed.values()) - have.keys()), sorted(have.keys() - set(renamed.values()))
        raise ValueError(
            f"averager state is of another set of parameters: {len(missing)} missing {missing[:3]}, "
            f"{len(surplus)} unexpected {surplus[:3]}. Freeze and wrap the model as when the state was saved."
        )
    matched = {name: have[other] for name, other in renamed.items()}
    for name, tensor in need.items():
        if matched[name].shape != tensor.shape or matched[name].dtype != tensor.dtype:
            raise ValueError(
                f"averager state: {name} is {matched[name].dtype} {tuple(matched[name].shape)}, this Averager stores "
                f"{tensor.dtype} {tuple(tensor.shape)}. Use the same model and the same dtype argument."
            )
    return matched
