"""Models of training, the exact risks of averaging rules and estimators in them, bounds, and moments along a run."""

from lagless.theory.trajectories._bounds import (
    commuting_plug_in_upper_bound as commuting_plug_in_upper_bound,
    cramer_rao as cramer_rao,
    fisher_information as fisher_information,
    flat_average_lower_bound as flat_average_lower_bound,
    flat_average_upper_bound as flat_average_upper_bound,
    last_iterate_upper_bound as last_iterate_upper_bound,
    ou_flat_average_upper_bound as ou_flat_average_upper_bound,
    plug_in_upper_bound as plug_in_upper_bound,
)
from lagless.theory.trajectories._discrete import QuadraticAdamW as QuadraticAdamW, QuadraticSGD as QuadraticSGD
from lagless.theory.trajectories._distance_curves import (
    DistanceCurves as DistanceCurves,
    distance_curves as distance_curves,
)
from lagless.theory.trajectories._errata import Slip as Slip, slips as slips
from lagless.theory.trajectories._estimators import (
    Estimator as Estimator,
    FlatAverage as FlatAverage,
    LastIterate as LastIterate,
    MaximumLikelihood as MaximumLikelihood,
    OUFlatAverage as OUFlatAverage,
    PlugInMaximumLikelihood as PlugInMaximumLikelihood,
    debiased as debiased,
)
from lagless.theory.trajectories._gauss_markov import GaussMarkov as GaussMarkov
from lagless.theory.trajectories._likelihood import log_likelihood as log_likelihood
from lagless.theory.trajectories._process import OrnsteinUhlenbeck as OrnsteinUhlenbeck
from lagless.theory.trajectories._risk import Risk as Risk
from lagless.theory.trajectories._sampled import (
    SampledRisk as SampledRisk,
    averages_along as averages_along,
    sampled_estimates as sampled_estimates,
    sampled_risks as sampled_risks,
)
from lagless.theory.trajectories._statements import Check as Check, check_statements as check_statements
from lagless.theory.trajectories._trajectory_moments import (
    TrajectoryMoments as TrajectoryMoments,
    moments_of as moments_of,
)
