"""Checks of a bias-corrected optimizer's state before it is taken over, and how its entries are made to fit."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lagless.execution import local
from lagless.optim._loaded_state import counter, require_fitting, require_structure, settings_of, settled
from lagless.optim.bias_corrected._method import Group, Method, States

_LASTING = ("lr", "betas", "eps", "weight_decay")  # a state of torch's AdamW has these, too


def prepared_state(
    state: dict[str, Any], groups: Sequence[Group], method: Method, checked: Callable[[Group], Group]
) -> dict[str, Any]:
    """Return a state with all settings; refuse one that does not fit.

    Args:
        state: as it was given.
        groups: of the optimizer that loads it.
        method: its.
        checked: returns the settings of a group as they are used, or raises ValueError.
    """
    require_structure(state, groups)
    prepared = []
    for index, (given, own) in enumerate(zip(state["param_groups"], groups, strict=True)):
        group = checked({**settings_of(index, given, own, _LASTING), "params": own["params"]})
        for number, p in zip(given["params"], own["params"], strict=True):
            if entries := state["state"].get(number):
                require_fitting(number, entries, p, method.entries(group, p), ("step",))
        prepared.append({**group, "params": given["params"]})
    return {**state, "param_groups": prepared}


def settle(states: States, groups: Sequence[Group], method: Method, given: Mapping[str, Any]) -> None:
    """Give ``states`` the entries of the state that was loaded: torch has cast them to the parameters' dtype."""
    tensors = [v for state in given["state"].values() for v in state.values() if isinstance(v, Tensor)]
    seen = {local(tensor).untyped_storage().data_ptr() for tensor in tensors}  # what is given stays as it is
    numbers = [number for group in given["param_groups"] for number in group["params"]]
    owned = [(p, group) for group in groups for p in group["params"]]
    for number, (p, group) in zip(numbers, owned, strict=True):
        if loaded := given["state"].get(number):
            for name, entry in method.entries(group, p).items():
                if name in loaded:
                    states[p][name] = settled(loaded[name], entry, p.device, seen)
            states[p]["step"] = counter(loaded["step"], torch.device("cpu"))
