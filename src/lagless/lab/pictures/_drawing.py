"""How pictures of the laboratory look, and what a picture comes with."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter

from lagless.rules import FloatArray

# Okabe and Ito's colours, and two that go with them; dashes and direct labels tell lines apart in print.
COLOURS = {
    "live": "#4d4d4d",
    "EMA": "#0072B2",
    "BEMA": "#D55E00",
    "OUEMA": "#009E73",
    "DEMA": "#AA4499",
    "UniformAverage": "#56B4E9",
    "PowerEMA": "#B8860B",
    "WindowAverage": "#882255",
    "bound": "#000000",
}
MARKERS = {
    "live": "*",
    "EMA": "o",
    "BEMA": "s",
    "OUEMA": "^",
    "DEMA": "D",
    "UniformAverage": "v",
    "PowerEMA": "P",
    "WindowAverage": "X",
}
QUIET = "#8a8a8a"
_STYLE: dict[Any, Any] = {
    "font.size": 11,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 11.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.unicode_minus": True,
    "figure.facecolor": "white",
    "savefig.dpi": 130,
    "legend.frameon": False,
}


@dataclass(frozen=True)
class Picture:
    """A figure, and what it shows.

    Attributes:
        name: file name without its ending.
        title: a heading.
        caption: what to see, in sentences made from the numbers.
        figure: the drawing.
        numbers: what was drawn and said.
    """

    name: str
    title: str
    caption: str
    figure: Figure
    numbers: Mapping[str, Any] = field(default_factory=dict)

    def save(self, folder: Path) -> Path:
        """Write ``NAME.png`` into ``folder``."""
        path = folder / f"{self.name}.png"
        self.write(path)
        return path

    def write(self, path: Path) -> None:
        """Write the figure as PNG, whatever the file is called."""
        with style():  # some settings are looked up when a figure is drawn
            self.figure.savefig(path, format="png", bbox_inches="tight")


@contextmanager
def style() -> Iterator[None]:
    """Inside, figures look like those of the laboratory."""
    with matplotlib.rc_context(_STYLE):
        yield


def new_figure(width: float, height: float, columns: int = 1, **options: Any) -> tuple[Figure, list[Axes]]:
    """A figure with ``columns`` panels side by side; options are those of ``Figure.subplots``."""
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots(1, columns, squeeze=False, **options)
    return figure, list(axes[0])


def band(axes: Axes, x: FloatArray, mean: FloatArray, error: FloatArray, colour: str) -> None:
    """Shade the root of mean ± 2 standard errors."""
    low, high = np.sqrt(np.maximum(mean - 2.0 * error, 0.0)), np.sqrt(mean + 2.0 * error)
    axes.fill_between(x, low, high, color=colour, alpha=0.25, linewidth=0)


def logarithmic(axes: Axes, which: str, ticks: Sequence[float] = (1.0, 2.0, 5.0)) -> None:
    """Make the axes ``which``, "x", "y" or "xy", logarithmic, with plain numbers at ``ticks`` in every decade."""
    for letter in which:
        axes.set(**{f"{letter}scale": "log"})
        axis = axes.xaxis if letter == "x" else axes.yaxis
        axis.set_major_locator(LogLocator(subs=ticks))
        axis.set_major_formatter("{x:g}")
        axis.set_minor_formatter(NullFormatter())


def label_ends(axes: Axes, ends: Mapping[str, tuple[float, float, str]], apart: float = 0.062) -> None:
    """Write each label right of the axes at the height of its line's end, moved apart where labels would overlap.

    Args:
        axes: with its limits set.
        ends: label → (x, y, colour) of the last point.
        apart: smallest distance between labels, as a share of the height.
    """
    to_axes = axes.transData + axes.transAxes.inverted()
    heights = {label: float(to_axes.transform((x, y))[1]) for label, (x, y, _) in ends.items()}
    places = _spread([heights[label] for label in sorted(heights, key=heights.__getitem__)], apart)
    for label, place in zip(sorted(heights, key=heights.__getitem__), places, strict=True):
        x, y, colour = ends[label]
        axes.annotate(
            label,
            (x, y),
            (1.03, place),
            textcoords="axes fraction",
            va="center",
            color=colour,
            arrowprops={"arrowstyle": "-", "color": "#aaaaaa", "linewidth": 0.8, "shrinkA": 0, "relpos": (0.0, 0.5)},
            annotation_clip=False,
        )


def _spread(heights: Sequence[float], apart: float) -> list[float]:
    """Ascending heights in [0, 1] moved ``apart``: runs that collide are centred on their mean, all are kept inside."""
    groups: list[list[float]] = []
    for height in heights:
        groups.append([height])
        while len(groups) > 1 and _top(groups[-2], apart) + apart > _bottom(groups[-1], apart):
            groups[-2:] = [groups[-2] + groups[-1]]
    places = [_bottom(group, apart) + apart * i for group in groups for i in range(len(group))]
    for i in range(len(places)):
        places[i] = max(places[i], i * apart)
    for i in range(len(places)):
        places[-1 - i] = min(places[-1 - i], 1.0 - i * apart)
    return places


def _bottom(group: Sequence[float], apart: float) -> float:
    return float(np.mean(group)) - apart * (len(group) - 1) / 2.0


def _top(group: Sequence[float], apart: float) -> float:
    return _bottom(group, apart) + apart * (len(group) - 1)


def plain(value: Any) -> Any:
    """``value`` as JSON: arrays become lists, numbers keep six digits, NaN becomes None."""
    if isinstance(value, Mapping):
        return {str(key): plain(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple, np.ndarray)):
        return [plain(entry) for entry in value]
    if isinstance(value, (float, np.floating)):
        return float(f"{value:.6g}") if np.isfinite(value) else None
    return value.item() if isinstance(value, np.generic) else value


def listed(items: Sequence[str]) -> str:
    """ "a, b and c"."""
    return items[0] if len(items) == 1 else f"{', '.join(items[:-1])} and {items[-1]}"
