"""What commands print about runs and averages."""

from __future__ import annotations

from collections.abc import Sequence

from rich.filesize import decimal
from rich.table import Table

from lagless.checkpoints import Trajectory
from lagless.cli._console import out
from lagless.cli._rule_options import settings_of
from lagless.posthoc import AverageSummary, RunSummary, decay_note, factors_note, notes_on, short_steps
from lagless.rules import FloatArray, schedule_of

_BLOCKS = " ▁▂▃▄▅▆▇█"


def print_run(summary: RunSummary) -> None:
    """Say what checkpoints a run has, and of what."""
    kind = "adapter" if summary.is_adapter else "model"
    types = ", ".join(f"{count:,} {name}" for name, count in summary.dtypes.items())
    out.print(
        f"{len(summary.steps)} checkpoints, {summary.unit}s {short_steps(summary.steps)}; each a {kind} of "
        f"{summary.parameters:,} parameters in {summary.tensors} tensors ({types}), {decimal(summary.nbytes)} in "
        f"{summary.shards} file(s)",
        highlight=False,
    )
    if summary.quantized:
        out.print(
            f"weights are stored quantized ({summary.quantized}); they are averaged as the numbers that they stand "
            f"for, and written as {summary.written}",
            highlight=False,
        )
    if summary.left_out:
        named = ", ".join(summary.left_out[:2]) + (", ..." if summary.left_out[2:] else "")
        out.print(f"left out, as no weights: {len(summary.left_out)} tensors ({named})", highlight=False, markup=False)


def print_start(trajectory: Trajectory, merged_lora: bool = False) -> None:
    """Say which checkpoint is θ_0, and why."""
    how = "as asked" if trajectory.start_given else "the earliest checkpoint; --start sets another"
    name = trajectory.checkpoints[0].path.name
    out.print(f"θ_0 is {name}, step {trajectory.steps[0]} ({how})", highlight=False, markup=False)
    for note in filter(None, (None if merged_lora else factors_note(trajectory), decay_note(trajectory))):
        out.print(f"note: {note}", highlight=False, markup=False)


def print_averages(summaries: Sequence[AverageSummary], names: Sequence[str] | None = None) -> None:
    """Print one row per average, and what a user may not expect of it; ``names`` in place of the summaries' own."""
    named = list(zip(names or [s.name for s in summaries], summaries, strict=True))
    table = Table(box=None, pad_edge=False)
    table.add_column("average", overflow="fold")
    for column in ("mean age (steps)", "effective iterates", "weight left on"):
        table.add_column(column, justify="right")
    table.add_column("settings other than the defaults", overflow="fold")
    for name, s in named:
        numbers = f"{s.mean_age:,.1f}", f"{s.effective_iterates:.2f}", f"θ_{s.anchor.step} {s.anchor.weight:+.4f}"
        table.add_row(name, *numbers, settings_of(s.rule))
    out.print(table, highlight=False)
    for name, s in named:
        for note in notes_on(s):
            out.print(f"note: {name}: {note}", highlight=False, markup=False)


def print_schedules(summaries: Sequence[AverageSummary], names: Sequence[str] | None = None) -> None:
    """Print the learning-rate schedule that each average equals to first order, as a line of blocks."""
    out.print("to first order, each average is this run with its learning rate multiplied by")
    named = list(zip(names or [s.name for s in summaries], summaries, strict=True))
    width = min(24, max(len(name) for name, _ in named))
    for name, s in named:
        multipliers = schedule_of(s.weights)[1:]
        out.print(
            f"  {name[:width]:<{width}} {sparkline(multipliers)}  {multipliers[0]:.2f} at first, {multipliers[-1]:.2f} "
            "at last",
            highlight=False,
            markup=False,
        )


def sparkline(values: Sequence[float] | FloatArray, columns: int = 32) -> str:
    """Return values as a line of blocks, from an empty one for 0 or less to a full one for 1 or more."""
    count = min(columns, len(values))
    picked = [float(values[round(i * (len(values) - 1) / max(1, count - 1))]) for i in range(count)]
    return "".join(_BLOCKS[min(8, max(0, round(8 * value)))] for value in picked)


def print_weights(summary: RunSummary) -> None:
    """Print the weight of every checkpoint in every average."""
    table = Table(box=None, pad_edge=False)
    table.add_column("step", justify="right")
    table.add_column("checkpoint")
    for s in summary.averages:
        table.add_column(s.name, justify="right")
    for i, (step, name) in enumerate(zip(summary.steps, summary.names, strict=True)):
        table.add_row(str(step), name, *(f"{s.weights[i]:+.4f}" for s in summary.averages))
    out.print(table, highlight=False)


def print_rounding(trajectory: Trajectory) -> None:
    """Say so where weights are stored in fewer than 32 bits, to which averages are rounded back."""
    tensors = trajectory.checkpoints[-1].tensors.values()
    if any(info.dtype.is_floating_point and info.dtype.itemsize < 4 for info in tensors):
        out.print("weights are rounded back to the stored type; --dtype float32 keeps all that averaging gained")


def print_written(summaries: Sequence[AverageSummary], dry_run: bool) -> None:
    """Say where models were written, or would be, and whether ``from_pretrained`` will miss a configuration."""
    verb = "would be written" if dry_run else "written"
    for summary in summaries:
        out.print(f"{verb} to {summary.path} ({decimal(summary.nbytes)})", highlight=False, markup=False)
    written = summaries[0].path
    configurations = "config.json", "adapter_config.json"
    if not dry_run and written and not any((written / name).is_file() for name in configurations):
        out.print(
            "note: the checkpoints have no config.json, which from_pretrained needs; put the base model's beside it"
        )
