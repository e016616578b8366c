"""The state of an Averager as a mapping: tensors under flat names, and plain JSON."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypedDict

import torch
from torch import Tensor

from lagless.averaging._live import LiveTensors
from lagless.execution import LOW_DTYPE, RuleSet
from lagless.rules import rule_to_dict, same_rule

FORMAT = 2
"""2 has digests of the live weights. States of format 1 are read too, and go on unchecked."""


class State(TypedDict):
    """``tensors``: "{buffer}/{parameter}" → tensor. ``meta``: everything else, plain JSON."""

    tensors: dict[str, Tensor]
    meta: dict[str, Any]


_LIVE = "live/"
"""Begins an entry of the lists under "buffers" that says what the live weights were: "live/{digest}/{name}"."""

_LOW = ".low"
"""Ends the name of a buffer's low bits, which no buffer's own name does: that ends with a number."""


def make_state(
    live: LiveTensors,
    rules: RuleSet,
    buffers: Sequence[Sequence[Tensor]],
    low: Sequence[Sequence[Tensor | None]],
    numbers: dict[str, Any],
    digests: Mapping[str, str],
) -> State:
    """Return the state of averages; its tensors are the buffers themselves.

    Args:
        live: what is averaged.
        rules: by which rules.
        buffers: what is stored, one list per key; an empty one is kept elsewhere.
        low: the low bits of each, empty or None where they are not kept.
        numbers: what else there is to know: step, seed, start.
        digests: of the live weights, by name; empty where nobody knows them.
    """
    names = rules.buffer_names()
    tensors = {
        f"{name}/{parameter}": sharding.present(part)
        for name, buffer in zip(names, buffers, strict=True)
        for parameter, sharding, part in zip(live.names, live.shardings, buffer, strict=bool(buffer))
    } | {
        f"{name}{_LOW}/{parameter}": sharding.present(part)
        for name, bits in zip(names, low, strict=True)
        for parameter, sharding, part in zip(live.names, live.shardings, bits, strict=bool(bits))
        if part is not None
    }
    meta: dict[str, Any] = {
        "format": FORMAT,
        "step": numbers["step"],
        "seed": numbers["seed"],
        "rules": {name: rule_to_dict(rule) for name, rule in rules.rules.items()},
        "last": {name: tick._asdict() for name, tick in rules.last.items()},
        # torch.distributed.checkpoint loads only what a new state has a key for, and refuses files that lack one. So
        # what is new since the first version, low bits and digests, is said in these lists.
        "buffers": {
            rule: [names[i] for i in indices] + [names[i] + _LOW for i in indices if low[i]]
            for rule, indices in rules.index.items()
        },
        "start": numbers["start"],
    }
    meta["buffers"][next(iter(rules.rules))] += [f"{_LIVE}{digest}/{name}" for name, digest in digests.items()]
    return {"tensors": tensors, "meta": meta}


def match(state: State, expected: State) -> tuple[dict[str, Tensor], set[str]]:
    """Return the tensors of ``state`` under the names of ``expected``; refused if it belongs to something else.

    Returns:
        The tensors, low bits included where ``state`` has them, and the names in ``expected`` of buffers that had low
        bits when the state was made. States of earlier versions have none.

    Raises:
        ValueError: if rules, parameters, storage or base checkpoint differ, naming the first difference and the remedy.
    """
    try:
        meta, wanted, have, need = state["meta"], expected["meta"], state["tensors"], expected["tensors"]
        if meta["format"] not in (1, FORMAT):
            raise ValueError(
                f"averager state has format {meta['format']!r}; this lagless reads 1 to {FORMAT}. Update lagless."
            )
        given, own = meta["rules"], wanted["rules"]
        if given.keys() != own.keys() or not all(same_rule(given[name], own[name]) for name in own):
            raise ValueError(
                f"averager state was made with rules {meta['rules']}, this Averager has {wanted['rules']}. "
                "Make the Averager with the same rules and names, or start new averages."
            )
        if _fingerprint(meta["start"]) != _fingerprint(wanted["start"]):
            raise ValueError(
                f"averager state was made with start={meta['start']}, this Averager has start={wanted['start']}. "
                "Give the same base checkpoint."
            )
        # Rules in another order share buffers under other names.
        theirs = {
            own: other
            for rule, names in wanted["buffers"].items()
            for own, other in zip(_plain(names), _plain(meta["buffers"][rule]), strict=True)
        }
        ours = {other: own for own, other in theirs.items()}
        announced = {
            ours[name.removesuffix(_LOW)] for names in meta["buffers"].values() for name in names if _says_low(name)
        }
        counters = isinstance(meta["step"], int) and isinstance(meta["seed"], int)
        if not counters or meta["last"].keys() != wanted["last"].keys():
            raise KeyError("step, seed, last")
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"this is not the state of an Averager ({error!r}); give what state_dict returned.") from error

    need = {n: t for n, t in need.items() if not _is_low(n)}
    given_low = {n: t for n, t in have.items() if _is_low(n)}
    have = {n: t for n, t in have.items() if not _is_low(n)}
    renamed = {name: "/".join([theirs[name.split("/", 1)[0]], name.split("/", 1)[1]]) for name in need}
    if set(renamed.values()) != have.keys():
        missing, surplus = sorted(set(renamed.values()) - have.keys()), sorted(have.keys() - set(renamed.values()))
        raise ValueError(
            f"averager state is of another set of parameters: {len(missing)} missing {missing[:3]}, "
            f"{len(surplus)} unexpected {surplus[:3]}. Freeze and wrap the model as when the state was saved."
        )
    matched = {name: have[other] for name, other in renamed.items()}
    for name, tensor in need.items():
        _require_alike(name, matched[name], tensor.shape, tensor.dtype)
    found: dict[str, Tensor] = {}
    for name, tensor in given_low.items():
        buffer, parameter = name.split("/", 1)
        own = f"{ours.get(buffer.removesuffix(_LOW))}/{parameter}"
        if own not in need or need[own].dtype != torch.float32:
            raise ValueError(
                f"averager state: {name} belongs to no float32 average of this Averager. Use the same model."
            )
        _require_alike(name, tensor, need[own].shape, LOW_DTYPE)
        found[low_name(own)] = tensor
    with_bits = {name.split("/", 1)[0] for name in found}
    for name, tensor in need.items():
        if (
            low_name(name).split("/", 1)[0] in with_bits
            and tensor.dtype == torch.float32
            and low_name(name) not in found
        ):
            raise ValueError(f"averager state: {low_name(name)} is missing. Use a state that was saved as a whole.")
    return matched | found, announced | {buffer.removesuffix(_LOW) for buffer in with_bits}


def low_name(name: str) -> str:
    """Return the name of the low bits of the tensor ``name``."""
    buffer, parameter = name.split("/", 1)
    return f"{buffer}{_LOW}/{parameter}"


def buffer_with_low(name: str) -> str:
    """Return the buffer of which ``name`` are the low bits."""
    return name.split("/", 1)[0].removesuffix(_LOW)


def live_digests(state: State) -> dict[str, str]:
    """Return the digests of the live weights that ``state`` was saved beside, by name; empty if it has none."""
    entries = [entry for entries in state["meta"]["buffers"].values() for entry in entries if entry.startswith(_LIVE)]
    pairs = (entry.removeprefix(_LIVE).partition("/") for entry in entries)
    return {name: digest for digest, _, name in pairs}


def _plain(entries: Sequence[str]) -> list[str]:
    """The names of buffers in a list of all that a state says of a rule's."""
    return [entry for entry in entries if not entry.startswith(_LIVE) and not entry.endswith(_LOW)]


def _says_low(entry: str) -> bool:
    return entry.endswith(_LOW) and not entry.startswith(_LIVE)


def _is_low(name: str) -> bool:
    return name.split("/", 1)[0].endswith(_LOW)


def _fingerprint(start: Mapping[str, Any] | None) -> Any:
    return None if start is None else start.get("fingerprint")


def _require_alike(name: str, found: Tensor, shape: torch.Size, dtype: torch.dtype) -> None:
    if found.shape != shape or found.dtype != dtype:
        raise ValueError(
            f"averager state: {name} is {found.dtype} {tuple(found.shape)}, this Averager stores {dtype} "
            f"{tuple(shape)}. Use the same model and the same dtype argument."
        )
