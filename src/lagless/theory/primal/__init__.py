"""Gradients between the iterate and its average, on noisy quadratics: exact moments, stability, the best gains."""

from lagless.theory.primal._best import (
    BestPrimalAveraging as BestPrimalAveraging,
    best_primal_averaging as best_primal_averaging,
)
from lagless.theory.primal._recursion import PrimalRecursion as PrimalRecursion
from lagless.theory.primal._rules import PrimalMoments as PrimalMoments, primal_moments as primal_moments
from lagless.theory.primal._stability import largest_stable_rate as largest_stable_rate
from lagless.theory.primal._twin import plain_twin as plain_twin
