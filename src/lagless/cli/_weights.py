"""Weights of checkpoints as people give them: on the command line, or in a file."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def given_weights(text: str, steps: Sequence[int], normalize: bool) -> list[float]:
    """Return one weight for each checkpoint, θ_0's first.

    Args:
        text: numbers separated by commas, one for each step; or the path of a file: a JSON list of numbers, a JSON
            object or lines of "step weight" (steps that are left out have weight 0), or a ``lagless.json``.
        steps: of the checkpoints.
        normalize: divide the weights by their sum.

    Raises:
        ValueError: if they cannot be read, or belong to other steps.
    """
    path = Path(text).expanduser()
    try:
        numbers: Any = [float(part) for part in text.split(",")]
    except ValueError:
        numbers = _from_file(path)
    if isinstance(numbers, dict):
        unknown = sorted(numbers.keys() - set(steps))
        if unknown:
            raise ValueError(
                f"--weights {text}: step {unknown[0]} is not in the run, which has {', '.join(map(str, steps[:8]))}"
                f"{', ...' if len(steps) > 8 else ''}."
            )
        numbers = [numbers.get(step, 0.0) for step in steps]
    if normalize:
        total = math.fsum(numbers)
        if not math.isfinite(total) or abs(total) < 1e-12:
            raise ValueError(f"--weights {text} sum to {total:g}, and cannot be normalized.")
        numbers = [number / total for number in numbers]
    return numbers


def _from_file(path: Path) -> list[float] | dict[int, float]:
    try:
        content = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(
            f"--weights {str(path)!r} is neither numbers separated by commas nor a text file ({error})."
        ) from None
    try:
        if content.lstrip().startswith(("[", "{")):
            data = json.loads(content)
            if isinstance(data, dict) and "sources" in data:
                data = {source["step"]: source["weight"] for source in data["sources"]}
            return {int(s): float(w) for s, w in data.items()} if isinstance(data, dict) else [float(w) for w in data]
        rows = [line.replace(",", " ").split() for line in content.splitlines() if line.strip()]
        if all(len(row) == 1 for row in rows):
            return [float(row[0]) for row in rows]
        return {int(step): float(weight) for step, weight in rows}
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise ValueError(
            f"{path}: not a file of weights ({error}); write a JSON list, a JSON object of step: weight, or lines of "
            "step and weight."
        ) from None
