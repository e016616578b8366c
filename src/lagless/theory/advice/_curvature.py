"""Curvature and noise of a run, estimated from how its iterates fluctuate once it has settled, and its distance."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, NoReturn

import numpy as np

from lagless.rules import FloatArray
from lagless.theory.advice._advice import AveragingProblem
from lagless.theory.advice._variogram_fit import FASTEST, Fit, fit_spectrum, mean_variance
from lagless.theory.numerics import Estimate
from lagless.theory.trajectories import TrajectoryMoments

LEAST_CHECKPOINTS = 16
COORDINATES = AveragingProblem.coordinates  # the same spectrum is fitted that advice is given for
_STARTS = (0.0, 0.125, 0.25, 0.375, 0.5, 0.625)
_UNSTEADY = 0.05
_UNSTEADY_Z = 4.0
_UNRESOLVED = 0.5
_RELAXATIONS = 6.0
_FORGOTTEN = 5.0
_SEEN = 3.0
_SINGLE = 4.0
_MISFIT = 0.03
_MISFIT_Z = 3.0
_BY_HAND = "give curvature_min, curvature_max and the other numbers yourself, without a run."


@dataclass(frozen=True)
class RunEstimate:
    """What the checkpoints of a run say about its quadratic. Each estimate comes with its standard error.

    Attributes:
        rate_min: a_min·lr, the slowest rate per optimizer step.
        rate_max: a_max·lr, the fastest.
        step_noise: lr·σ, the standard deviation of the noise that one step adds to a coordinate.
        distance: root mean square over coordinates of θ_0 - μ*.
        first_step: where the stationary part begins.
        last_step: where it ends.
        checkpoints: how many it has.
        coordinates: how many coordinates were looked at.
        misfit: root mean square of (observed - fitted)/fitted over the lags of the variogram.
        sampling_error: root mean square of the relative standard errors of the variogram. A misfit far above it says
            that the run is no SGD on such a quadratic; standard errors then mean little.
    """

    rate_min: Estimate
    rate_max: Estimate
    step_noise: Estimate
    distance: Estimate
    first_step: int
    last_step: int
    checkpoints: int
    coordinates: int
    misfit: float
    sampling_error: float

    def problem(self, steps: int | None = None, lr: float = 1.0) -> AveragingProblem:
        """The estimates as a problem for :func:`choose`.

        Args:
            steps: the horizon; None for the last step of the run.
            lr: the learning rate of the run, if curvatures and noise are wanted in units of the loss. It changes no
                ratio between rules.
        """
        return AveragingProblem(
            curvature_min=self.rate_min.mean / lr,
            curvature_max=self.rate_max.mean / lr,
            noise=self.step_noise.mean / lr,
            distance=self.distance.mean,
            lr=lr,
            steps=self.last_step if steps is None else steps,
        )


class _Window(NamedTuple):
    """The last ``length`` iterates, from ``first`` on, ``spacing`` optimizer steps apart."""

    first: int
    length: int
    spacing: int


def estimate_run(moments: TrajectoryMoments) -> RunEstimate:
    """Estimate curvature, noise and distance from a run at constant learning rate that has settled.

    In the stationary part the variogram of the iterates, for a lag of k checkpoints Δ steps apart, is

        D_k = ½ E(θ_{j+k} - θ_j)² = mean_i v_i (1 - ρ_i^{kΔ}),   ρ_i = 1 - r_i,   v_i = s²/(r_i(2 - r_i)),

    averaged over eigen-directions, with rates r_i = lr·a_i and step noise s = lr·σ. The r_i are taken to be spread
    evenly in log r from r_min to r_max, as in :class:`AveragingProblem`, and the three numbers are fitted to D_k over
    lags up to half the stationary part. Differences need no mean to be subtracted, which in a short window would bias
    the rates upwards. The distance is that from θ_0 to the mean of the stationary part, less what is noise in that
    mean.

    What can be known, and from what:

    * rates between about 1/(length of the stationary part) and 3/Δ. A slower direction moves like a random walk, a
      faster one is forgotten between two checkpoints; both only bound the rate, and are refused.
    * the noise alone, if Δ·r is small: then D_1 ≈ ½Δs² whatever the rates are. If Δ·r is large, only the ratio s²/r.
    * the distance only if the run has forgotten θ_0.
    * what a spectrum of this kind with equal noise in all directions would look like. Where noise grows with
      curvature, fast directions count more and the range moves up; where curvatures cluster, its ends mean little.
    * a range too narrow to be told from a single rate (less than two standard errors) is reported as one rate, if at
      the upper limit of its width r_max is below 3/Δ and at most four times r_min; otherwise it is refused. Its
      standard error is that of the single rate, and no bound on the ends of a narrow range.
    * no rates of 1 or more, and no momentum or schedule: refused if the fit ends at 1, or misses the variogram by more
      than 3 % and three times its standard error.

    Rounded checkpoints (bfloat16) add noise of their own, which looks like a fast direction: use float32 ones.
    Standard errors are those between groups of coordinates: they know nothing of other seeds or of misfit.

    Args:
        moments: the trajectory; its first iterate is θ_0.

    Raises:
        ValueError: if there are fewer than 17 checkpoints, unevenly spaced ones, no stationary part, rates beyond
            what the spacing and the length of the run can show, or fluctuations that are not those of such a run.
    """
    squares = moments.squared_differences()
    _require_checkpoints(moments)
    window = _stationary_part(squares, moments.steps)
    lags = _lags(window.length)
    inside = squares[:, window.first :, window.first :]
    observed = np.stack([_variogram(inside, lag) for lag in lags], axis=1)
    fit = fit_spectrum(np.array(lags) * window.spacing, observed, COORDINATES)
    _require_resolved(fit, window)
    return RunEstimate(
        rate_min=fit.rate_min,
        rate_max=fit.rate_max,
        step_noise=fit.step_noise,
        distance=_distance(squares, window, fit),
        first_step=moments.steps[window.first],
        last_step=moments.steps[-1],
        checkpoints=window.length,
        coordinates=moments.coordinates,
        misfit=fit.misfit,
        sampling_error=fit.sampling_error,
    )


def _require_checkpoints(moments: TrajectoryMoments) -> None:
    count = len(moments.steps) - 1
    if count < LEAST_CHECKPOINTS:
        raise ValueError(
            f"{count} checkpoints after θ_0; fluctuations can be told from drift with {LEAST_CHECKPOINTS} or more. "
            f"Store checkpoints more often, or {_BY_HAND}"
        )
    if (spread := set(np.diff(moments.steps[1:]).tolist())) != {moments.steps[2] - moments.steps[1]}:
        raise ValueError(
            f"checkpoints lie {', '.join(map(str, sorted(spread)))} steps apart; the estimator needs one spacing after "
            "θ_0. Choose evenly spaced ones (steps)."
        )


def _stationary_part(squares: FloatArray, steps: list[int]) -> _Window:
    """The longest end of the run in which the variogram of the first half is that of the second."""
    available = len(steps) - 1
    worst = 0.0
    for share in _STARTS:
        first = 1 + int(share * available)
        count = len(steps) - first
        if count < LEAST_CHECKPOINTS:
            break
        excess, steady = _drift(squares[:, first:, first:])
        if steady:
            return _Window(first, count, steps[2] - steps[1])
        worst = excess
    raise ValueError(
        "the run has no stationary part: over its last checkpoints the iterates still move "
        f"{abs(worst):.0%} {'more' if worst > 0 else 'less'} in the first half than in the second. Either it is still "
        "on its way, or its learning rate changes. Train longer at a constant rate, choose checkpoints of such a part "
        f"(steps), or {_BY_HAND}"
    )


def _drift(window: FloatArray) -> tuple[float, bool]:
    """By how much the variogram of the first half exceeds that of the second, and whether that is compatible with 0."""
    half = window.shape[1] // 2
    worst, steady = 0.0, True
    for lag in (1, half // 2):
        early, late = _variogram(window[:, :half, :half], lag), _variogram(window[:, -half:, -half:], lag)
        scale = late.mean()
        if not scale > 0.0:
            raise ValueError("the iterates do not move at all over the last checkpoints: nothing can be estimated.")
        differences = (early - late) / scale
        excess, error = differences.mean(), differences.std(ddof=1) / np.sqrt(len(differences))
        if abs(excess) > _UNSTEADY and abs(excess) > _UNSTEADY_Z * error:
            steady = False
            worst = max(worst, excess, key=abs)
    return float(worst), steady


def _variogram(squares: FloatArray, lag: int) -> FloatArray:
    """½ mean over j of (θ_{j+lag} - θ_j)², shape (groups,)."""
    return 0.5 * np.diagonal(squares, offset=lag, axis1=1, axis2=2).mean(axis=1)


def _lags(count: int) -> list[int]:
    return sorted({int(round(lag)) for lag in np.geomspace(1, count // 2, 12)})


def _require_resolved(fit: Fit, window: _Window) -> None:
    span = window.length * window.spacing
    slow, fast = (end.standard_error / end.mean for end in (fit.rate_min, fit.rate_max))
    _require_fit(fit, window)
    forgotten = fit.rate_max.mean * window.spacing > _FORGOTTEN
    if not forgotten and (fit.rate_min.mean * span < _RELAXATIONS or not slow < _UNRESOLVED):
        raise ValueError(
            f"the slowest direction cannot be seen: in the {span} steps that look stationary it moves like a random "
            f"walk (estimated rate {fit.rate_min.mean:.2g} per step, relative error {slow:.2g}). Train longer, or "
            f"{_BY_HAND}"
        )
    if forgotten or not fast < _UNRESOLVED:
        _refuse_fastest(window, f"estimated rate {fit.rate_max.mean:.2g} per step, relative error {fast:.2g}")
    single = fit.rate_min.mean == fit.rate_max.mean
    if single and (fit.fastest * window.spacing > _SEEN or fit.widest > _SINGLE):
        _refuse_fastest(
            window,
            f"one rate of {fit.rate_min.mean:.2g} per step fits, and so does a range up to "
            + (f"{fit.fastest:.2g}" if fit.fastest < 0.95 * FASTEST else "1"),
        )


def _require_fit(fit: Fit, window: _Window) -> None:
    if fit.misfit > _MISFIT and fit.misfit > _MISFIT_Z * fit.sampling_error:
        raise ValueError(
            f"the fluctuations are not those of SGD on a quadratic: the best fit misses them by {fit.misfit:.1%}, with "
            f"standard errors of {fit.sampling_error:.1%}; at most {_MISFIT:.0%} is accepted. Momentum, a learning "
            f"rate that changes, rates above 1 per step, or rounded checkpoints do that. Choose checkpoints of a part "
            f"without them (steps), or {_BY_HAND}"
        )
    if fit.bounded and window.spacing > _SEEN:
        _refuse_fastest(window, "any rate up to 1 per step fits")
    if fit.bounded:
        raise ValueError(
            "the fastest direction moves by all of its distance or more in one step (a rate of 1 or above); the "
            f"estimator knows rates below 1. Lower the learning rate, or {_BY_HAND}"
        )


def _refuse_fastest(window: _Window, found: str) -> NoReturn:
    raise ValueError(
        f"the fastest direction cannot be seen: with {window.spacing} steps between two checkpoints it is forgotten "
        f"from one to the next, or lost in noise ({found}). Store checkpoints more often, look at more parameters, or "
        f"{_BY_HAND}"
    )


def _distance(squares: FloatArray, window: _Window, fit: Fit) -> Estimate:
    """Root of mean over coordinates of (θ_0 - θ̄)² - Var(θ̄)."""
    to_start = squares[:, 0, window.first :].mean(axis=1)
    within = squares[:, window.first :, window.first :].mean(axis=(1, 2))
    groups = to_start - 0.5 * within
    squared = groups.mean() - mean_variance(fit, window.length, window.spacing, COORDINATES)
    error = groups.std(ddof=1) / np.sqrt(len(groups))
    root = float(np.sqrt(max(squared, 0.0)))
    # Where the square is within its error of 0, so is the root, and the error of a root is the root of the error.
    return Estimate(root, float(error / (2.0 * root) if squared > error else np.sqrt(error)))
