"""Checks of a state before an Averager takes it over: every entry is what an Averager could have written."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor

from lagless._validation import is_list, is_mapping, is_tuple, shown
from lagless.rules import Rule, Tick

LIVE = "live/"
"""Begins an entry of the lists under "buffers" that says what the live weights were: "live/{digest}/{name}"."""

LOW = ".low"
"""Ends the name of a buffer's low bits, which no buffer's own name does: that ends with a number."""

_LARGEST = 2**53
_DIGEST = re.compile(rf"{LIVE}[0-9a-f]{{16}}/.+", re.DOTALL)


def refuse(entry: str, found: object, wanted: str) -> NoReturn:
    """Refuse an entry of a state.

    Raises:
        ValueError: naming the entry, what was found, and what is wanted.
    """
    raise ValueError(
        f"this is not the state of an Averager: {entry} is {shown(found)}; it must be {wanted}. Give what state_dict "
        "returned, or a file that save wrote."
    )


def mapping(entry: str, value: Any) -> Mapping[str, Any]:
    """Return ``value``, required to be a mapping of strings to anything."""
    if not is_mapping(value) or not all(isinstance(key, str) for key in value):
        refuse(entry, value, "a mapping of names")
    return value


def entry_of(value: Mapping[str, Any], key: str, where: str = "the state") -> Any:
    """Return an entry, required to be there."""
    if key not in value:
        raise ValueError(
            f"this is not the state of an Averager: {where} has no {key!r}. Give what state_dict returned, or a file "
            "that save wrote."
        )
    return value[key]


def count(entry: str, value: Any, most: int | None = _LARGEST) -> int:
    """Return ``value``, required to be a whole number from 0 to ``most``."""
    if not isinstance(value, int) or isinstance(value, bool) or value < 0 or (most is not None and value > most):
        refuse(entry, value, f"a whole number from 0 {'on' if most is None else f'to {most}'}")
    return value


def plain(entry: str, value: Any) -> Any:
    """Return ``value``, required to be plain JSON."""
    if is_mapping(value):
        for key, item in mapping(entry, value).items():
            plain(f"{entry}.{key}", item)
    elif is_list(value) or is_tuple(value):
        for i, item in enumerate(value):
            plain(f"{entry}.{i}", item)
    elif not (value is None or isinstance(value, str | int | float)):
        refuse(entry, value, "plain JSON")
    return value


def ticks(last: Any, rules: Mapping[str, Rule], step: int) -> dict[str, Tick]:
    """Return the latest update of each rule, required to be one of a run that is at ``step`` and saw every step.

    Raises:
        ValueError: naming the entry.
    """
    last = mapping("meta.last", last)
    if last.keys() != rules.keys():
        refuse("meta.last", sorted(last), f"of the averages {', '.join(rules)}")
    return {name: _tick(f"meta.last.{name}", last[name], rule, step) for name, rule in rules.items()}


def _tick(entry: str, value: Any, rule: Rule, step: int) -> Tick:
    value = mapping(entry, value)
    tick = Tick(*(count(f"{entry}.{field}", entry_of(value, field, entry)) for field in Tick._fields))
    schedule = rule.schedule
    if tick.step > step or schedule.count(tick.step) != schedule.count(step):
        refuse(f"{entry}.step", tick.step, f"that of the latest update up to step {step}")
    if tick.number == 0:
        expected: Sequence[int] = [schedule.begin(tick.step).previous]
    elif not schedule.updates(tick.step) or tick.number > schedule.count(tick.step):
        refuse(entry, dict(value), f"an update of {rule}")
    elif tick.number == 1:  # the run may have been joined since the update before
        expected = range(max(tick.step - rule.update_freq, rule.update_after), tick.step)
    else:
        expected = [tick.step - rule.update_freq]
    if tick.previous not in expected:
        refuse(f"{entry}.previous", tick.previous, "the step of the update before, or that where averaging began")
    return tick


def buffer_names(buffers: Any, own: Mapping[str, Sequence[str]]) -> dict[str, str]:
    """Return how a state calls each buffer: rules in another order share buffers under other names.

    Args:
        buffers: of the state, what it says of each rule's buffers.
        own: the names of this Averager's buffers, by rule.

    Returns:
        Own name → the state's name.

    Raises:
        ValueError: naming the entry.
    """
    buffers = mapping("meta.buffers", buffers)
    if buffers.keys() != own.keys():
        refuse("meta.buffers", sorted(buffers), f"of the averages {', '.join(own)}")
    users: dict[str, set[str]] = {}
    for rule, names in own.items():
        for position, name in enumerate(names):
            users.setdefault(name, set()).add(f"{rule}.{position}")
    theirs: dict[str, str] = {}
    for rule, names in own.items():
        found = plain_entries(_texts(f"meta.buffers.{rule}", buffers[rule]))
        if len(found) != len(names):
            refuse(f"meta.buffers.{rule}", found, f"of {len(names)} buffers")
        for position, (name, other) in enumerate(zip(names, found, strict=True)):
            if other not in users[name] or theirs.setdefault(name, other) != other:
                refuse(f"meta.buffers.{rule}.{position}", other, f"one of {', '.join(sorted(users[name]))}")
    return theirs


def _texts(entry: str, value: Any) -> Sequence[str]:
    if not (is_list(value) or is_tuple(value)):
        refuse(entry, value, "a list of names")
    for i, text in enumerate(value):
        if not isinstance(text, str) or (text.startswith(LIVE) and not _DIGEST.fullmatch(text)):
            refuse(f"{entry}.{i}", text, "the name of a buffer, or the digest of a live tensor")
    return value


def plain_entries(entries: Sequence[str]) -> list[str]:
    """Return the names of buffers in a list of all that a state says of a rule's."""
    return [entry for entry in entries if not entry.startswith(LIVE) and not entry.endswith(LOW)]


def low_entries(buffers: Mapping[str, Sequence[str]], theirs: Mapping[str, str]) -> set[str]:
    """Return the own names of the buffers that are said to have low bits.

    Raises:
        ValueError: for a name that no buffer has.
    """
    ours = {other: own for own, other in theirs.items()}
    found: set[str] = set()
    for rule, entries in buffers.items():
        for i, entry in enumerate(entries):
            if entry.endswith(LOW) and not entry.startswith(LIVE):
                if entry.removesuffix(LOW) not in ours:
                    refuse(f"meta.buffers.{rule}.{i}", entry, f"one of {', '.join(name + LOW for name in ours)}")
                found.add(ours[entry.removesuffix(LOW)])
    return found


def tensors(value: Any) -> Mapping[str, Tensor]:
    """Return the tensors of a state, required to be dense, each with memory, under names of buffer and parameter.

    Raises:
        ValueError: naming the entry.
    """
    for name, tensor in mapping("tensors", value).items():
        if "/" not in name:
            refuse(f"tensors[{name!r}]", name, "named after a buffer and a parameter, 'BUFFER/PARAMETER'")
        if not isinstance(tensor, Tensor) or tensor.layout != torch.strided or tensor.is_quantized or tensor.is_meta:
            refuse(f"tensors[{name!r}]", tensor, "a dense tensor with values")
    return value
