"""Input that weights cannot be learned from."""

from __future__ import annotations

import math
from collections.abc import Sequence

from lagless.checkpoints import CheckpointError
from lagless.lab.learn._documents import Part
from lagless.lab.learn._modes import Floats

_SAME = 1e-6  # of the largest distance between checkpoints; about what float32 resolves


def refuse_few_targets(part: Part, free: int, least: float) -> None:
    """Refuse a fit part that is too small for the number of weights.

    Raises:
        ValueError: naming what there is and what is needed.
    """
    if part.size < least * free:
        raise ValueError(
            f"data: {part.size} targets to fit {free} free weights on, {part.size / free:.0f} for each; at least "
            f"{least:g} are needed ({math.ceil(least * free)} in all), or the weights fit chance. Give more held-out "
            "text, leave out checkpoints (--steps), or lower targets_per_weight (--targets-per-weight)."
        )


def refuse_nonfinite(names: Sequence[str], losses: Sequence[float]) -> None:
    """Refuse checkpoints at which the loss is NaN or infinite.

    Raises:
        ValueError: naming them.
    """
    if bad := [f"{name} ({loss})" for name, loss in zip(names, losses, strict=True) if not math.isfinite(loss)]:
        raise ValueError(
            f"the loss is not finite at {', '.join(bad[:5])}{', ...' if bad[5:] else ''}. The run has diverged there, "
            "or the loss does not fit the data: leave those checkpoints out (--steps), or mend the loss."
        )


def refuse_copies(names: Sequence[str], gram: Floats, fingerprints: Sequence[str]) -> None:
    """Refuse checkpoints that are equal, between which no weights can choose.

    Args:
        names: of the checkpoints.
        gram: <θ_i - θ_N, θ_j - θ_N>.
        fingerprints: of their contents.

    Raises:
        CheckpointError: naming two.
    """
    norms = gram.diagonal()
    squared = norms[:, None] + norms[None, :] - 2.0 * gram
    largest = float(squared.max())
    for j in range(len(names)):
        for i in range(j):
            if fingerprints[i] == fingerprints[j] or squared[i, j] <= _SAME**2 * largest:
                raise CheckpointError(
                    f"{names[i]} and {names[j]} hold the same weights (their distance is "
                    f"{math.sqrt(max(float(squared[i, j]), 0.0)):g} of {math.sqrt(max(largest, 0.0)):g} at most), so "
                    "that how a weight is divided between them means nothing. Leave one of them out (--steps)."
                )
