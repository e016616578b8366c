"""The quadratic laboratory: exact risks, bounds and sampled paths in the Ornstein-Uhlenbeck model of training."""

from lagless.theory._advice import (
    Advice as Advice,
    AveragingProblem as AveragingProblem,
    Measure as Measure,
    Setting as Setting,
    choose as choose,
    risk_curve as risk_curve,
)
from lagless.theory._bounds import (
    commuting_plug_in_upper_bound as commuting_plug_in_upper_bound,
    cramer_rao as cramer_rao,
    fisher_information as fisher_information,
    flat_average_lower_bound as flat_average_lower_bound,
    flat_average_upper_bound as flat_average_upper_bound,
    last_iterate_upper_bound as last_iterate_upper_bound,
    ou_flat_average_upper_bound as ou_flat_average_upper_bound,
    plug_in_upper_bound as plug_in_upper_bound,
)
from lagless.theory._control import (
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
from lagless.theory._control_cost import ControlCost as ControlCost, control_cost as control_cost
from lagless.theory._convex import ConvexGuarantee as ConvexGuarantee, absolute_value_gap as absolute_value_gap
from lagless.theory._curvature import RunEstimate as RunEstimate, estimate_run as estimate_run
from lagless.theory._discrete import QuadraticAdamW as QuadraticAdamW, QuadraticSGD as QuadraticSGD
from lagless.theory._distance_curves import DistanceCurves as DistanceCurves, distance_curves as distance_curves
from lagless.theory._errata import Slip as Slip, slips as slips
from lagless.theory._estimate import Estimate as Estimate
from lagless.theory._estimators import (
    Estimator as Estimator,
    FlatAverage as FlatAverage,
    LastIterate as LastIterate,
    MaximumLikelihood as MaximumLikelihood,
    OUFlatAverage as OUFlatAverage,
    PlugInMaximumLikelihood as PlugInMaximumLikelihood,
    debiased as debiased,
)
from lagless.theory._expansions import (
    FirstOrderAdam as FirstOrderAdam,
    FullHistoryAdam as FullHistoryAdam,
    InvertedAdam as InvertedAdam,
)
from lagless.theory._gauss_markov import GaussMarkov as GaussMarkov
from lagless.theory._likelihood import log_likelihood as log_likelihood
from lagless.theory._matched import (
    SpectrumComparison as SpectrumComparison,
    compare_over_spectrum as compare_over_spectrum,
    matched_ema as matched_ema,
    slowed_sgd as slowed_sgd,
)
from lagless.theory._preconditioner_bias import (
    GradientLaw as GradientLaw,
    PreconditionerBias as PreconditionerBias,
    one_step_bias as one_step_bias,
    stationary_bias as stationary_bias,
)
from lagless.theory._preconditioners import AdamEstimator as AdamEstimator, UpdateEstimator as UpdateEstimator
from lagless.theory._process import OrnsteinUhlenbeck as OrnsteinUhlenbeck
from lagless.theory._pull import (
    PullRecursion as PullRecursion,
    full_pull_improvement as full_pull_improvement,
    largest_stable_gain as largest_stable_gain,
    optimal_gain as optimal_gain,
)
from lagless.theory._pulled_sgd import (
    hidden_iterate as hidden_iterate,
    pulled_sgd as pulled_sgd,
    simulate_recursion as simulate_recursion,
)
from lagless.theory._risk import Risk as Risk
from lagless.theory._rule_grid import default_rules as default_rules
from lagless.theory._sampled import (
    SampledRisk as SampledRisk,
    averages_along as averages_along,
    sampled_estimates as sampled_estimates,
    sampled_risks as sampled_risks,
)
from lagless.theory._statements import Check as Check, check_statements as check_statements
from lagless.theory._trajectory_moments import TrajectoryMoments as TrajectoryMoments, moments_of as moments_of
