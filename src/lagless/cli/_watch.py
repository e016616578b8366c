"""``lagless watch``."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lagless.cli._console import out
from lagless.cli._evaluation_options import BatchSize, Device, Length, Sequences, require
from lagless.cli._rule_options import Grid, RuleNames, chosen_rules, require_rule, rule_options

if TYPE_CHECKING:
    from lagless.watch import CommandPlan, HeldOutPlan, Page

_PORT = 8642


@rule_options
def watch_command(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Run folder, which may still be empty or missing.")],
    settings: dict[str, Any],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="OUT", help="Folder for everything. Default: RUN-watch.")
    ] = None,
    rule: RuleNames = [],  # noqa: B006 (typer copies it)
    grid: Grid = [],  # noqa: B006
    start: Annotated[
        Path | None, typer.Option(help="Checkpoint that is θ_0. Default: the earliest one of the run.")
    ] = None,
    start_step: Annotated[int, typer.Option(help="Step of --start.")] = 0,
    data: Annotated[
        str | None, typer.Option(metavar="FILE", help="Held-out text, problems or conversations: measure the loss.")
    ] = None,
    task: Annotated[
        list[str], typer.Option(help="Task to measure: boolq, gsm8k, mmlu_hs, arithmetic; may be repeated.")
    ] = [],  # noqa: B006
    eval_command: Annotated[
        str | None,
        typer.Option(metavar="COMMAND", help="Gets a model folder ({model}, or last) and prints JSON with loss."),
    ] = None,
    eval_timeout: Annotated[float, typer.Option(min=0.0, help="Seconds after which --eval-command is ended.")] = 3600.0,
    eval_every: Annotated[int, typer.Option(min=0, help="Steps from one evaluation to the next at least.")] = 0,
    eval_dtype: Annotated[str, typer.Option(help="Type of weights in memory: float32, bfloat16, float16.")] = "float32",
    sequences: Sequences = 200,
    length: Length = 512,
    batch_size: BatchSize = 8,
    device: Device = None,
    prune: Annotated[bool, typer.Option("--prune", help="Remove checkpoints of RUN that are in all averages.")] = False,
    prune_keep: Annotated[int, typer.Option(min=1, help="Newest checkpoints that --prune leaves.")] = 3,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="With --prune: list them, remove nothing.")] = False,
    max_disk: Annotated[str | None, typer.Option(metavar="SIZE", help="Most that OUT may use, e.g. 200GB.")] = None,
    log: Annotated[
        list[str], typer.Option(help="Pass losses on: tensorboard, wandb, mlflow, trackio; may be repeated.")
    ] = [],  # noqa: B006
    serve: Annotated[bool, typer.Option("--serve", help="Show a page on 127.0.0.1.")] = False,
    port: Annotated[int | None, typer.Option(help="Port of the page. Default: 8642, or any that is free.")] = None,
    once: Annotated[bool, typer.Option(help="Take up what is there, then end; for cron and CI.")] = False,
    until: Annotated[
        str | None, typer.Option(metavar="STEP|idle:MINUTES", help="End at a step, or after so long without a new one.")
    ] = None,
    keep: Annotated[int, typer.Option(min=1, help="Averaged models to keep.")] = 1,
    keep_states: Annotated[
        int, typer.Option(min=1, help="States of the averages to keep, to return to if the run goes back.")
    ] = 2,
    dtype: Annotated[
        str, typer.Option(help="Type of the weights written: auto (as stored), float32, bfloat16, float16, float64.")
    ] = "auto",
    poll: Annotated[float, typer.Option(min=0.05, help="Seconds between looks.")] = 2.0,
    settle: Annotated[
        float, typer.Option(min=0.0, help="Seconds without a change after which a checkpoint counts as written.")
    ] = 2.0,
    patience: Annotated[
        float, typer.Option(min=0.0, help="Seconds that later checkpoints wait for one that is not complete.")
    ] = 60.0,
) -> None:
    """Average the checkpoints of a run while it is going on, and keep the best averaged model ready to load.

    Beside any trainer: nothing is changed in it. OUT/best is the best model so far. Started again, it goes on where it
    was. Exit codes: 0, all checkpoints are in the averages; 3, some were left out; 4, no average yet.
    """
    from lagless.checkpoints import absolute_path, parse_size
    from lagless.watch import Settings, Table, Until, View, Waiter, Watch, Writer, follow

    require_rule(rule, settings, grid)
    if dry_run and not prune:
        raise ValueError("--dry-run lists what --prune would remove; give both.")
    ends = Until.parse(until)
    run = absolute_path(run)
    followed = Settings(
        start=start,
        start_step=start_step,
        settle=settle,
        patience=settle if once else patience,
        keep_states=keep_states,
        keep=keep,
        dtype=dtype,
        evaluate=_plan(data, task, eval_command, eval_timeout, sequences, length, batch_size, device, eval_dtype),
        evaluate_every=eval_every,
        prune=prune_keep if prune else None,
        prune_dry=dry_run,
        max_disk=None if max_disk is None else parse_size(max_disk),
    )
    rules = chosen_rules([0, 1], rule, settings, grid)
    place = run.with_name(f"{run.name}-watch") if output is None else absolute_path(output)
    with ExitStack() as stack:
        waiter = Waiter(run)
        stack.callback(waiter.close)
        watch = stack.enter_context(Watch(run, place, rules, followed))
        view = View(watch.metrics.rows())
        watch.sinks += [view, lambda row: waiter.wake()]
        for kind in log:
            writer = Writer(kind, run, place)
            stack.callback(writer.close)
            watch.sinks.append(writer)
        if serve:
            page = stack.enter_context(_page(lambda: view.data(watch), lambda: view.version(watch), port))
            watch.sinks.append(page.changed)
            out.print(f"page: {page.url}", highlight=False, markup=False)
        if out.is_terminal:
            table = stack.enter_context(Table(out))
            shown = [""]

            def each() -> None:
                if (version := view.version(watch)) != shown[0]:
                    table.show(view.data(watch))
                    shown[0] = version
        else:
            watch.sinks.append(_print)
            each = _nothing
        try:
            code = follow(watch, waiter, poll=poll, until=ends, once=once, each=each)
        except KeyboardInterrupt:
            watch.tell("stopped", "stopped; the same command goes on from here")
            code = 130
    raise typer.Exit(code)


def _nothing() -> None:
    """Lines are printed as things happen."""


def _page(data: Callable[[], dict[str, Any]], version: Callable[[], str], port: int | None) -> Page:
    from lagless.checkpoints import CheckpointError
    from lagless.watch import Page

    try:
        return Page(data, version, _PORT if port is None else port)
    except CheckpointError:
        if port is not None:
            raise
        return Page(data, version, 0)


def _plan(
    data: str | None,
    tasks: list[str],
    command: str | None,
    timeout: float,
    sequences: int,
    length: int,
    batch_size: int,
    device: str | None,
    dtype: str,
) -> HeldOutPlan | CommandPlan | None:
    from lagless.watch import CommandPlan, HeldOutPlan

    if command is not None:
        if data is not None or tasks:
            raise ValueError("--eval-command takes the place of --data and --task; give one or the other.")
        return CommandPlan(command, timeout)
    if data is None and not tasks:
        return None
    require("watch")
    if data is not None and Path(data).expanduser().is_file():
        data = str(Path(data).expanduser().resolve())
    return HeldOutPlan(
        data, tuple(tasks), sequences=sequences, length=length, batch_size=batch_size, device=device, dtype=dtype
    )


def _print(row: dict[str, Any]) -> None:
    if "text" in row:
        text = f"step {row['step']}: {row['text']}" if "step" in row else row["text"]
    elif "loss" in row:
        text = f"step {row['step']}: {row['name']} has a loss of {row['loss']:.4f}"
    else:
        return
    out.print(text, highlight=False, markup=False, soft_wrap=True)
