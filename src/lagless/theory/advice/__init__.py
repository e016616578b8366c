"""Choose an averaging rule from the curvature and noise of a run, given or estimated."""

from lagless.theory.advice._advice import (
    Advice as Advice,
    AveragingProblem as AveragingProblem,
    Measure as Measure,
    Setting as Setting,
    choose as choose,
    risk_curve as risk_curve,
)
from lagless.theory.advice._curvature import RunEstimate as RunEstimate, estimate_run as estimate_run
from lagless.theory.advice._rule_grid import default_rules as default_rules
