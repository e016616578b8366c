"""Pictures of a study: curves over training with bands over seeds, and maps over two hyperparameters."""

from __future__ import annotations

import io

import matplotlib
import numpy as np
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure as Canvas

from lagless.lab.report._compare import best_setting, finalists, score_of, settings_of
from lagless.lab.report._study import Figure, Run, Study
from lagless.lab.statistics import mean

_MOST_ACROSS = 6
_COLOURS = matplotlib.colormaps["tab10"].colors  # type: ignore[attr-defined]


def draw(study: Study, figure: Figure) -> bytes:
    """A figure as PNG."""
    canvas = Canvas(figsize=(8, 4.2), layout="constrained")
    (_curves if figure.kind == "curves" else _map)(canvas, study, figure)
    buffer = io.BytesIO()
    canvas.savefig(buffer, format="png", dpi=110)
    return buffer.getvalue()


def _curves(canvas: Canvas, study: Study, figure: Figure) -> None:
    axes = canvas.subplots()
    for i, method in enumerate(figure.methods):
        runs = _best(study, figure, method)
        curves = [np.asarray(run.curves[figure.score], dtype=float) for run in runs if figure.score in run.curves]
        if not curves:
            raise ValueError(f"{study.name}: the chosen runs of {method!r} have no curve of {figure.score!r}.")
        steps, values = curves[0][:, 0], np.stack([curve[:, 1] for curve in curves])
        centre, spread = values.mean(axis=0), values.std(axis=0, ddof=min(1, len(values) - 1)) / np.sqrt(len(values))
        line = ("-", "--", ":")[i // 10 % 3]
        axes.plot(steps, centre, line, label=f"{method} (n = {len(values)})", color=_COLOURS[i % 10])
        axes.fill_between(steps, centre - 2 * spread, centre + 2 * spread, color=_COLOURS[i % 10], alpha=0.2, lw=0)
    axes.set(xlabel="optimizer step", ylabel=figure.score)
    canvas.legend(loc="outside right center", frameon=False)


def _map(canvas: Canvas, study: Study, figure: Figure) -> None:
    panels = np.atleast_1d(canvas.subplots(1, len(figure.methods), sharey=True))
    tables = [_table(study, figure, method) for method in figure.methods]
    finite = np.concatenate([table[2][np.isfinite(table[2])] for table in tables])
    if figure.minus is None:
        low, high, colours = float(finite.min()), float(finite.max()), "viridis"
    else:
        high = float(np.abs(finite).max())
        low, colours = -high, "RdBu_r"
    norm = Normalize(low, high)
    for axes, method, (xs, ys, values) in zip(panels, figure.methods, tables, strict=True):
        image = axes.imshow(values, origin="lower", aspect="auto", norm=norm, cmap=colours)
        upright = 90 if len(xs) > _MOST_ACROSS else 0  # many columns leave no room for numbers side by side
        axes.set_xticks(range(len(xs)), xs, rotation=upright)
        axes.set_yticks(range(len(ys)), ys)
        axes.set(title=method, xlabel=figure.x)
        for (row, column), value in np.ndenumerate(values):
            if np.isfinite(value):
                dark = sum(image.to_rgba(value)[:3]) < 1.5
                text = f"{value:+.3f}" if figure.minus else f"{value:.3f}"
                colour = "white" if dark else "black"
                axes.text(column, row, text, ha="center", va="center", fontsize=7, color=colour, rotation=upright)
    panels[0].set_ylabel(str(figure.y))
    label = figure.score if figure.minus is None else f"{figure.score} minus {figure.minus}"
    canvas.colorbar(ScalarMappable(norm, colours), ax=list(panels), label=label)


def _table(study: Study, figure: Figure, method: str) -> tuple[list[str], list[str], np.ndarray]:
    """Labels along x and y, and the mean score over seeds; the best over hyperparameters that are neither x nor y."""
    settings = _mapped(study, figure, method)
    groups = [group for group in settings if all(run.scores is not None for run in group)]
    subtract = _reference(study, figure)
    x, y = str(figure.x), str(figure.y)
    xs = sorted({group[0].setting[x] for group in groups}, key=_order)
    ys = sorted({group[0].setting[y] for group in groups}, key=_order)
    values = np.full((len(ys), len(xs)), np.nan)
    for group in groups:
        at = ys.index(group[0].setting[y]), xs.index(group[0].setting[x])
        found = [score_of(r, figure.score) - (0.0 if figure.minus is None else subtract[r.seed]) for r in group]
        values[at] = np.fmin(values[at], mean(found).value)
    return [_label(v) for v in xs], [_label(v) for v in ys], values


def _mapped(study: Study, figure: Figure, method: str) -> list[list[Run]]:
    """The settings of a map: where some were tried on seeds of their own, those, as only few of them are reported."""
    tuning = settings_of(study.runs, method, figure.at, tuning=True)
    return finalists(tuning) if tuning else settings_of(study.runs, method, figure.at)


def _reference(study: Study, figure: Figure) -> dict[int, float]:
    if figure.minus is None:
        return {}
    best = best_setting(_mapped(study, figure, figure.minus), figure.selected_by or figure.score)
    return {run.seed: score_of(run, figure.score) for run in best}


def _best(study: Study, figure: Figure, method: str) -> list[Run]:
    return best_setting(settings_of(study.runs, method, figure.at), figure.selected_by or figure.score)


def _label(value: object) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def _order(value: object) -> tuple[bool, float, str]:
    number = isinstance(value, int | float)
    return not number, float(value) if isinstance(value, int | float) else 0.0, str(value)
