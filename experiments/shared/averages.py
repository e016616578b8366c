"""Averages of a run as weights on its stored iterates, by family and setting."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from lagless import BEMA, DEMA, EMA, OUEMA, Rule, effective_iterates, mean_age, trajectory_weights, weight_on_start

KAPPAS, ETAS, PHIS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6), (0.1, 0.2, 0.4, 0.8), (100, 200, 400)
FRACTIONS, SHARES = (0.02, 0.05, 0.1, 0.2, 0.3, 0.5), (0.25, 0.5, 1.0)
SLOWER = 3.0  # width of the slow anchor in widths of the EMA
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


def profile_weights(fraction: float, steps: Sequence[int]) -> np.ndarray:
    """Return the weights of the EMA whose half-life is a fraction f of the run, at any width f > 0.

    w_i = (t_i^p − t_{i−1}^p) / T^p with p = ln 2 / f; θ_0, at t = 0, has none.
    """
    u = (np.asarray(steps, dtype=np.float64) / steps[-1]) ** (math.log(2.0) / fraction)
    return np.diff(u, prepend=0.0)


def double_profile_weights(fraction: float, steps: Sequence[int]) -> np.ndarray:
    """Return the weights of DEMA, 2 e1 − e2, with the gains β_t = 1 − (t'/t)^p of that EMA."""
    p = math.log(2.0) / fraction
    first, second = np.zeros(len(steps)), np.zeros(len(steps))
    first[0] = second[0] = 1.0
    for i in range(1, len(steps)):
        beta = 1.0 - (steps[i - 1] / steps[i]) ** p
        first *= 1.0 - beta
        first[i] += beta
        second += beta * (first - second)
    return 2.0 * first - second


def relative_lag(fraction: float) -> float:
    """Return the mean age of that EMA as a share of the run, 1/(p + 1), on a dense grid of updates."""
    return 1.0 / (math.log(2.0) / fraction + 1.0)


def scale_free_rules(steps: Sequence[int]) -> Iterator[Average]:
    """Yield the rules that mean the same on a run of any length: widths and tails that are shares of the run."""
    count = len(steps)
    live, start = (average.weights for average in endpoints(steps))
    for f in FRACTIONS:
        ema = profile_weights(f, steps)
        slow = profile_weights(SLOWER * f, steps)
        yield Average("ema-f", {"f": f}, ema)
        for c in SHARES:
            # α (live − anchor) makes the average younger by α times the age of the anchor, which is to be c of its lag.
            removed = c * relative_lag(f)
            yield Average("bema-f", {"f": f, "c": c}, ema + removed * (live - start))
            alpha = removed / relative_lag(SLOWER * f)
            yield Average("slow-bema-f", {"f": f, "c": c}, ema + alpha * (live - slow))
        yield Average("dema-f", {"f": f}, double_profile_weights(f, steps))
    for share in TAILS:
        length = round(share * (count - 1))
        weights = np.zeros(count)
        weights[-length:] = 1.0 / length
        yield Average("tail", {"share": share}, weights)
        # A multiplier of the learning rate 1 − √u over the tail; the weights are its falls.
        weights = np.zeros(count)
        weights[-length:] = np.diff(np.sqrt(np.arange(length + 1) / length))
        yield Average("sqrt-decay", {"share": share}, weights)


def endpoints(steps: Sequence[int]) -> list[Average]:
    """Return the live weights and the initial ones as averages."""
    live, start = np.zeros(len(steps)), np.zeros(len(steps))
    live[-1] = start[0] = 1.0
    return [Average("live", {}, live), Average("start", {}, start)]
