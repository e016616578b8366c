"""The result on the terminal."""

from __future__ import annotations

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from lagless.lab.demo._results import DemoResult, settings
from lagless.lab.demo._words import findings


def print_result(result: DemoResult, console: Console) -> None:
    """Print the table, what was seen, and where to look further."""
    table = Table(
        title="Loss on text that was not trained on: the live weights, and averages of them",
        title_justify="left",
        box=SIMPLE_HEAD,
        padding=(0, 1),
        pad_edge=False,
    )
    for heading in ("rule", "settings"):
        table.add_column(heading, no_wrap=True)
    for heading in ("loss", "minus live", "mean age", "n eff."):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_row("live", "no averaging", f"{result.live_loss:.3f}", "", "0", "1", end_section=True)
    for row in result.rows:
        candidate, difference = row.candidate, row.difference
        colour = "green" if difference.clear and difference.mean < 0 else "red" if difference.clear else "default"
        table.add_row(
            row.label,
            settings(candidate.rule),
            f"{row.loss:.3f}",
            f"[{colour}]{difference}[/]",
            f"{candidate.mean_age:.0f}",
            f"{candidate.effective_iterates:.0f}",
            end_section=row is result.matched_rows[-1],
        )
    console.print()
    console.print(table)
    console.print(
        "loss: cross-entropy in nats per token, lower is better. minus live: ± one standard error over held-out files "
        "of this one run. mean age: how many steps the average trails behind. n eff.: how many independent snapshots "
        "it amounts to.",
        style="dim",
    )
    console.print()
    for sentence in findings(result):
        console.print(f"• {escape(sentence)}", highlight=False)
    console.print(
        f"\n{result.seconds:.0f} s. Open {escape(str(result.report))} for curves, samples and what to do next."
    )
