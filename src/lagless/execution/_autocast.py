"""Arithmetic in the precision of the tensors, whatever autocast is at work."""

from __future__ import annotations

from collections.abc import Generator, Iterable
from contextlib import ExitStack, contextmanager

import torch


@contextmanager
def without_autocast(devices: Iterable[torch.device]) -> Generator[None]:
    """Compute in the tensors' own precision inside the ``with`` block.

    Steps called inside an autocast region, and hooks of a ``backward()`` called there, would multiply matrices in
    bfloat16 or float16 otherwise.

    Args:
        devices: of the tensors.
    """
    with ExitStack() as regions:
        for kind in {device.type for device in devices}:
            if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
                regions.enter_context(torch.autocast(kind, enabled=False))
        yield
