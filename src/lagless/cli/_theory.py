"""``lagless theory``: the quadratic laboratory."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Annotated, Literal

import typer

from lagless.cli._console import err, out

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode=None,
    help="The quadratic laboratory: advice, statements, figures. Figures need lagless[lab].",
)


@app.callback()
def _theory() -> None:
    """The quadratic laboratory: advice, statements, figures. Figures need lagless[lab]."""


def _require_matplotlib(command: str) -> None:
    if importlib.util.find_spec("matplotlib") is None:
        raise ImportError(f"lagless theory {command} needs matplotlib: pip install 'lagless[lab]'")


Output = Annotated[Path, typer.Option("--output", "-o", metavar="OUT", help="Folder to make.")]


@app.command()
def choose(
    steps: Annotated[
        int | None, typer.Option(help="Horizon in optimizer steps. Default: the last step of --run.")
    ] = None,
    curvature_min: Annotated[float | None, typer.Option(help="Smallest curvature a.")] = None,
    curvature_max: Annotated[float | None, typer.Option(help="Largest curvature a.")] = None,
    noise: Annotated[float | None, typer.Option(help="Standard deviation of the gradient noise per parameter.")] = None,
    distance: Annotated[float | None, typer.Option(help="Distance of θ_0 from the minimum per parameter.")] = None,
    lr: Annotated[float | None, typer.Option(help="Learning rate.")] = None,
    run: Annotated[
        Path | None, typer.Option(help="Deprecated, see lagless choose: estimate what is not given from this run.")
    ] = None,
    start: Annotated[Path | None, typer.Option(help="Checkpoint that is θ_0 of --run.")] = None,
    measure: Annotated[Literal["loss", "distance"], typer.Option(help="What settings are ordered by.")] = "loss",
    update_freq: Annotated[int | None, typer.Option(help="φ; by default it is chosen with the rest.")] = None,
    copies: Annotated[int, typer.Option(help="Most copies of the parameters that a rule may store.")] = 10,
    seed: Annotated[int, typer.Option(help="Of the sample of parameters of --run.")] = 0,
    plot: Annotated[Path | None, typer.Option(help="PNG file to write. Needs lagless[lab].")] = None,
) -> None:
    """Recommend a rule: its exact risk over a grid of settings, for a spectrum of curvatures and a noise scale."""
    from lagless.lab.pictures import advise

    if plot is not None:
        _require_matplotlib("choose --plot")
    if run is not None:
        err.print(
            f"note: --run is deprecated: it needs a run of SGD that has settled. lagless choose {run} is for any run.",
            highlight=False,
            markup=False,
        )
    advise(
        steps=steps,
        curvature_min=curvature_min,
        curvature_max=curvature_max,
        noise=noise,
        distance=distance,
        lr=lr,
        run=run,
        start=start,
        measure=measure,
        update_freq=update_freq,
        copies=copies,
        seed=seed,
        plot=plot,
        console=out,
    )


@app.command()
def check(
    seed: Annotated[int, typer.Option(help="Of the random matrices.")] = 0,
    dimension: Annotated[int, typer.Option(help="Dimension of the random process.")] = 4,
) -> None:
    """Check every statement of the BEMA paper on random processes, and show its slips with their numbers."""
    from lagless.lab.pictures import print_statements

    print_statements(dimension=dimension, seed=seed, console=out)


@app.command("preconditioner-bias")
def preconditioner_bias(
    samples: Annotated[int, typer.Option(help="Independent steps of the one-step tables.")] = 300_000,
    steps: Annotated[int, typer.Option(help="Steps per chain of the long run.")] = 500,
    chains: Annotated[int, typer.Option(help="Independent chains; standard errors come from them.")] = 500,
    seed: Annotated[int, typer.Option(help="Of the gradients.")] = 0,
    output: Annotated[Path | None, typer.Option("--output", "-o", metavar="FILE", help="JSON to write.")] = None,
) -> None:
    """Measure how far Adam-type updates are off on average, by estimator and by reason, with standard errors."""
    from lagless.lab.pictures import print_biases

    print_biases(samples=samples, steps=steps, chains=chains, seed=seed, output=output, console=out)


@app.command()
def figures(
    output: Output = Path("lagless-laboratory"),
    seed: Annotated[int, typer.Option(help="Of everything that is sampled.")] = 0,
    overwrite: Annotated[bool, typer.Option(help="Replace OUT.")] = False,
) -> None:
    """Draw every figure of the laboratory, as PNG and as one page that says what to see."""
    _require_matplotlib("figures")
    from lagless.lab.pictures import run_laboratory

    if seed < 0:
        raise ValueError(f"seed={seed}; it must be an integer >= 0.")
    run_laboratory(output, seed=seed, overwrite=overwrite, console=out)


@app.command()
def primers(output: Output = Path("primer-figures")) -> None:
    """Draw the figures of the primers in the documentation."""
    _require_matplotlib("primers")
    from lagless.lab.pictures import make_primer_figures

    for path in make_primer_figures(output, console=out):
        out.print(str(path), highlight=False, markup=False)
