"""Preconditioners that avoid finite-sample bias, and the bias of those that do not."""

from lagless.theory.preconditioning._bias import (
    GradientLaw as GradientLaw,
    PreconditionerBias as PreconditionerBias,
    one_step_bias as one_step_bias,
    stationary_bias as stationary_bias,
)
from lagless.theory.preconditioning._expansions import (
    FirstOrderAdam as FirstOrderAdam,
    FullHistoryAdam as FullHistoryAdam,
    InvertedAdam as InvertedAdam,
)
from lagless.theory.preconditioning._preconditioners import (
    AdamEstimator as AdamEstimator,
    UpdateEstimator as UpdateEstimator,
)
