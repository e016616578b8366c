"""``lagless average`` and ``lagless inspect``."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from lagless.cli._console import out
from lagless.cli._rule_options import Grid, RuleNames, chosen_rules, integers, require_rule, rule_options
from lagless.cli._weights import given_weights

Runs = Annotated[
    list[Path],
    typer.Argument(metavar="RUN", help="Run folder with checkpoint-N folders; or two or more checkpoints."),
]
Start = Annotated[Path | None, typer.Option(help="Checkpoint that is θ_0. Default: the earliest one of the run.")]
StartStep = Annotated[int | None, typer.Option(help="Step of --start. Default: 0.")]
Steps = Annotated[str | None, typer.Option(help="Steps to use, e.g. 0,100,200; for a list of files, their steps.")]
At = Annotated[int | None, typer.Option(help="Average as of this step; later checkpoints are left out.")]

Best = Annotated[int | None, typer.Option(metavar="N", help="Use the N checkpoints with the best --metric.")]
Metric = Annotated[str | None, typer.Option(help="Metric for --best: of trainer_state.json, or Lightning's monitor.")]
Mode = Annotated[
    Literal["min", "max"] | None, typer.Option(help="Which values of --metric are good. Default: by its name.")
]


@rule_options
def average(
    run: Runs,
    output: Annotated[Path, typer.Option("--output", "-o", metavar="OUT", help="Folder to make.")],
    settings: dict[str, Any],
    rule: RuleNames = [],  # noqa: B006 (typer copies it)
    grid: Grid = [],  # noqa: B006
    weights: Annotated[
        str | None,
        typer.Option(
            metavar="FILE|W,W,...", help="Weights of the checkpoints, θ_0's first, in place of a rule; see --normalize."
        ),
    ] = None,
    normalize: Annotated[bool, typer.Option(help="Divide --weights by their sum.")] = False,
    start: Start = None,
    start_step: StartStep = None,
    steps: Steps = None,
    at: At = None,
    best: Best = None,
    metric: Metric = None,
    mode: Mode = None,
    dtype: Annotated[
        str, typer.Option(help="Type of the weights written: auto (as stored), float32, bfloat16, float16, float64.")
    ] = "auto",
    max_shard_size: Annotated[str, typer.Option(help="Largest weight file.")] = "5GB",
    memory: Annotated[str, typer.Option(help="Most memory for buffers.")] = "1GiB",
    accumulate: Annotated[Literal["float32", "float64"], typer.Option(help="Type to sum in.")] = "float32",
    recursive: Annotated[
        bool, typer.Option(help="Form averages checkpoint after checkpoint: those of lagless watch, bit for bit.")
    ] = False,
    merged_lora: Annotated[
        bool, typer.Option("--merged-lora", help="Of LoRA adapters, average the products BA, not A and B apart.")
    ] = False,
    overwrite: Annotated[bool, typer.Option(help="Replace OUT.")] = False,
    allow_nonfinite: Annotated[bool, typer.Option(help="Average NaN and infinity instead of refusing.")] = False,
    dry_run: Annotated[bool, typer.Option(help="Check everything and say what would be done; write nothing.")] = False,
) -> None:
    """Average the checkpoints of a run into models that from_pretrained loads; every byte is read once.

    Without --rule this is EMA(half_life_fraction=0.05), the same average at every length of run, or, with --best, the
    mean of those N. Several rules or a --grid make one model each, in OUT/NAME. Under torchrun the
    processes divide the files of OUT.
    """
    from lagless.checkpoints import find_checkpoints, parse_size
    from lagless.cli._processes import reading, torchrun
    from lagless.cli._summaries import print_averages, print_rounding, print_schedules, print_start, print_written
    from lagless.posthoc import average_checkpoints

    trajectory = find_checkpoints(
        _source(run), integers("--steps", steps), start, start_step, best=best, metric=metric, mode=mode
    ).until(at)
    if best is not None and weights is None and not (rule or settings or grid):
        weights, normalize = ",".join(["0" if start else "1", *["1"] * (len(trajectory.steps) - 1)]), True
    if weights is not None and (rule or settings or grid):
        raise ValueError("--weights takes the place of --rule and its arguments; give one or the other.")
    rules = chosen_rules(trajectory.steps, rule, settings, grid) if weights is None else {}
    named = {**rules} if weights is None else {"": given_weights(weights, trajectory.steps, normalize)}
    with torchrun() as group, reading() as progress:
        summaries = average_checkpoints(
            trajectory,
            named if len(named) > 1 else next(iter(named.values())),
            output,
            dtype=dtype,
            max_shard_size=max_shard_size,
            memory=parse_size(memory),
            accumulate=accumulate,
            recursive=recursive,
            merged_lora=merged_lora,
            overwrite=overwrite,
            allow_nonfinite=allow_nonfinite,
            progress=progress,
            dry_run=dry_run,
            group=group,
        )
    print_start(trajectory, merged_lora)
    print_averages(summaries, list(rules) or ["weights"])
    print_schedules(summaries, list(rules) or ["weights"])
    if dtype == "auto":
        print_rounding(trajectory)
    print_written(summaries, dry_run)


@rule_options
def inspect_command(
    run: Runs,
    settings: dict[str, Any],
    rule: RuleNames = [],  # noqa: B006
    grid: Grid = [],  # noqa: B006
    start: Start = None,
    start_step: StartStep = None,
    steps: Steps = None,
    at: At = None,
    best: Best = None,
    metric: Metric = None,
    mode: Mode = None,
    plot: Annotated[
        Path | None, typer.Option(metavar="PNG", help="Draw the weights and the learning-rate schedules they equal.")
    ] = None,
) -> None:
    """Say what is in a run folder, and with --rule what a rule would make of it; no weights are read."""
    from lagless.checkpoints import find_checkpoints
    from lagless.cli._summaries import print_averages, print_run, print_schedules, print_start, print_weights
    from lagless.posthoc import inspect_run

    require_rule(rule, settings, grid)
    trajectory = find_checkpoints(
        _source(run), integers("--steps", steps), start, start_step, best=best, metric=metric, mode=mode
    ).until(at)
    summary = inspect_run(trajectory, chosen_rules(trajectory.steps, rule, settings, grid) if rule else None)
    print_run(summary)
    print_start(trajectory)
    if summary.averages:
        print_averages(summary.averages)
        print_schedules(summary.averages)
        print_weights(summary)
    if plot is not None:
        if not summary.averages:
            raise ValueError("--plot draws averages; say which with --rule.")
        if importlib.util.find_spec("matplotlib") is None:
            raise ImportError("lagless inspect --plot needs matplotlib: pip install 'lagless[lab]'")
        from lagless.lab.pictures import draw_schedules

        draw_schedules({s.name: s.weights for s in summary.averages}, summary.steps, plot)
        out.print(f"drawn to {plot}", highlight=False, markup=False)


def _source(run: list[Path]) -> Path | list[Path]:
    return run[0] if len(run) == 1 else run
