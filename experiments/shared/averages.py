"""Averages of a run as weights on its stored iterates, by family and setting."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from lagless import (
    BEMA,
    DEMA,
    EMA,
    OUEMA,
    DecayAverage,
    Rule,
    effective_iterates,
    mean_age,
    trajectory_weights,
    weight_on_start,
)

KAPPAS, ETAS, PHIS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6), (0.1, 0.2, 0.4, 0.8), (100, 200, 400)
FRACTIONS, SHARES = (0.02, 0.05, 0.1, 0.2, 0.3, 0.5), (0.25, 0.5, 1.0)
TAILS = (0.05, 0.1, 0.2, 0.4)

Setting = Mapping[str, float]


@dataclass(frozen=True)
class Average:
    """One way of averaging the stored iterates of a run.

    Attributes:
        family: which rule or kind of rule.
        setting: its arguments.
        weights: shape (iterates,), summing to 1.
        gamma: γ, the multiplier of the power clock; None for rules without one.
    """

    family: str
    setting: Setting
    weights: np.ndarray
    gamma: float | None = None

    @property
    def name(self) -> str:
        """Unique among the averages of a run."""
        return " ".join([self.family, *(f"{key}={value:g}" for key, value in self.setting.items())])

    def summary(self, steps: Sequence[int]) -> dict[str, float]:
        """Return the weight on θ_0, mean age / T, effective iterates and the clock."""
        found: dict[str, float] = {
            "theta_0": round(weight_on_start(self.weights), 4),
            "age": round(mean_age(self.weights, steps) / steps[-1], 4),
            "iterates": round(effective_iterates(self.weights), 2),
            "T": int(steps[-1]),
        }
        return found if self.gamma is None else {**found, "gamma": self.gamma, "phi": self.setting["phi"]}


def power_rules(steps: Sequence[int]) -> Iterator[Average]:
    """Yield the rules of the power clock: EMA, BEMA, OUEMA and DEMA over κ, η, φ, and burn-in and virtual age."""

    def average(family: str, rule: Rule, **setting: float) -> Average:
        return Average(family, setting, trajectory_weights(rule, steps), 1.0)

    for phi in PHIS:
        for kappa in KAPPAS:
            yield average("ema", EMA(ema_power=kappa, update_freq=phi), kappa=kappa, phi=phi)
            for eta in ETAS:
                rule = BEMA(ema_power=kappa, bias_power=eta, update_freq=phi)
                yield average("bema", rule, kappa=kappa, eta=eta, phi=phi)
    for kappa in (0.2, 0.5):
        for tau, rho in ((800, 10), (1600, 10), (0, 1), (0, 100), (0, 1000)):
            setting = {"kappa": kappa, "phi": 400, "tau": tau, "rho": rho}
            same = {"ema_power": kappa, "update_after": tau, "lag": float(rho), "update_freq": 400}
            yield average("ema-clock", EMA(**same), **setting)
            yield average("bema-clock", BEMA(bias_power=0.2, **same), eta=0.2, **setting)
    for phi in (100, 400):
        for kappa in (0.2, 0.3, 0.5):
            for eta in (0.2, 0.4):
                rule = OUEMA(ema_power=kappa, bias_power=eta, update_freq=phi)
                yield average("ouema", rule, kappa=kappa, eta=eta, phi=phi)
        for kappa in KAPPAS[1:]:
            yield average("dema", DEMA(ema_power=kappa, update_freq=phi), kappa=kappa, phi=phi)


def scale_free_rules(steps: Sequence[int]) -> Iterator[Average]:
    """Yield the rules that mean the same on a run of any length: widths and tails that are shares of the run."""
    every, total = steps[1] - steps[0], steps[-1]

    def average(family: str, rule: Rule, **setting: float) -> Average:
        return Average(family, setting, trajectory_weights(rule, steps))

    for f in FRACTIONS:
        width = {"half_life_fraction": f, "update_freq": every}
        yield average("ema-f", EMA(**width), f=f)
        for c in SHARES:
            yield average("bema-f", BEMA(correction=c, anchor="start", **width), f=f, c=c)
            yield average("slow-bema-f", BEMA(correction=c, anchor="slow", **width), f=f, c=c)
        yield average("dema-f", DEMA(**width), f=f)
    for share in TAILS:
        duration = round(share * (len(steps) - 1)) * every
        for family, shape in (("tail", "linear"), ("sqrt-decay", "minus-sqrt")):
            rule = DecayAverage(shape=shape, duration=duration, total_steps=total, update_freq=every)
            yield average(family, rule, share=share)


def endpoints(steps: Sequence[int]) -> list[Average]:
    """Return the live weights and the initial ones as averages."""
    live, start = np.zeros(len(steps)), np.zeros(len(steps))
    live[-1] = start[0] = 1.0
    return [Average("live", {}, live), Average("start", {}, start)]
