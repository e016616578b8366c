"""How an optimizer that keeps an average takes over a state: what it checks, and how entries are made to fit."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor

from lagless.execution import LIVE
from lagless.optim._average_step import coefficients
from lagless.optim._loaded_state import require_fitting, require_structure, settings_of, settled
from lagless.rules import Rule, rule_from_dict

if TYPE_CHECKING:
    from lagless.optim._averaged import AveragedOptimizer


def prepared_state(optimizer: AveragedOptimizer, state: dict[str, Any]) -> dict[str, Any]:
    """Return a state with all settings, and rules for their description; refuse one that does not fit."""
    given = state.get("param_groups")
    if isinstance(given, list) and any(isinstance(group, dict) and "average" not in group for group in given):
        raise ValueError(
            f"this is not the state of a {type(optimizer).__name__}: its groups have no 'average'. "
            "To go on from another optimizer, start with a new state."
        )
    owned = optimizer._groups
    require_structure(state, owned)
    groups = []
    for index, (given, own) in enumerate(zip(state["param_groups"], owned, strict=True)):
        group = settings_of(index, given, {**own, "evaluating": False}, optimizer._lasting)
        group["average"] = _rule(index, group["average"])
        optimizer._check_loaded({**group, "params": own["params"]})
        groups.append(group)
    evaluating = any(group["evaluating"] for group in groups)
    for group, own in zip(groups, owned, strict=True):
        for number, parameter in zip(group["params"], own["params"], strict=True):
            if entries := state["state"].get(number):
                _require_fitting(optimizer, number, parameter, group, entries, evaluating)
    return {**state, "param_groups": groups}


def take_entries(optimizer: AveragedOptimizer, given: Mapping[str, Any]) -> None:
    """Give ``optimizer`` the entries of the state it has loaded: torch has cast them to the parameters' dtype."""
    numbers = [number for group in given["param_groups"] for number in group["params"]]
    owned = [(p, group) for group in optimizer.param_groups for p in group["params"]]
    seen: set[int] = set()
    for number, (parameter, group) in zip(numbers, owned, strict=True):
        if loaded := given["state"].get(number):
            held, entries = optimizer.state[parameter], optimizer._entries_of(parameter, group, loaded)
            for name in entries.keys() & loaded.keys():
                held[name] = settled(loaded[name], entries[name], parameter.device, seen)
            for name in optimizer._counters(parameter, group, loaded):
                held[name] = optimizer._counter(name, loaded[name], parameter, group)


def _rule(index: int, given: Any) -> Rule:
    if isinstance(given, Rule):
        return given
    try:
        return rule_from_dict(given)
    except ValueError as error:
        raise ValueError(f"'average' of group {index} of the optimizer's state: {error}") from error


def _require_fitting(
    optimizer: AveragedOptimizer,
    number: object,
    parameter: Tensor,
    group: dict[str, Any],
    state: dict[str, Any],
    evaluating: bool,
) -> None:
    name = f"the state of parameter {number}"
    optimizer._require_fitting(parameter, group, state, name)
    counters = optimizer._counters(parameter, group, state)
    require_fitting(number, state, parameter, optimizer._entries_of(parameter, group, state), counters)
    if LIVE in state and not evaluating:
        raise ValueError(
            f"{name} has {LIVE!r}, the weights that wait while the parameters hold the average, but no group of it "
            "says 'evaluating'. Load a state as state_dict() gave it."
        )
    step = state.get(optimizer.step_key)
    if evaluating and LIVE not in state and step is not None and coefficients(group["average"], int(step)):
        raise ValueError(
            f"{name} lacks {LIVE}, the weights that wait while the parameters hold the average, as a group of it says "
            "by 'evaluating'; it was saved incompletely. Call train() before saving with a tool that keeps only known "
            "entries."
        )
