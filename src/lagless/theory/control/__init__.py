"""PACE as control: the pull toward the average, its costs, matched alternatives and convex guarantees."""

from lagless.theory.control._control import (
    Control as Control,
    ControlProblem as ControlProblem,
    Riccati as Riccati,
    certainty_equivalent_control as certainty_equivalent_control,
    early_gain as early_gain,
    no_control as no_control,
    oracle_control as oracle_control,
    plug_in_control as plug_in_control,
    posterior_mean as posterior_mean,
    posterior_variance as posterior_variance,
    practical_control as practical_control,
    relaxed_early_gain as relaxed_early_gain,
    relaxed_gain as relaxed_gain,
    riccati as riccati,
)
from lagless.theory.control._control_cost import ControlCost as ControlCost, control_cost as control_cost
from lagless.theory.control._convex import ConvexGuarantee as ConvexGuarantee, absolute_value_gap as absolute_value_gap
from lagless.theory.control._matched import (
    SpectrumComparison as SpectrumComparison,
    compare_over_spectrum as compare_over_spectrum,
    matched_ema as matched_ema,
    slowed_sgd as slowed_sgd,
)
from lagless.theory.control._pull import (
    PullRecursion as PullRecursion,
    full_pull_improvement as full_pull_improvement,
    largest_stable_gain as largest_stable_gain,
    optimal_gain as optimal_gain,
)
from lagless.theory.control._pulled_sgd import (
    hidden_iterate as hidden_iterate,
    pulled_sgd as pulled_sgd,
    simulate_recursion as simulate_recursion,
)
