"""Averages as weights over a run, and as the learning-rate schedules that they equal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from lagless.lab.pictures._drawing import new_figure
from lagless.rules import schedule_of


def draw_schedules(averages: Mapping[str, Sequence[float]], steps: Sequence[int], path: Path) -> None:
    """Draw weights and equivalent learning-rate schedules of averages into one picture.

    Args:
        averages: name → weight of each iterate, θ_0's first.
        steps: of the iterates.
        path: of the PNG.
    """
    figure, (left, right) = new_figure(11.0, 4.2, 2)
    for name, weights in averages.items():
        left.plot(steps, weights, marker=".", label=name or "average")
        right.step(steps[1:], schedule_of(weights)[1:], where="post", label=name or "average")
    left.axhline(0.0, color="grey", linewidth=0.8)
    left.set(xlabel="optimizer step", ylabel="weight of the checkpoint")
    highest = max(1.0, *(float(np.max(schedule_of(w)[1:])) for w in averages.values()))
    right.set(
        xlabel="optimizer step",
        ylabel="learning rate multiplied by",
        ylim=(min(0.0, right.get_ylim()[0]), 1.05 * highest),
    )
    left.legend(frameon=False)
    figure.savefig(path, dpi=120)
