"""How large a correction is in a run."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lagless._validation import require_integer
from lagless.execution import numbers


@dataclass(frozen=True)
class Correction:
    """What the correction did to one parameter group's update in one step.

    Attributes:
        group: index in ``optimizer.param_groups``.
        step: the optimizer step it was recorded in.
        cross_fit: as in the group.
        inverse_correction: as in the group.
        relative: ‖u - u_std‖/‖u_std‖, u_std the standard update from the same gradients and moments.
        cosine: between u and u_std.
        dispersion: mean of Var(D̂)/D², the preconditioner's relative variance as the inverse correction estimates it:
            over coordinates for AdamW and Sophia (P for D), over all factors' eigenvalues λ for Shampoo. nan where
            nothing of the kind is collected: without inverse correction, unless for leave_one_out.
    """

    group: int
    step: int
    cross_fit: str
    inverse_correction: str
    relative: float
    cosine: float
    dispersion: float


class CorrectionSums:
    """Inner products of one step's updates, summed on their device until somebody asks."""

    def __init__(self, step: int) -> None:
        self.step = step
        self._products: Tensor | None = None  # u·u, u·s, s·s, (u - s)·(u - s), Σ dispersion
        self._counted = 0

    def add(self, update: Tensor, standard: Tensor, dispersion: Tensor | None) -> None:
        """Count a piece of a corrected update, of the standard one, and Var(D̂)/D² of its coordinates."""
        u, s = update.double().flatten(), standard.double().flatten()
        difference = u - s
        spread = u.new_zeros(()) if dispersion is None else dispersion.double().sum()
        products = torch.stack([u @ u, u @ s, s @ s, difference @ difference, spread])
        self._products = products if self._products is None else self._products + products
        self._counted += 0 if dispersion is None else dispersion.numel()

    def result(self, index: int, group: dict[str, Any]) -> Correction:
        """The report; waits for the device."""
        uu, us, ss, dd, spread = [0.0] * 5 if self._products is None else numbers(self._products)
        return Correction(
            group=index,
            step=self.step,
            cross_fit=group["cross_fit"],
            inverse_correction=group["inverse_correction"],
            relative=math.sqrt(dd / ss) if ss else 0.0,
            cosine=us / math.sqrt(uu * ss) if uu and ss else math.nan,
            dispersion=spread / self._counted if self._counted else math.nan,
        )


class CorrectionRecorder:
    """What corrections did, by parameter group, from the latest step that was recorded.

    Args:
        report_freq: steps between records; 0 for none.
    """

    def __init__(self, report_freq: int) -> None:
        self.report_freq = require_integer("report_freq", report_freq, minimum=0)
        self._sums: dict[int, CorrectionSums] = {}

    def begin(self, index: int, step: int, wanted: Callable[[int, int | None, int], bool]) -> CorrectionSums | None:
        """Return sums for a step of a corrected group, or None if it is not to be recorded.

        Args:
            index: of the group.
            step: 1-based.
            wanted: whether to record a step, given the step, the latest recorded one, and ``report_freq``.
        """
        former = self._sums.get(index)
        if not self.report_freq or not wanted(step, None if former is None else former.step, self.report_freq):
            return None
        self._sums[index] = CorrectionSums(step)
        return self._sums[index]

    def report(self, groups: Sequence[dict[str, Any]]) -> list[Correction]:
        """Return one record per group that has one.

        Raises:
            RuntimeError: if none was recorded yet.
        """
        if not self._sums:
            raise RuntimeError(
                f"no step has been recorded; report_freq={self.report_freq}: every so many steps of a corrected group "
                "are, from its first corrected one on."
            )
        return [self._sums[i].result(i, group) for i, group in enumerate(groups) if i in self._sums]
