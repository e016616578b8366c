"""What the pull does, summed on the device."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from lagless.execution import exact_dtype, numbers


class PullStatistics:
    """Gains and norms of the steps that were recorded, over the parameters that moved, on this rank.

    Nothing waits for the device before :meth:`read`.
    """

    def __init__(self) -> None:
        self.steps = 0
        self._sums: dict[torch.device, Tensor] = {}
        self._largest: dict[torch.device, Tensor] = {}

    def count(
        self, before: list[Tensor], after: list[Tensor], gains: list[Tensor], distance: list[Tensor], ceiling: float
    ) -> None:
        """Count one block: weights before and after, gains before the clamp, the way to the target, the clamp."""
        update = _flat(after) - _flat(before)
        gain = _flat(gains)
        clamped = gain.clamp(max=ceiling)
        pull = clamped * _flat(distance)
        if not gain.numel():
            return
        one = torch.ones_like(gain[0])
        sums = [one * gain.numel(), (gain > 1.0).sum(), gain.sum(), clamped.sum()]
        sums += [x.square().sum() for x in (pull, update - pull, update)]
        exact = exact_dtype(gain.device)
        self._take(self._sums, torch.add, torch.stack([x.to(exact) for x in sums]))
        self._take(self._largest, torch.maximum, torch.stack([gain.max(), -gain.min()]).to(exact))

    def read(self) -> dict[str, float]:
        """The figures, by name; waits for every device once.

        ====================== ==================================================================
        ``fraction_clipped``   of the coordinates, those with a gain above 1
        ``gain_unclamped``     mean of η c d_t/D; ``..._max`` and ``..._min`` its extremes
        ``gain``               mean of the gains that were applied
        ``pull_norm``          of gain · (target - θ), all coordinates of a step together
        ``adamw_norm``         of the step without the pull
        ``update_norm``        of θ_t - θ_{t-1}
        ====================== ==================================================================

        Norms are root mean squares over the recorded steps. A step without a pull counts with gains of 0.

        Raises:
            RuntimeError: if no step was recorded.
        """
        if not self._sums:
            raise RuntimeError("no step was recorded; take one inside the recording() block.")
        count, clipped, gain, clamped, *squares = numbers(
            torch.stack([s.cpu().double() for s in self._sums.values()]).sum(0)
        )
        largest, smallest = numbers(torch.stack([s.cpu().double() for s in self._largest.values()]).amax(0))
        pull, adamw, update = ((square / self.steps) ** 0.5 for square in squares)
        return {
            "fraction_clipped": clipped / count,
            "gain_unclamped": gain / count,
            "gain_unclamped_max": largest,
            "gain_unclamped_min": -smallest,
            "gain": clamped / count,
            "pull_norm": pull,
            "adamw_norm": adamw,
            "update_norm": update,
        }

    @staticmethod
    def _take(into: dict[torch.device, Tensor], combine: Callable[[Tensor, Tensor], Tensor], values: Tensor) -> None:
        known = into.get(values.device)
        into[values.device] = values if known is None else combine(known, values)


def _flat(tensors: list[Tensor]) -> Tensor:
    return torch.cat([t.reshape(-1) for t in tensors])
