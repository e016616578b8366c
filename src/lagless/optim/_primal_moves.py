"""How the sequences of primal averaging are exchanged in the memory of the parameters."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

from torch import Tensor

from lagless.execution import foreach_add, foreach_add_, foreach_copy_, foreach_mul_


class Widened:
    """Parameters of 16 bits that stand for their float32 iterates, with float32 gradients, until :meth:`undo`."""

    def __init__(self, iterates: Mapping[Tensor, Tensor]) -> None:
        self._own = [(p, p.data, p.grad) for p in iterates]
        for parameter, _, grad in self._own:
            parameter.grad = None  # its dtype is checked against the data's
            parameter.data = iterates[parameter]
            parameter.grad = None if grad is None else grad.to(parameter.dtype)

    def undo(self) -> None:
        """Give the parameters their own weights and gradients back."""
        for parameter, data, grad in self._own:
            parameter.grad = None
            parameter.data, parameter.grad = data, grad


@contextmanager
def without_gradients(parameters: Iterable[Tensor]) -> Iterator[None]:
    """Hide the gradients of parameters inside the ``with`` block, so that an optimizer does not step them."""
    hidden = [(parameter, parameter.grad) for parameter in parameters]
    for parameter, _ in hidden:
        parameter.grad = None
    try:
        yield
    finally:
        for parameter, grad in hidden:
            parameter.grad = grad


def mix(
    y: list[Tensor], z: list[Tensor], stored: list[Tensor] | None, distance: list[Tensor] | None, m: float, pull: float
) -> None:
    """Write z + p·distance to ``stored`` and (1 - m) z + m x to ``y``; ``distance`` is x - z, None for nothing.

    ``z`` may be ``y`` or ``stored`` itself.
    """
    if distance is not None and pull:
        foreach_add_(z, distance, alpha=pull)
        foreach_mul_(distance, 1.0 - pull)
    between = z if distance is None or m == 0.0 else foreach_add(z, distance, alpha=m)
    if stored is not None and stored is not z:
        foreach_copy_(stored, z)
    if between is not y:
        foreach_copy_(y, between)
