"""Numbers on their way between host and device."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import torch
from torch import Tensor

from lagless.execution._annotated import numbers

WITHOUT_FLOAT64 = ("mps",)


def counts(values: Sequence[int | Tensor]) -> list[int]:
    """Step counts as integers, with one wait for each device that holds some."""
    found = [0 if isinstance(value, Tensor) else int(value) for value in values]
    devices: defaultdict[torch.device, list[int]] = defaultdict(list)
    for i, value in enumerate(values):
        if isinstance(value, Tensor):
            devices[value.device].append(i)
    for held in devices.values():
        together = torch.stack([torch.reshape(values[i], ()) for i in held])  # pyright: ignore[reportArgumentType]
        for i, number in zip(held, numbers(together), strict=True):
            found[i] = int(number)
    return found


def exact_dtype(device: torch.device) -> torch.dtype:
    """The widest floating dtype that ``device`` computes in."""
    return torch.float32 if device.type in WITHOUT_FLOAT64 else torch.float64
