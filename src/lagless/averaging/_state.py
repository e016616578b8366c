"""The state of an Averager as a mapping: tensors under flat names, and plain JSON."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, TypedDict

import torch
from torch import Tensor

from lagless._validation import shown
from lagless.averaging._live import LiveTensors
from lagless.averaging._state_checks import (
    LIVE,
    LOW,
    buffer_names,
    count,
    entry_of,
    low_entries,
    mapping,
    plain,
    plain_entries,
    tensors,
    ticks,
)
from lagless.execution import LOW_DTYPE, RuleSet
from lagless.rules import Rule, Tick, rule_to_dict, same_rule

FORMAT = 2
"""2 has digests of the live weights. States of format 1 are read too, and go on unchecked."""


class State(TypedDict):
    """``tensors``: "{buffer}/{parameter}" → tensor. ``meta``: everything else, plain JSON."""

    tensors: dict[str, Tensor]
    meta: dict[str, Any]


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
    stored = {
        f"{name}/{parameter}": sharding.present(part)
        for name, buffer in zip(names, buffers, strict=True)
        for parameter, sharding, part in zip(live.names, live.shardings, buffer, strict=bool(buffer))
    } | {
        f"{name}{LOW}/{parameter}": sharding.present(part)
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
            rule: [names[i] for i in indices] + [names[i] + LOW for i in indices if low[i]]
            for rule, indices in rules.index.items()
        },
        "start": numbers["start"],
    }
    meta["buffers"][next(iter(rules.rules))] += [f"{LIVE}{digest}/{name}" for name, digest in digests.items()]
    return {"tensors": stored, "meta": meta}


class Matched(NamedTuple):
    """What a state says, under this Averager's names.

    Attributes:
        step: optimizer steps so far.
        seed: of the noise of rounding.
        last: the latest update of each rule.
        tensors: buffers, and low bits where the state has them.
        with_low: names of the buffers that had low bits when it was made. States of earlier versions have none.
    """

    step: int
    seed: int
    last: dict[str, Tick]
    tensors: dict[str, Tensor]
    with_low: set[str]


def match(state: State, expected: State, rules: Mapping[str, Rule]) -> Matched:
    """Return what ``state`` says, if an Averager of these rules and tensors could have written it.

    Args:
        state: what was given.
        expected: the present state of the Averager.
        rules: by name.

    Raises:
        ValueError: naming the first entry that does not fit, and the remedy.
    """
    whole = mapping("the state", state)
    meta, wanted = mapping("meta", entry_of(whole, "meta")), expected["meta"]
    have, need = tensors(entry_of(whole, "tensors")), expected["tensors"]
    version = entry_of(meta, "format", "meta")
    if isinstance(version, bool) or version not in (1, FORMAT):
        raise ValueError(
            f"averager state has format {shown(version)}; this lagless reads 1 to {FORMAT}. Update lagless."
        )
    given, own = mapping("meta.rules", plain("meta.rules", entry_of(meta, "rules", "meta"))), wanted["rules"]
    records = all(isinstance(record, Mapping) for record in given.values())
    if not records or given.keys() != own.keys() or not all(same_rule(given[name], own[name]) for name in own):
        raise ValueError(
            f"averager state was made with rules {given}, this Averager has {own}. "
            "Make the Averager with the same rules and names, or start new averages."
        )
    start = plain("meta.start", entry_of(meta, "start", "meta"))
    if _fingerprint(None if start is None else mapping("meta.start", start)) != _fingerprint(wanted["start"]):
        raise ValueError(
            f"averager state was made with start={meta['start']}, this Averager has start={wanted['start']}. "
            "Give the same base checkpoint."
        )
    step = count("meta.step", entry_of(meta, "step", "meta"))
    seed = count("meta.seed", entry_of(meta, "seed", "meta"), most=None)
    last = ticks(entry_of(meta, "last", "meta"), rules, step)
    theirs = buffer_names(
        entry_of(meta, "buffers", "meta"), {rule: plain_entries(names) for rule, names in wanted["buffers"].items()}
    )
    ours = {other: own for own, other in theirs.items()}
    announced = low_entries(meta["buffers"], theirs)

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
        own = f"{ours.get(buffer.removesuffix(LOW))}/{parameter}"
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
    with_low = announced | {buffer.removesuffix(LOW) for buffer in with_bits}
    return Matched(step, seed, last, matched | found, with_low)


def low_name(name: str) -> str:
    """Return the name of the low bits of the tensor ``name``."""
    buffer, parameter = name.split("/", 1)
    return f"{buffer}{LOW}/{parameter}"


def buffer_with_low(name: str) -> str:
    """Return the buffer of which ``name`` are the low bits."""
    return name.split("/", 1)[0].removesuffix(LOW)


def live_digests(state: State) -> dict[str, str]:
    """Return the digests of the live weights that ``state`` was saved beside, by name; empty if it has none."""
    entries = [entry for entries in state["meta"]["buffers"].values() for entry in entries if entry.startswith(LIVE)]
    pairs = (entry.removeprefix(LIVE).partition("/") for entry in entries)
    return {name: digest for digest, _, name in pairs}


def _is_low(name: str) -> bool:
    return name.split("/", 1)[0].endswith(LOW)


def _fingerprint(start: Mapping[str, Any] | None) -> Any:
    return None if start is None else start.get("fingerprint")


def _require_alike(name: str, found: Tensor, shape: torch.Size, dtype: torch.dtype) -> None:
    if found.shape != shape or found.dtype != dtype:
        raise ValueError(
            f"averager state: {name} is {found.dtype} {tuple(found.shape)}, this Averager stores {dtype} "
            f"{tuple(shape)}. Use the same model and the same dtype argument."
        )
