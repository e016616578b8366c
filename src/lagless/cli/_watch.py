"""``lagless watch``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lagless.cli._console import out
from lagless.cli._evaluation_options import BatchSize, Device, Length, Sequences, require
from lagless.cli._rule_options import Grid, RuleNames, chosen_rules, require_rule, rule_options

if TYPE_CHECKING:
    from lagless.watch import CommandPlan, HeldOutPlan


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
    from lagless.checkpoints import absolute_path
    from lagless.watch import Settings, Until, Waiter, Watch, follow

    require_rule(rule, settings, grid)
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
    )
    rules = chosen_rules([0, 1], rule, settings, grid)
    place = run.with_name(f"{run.name}-watch") if output is None else absolute_path(output)
    waiter = Waiter(run)
    try:
        with Watch(run, place, rules, followed, [_print]) as watch:
            code = follow(watch, waiter, poll=poll, until=ends, once=once)
    finally:
        waiter.close()
    raise typer.Exit(code)


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
        out.print(f"step {row['step']}: {row['text']}" if "step" in row else row["text"], highlight=False, markup=False)
