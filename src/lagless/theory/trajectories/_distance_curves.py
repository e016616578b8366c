"""The data of the quadratic figures of arXiv 2508.00180, made with the product's own rules."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from lagless.rules import FloatArray, Rule
from lagless.theory.trajectories._estimators import MaximumLikelihood
from lagless.theory.trajectories._process import OrnsteinUhlenbeck
from lagless.theory.trajectories._risk import Risk
from lagless.theory.trajectories._sampled import SampledRisk, sampled_risks


@dataclass(frozen=True)
class DistanceCurves:
    """E||μ̂ - μ*||² against time, exact and sampled.

    Attributes:
        steps: shape (n,), the optimizer steps of the points.
        times: shape (n,), t at those steps.
        exact: rule name → risk, arrays of shape (n,).
        sampled: rule name → Monte-Carlo estimate of the same.
        optimum: shape (n,), the risk of the maximum likelihood estimator, which no unbiased one can beat.
    """

    steps: FloatArray
    times: FloatArray
    exact: Mapping[str, Risk]
    sampled: Mapping[str, SampledRisk]
    optimum: FloatArray

    def largest_z(self) -> float:
        """The largest |sampled - exact|/standard error over all rules and points."""
        return max(float(np.abs(self.sampled[name].z(risk.total)).max()) for name, risk in self.exact.items())


def distance_curves(
    process: OrnsteinUhlenbeck,
    rules: Mapping[str, Rule],
    *,
    steps: int,
    dt: float | None = None,
    at: Sequence[int] | None = None,
    paths: int = 1000,
    seed: int = 0,
    device: str | torch.device = "cpu",
    progress: bool = False,
) -> DistanceCurves:
    """Exact and sampled curves of many rules on one process.

    Args:
        process: the process.
        rules: name → rule.
        steps: how many optimizer steps.
        dt: time per step; default the process's η.
        at: steps at which rules are read; default every step but 0.
        paths: how many sampled trajectories.
        seed: of the paths.
        device: where the paths live.
        progress: show a progress bar.
    """
    where = list(range(1, steps + 1)) if at is None else list(at)
    times = process.step_time(dt) * np.array(where, dtype=np.float64)
    return DistanceCurves(
        np.array(where, dtype=np.float64),
        times,
        process.risks(rules, steps=steps, dt=dt, at=where),
        sampled_risks(
            process, rules, steps=steps, dt=dt, at=where, paths=paths, seed=seed, device=device, progress=progress
        ),
        np.array([float(process.risk(MaximumLikelihood(), horizon=float(t)).total) for t in times]),
    )
