"""The statements of the BEMA paper on one random process, as a table."""

from __future__ import annotations

import numpy as np
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from lagless.filters import FloatArray
from lagless.theory import Check, OrnsteinUhlenbeck, Slip, check_statements, slips

_HORIZON = 3.0


def print_statements(*, dimension: int = 4, seed: int = 0, console: Console | None = None) -> list[Check]:
    """Check every statement on a random process, print both sides of each, then the slips of the paper.

    Args:
        dimension: d of the process, with random A, Σ, μ* and θ_0.
        seed: of the process.
        console: where to print; None for standard output.

    Returns:
        The statements, corrected where the printed one does not hold.

    Raises:
        ValueError: if ``dimension`` or ``seed`` is out of range, or a statement does not hold.
    """
    if dimension < 1:
        raise ValueError(f"dimension={dimension}; it must be an integer >= 1.")
    if seed < 0:
        raise ValueError(f"seed={seed}; it must be an integer >= 0.")
    console = console or Console()
    random = np.random.default_rng(seed)
    process = OrnsteinUhlenbeck(
        A=_positive_definite(random, dimension),
        mu=random.standard_normal(dimension),
        theta0=random.standard_normal(dimension),
        eta=0.25,
        Sigma=_positive_definite(random, dimension),
    )
    isotropic = OrnsteinUhlenbeck(process.A, process.mu, process.theta0, eta=0.25, Sigma=1.5)
    checks: list[Check] = []
    for title, instance in (("random A and Σ", process), ("random A, Σ = 1.5 I", isotropic)):
        found = check_statements(instance, _HORIZON)
        console.print(_checks_table(found, f"Statements, {title}, d = {dimension}, T = {_HORIZON:g}"), highlight=False)
        checks += found
    textbook = OrnsteinUhlenbeck(A=0.7, mu=1.3, theta0=-2.0, eta=0.25, Sigma=1.5)
    console.print(_slips_table(slips(textbook, _HORIZON, tau=0.5, guess=1.1)), highlight=False)
    if broken := [check.number for check in checks if not check.holds]:
        raise ValueError(f"{', '.join(broken)}: does not hold on this process; please report dimension and seed.")
    return checks


def _checks_table(checks: list[Check], title: str) -> Table:
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, pad_edge=False)
    table.add_column("number", no_wrap=True)
    table.add_column("claim", overflow="fold")
    table.add_column("left", justify="right", no_wrap=True)
    table.add_column("", no_wrap=True)
    table.add_column("right", justify="right", no_wrap=True)
    table.add_column("holds", no_wrap=True)
    for check in checks:
        sides = f"{check.left:.6g}", check.relation, f"{check.right:.6g}"
        table.add_row(check.number, escape(check.claim), *sides, "yes" if check.holds else "NO")
    return table


def _slips_table(found: list[Slip]) -> Table:
    title = "Slips of arXiv 2508.00180 (A = 0.7, μ* = 1.3, θ_0 = -2, η = 0.25, Σ = 1.5, T = 3)"
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, pad_edge=False)
    for column in ("where", "what", "quantity"):
        table.add_column(column, overflow="fold")
    for column in ("printed", "right"):
        table.add_column(column, justify="right", no_wrap=True)
    for slip in found:
        table.add_row(slip.where, escape(slip.what), escape(slip.quantity), f"{slip.printed:.4f}", f"{slip.right:.4f}")
    return table


def _positive_definite(random: np.random.Generator, dimension: int) -> FloatArray:
    factor = random.standard_normal((dimension, dimension)) / np.sqrt(dimension)
    return factor @ factor.T + 0.3 * np.eye(dimension)
