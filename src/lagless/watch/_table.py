"""The live table in the terminal."""

from __future__ import annotations

from typing import Any

from rich.console import Console, Group, RenderableType
from rich.filesize import decimal
from rich.live import Live
from rich.table import Table as RichTable
from rich.text import Text

_LAST = 5  # events shown


class Table:
    """Shows what a watch knows, and keeps it up to date; a context manager.

    Args:
        console: where to.
    """

    def __init__(self, console: Console) -> None:
        self._live = Live(console=console, auto_refresh=False, vertical_overflow="crop")

    def __enter__(self) -> Table:
        self._live.__enter__()
        return self

    def __exit__(self, *details: Any) -> None:
        self._live.__exit__(None, None, None)

    def show(self, data: dict[str, Any]) -> None:
        """Show data of a :class:`lagless.watch._view.View`."""
        self._live.update(render(data), refresh=True)


def render(data: dict[str, Any]) -> RenderableType:
    """Return what the terminal shows. Text is never read as markup."""
    step = "no checkpoint yet" if data["step"] is None else f"step {data['step']:,}"
    head = f"{data['run']}  {step}, {data['checkpoints']} checkpoints in the averages"
    lines: list[RenderableType] = [Text(head, style="bold"), _averages(data)]
    if best := data["best"]:
        loss = "" if best["loss"] is None else f", loss {best['loss']:.4f}"
        lines.append(Text(f"best: {best['name']} as of step {best['step']}{loss}  {best['path']}", style="green"))
    lines += [Text(f"- {text}") for text in data["advice"]]
    lines += [Text(f"waiting for {text}", style="yellow") for text in data["pending"]]
    seconds, disk = data["seconds"], data["disk"]
    used = f"state {decimal(disk['state'])}, models {decimal(disk['models'])}"
    spent = f"taking up {seconds['absorbing']:.1f} s, evaluating {seconds['evaluating']:.1f} s in all"
    lines.append(Text(f"{used}; {spent}", style="dim"))
    for event in data["events"][-_LAST:]:
        place = "" if event["step"] is None else f"step {event['step']}: "
        lines.append(Text(f"{place}{event['text']}", style="dim" if event["event"] == "absorbed" else "yellow"))
    return Group(*lines)


def _averages(data: dict[str, Any]) -> RichTable:
    table = RichTable(box=None, pad_edge=False)
    table.add_column("average", overflow="fold")
    for title in ("loss", "over live", "mean age (steps)", "weight on θ_0"):
        table.add_column(title, justify="right")
    newest = {name: points[-1] for name, points in data["losses"].items() if points}
    live = newest.get("live")
    rows = [{"name": "live"}] if live else []
    for row in [*rows, *sorted(data["averages"], key=lambda a: newest.get(a["name"], [0, float("inf")])[1])]:
        name, found = row["name"], newest.get(row["name"])
        loss = "-" if found is None else f"{found[1]:.4f}" + (f" ± {found[2]:.4f}" if found[2] else "")
        over = "-" if not found or not live or name == "live" or found[0] != live[0] else f"{live[1] - found[1]:+.4f}"
        age, start = row.get("mean_age"), row.get("on_start")
        numbers = loss, over, "-" if age is None else f"{age:,.1f}", "-" if start is None else f"{start:+.4f}"
        table.add_row(Text(name), *numbers)
    return table
