"""The data of the quadratic figures of arXiv 2508.00180, made with the product's own rules."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from lagless.filters import FloatArray
from lagless.rules import BEMA, DEMA, EMA, OUEMA, Rule, UniformAverage
from lagless.theory._estimators import MaximumLikelihood
from lagless.theory._process import OrnsteinUhlenbeck
from lagless.theory._risk import Risk
from lagless.theory._sampled import SampledRisk, averages_along, sampled_risks

FIGURE_2_RULES: Mapping[str, Rule] = {
    "last iterate": EMA(ema_power=0.0),
    "EMA": EMA(ema_power=1.0),
    "EMA κ=0.5": EMA(ema_power=0.5),
    "uniform average": UniformAverage(),
    "DEMA": DEMA(ema_power=1.0, update_freq=1),
    "OUEMA": OUEMA(ema_power=1.0, bias_power=0.2, update_freq=1),
    "OUEMA η=0.3": OUEMA(ema_power=1.0, bias_power=0.3, update_freq=1),
    "BEMA": BEMA(ema_power=1.0, bias_power=0.2, update_freq=1),
    "BEMA η=0.3": BEMA(ema_power=1.0, bias_power=0.3, update_freq=1),
    "BEMA κ=0.5": BEMA(ema_power=0.5, bias_power=0.4, update_freq=1),
}


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


def figure_1(*, steps: int = 400, seed: int = 0) -> dict[str, FloatArray]:
    """One path in two dimensions with μ* = 0: the iterate, its EMA and its BEMA, each of shape (steps + 1, 2).

    The noise is large against the pull, so the iterate never settles; the EMA trails; BEMA does neither.

    Reference:
        Block and Zhang, arXiv 2508.00180, Fig. 1(a), whose settings are not given.
    """
    process = OrnsteinUhlenbeck(np.diag([1.0, 2.0]), mu=0.0, theta0=np.array([4.0, 3.0]), eta=0.01, Sigma=4.0)
    path = process.sample(1, process.eta * np.arange(steps + 1), seed=seed)[0]
    rules = {"EMA": EMA(ema_power=1.0), "BEMA": BEMA(ema_power=1.0, bias_power=0.2, update_freq=1)}
    return {"iterate": path.numpy()} | {
        name: value.numpy() for name, value in averages_along(rules, path, steps).items()
    }


def figure_2(
    *, steps: int = 2000, paths: int = 1000, seed: int = 0, device: str | torch.device = "cpu", progress: bool = False
) -> DistanceCurves:
    """Expected squared distance from μ* in d = 20, A = I, for ten rules.

    The paper does not give its noise, step and horizon; here Σ = I, η = 0.003, ||μ* - θ_0||² = 20 and T = 6.

    Reference:
        Block and Zhang, arXiv 2508.00180, Fig. 2 and 14(a).
    """
    process = OrnsteinUhlenbeck(np.eye(20), mu=0.0, theta0=1.0, eta=0.003, Sigma=1.0)
    return distance_curves(
        process, FIGURE_2_RULES, steps=steps, paths=paths, seed=seed, device=device, progress=progress
    )
