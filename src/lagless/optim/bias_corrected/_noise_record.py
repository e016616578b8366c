"""The gradient noise scale of a run: of the latest step, and smoothed over steps."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

HALF_LIFE = 50.0  # steps: single ones are too noisy to act on


class NoiseEstimate(NamedTuple):
    """Estimates of |G|² and tr Σ, both unbiased, in the units of the gradients as they were accumulated.

    Attributes:
        signal: |G|², the squared norm of the expected gradient; below 0 where noise hides it.
        noise: tr Σ, the variance of the gradient of one sample, summed over coordinates.
    """

    signal: float
    noise: float

    @property
    def scale(self) -> float:
        """Return B_simple = tr Σ/|G|², in samples; infinity where no signal was found."""
        return self.noise / self.signal if self.signal > 0.0 else math.inf


@dataclass(frozen=True)
class NoiseScale:
    """The gradient noise scale, of all parameters or of a group of them.

    Attributes:
        steps: how many were measured: those with at least two microbatches and finite gradients.
        samples: in the latest of them; the unit of ``noise`` and ``scale``.
        latest: of that step alone.
        smoothed: exponential averages over steps of |G|² and of tr Σ, each by itself, since their ratio is biased.
        group: index of the parameter group; None for all of them together.
        groups: the same of every group that was measured; empty within a group.
    """

    steps: int
    samples: float
    latest: NoiseEstimate
    smoothed: NoiseEstimate
    group: int | None = None
    groups: tuple[NoiseScale, ...] = ()


class NoiseRecord:
    """What steps said about every parameter group, kept on the device until somebody asks.

    Args:
        half_life: steps after which a step counts half.
    """

    def __init__(self, half_life: float = HALF_LIFE) -> None:
        self._gain = -math.expm1(-math.log(2.0) / half_life)
        self._latest: Tensor | None = None  # per group |G|², tr Σ, samples
        self._sums: Tensor | None = None  # per group averages of |G|², tr Σ and 1; and the number of steps

    def add(self, moments: Tensor, samples: Tensor | float) -> None:
        """Take in a step.

        Args:
            moments: |G|² and tr Σ of one sample, shape (groups, 2). A group whose numbers are not finite is left out.
            samples: of the step.
        """
        found = torch.cat(
            [moments, torch.as_tensor(samples, dtype=moments.dtype, device=moments.device).expand(len(moments), 1)],
            dim=1,
        )
        latest, sums = _grown(self._latest, found), _grown(self._sums, moments.new_zeros(len(moments), 4))
        finite = found.isfinite().all(dim=1, keepdim=True)
        ones = torch.ones_like(moments)
        moved = torch.cat([sums[:, :3].lerp(torch.cat([moments, ones[:, :1]], dim=1), self._gain), sums[:, 3:] + 1], 1)
        self._sums, self._latest = torch.where(finite, moved, sums), torch.where(finite, found, latest)

    def result(self) -> NoiseScale:
        """Return the estimates. Waits for the device.

        Raises:
            RuntimeError: if there is none.
        """
        groups = []
        if self._latest is not None and self._sums is not None:
            for i, (latest, sums) in enumerate(zip(self._latest.tolist(), self._sums.tolist(), strict=True)):
                signal, noise, weight, steps = sums
                if steps:
                    smoothed = NoiseEstimate(signal / weight, noise / weight)
                    groups.append(NoiseScale(int(steps), latest[2], NoiseEstimate(*latest[:2]), smoothed, i))
        if not groups:
            raise RuntimeError(
                "no step with at least two microbatches was measured yet, and one says nothing about noise. Accumulate "
                "gradients over several backward() calls made after this was, or train on several data-parallel "
                "processes."
            )
        newest = max(groups, key=lambda group: group.steps)
        latest, smoothed = (_sum([getattr(group, which) for group in groups]) for which in ("latest", "smoothed"))
        return NoiseScale(newest.steps, newest.samples, latest, smoothed, None, tuple(groups))


class MeasuresNoise:
    """What has a record of the gradient noise."""

    _noise: NoiseRecord

    def noise_scale(self) -> NoiseScale:
        """Return the gradient noise scale of the latest step and smoothed over steps, in all and per parameter group.

        Waits for the device. A bias-corrected optimizer has it from the sums that it steps with: groups without any, as
        those in ``exclude``, are left out (put :class:`lagless.GradientNoise` beside it for all of them), the unit is a
        microbatch or that of the microbatches' weights, and loading a state starts the averages again.

        Raises:
            RuntimeError: if no step with two microbatches was seen yet.
        """
        return self._noise.result()


def _grown(tensor: Tensor | None, like: Tensor) -> Tensor:
    """Return ``tensor`` with a row for every group of ``like``; groups may be added to an optimizer."""
    if tensor is None:
        return torch.zeros_like(like)
    return torch.cat([tensor.to(like), like.new_zeros(len(like) - len(tensor), like.shape[1])])


def _sum(parts: Sequence[NoiseEstimate]) -> NoiseEstimate:
    return NoiseEstimate(sum(p.signal for p in parts), sum(p.noise for p in parts))
