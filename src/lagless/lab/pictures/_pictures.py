"""All figures by one call."""

from __future__ import annotations

import json
import platform
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from os import PathLike
from pathlib import Path

import torch
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from lagless._version import __version__
from lagless.checkpoints import atomic_file, atomic_folder
from lagless.lab.output import check_output
from lagless.lab.pictures._distances import draw_figure_2, draw_figure_14a, draw_ten_rules, follow_rules
from lagless.lab.pictures._drawing import Picture, plain, style
from lagless.lab.pictures._page import PAGE, write_page
from lagless.lab.pictures._paths import draw_path
from lagless.lab.pictures._preconditioning import biases, cancellation, draw_biases, draw_cancellation
from lagless.lab.pictures._primers import PRIMERS
from lagless.lab.pictures._pulls import draw_controls, draw_guarantees, draw_pull

NUMBERS = "numbers.json"


@dataclass(frozen=True)
class Effort:
    """How much is simulated. Exact curves do not depend on it.

    Attributes:
        steps: optimizer steps of Fig. 2.
        paths: sampled paths of Fig. 2, and of each gain of the pull.
        samples: independent steps for each bias of one step.
        chains: chains for each bias in the long run, with as many steps.
    """

    steps: int = 2000
    paths: int = 1000
    samples: int = 1_000_000
    chains: int = 1000


@dataclass(frozen=True)
class LaboratoryResult:
    """What was made.

    Attributes:
        out: the folder.
        pictures: all pictures, in the order of the page.
        seconds: how long each part took.
    """

    out: Path
    pictures: tuple[Picture, ...]
    seconds: Mapping[str, float]

    @property
    def page(self) -> Path:
        """The page."""
        return self.out / PAGE


def run_laboratory(
    out: str | PathLike[str],
    *,
    seed: int = 0,
    overwrite: bool = False,
    console: Console | None = None,
    effort: Effort | None = None,
) -> LaboratoryResult:
    """Compute and draw every figure of the quadratic laboratory, and write them as PNG and as one page.

    Takes about a minute on two cores. The same seed gives the same numbers on the same machine.

    Args:
        out: the folder to make: ``laboratory.html``, the figures as PNG, ``numbers.json``. It appears when everything
            is written.
        seed: of everything sampled.
        overwrite: replace ``out`` if the laboratory wrote it before.
        console: where progress goes; None for standard output.
        effort: how much is simulated.

    Raises:
        ValueError: if ``out`` cannot be used.
    """
    out, console, effort = Path(out).expanduser(), console or Console(), effort or Effort()
    check_output(out, overwrite, [PAGE, NUMBERS], "the laboratory")
    parts = _parts(seed, effort)
    sections: dict[str, list[Picture]] = {}
    seconds: dict[str, float] = {}
    with atomic_folder(out) as folder, style(), _progress(console, len(parts)) as show:
        for section, name, draw in parts:
            show(name)
            before = time.perf_counter()
            pictures = draw()
            for picture in pictures:
                picture.save(folder)
            seconds[name] = time.perf_counter() - before
            sections.setdefault(section, []).extend(pictures)
        everything = tuple(picture for pictures in sections.values() for picture in pictures)
        _write_numbers(everything, seconds, seed, effort, folder)
        footer = (
            f"lagless {__version__}, seed {seed}, {sum(seconds.values()):.0f} s. "
            f"lagless theory figures -o {out.name} --seed {seed} makes this page; {NUMBERS} has the numbers."
        )
        write_page(list(sections.items()), folder, footer)
    result = LaboratoryResult(out, everything, seconds)
    console.print(f"{sum(seconds.values()):.0f} s. Open {escape(str(result.page))}", highlight=False)
    return result


def make_primer_figures(folder: str | PathLike[str], console: Console | None = None) -> list[Path]:
    """Draw the six figures of the primers into ``folder``, as ``NAME.png``; those that exist are replaced.

    Returns:
        Their paths.
    """
    folder, console = Path(folder).expanduser(), console or Console()
    folder.mkdir(parents=True, exist_ok=True)
    written: list[Path] = []
    with style(), _progress(console, len(PRIMERS)) as show:
        for name, draw in PRIMERS.items():
            show(name)
            picture = draw()
            written.append(folder / f"{picture.name}.png")
            with atomic_file(written[-1]) as partial:
                picture.write(partial)
    console.print(f"{len(written)} figures written to {escape(str(folder))}", highlight=False)
    return written


def _parts(seed: int, effort: Effort) -> list[tuple[str, str, Callable[[], Sequence[Picture]]]]:
    """(section, name, what to draw) of every part."""

    def distances() -> list[Picture]:
        curves = follow_rules(steps=effort.steps, paths=effort.paths, seed=seed)
        return [draw_figure_2(curves), draw_figure_14a(curves), draw_ten_rules(curves)]

    def preconditioners() -> list[Picture]:
        return [draw_biases(biases(effort.samples, effort.chains, effort.chains, seed))]

    def cancelling() -> list[Picture]:
        return [draw_cancellation(cancellation(steps=effort.chains, chains=effort.chains, seed=seed))]

    averaging, pulling, inverting = "Averaging without the lag", "Pulling to the average", "Preconditioners"
    parts: list[tuple[str, str, Callable[[], Sequence[Picture]]]] = [
        (averaging, "figure 1(a)", lambda: [draw_path(seed)]),
        (averaging, "figures 2 and 14(a)", distances),
        (pulling, "pull", lambda: [draw_pull(seed, 4 * effort.paths)]),
        (pulling, "guarantees", lambda: [draw_guarantees(seed, max(2, effort.paths // 5))]),
        (pulling, "controls", lambda: [draw_controls()]),
        (inverting, "biases", preconditioners),
        (inverting, "cancellation", cancelling),
    ]
    # A default argument binds each drawing, where a closure would see the last one only.
    primers = [("Seven traps", name, lambda draw=draw: [draw()]) for name, draw in PRIMERS.items()]
    return parts + primers


@contextmanager
def _progress(console: Console, total: int) -> Iterator[Callable[[str], None]]:
    columns = TextColumn("{task.description}"), BarColumn(bar_width=20), MofNCompleteColumn(), TimeElapsedColumn()
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("", total=total)
        started = False

        def show(name: str) -> None:
            nonlocal started
            progress.update(task, description=f"{name:22}", advance=1 if started else 0)
            started = True

        yield show


def _write_numbers(
    pictures: Sequence[Picture], seconds: Mapping[str, float], seed: int, effort: Effort, folder: Path
) -> None:
    record = {
        "lagless": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "seed": seed,
        "effort": vars(effort),
        "seconds": seconds,
        "figures": {p.name: {"title": p.title, "caption": p.caption, "numbers": p.numbers} for p in pictures},
    }
    (folder / NUMBERS).write_text(json.dumps(plain(record), ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
