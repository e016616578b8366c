"""What a wrapped optimizer keeps of a parameter, found by stepping one like it on a few numbers."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Mapping
from numbers import Real
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer

from lagless._validation import LARGEST, shown
from lagless.optim._loaded_state import Entry
from lagless.optim.bias_corrected._base import BiasCorrected, checked_settings, entries_of

_PRIMES: tuple[int, ...] = (
    2,
    3,
    5,
    7,
    11,
    13,
    17,
    19,
)  # sizes of the tried parameter's dimensions, by which its entries' are told
_ELSEWHERE = {"capturable": False, "fused": None, "foreach": None}  # what a CPU may refuse and an accelerator takes


class Kept(NamedTuple):
    """What there is to know about a parameter's state: tensors by name, and counts of steps."""

    entries: dict[str, Entry]
    counters: list[str]


_UNKNOWN = Kept({}, [])


def kept_by(
    optimizer: Optimizer, group: Mapping[str, Any], parameter: Tensor, dtype: torch.dtype, state: Mapping[str, Any]
) -> Kept:
    """Return what ``optimizer`` keeps of a parameter in a state that is not empty.

    Args:
        optimizer: of ``torch.optim`` or bias-corrected; of others what their present state shows.
        group: settings.
        parameter: likewise.
        dtype: of the weights that the optimizer steps.
        state: of the parameter, as it is loaded.
    """
    if isinstance(optimizer, BiasCorrected):
        entries = entries_of(optimizer, dict(group), parameter)
        counters = ["step"] if "step" in state else []
        return Kept(entries if counters else {}, counters)
    if not _is_torchs_own(optimizer):
        held = optimizer.state.get(parameter, {}) if parameter in optimizer.state else {}
        tensors = {k: v for k, v in held.items() if isinstance(v, Tensor) and v.dim() and v.is_floating_point()}
        return Kept({k: Entry(v.shape, (v.dtype,), needed=False) for k, v in tensors.items() if k in state}, [])
    found = _tried(optimizer, group, parameter, dtype)
    if found is None:
        return _UNKNOWN
    sizes = dict(zip(_PRIMES, parameter.shape, strict=False))
    entries = {
        name: Entry([sizes.get(size, size) for size in value.shape], (value.dtype,))
        for name, value in found.items()
        if isinstance(value, Tensor) and value.is_floating_point() and name != "step"
    }
    return Kept(entries, ["step"] if "step" in found else [])


def check_settings(optimizer: Optimizer, group: Mapping[str, Any]) -> None:
    """Require a group's settings to be ones that a wrapped optimizer takes.

    Raises:
        ValueError: if torch's own optimizer refuses them, or one of another's is of another kind than it is now.
    """
    for own in optimizer.param_groups[:1]:
        for name in optimizer.defaults.keys() & group.keys():
            if not _alike(own[name], group[name]):
                raise ValueError(
                    f"{type(optimizer).__name__}: {name}={shown(group[name])}; it must be of the kind of "
                    f"{own[name]!r}, its present value."
                )
    if isinstance(optimizer, BiasCorrected):
        checked_settings(optimizer, dict(group))
    elif _is_torchs_own(optimizer):
        _made(optimizer, {**group, **_ELSEWHERE}, torch.zeros(1, 1, dtype=torch.float32))


def _alike(own: Any, given: Any) -> bool:
    if isinstance(own, bool):
        return isinstance(given, bool)
    if isinstance(own, Real) or (isinstance(own, Tensor) and own.numel() == 1):
        if isinstance(given, Tensor):
            return given.numel() == 1 and not given.is_complex()
        return isinstance(given, int | float) and not isinstance(given, bool) and abs(given) <= LARGEST
    if isinstance(own, list | tuple):
        return isinstance(given, list | tuple) and len(given) == len(own) and all(map(_alike, own, given))
    return not isinstance(own, str) or isinstance(given, str)


def _is_torchs_own(optimizer: Optimizer) -> bool:
    return type(optimizer).__module__.startswith("torch.optim.")


def _made(optimizer: Optimizer, group: Mapping[str, Any], weights: Tensor) -> Optimizer:
    """Return an optimizer of the same kind and settings, on the CPU."""
    kind = type(optimizer)
    known = inspect.signature(kind).parameters.keys() - {"params"}
    settings = {name: value for name, value in group.items() if name in known}
    try:
        return kind([torch.nn.Parameter(weights)], **settings)
    except (ValueError, TypeError, RuntimeError, AttributeError) as error:
        raise ValueError(f"{kind.__name__} refuses the settings of a group of the state: {error}") from error


def _tried(
    optimizer: Optimizer, group: Mapping[str, Any], parameter: Tensor, dtype: torch.dtype
) -> dict[str, Any] | None:
    """Return the state after a step on a small parameter on the CPU; None where it cannot be had there."""
    if parameter.dim() > len(_PRIMES):
        return None
    on_cpu = parameter.device.type == "cpu"
    settings = group if on_cpu else {**group, **_ELSEWHERE}
    tried = _made(optimizer, settings, torch.ones(_PRIMES[: parameter.dim()], dtype=dtype))
    (weights,) = tried.param_groups[0]["params"]
    weights.grad = torch.ones_like(weights)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tried.step()
    except (RuntimeError, AssertionError) as error:
        if on_cpu:
            raise ValueError(
                f"{type(optimizer).__name__} cannot step with the settings of a group of the state: {error}"
            ) from error
        return None  # no kernel for these weights on the CPU
    return dict(tried.state[weights])
