"""Advice on the terminal."""

from __future__ import annotations

from dataclasses import replace
from os import PathLike
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from lagless.checkpoints import StrPath
from lagless.lab.pictures._checkpoints import estimate_checkpoints
from lagless.theory import Advice, AveragingProblem, Estimate, Measure, RunEstimate, choose

LIMITS = (
    "Exact for SGD with a constant learning rate on a quadratic with this spectrum, equal noise and equal distance "
    "in all directions. A schedule, momentum, an adaptive optimizer or another loss change it: take the setting as "
    "one to try, and compare it with the live weights on held-out data."
)
_MEASURED = {"loss": "excess loss per direction, ½a(μ̂ − μ*)²", "distance": "squared distance per direction, (μ̂ − μ*)²"}


def advise(
    *,
    steps: int | None,
    curvature_min: float | None = None,
    curvature_max: float | None = None,
    noise: float | None = None,
    distance: float | None = None,
    lr: float | None = None,
    run: StrPath | None = None,
    start: StrPath | None = None,
    measure: Measure = "loss",
    update_freq: int | None = None,
    copies: int = 10,
    seed: int = 0,
    plot: str | PathLike[str] | None = None,
    console: Console | None = None,
) -> Advice:
    """Choose a rule for assumed numbers, or for those estimated from a run's checkpoints, and print why.

    Args:
        steps: the horizon in optimizer steps; None for the last step of ``run``.
        curvature_min: as in :class:`~lagless.theory.AveragingProblem`; these five are all needed without ``run``, and
            replace what is estimated with it (each in units of ``lr``, 1 if not given).
        curvature_max: as there.
        noise: as there.
        distance: as there.
        lr: as there.
        run: a run folder whose checkpoints to estimate from.
        start: the checkpoint that is θ_0.
        measure: what settings are ordered by.
        update_freq: as in :func:`~lagless.theory.choose`.
        copies: as there.
        seed: of the sample of parameters.
        plot: a PNG file to write.
        console: where to print; None for standard output.

    Raises:
        ValueError: if numbers are missing or out of range, or the checkpoints cannot tell.
        ImportError: if ``plot`` is given and matplotlib is missing.
    """
    console = console or Console()
    given: dict[str, Any] = {
        "curvature_min": curvature_min,
        "curvature_max": curvature_max,
        "noise": noise,
        "distance": distance,
        "lr": lr,
    }
    known = {name: value for name, value in given.items() if value is not None}
    if run is None:
        missing = [name for name, value in {**given, "steps": steps}.items() if value is None]
        if missing:
            options = ", ".join(f"--{name.replace('_', '-')}" for name in missing)
            raise ValueError(f"{options}: needed to describe the run; or give --run to estimate from its checkpoints.")
        problem = AveragingProblem(**known, steps=int(steps or 0))
    else:
        estimate = estimate_checkpoints(run, start=start, seed=seed)
        print_estimate(estimate, console)
        estimated = estimate.problem(steps, lr=1.0 if lr is None else lr)
        problem = replace(estimated, **known)
    advice = choose(problem, measure=measure, update_freq=update_freq, copies=copies)
    print_advice(advice, console)
    if plot is not None:
        from lagless.lab.pictures._advice_picture import save_advice  # the only part that needs matplotlib

        console.print(f"plot written to {escape(str(save_advice(advice, plot)))}", highlight=False)
    return advice


def print_estimate(estimate: RunEstimate, console: Console) -> None:
    """Print what the checkpoints say, with standard errors."""
    console.print(
        f"estimated from {estimate.checkpoints} checkpoints (steps {estimate.first_step} to {estimate.last_step}, "
        f"which look stationary) and {estimate.coordinates:,} parameters:",
        highlight=False,
    )
    rows = {
        "slowest rate per step, a_min·lr": estimate.rate_min,
        "fastest rate per step, a_max·lr": estimate.rate_max,
        "noise of one step, lr·σ": estimate.step_noise,
        "distance of θ₀ per parameter": estimate.distance,
    }
    for name, value in rows.items():
        console.print(f"  {name:34} {_with_error(value)}", highlight=False)
    console.print(
        f"  fitted to the fluctuations within {estimate.misfit:.1%}; errors are standard errors between groups of "
        "parameters of this one run",
        highlight=False,
    )
    if estimate.misfit > estimate.sampling_error:
        console.print(
            f"  that is more than the standard errors of the fluctuations, {estimate.sampling_error:.1%}: the run is "
            "not quite SGD on such a quadratic, and the numbers above are less certain than their errors say",
            highlight=False,
        )
    console.print()


def _with_error(value: Estimate) -> str:
    return f"{value.mean:.3g} ± {value.standard_error:.2g}"


def print_advice(advice: Advice, console: Console) -> None:
    """Print the best setting of every family, the recommended one, the calls that make them, and what the advice
    cannot know.
    """
    table = Table(
        title=f"After {advice.problem.steps:,} steps: {_MEASURED[advice.measure]}",
        title_justify="left",
        box=SIMPLE_HEAD,
        padding=(0, 1),
        pad_edge=False,
    )
    table.add_column("best of each family", no_wrap=True)
    for heading in ("copies", "bias²", "variance", "total", "below live"):
        table.add_column(heading, justify="right", no_wrap=True)
    shown = list(advice.best_of_families)
    if advice.recommended not in shown:
        shown.insert(0, advice.recommended)
    for setting in shown:
        risk = advice.risk(setting)
        mark = "bold" if setting is advice.recommended else ""
        times = advice.total(advice.live) / advice.total(setting)
        numbers = (f"{float(value):.3g}" for value in (risk.bias_squared, risk.variance, risk.total))
        table.add_row(setting.family, str(setting.copies), *numbers, f"{times:.2f} ×", style=mark)
    console.print(table, highlight=False)
    for line in findings(advice):
        console.print(line, highlight=False, markup=False, soft_wrap=line.startswith("recommended:"))
    console.print("\nbest of the other families:", highlight=False)
    for setting in shown:
        if setting.rule is not None and setting is not advice.recommended:
            console.print(f"  {setting.name}", highlight=False, markup=False, soft_wrap=True)
    console.print(f"\n{LIMITS}", style="dim", highlight=False)


def findings(advice: Advice) -> list[str]:
    """The recommended setting and what it gains."""
    best = advice.recommended
    if best.rule is None:
        return [f"recommended: no averaging; none of {len(advice.settings) - 1} settings is better by more than 2 %"]
    gain = f"{advice.gain(advice.live):.2f} times lower than that of the live weights"
    if (ema := advice.best_ema) is not None and ema is not best:
        gain += f", {advice.gain(ema):.2f} times lower than that of the best EMA"
    return [
        f"recommended: {best.name}",
        f"its {advice.measure} is {gain} ({len(advice.settings) - 1} settings compared; within 2 % the fewest copies "
        "win)",
    ]
