"""The statements of the BEMA paper on random processes, its risks against sampled ones, and its slips."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from lagless.rules import FloatArray
from lagless.theory import (
    Check,
    Estimator,
    FlatAverage,
    LastIterate,
    MaximumLikelihood,
    OrnsteinUhlenbeck,
    OUFlatAverage,
    PlugInMaximumLikelihood,
    SampledRisk,
    Slip,
    check_statements,
    sampled_estimates,
    slips,
)

_HORIZON, _TAU, _GUESS = 3.0, 0.5, 1.1
_TEXTBOOK = OrnsteinUhlenbeck(A=0.7, mu=1.3, theta0=-2.0, eta=0.25, Sigma=1.5)
_TEXTBOOK_WORDS = "A = 0.7, μ* = 1.3, θ_0 = -2, η = 0.25, Σ = 1.5, T = 3"
_LARGEST_Z = 5.0


def print_statements(
    *, dimension: int = 4, seed: int = 0, instances: int = 100, console: Console | None = None
) -> list[Check]:
    """Check every statement on random processes, print the worst case of each, then sampled risks and the slips.

    Args:
        dimension: d of the processes, with random A, Σ, μ*, θ_0, η and T; every other one has Σ = σI.
        seed: of the processes and of the sampled paths.
        instances: how many processes, ≥ 2.
        console: where to print; None for standard output.

    Returns:
        The statements on every process, corrected where the printed one does not hold.

    Raises:
        ValueError: if an argument is out of range, a statement does not hold, or a sampled risk is further than five
            standard errors from the exact one.
    """
    if dimension < 1:
        raise ValueError(f"dimension={dimension}; it must be an integer >= 1.")
    if seed < 0:
        raise ValueError(f"seed={seed}; it must be an integer >= 0.")
    if instances < 2:
        raise ValueError(f"instances={instances}; it must be an integer >= 2.")
    console = console or Console()
    random = np.random.default_rng(seed)
    checks = [check for index in range(instances) for check in _random_checks(random, dimension, index % 2 == 1)]
    _print_checks(checks, dimension, instances, console)

    general = OrnsteinUhlenbeck(
        A=_positive_definite(random, dimension),
        mu=random.standard_normal(dimension),
        theta0=random.standard_normal(dimension),
        eta=0.25,
        Sigma=_positive_definite(random, dimension),
    )
    console.print(
        "Monte Carlo: E‖μ̂ - μ*‖² exact, and on sampled paths (z = difference / s.e.)", style="bold", highlight=False
    )
    off = _print_sampled(_TEXTBOOK, _TEXTBOOK_WORDS, seed, console)
    off += _print_sampled(general, f"random A and Σ, d = {dimension}, T = {_HORIZON:g}", seed, console)

    console.print("Slips of arXiv 2508.00180: as printed → as it should be, for", style="bold", highlight=False)
    console.print(_TEXTBOOK_WORDS, highlight=False)
    for slip in slips(_TEXTBOOK, _HORIZON, tau=_TAU, guess=_GUESS):
        _print_slip(slip, console)
    if broken := sorted({check.number for check in checks if not check.holds}) + off:
        raise ValueError(f"{', '.join(broken)}: does not hold; please report dimension and seed.")
    return checks


def _random_checks(random: np.random.Generator, dimension: int, isotropic: bool) -> list[Check]:
    process = OrnsteinUhlenbeck(
        A=_positive_definite(random, dimension),
        mu=random.standard_normal(dimension),
        theta0=random.standard_normal(dimension) * 10.0 ** random.uniform(-2.0, 1.0),
        eta=10.0 ** random.uniform(-3.0, 0.0),
        Sigma=random.uniform(0.2, 2.0) if isotropic else _positive_definite(random, dimension),
    )
    horizon = 10.0 ** random.uniform(-1.5, 1.5)
    # Half of the guesses with Σ = σI commute with A, for the sharper bound of Theorem 5.
    commuting = random.random() < 0.5
    guess = random.uniform(0.2, 3.0) if commuting else _positive_definite(random, dimension)
    return check_statements(process, horizon, tau=horizon * random.uniform(0.05, 0.95), guess=guess)


def _print_checks(checks: Iterable[Check], dimension: int, instances: int, console: Console) -> None:
    """Each statement once, with its worst case."""
    groups: dict[tuple[str, str], list[Check]] = {}
    for check in checks:
        groups.setdefault((check.number, check.claim), []).append(check)
    console.print(
        f"Statements on {instances} random processes, d = {dimension}, every other one with Σ = σI.",
        style="bold",
        highlight=False,
    )
    for relation, words in (
        ("=", "Equalities: largest error, relative to the larger side"),
        ("<=", "Inequalities: smallest slack, likewise; 0 where equality is reached"),
    ):
        table = _table(words)
        table.add_column("number", max_width=15)
        table.add_column("claim", overflow="fold")
        table.add_column("cases", justify="right", no_wrap=True)
        table.add_column("error" if relation == "=" else "slack", justify="right", no_wrap=True)
        table.add_column("holds", no_wrap=True)
        for (number, claim), found in groups.items():
            if found[0].relation == relation:
                slack = [check.slack for check in found]
                worst = max(map(abs, slack)) if relation == "=" else min(slack)
                shown = "0" if relation == "<=" and abs(worst) <= 1e-12 else f"{worst:.1e}"
                verdict = "all" if all(check.holds for check in found) else "NO"
                table.add_row(Text(number), Text(claim), str(len(found)), shown, verdict)
        console.print(table, highlight=False)


def _print_sampled(process: OrnsteinUhlenbeck, title: str, seed: int, console: Console) -> list[str]:
    """Exact and sampled risks; returns the names of those that disagree."""
    estimators: Mapping[str, Estimator] = {
        "last iterate": LastIterate(),
        "flat average": FlatAverage(),
        f"OUEMA, τ = {_TAU:g}": OUFlatAverage(_TAU),
        "MLE": MaximumLikelihood(),
        f"plug-in MLE, Ã = {_GUESS:g} I": PlugInMaximumLikelihood(_GUESS),
    }
    paths = max(500, 40_000 // process.dimension)
    found = sampled_estimates(process, estimators, np.linspace(0.0, _HORIZON, 241), paths=paths, seed=seed)
    table = _table(f"{title}, {paths:,} paths")
    table.add_column("estimator", no_wrap=True)
    for column in ("exact", "sampled", "s.e.", "z"):
        table.add_column(column, justify="right", no_wrap=True)
    off: list[str] = []
    for name, estimator in estimators.items():
        exact, sampled = float(process.risk(estimator, horizon=_HORIZON).total), found[name]
        z = _add_sampled(table, name, exact, sampled)
        if not abs(z) < _LARGEST_Z:
            off.append(f"sampled risk of {name}")
    console.print(table, highlight=False)
    return off


def _add_sampled(table: Table, name: str, exact: float, sampled: SampledRisk) -> float:
    z = float(sampled.z(exact))
    values: Sequence[str] = (f"{exact:.4f}", f"{sampled.total:.4f}", f"± {sampled.standard_error:.4f}", f"{z:+.2f}")
    table.add_row(Text(name), *values)
    return z


def _print_slip(slip: Slip, console: Console) -> None:
    heading = Text.assemble((f"{slip.where}: ", "bold"), slip.what)
    console.print(Padding(heading, (1, 0, 0, 0)), highlight=False, soft_wrap=False)
    values = Text(f"{slip.quantity}: {slip.printed:.4f} → {slip.right:.4f}")
    console.print(Padding(values, (0, 0, 0, 4)), highlight=False, soft_wrap=False)


def _table(title: str) -> Table:
    return Table(title=Text(title), title_justify="left", box=SIMPLE_HEAD, pad_edge=False)


def _positive_definite(random: np.random.Generator, dimension: int) -> FloatArray:
    factor = random.standard_normal((dimension, dimension)) / np.sqrt(dimension)
    return factor @ factor.T + 0.3 * np.eye(dimension)
