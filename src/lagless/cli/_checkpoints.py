"""``lagless average`` and ``lagless inspect``."""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import torch.distributed as dist
import typer
from rich.filesize import decimal
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn
from rich.table import Table

from lagless.checkpoints import Trajectory, find_checkpoints, parse_size
from lagless.cli._console import err, out
from lagless.posthoc import (
    Accumulate,
    AverageSummary,
    RunSummary,
    average_checkpoints,
    inspect_run,
)
from lagless.rules import Rule, WindowAverage, common_update_freq, rules_from_settings, start_note

Runs = Annotated[
    list[Path],
    typer.Argument(metavar="RUN", help="Run folder with checkpoint-N folders; or two or more checkpoints."),
]
RuleNames = Annotated[
    list[str],
    typer.Option("--rule", help="ema, bema, ouema, dema, uniformaverage, powerema, windowaverage; may be repeated."),
]
Grid = Annotated[
    list[str],
    typer.Option(help="ARGUMENT=VALUE,VALUE,...: one average per value; repeat for a product. All in one pass."),
]
Start = Annotated[Path | None, typer.Option(help="Checkpoint that is θ_0. Default: the earliest one of the run.")]
StartStep = Annotated[int | None, typer.Option(help="Step of --start. Default: 0.")]
Steps = Annotated[str | None, typer.Option(help="Steps to use, e.g. 0,100,200; for a list of files, their steps.")]
At = Annotated[int | None, typer.Option(help="Average as of this step; later checkpoints are left out.")]

_SETTINGS = {
    "ema_power": (float, "κ: β = (lag + multiplier·t)^-κ."),
    "bias_power": (float, "η: α = (lag + multiplier·t)^-η; smaller corrects more, inf is the plain EMA."),
    "multiplier": (float, "γ."),
    "lag": (float, "ρ, the virtual age at step 0."),
    "min_ema_multiplier": (float, "Floor on β."),
    "form": (str, "Published form of BEMA: algorithm_1, trl, offline, online."),
    "decay": (float, "EMA: β = 1 - decay at every update."),
    "half_life": (float, "EMA: half-life in optimizer steps."),
    "half_life_fraction": (float, "EMA: half-life as a fraction of the steps so far."),
    "relative_width": (float, "PowerEMA: σ_rel."),
    "window": (int, "WindowAverage: number of snapshots."),
    "update_after": (int, "τ: burn-in in optimizer steps."),
    "update_freq": (int, "φ: optimizer steps between updates. Default: every stored checkpoint."),
}


def _rule_options(command: Callable[..., None]) -> Callable[..., None]:
    """Replace the parameter ``settings`` of ``command`` by one option for every argument that a rule can have."""
    own = inspect.signature(command, eval_str=True)
    options = [
        inspect.Parameter(
            name,
            inspect.Parameter.KEYWORD_ONLY,
            default=None,
            annotation=Annotated[kind | None, typer.Option(help=text, rich_help_panel="Rule arguments")],
        )
        for name, (kind, text) in _SETTINGS.items()
    ]

    @functools.wraps(command)
    def run(**values: Any) -> None:
        settings = {name: values.pop(name) for name in _SETTINGS}
        command(settings={name: value for name, value in settings.items() if value is not None}, **values)

    kept = [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for name, p in own.parameters.items() if name != "settings"]
    run.__signature__ = own.replace(parameters=[*kept, *options])  # type: ignore[attr-defined]
    run.__annotations__ = {p.name: p.annotation for p in [*kept, *options]}
    return run


@_rule_options
def average(
    run: Runs,
    output: Annotated[Path, typer.Option("--output", "-o", metavar="OUT", help="Folder to make.")],
    settings: dict[str, Any],
    rule: RuleNames = ["bema"],  # noqa: B006 (typer copies it)
    grid: Grid = [],  # noqa: B006
    start: Start = None,
    start_step: StartStep = None,
    steps: Steps = None,
    at: At = None,
    dtype: Annotated[
        str, typer.Option(help="Type of the weights written: auto (as stored), float32, bfloat16, float16, float64.")
    ] = "auto",
    max_shard_size: Annotated[str, typer.Option(help="Largest weight file.")] = "5GB",
    memory: Annotated[str, typer.Option(help="Most memory for buffers.")] = "1GiB",
    accumulate: Annotated[Accumulate, typer.Option(help="Type to sum in.")] = "float32",
    overwrite: Annotated[bool, typer.Option(help="Replace OUT.")] = False,
    allow_nonfinite: Annotated[bool, typer.Option(help="Average NaN and infinity instead of refusing.")] = False,
    dry_run: Annotated[bool, typer.Option(help="Check everything and say what would be done; write nothing.")] = False,
) -> None:
    """Average the checkpoints of a run into models that from_pretrained loads; every byte is read once.

    Several rules or a --grid make one model each, in OUT/NAME. Under torchrun the processes divide the files of OUT.
    """
    source = _source(run)
    where: dict[str, Any] = {"start": start, "start_step": start_step, "steps": _numbers(steps)}
    trajectory = find_checkpoints(source, **where).until(at)
    rules = _rules(trajectory, rule, settings, grid)
    with _torchrun() as group, _progress() as progress:
        summaries = average_checkpoints(
            source,
            rules if len(rules) > 1 else next(iter(rules.values())),
            output,
            **where,
            at=at,
            dtype=dtype,
            max_shard_size=max_shard_size,
            memory=parse_size(memory),
            accumulate=accumulate,
            overwrite=overwrite,
            allow_nonfinite=allow_nonfinite,
            progress=progress,
            dry_run=dry_run,
            group=group,
        )
    _print_start(trajectory)
    _print_averages([replace(s, name=name) for s, name in zip(summaries, rules, strict=True)])
    stored = {
        info.dtype.itemsize for info in trajectory.checkpoints[-1].tensors.values() if info.dtype.is_floating_point
    }
    if dtype == "auto" and min(stored, default=4) < 4:
        out.print("weights are rounded back to the stored type; --dtype float32 keeps all that averaging gained")
    verb = "would be written" if dry_run else "written"
    for summary in summaries:
        out.print(f"{verb} to {summary.path} ({decimal(summary.nbytes)})", highlight=False, markup=False)
    written = summaries[0].path
    if (
        not dry_run
        and written
        and not any((written / name).is_file() for name in ("config.json", "adapter_config.json"))
    ):
        out.print(
            "note: the checkpoints have no config.json, which from_pretrained needs; put the base model's beside it"
        )


@_rule_options
def inspect_command(
    run: Runs,
    settings: dict[str, Any],
    rule: RuleNames = [],  # noqa: B006
    grid: Grid = [],  # noqa: B006
    start: Start = None,
    start_step: StartStep = None,
    steps: Steps = None,
    at: At = None,
) -> None:
    """Say what is in a run folder, and with --rule what a rule would make of it; no weights are read."""
    source = _source(run)
    where: dict[str, Any] = {"start": start, "start_step": start_step, "steps": _numbers(steps)}
    if (settings or grid) and not rule:
        raise ValueError("rule arguments were given without --rule; say which rule they belong to, e.g. --rule ema.")
    trajectory = find_checkpoints(source, **where).until(at)
    summary = inspect_run(source, _rules(trajectory, rule, settings, grid) if rule else None, **where, at=at)
    kind = "adapter" if summary.is_adapter else "model"
    types = ", ".join(f"{count:,} {name}" for name, count in summary.dtypes.items())
    out.print(
        f"{len(summary.steps)} checkpoints, steps {_span(summary.steps)}; each a {kind} of {summary.parameters:,} "
        f"parameters in {summary.tensors} tensors ({types}), {decimal(summary.nbytes)} in {summary.shards} file(s)",
        highlight=False,
    )
    if summary.left_out:
        named = ", ".join(summary.left_out[:2]) + (", ..." if summary.left_out[2:] else "")
        out.print(f"left out, as no weights: {len(summary.left_out)} tensors ({named})", highlight=False, markup=False)
    _print_start(trajectory)
    if summary.averages:
        _print_averages(summary.averages)
        _print_weights(summary)


def _source(run: list[Path]) -> Path | list[Path]:
    return run[0] if len(run) == 1 else run


def _numbers(text: str | None) -> list[int] | None:
    if text is None:
        return None
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise ValueError(f"--steps {text!r}; it must be integers separated by commas, e.g. 0,100,200.") from None


def _rules(trajectory: Trajectory, kinds: list[str], settings: dict[str, Any], grid: list[str]) -> dict[str, Rule]:
    """The rules asked for. Left alone, update_freq becomes the one at which every stored checkpoint is an update."""
    axes: dict[str, list[str]] = {}
    for item in grid:
        name, _, values = item.partition("=")
        if not re.fullmatch(r"[\w-]+", name) or not values:
            raise ValueError(f"--grid {item!r}; it must be ARGUMENT=VALUE,VALUE,..., e.g. ema-power=0.2,0.5.")
        axes[name] = values.split(",")
    if "update_freq" not in settings and not any(name.replace("-", "_") == "update_freq" for name in axes):
        settings = settings | {"update_freq": common_update_freq(trajectory.steps, settings.get("update_after", 0))}
    return rules_from_settings(kinds, settings, axes)


def _print_start(trajectory: Trajectory) -> None:
    how = "as asked" if trajectory.start_given else "the earliest checkpoint; --start sets another"
    name = trajectory.checkpoints[0].path.name
    out.print(f"θ_0 is {name}, step {trajectory.steps[0]} ({how})", highlight=False, markup=False)


def _span(steps: tuple[int, ...]) -> str:
    return ", ".join(map(str, steps)) if len(steps) <= 8 else f"{steps[0]}, {steps[1]}, ..., {steps[-1]}"


def _print_averages(summaries: Sequence[AverageSummary]) -> None:
    table = Table(box=None, pad_edge=False)
    table.add_column("average", overflow="fold")
    for column in ("mean age (steps)", "effective iterates", "weight left on"):
        table.add_column(column, justify="right")
    table.add_column("settings other than the defaults", overflow="fold")
    for s in summaries:
        numbers = f"{s.mean_age:,.1f}", f"{s.effective_iterates:.2f}", f"θ_{s.anchor.step} {s.anchor.weight:+.4f}"
        table.add_row(s.name, *numbers, _settings_of(s.rule))
    out.print(table, highlight=False)
    for s in summaries:
        for note in _notes(s):
            out.print(f"note: {s.name}: {note}", highlight=False, markup=False)


def _notes(s: AverageSummary) -> Iterator[str]:
    """What a user may not expect of this average."""
    skipped = [step for step in s.steps[1:] if step > s.rule.update_after and not s.rule.schedule.updates(step)]
    if skipped[-1:] == [s.steps[-1]]:
        skipped.pop()  # the last one counts in any case
    if skipped:
        yield (
            f"update_freq={s.rule.update_freq} leaves out {len(skipped)} of {len(s.steps)} checkpoints (steps "
            f"{_span(tuple(skipped))}); {common_update_freq(s.steps, s.rule.update_after)} uses all"
        )
    if isinstance(s.rule, WindowAverage):
        yield f"θ_0 (step {s.steps[0]}) is not one of the snapshots averaged"
        if len(s.steps) - 1 < s.rule.window:
            yield f"these are all {len(s.steps) - 1} there are, fewer than window={s.rule.window}"
    if s.effective_iterates < 1.0:
        yield (
            "noisier than the last checkpoint alone: the correction outweighs what averaging gains; a larger "
            "bias_power corrects less, and a larger ema_power averages more"
        )
    if note := start_note(s.rule, s.anchor, s.steps[-1]):
        yield note


def _settings_of(rule: Rule) -> str:
    defaults = inspect.signature(type(rule)).parameters
    changed = {name: value for name, value in vars(rule).items() if value != defaults[name].default}
    return ", ".join(f"{name}={value}" for name, value in changed.items())


def _print_weights(summary: RunSummary) -> None:
    table = Table(box=None, pad_edge=False)
    table.add_column("step", justify="right")
    table.add_column("checkpoint")
    for s in summary.averages:
        table.add_column(s.name, justify="right")
    for i, (step, name) in enumerate(zip(summary.steps, summary.names, strict=True)):
        table.add_row(str(step), name, *(f"{s.weights[i]:+.4f}" for s in summary.averages))
    out.print(table, highlight=False)


@contextmanager
def _torchrun() -> Iterator[Any]:
    """The processes that torchrun started, of which the first alone prints results; None without it."""
    if not dist.is_torchelastic_launched():
        yield None
        return
    dist.init_process_group("gloo")
    out.quiet = dist.get_rank() > 0
    try:
        yield dist.group.WORLD
    finally:
        dist.destroy_process_group()


@contextmanager
def _progress() -> Iterator[Callable[[int, int], None]]:
    columns = TextColumn("reading"), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn()
    progress = Progress(*columns, console=err, transient=True, disable=out.quiet)
    task = progress.add_task("reading", total=None)

    def advance(done: int, total: int) -> None:
        progress.start()  # not before something is read, so that errors stand alone
        progress.update(task, completed=done, total=total)

    try:
        yield advance
    finally:
        progress.stop()
