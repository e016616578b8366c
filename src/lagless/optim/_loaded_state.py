"""Checks of a state before an optimizer takes it over, and how its entries are made to fit.

What is refused here would otherwise be used on the wrong elements, or fail at a later step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor
from torch.optim import Optimizer

from lagless._validation import shown
from lagless.execution import is_sharded, local

_MOST_STEPS = 2**53  # beyond it, a float64 count no longer grows by one

STATE_FORMAT = 1
"""What a state's ``"format"`` says; one without is of a version that did not number them, and is read like format 1."""


class Entry(NamedTuple):
    """What an optimizer works with under one name of a parameter's state.

    Attributes:
        shape: wanted.
        dtypes: that it works with; a tensor of any other floating dtype is turned into the first.
        needed: whether a state that is not empty must have it.
    """

    shape: Sequence[int]
    dtypes: tuple[torch.dtype, ...]
    needed: bool = True


def wide_dtype(parameter: Tensor) -> torch.dtype:
    """Return float32, or the parameter's dtype where that is wider: what moments and sums are kept in."""
    return torch.promote_types(parameter.dtype, torch.float32)


def with_format(state: dict[str, Any]) -> dict[str, Any]:
    """Return a state with the number of its format."""
    return {**state, "format": STATE_FORMAT}


def load_checked(
    optimizer: Optimizer,
    load: Callable[[Any], None],
    state_dict: Any,
    prepared: Callable[[dict[str, Any]], dict[str, Any]],
    wrapped: Sequence[Optimizer] = (),
) -> dict[str, Any]:
    """Let torch take over a state in the form that ``prepared`` gives it, after all hooks; return that form.

    Args:
        optimizer: that loads; if anything is raised, it and those that it wraps keep groups and state.
        load: torch's own ``load_state_dict``.
        state_dict: as it was given.
        prepared: checks a state and returns the one to take over; it changes nothing.
        wrapped: optimizers that share groups and state with it.
    """
    if not isinstance(state_dict, dict):
        raise ValueError(f"the optimizer's state is {type(state_dict).__name__}; give the dict of state_dict().")
    given: dict[str, Any] = {}

    def prepare(_: Optimizer, state: dict[str, Any]) -> dict[str, Any]:
        given.update(prepared(state))
        return given

    former = [(owner, owner.state, owner.param_groups) for owner in (optimizer, *wrapped)]
    last = optimizer.register_load_state_dict_pre_hook(prepare)
    try:
        load(state_dict)
    except BaseException:
        for owner, state, groups in former:
            owner.state, owner.param_groups = state, groups
        raise
    finally:
        last.remove()
    return given


def require_structure(state: Mapping[str, Any], own: Sequence[Mapping[str, Any]]) -> None:
    """Refuse a state that is not made of as many groups of as many parameters, each with a state of its own or none.

    Args:
        state: with ``"state"`` and ``"param_groups"``, as ``torch.optim`` has it.
        own: the groups of the optimizer that loads it.

    Raises:
        ValueError: naming the entry; also for a format that this version does not know.
    """
    found = state.get("format", STATE_FORMAT)
    if type(found) is not int or found != STATE_FORMAT:
        raise ValueError(
            f"the optimizer's state has format {found!r:.60}; this lagless reads {STATE_FORMAT}. Update lagless."
        )
    groups, states = state.get("param_groups"), state.get("state")
    if not isinstance(groups, list) or not all(isinstance(group, dict) for group in groups):
        _refuse("'param_groups'", shown(groups), "a list of dicts")
    if not isinstance(states, dict):
        _refuse("'state'", shown(states), "a dict of a dict for each parameter")
    for i, group in enumerate(groups):
        if not isinstance(group.get("params"), list):
            _refuse(f"'params' of group {i}", shown(group.get("params")), "a list of numbers of parameters")
    sizes, wanted = ([len(group["params"]) for group in some] for some in (groups, own))
    if sizes != wanted:
        _refuse("'param_groups'", f"of {sizes} parameters", f"{len(wanted)} groups of {wanted} parameters")
    numbers = [number for group in groups for number in group["params"]]
    if not all(isinstance(number, int | str) for number in numbers) or len({*numbers}) != len(numbers):
        _refuse("'params' of the groups", shown(numbers), "numbers of parameters, each of them once")
    for number, entry in states.items():
        if number not in numbers:
            _refuse(f"'state' of parameter {number!r:.60}", "of no parameter", f"of one in 'params', {shown(numbers)}")
        if not isinstance(entry, dict):
            _refuse(f"'state' of parameter {number}", shown(entry), "a dict")


def settings_of(index: int, given: Mapping[str, Any], own: Mapping[str, Any], needed: Iterable[str]) -> dict[str, Any]:
    """Return a group's settings: the given ones, and the optimizer's own where a state of an earlier version lacks any.

    Args:
        index: of the group, for errors.
        given: the group of a state.
        own: the group of the optimizer that loads it.
        needed: settings that every version saved.

    Raises:
        ValueError: if it lacks one of those, or has the optimizer's names of parameters in another order.
    """
    missing = sorted(name for name in needed if name in own and name not in given)
    if missing:
        raise ValueError(
            f"group {index} of the optimizer's state lacks {', '.join(map(repr, missing))}: it is damaged, or another "
            "optimizer's. Load a state of this optimizer, or start with a new one."
        )
    names, ours = given.get("param_names"), own.get("param_names")
    if "param_names" in given:
        if not isinstance(names, list) or [type(name) for name in names] != [str] * len(given["params"]):
            _refuse(f"'param_names' of group {index}", shown(names), f"a list of {len(given['params'])} names")
        if ours is not None and names != ours and sorted(names) == sorted(ours):
            _refuse(f"'param_names' of group {index}", shown(names), f"in the order of this optimizer's, {shown(ours)}")
    if "evaluating" in given and not isinstance(given["evaluating"], bool):
        _refuse(f"'evaluating' of group {index}", shown(given["evaluating"]), "True or False")
    return {**{name: value for name, value in own.items() if name != "params"}, **given}


def require_fitting(
    number: object,
    state: Mapping[str, Any],
    parameter: Tensor,
    entries: Mapping[str, Entry],
    counters: Iterable[str],
) -> None:
    """Refuse a parameter's state that lacks entries, or has one in another shape or type than the optimizer wants.

    Args:
        number: of the parameter, for errors.
        state: of the parameter; entries that neither argument names are not looked at.
        parameter: itself.
        entries: wanted, by name.
        counters: names of counts of steps, which must be there.

    Raises:
        ValueError: naming parameter, entry, what was found and what is wanted.
    """
    counters = tuple(counters)
    needed = {*counters, *(name for name, entry in entries.items() if entry.needed)}
    if missing := sorted(needed - state.keys()):
        raise ValueError(
            f"the state of parameter {number} lacks {', '.join(missing)}; it was saved incompletely. If the tool that "
            "saved it keeps only known entries, call train() before."
        )
    for name in entries.keys() & state.keys():
        value, shape = state[name], tuple(entries[name].shape)
        where = f"the state of parameter {number}: {name!r}"
        if not isinstance(value, Tensor) or not value.is_floating_point() or value.layout != torch.strided:
            found = f"a {value.dtype} {value.layout} tensor" if isinstance(value, Tensor) else shown(value)
            _refuse(where, found, f"a dense floating-point tensor of shape {shape}")
        if tuple(value.shape) != shape:
            _refuse(where, f"of shape {tuple(value.shape)}", f"of shape {shape}")
        if value.is_meta and not parameter.is_meta:
            _refuse(where, "on the meta device, without values", f"a tensor on {parameter.device}")
        if is_sharded(value) != is_sharded(parameter) and shape == tuple(parameter.shape):
            kinds = {True: "sharded, a DTensor", False: "whole, a plain tensor"}
            _refuse(where, kinds[is_sharded(value)], f"{kinds[is_sharded(parameter)]}, as the parameter is")
    for name in counters:
        if not _is_count(state[name]):
            found = f"{state[name]!r:.60}"
            _refuse(f"the state of parameter {number}: {name!r}", found, f"a whole number in [0, {_MOST_STEPS}]")


def settled(value: Tensor, entry: Entry, device: torch.device, seen: set[int]) -> Tensor:
    """Return a tensor of a state in a dtype of ``entry``, every element of it in memory of its own.

    Args:
        value: that :func:`require_fitting` has accepted.
        entry: likewise.
        device: of the result.
        seen: addresses of memory that other entries have; the result's is added.
    """
    result = value.to(device, value.dtype if value.dtype in entry.dtypes else entry.dtypes[0]).detach()
    part = local(result)
    overlaps = any(step == 0 and size > 1 for size, step in zip(part.shape, part.stride(), strict=True))
    # An archive may hold one tensor under several names; a step would then write all of them at once.
    if part.numel() and (overlaps or part.untyped_storage().data_ptr() in seen):
        result = result.clone(memory_format=torch.preserve_format)  # of overlapping ones, contiguous
    seen.add(local(result).untyped_storage().data_ptr())
    return result


def counter_dtype(step: Tensor) -> torch.dtype:
    """The type of a loaded step count: float32 or wider, since one in bfloat16 stops at 256 and in float16 at 2,048."""
    return torch.float64 if step.dtype == torch.float64 else torch.float32


def counter(step: Any, device: torch.device) -> Tensor:
    """Return a loaded step count as a tensor of no dimension."""
    tensor = step if isinstance(step, Tensor) else torch.tensor(float(step), dtype=torch.float32)
    return tensor.detach().to(device, counter_dtype(tensor), copy=True).reshape(())


def _is_count(step: object) -> bool:
    if isinstance(step, Tensor):
        if step.numel() != 1 or step.is_complex() or step.is_meta or step.layout != torch.strided:
            return False
        step = step.item()
    return not isinstance(step, bool) and isinstance(step, int | float) and _is_whole(step)


def _is_whole(number: float) -> bool:
    return 0 <= number <= _MOST_STEPS and number == int(number)  # not isfinite: integers of any size come here


def _refuse(where: str, found: str, wanted: str) -> NoReturn:
    raise ValueError(
        f"{where} is {found}; it must be {wanted}. Load a state that was saved for this model, with parameters in the "
        "same order, or start with a new state."
    )
