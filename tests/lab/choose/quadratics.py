"""Runs of SGD on quadratics of many dimensions, and the exact expected loss of averages of their iterates."""

from typing import NamedTuple

import numpy as np


class Quadratic(NamedTuple):
    """θ ← θ - λ_t (a θ + s ξ), with curvatures a spread evenly in log a; the learning rate is in a."""

    slowest: float
    fastest: float
    noise: float
    start: float
    every: int = 25
    decayed: bool = False
    length: int = 1000
    dimension: int = 2048

    @property
    def curvatures(self):
        return np.geomspace(self.slowest, self.fastest, self.dimension)

    @property
    def steps(self):
        return list(range(0, self.length + 1, self.every))

    def rate(self, step):
        return 1.0 - step / self.length if self.decayed else 1.0

    def sample(self, seed):
        """The stored iterates of one run, shape (N, dimension)."""
        generator = np.random.default_rng(seed)
        theta = np.full(self.dimension, self.start)
        rows = [theta]
        for step in range(self.length):
            gradient = self.curvatures * theta + self.noise * generator.standard_normal(self.dimension)
            theta = theta - self.rate(step) * gradient
            if (step + 1) % self.every == 0:
                rows.append(theta)
        return np.array(rows)

    def excess(self, weights):
        """Σ ½ a E(Σ w_i θ_i)² minus that of the last iterate, shape (M,); one curvature stands for 16 neighbours."""
        a = self.curvatures.reshape(-1, 16).mean(axis=1)
        mean, variance, kept = np.full_like(a, self.start), np.zeros_like(a), np.zeros_like(a)
        means, variances, decays = [mean], [variance], [kept]
        for step in range(self.length):
            shrink = 1.0 - self.rate(step) * a
            mean, kept = shrink * mean, kept + np.log(shrink)
            variance = shrink**2 * variance + (self.rate(step) * self.noise) ** 2
            if (step + 1) % self.every == 0:
                for kind, value in ((means, mean), (variances, variance), (decays, kept)):
                    kind.append(value)
        order = np.arange(len(means))
        early, late = np.minimum.outer(order, order), np.maximum.outer(order, order)
        total = np.zeros(len(weights))
        for curvature, m, v, d in zip(a, *(np.array(part).T for part in (means, variances, decays)), strict=True):
            products = np.outer(m, m) + v[early] * np.exp(d[late] - d[early])
            total += 0.5 * curvature * (((weights @ products) * weights).sum(axis=1) - products[-1, -1])
        return 16 * total


def products_of(iterates):
    moved = np.diff(iterates, axis=0)
    return moved @ moved.T
