"""What the table and the page show, from the rows of the metrics and the state."""

from __future__ import annotations

import inspect
import threading
import zlib
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from lagless.rules import mean_age, rule_to_dict, schedule_of, trajectory_weights, weight_on_start
from lagless.watch._advice import advice

if TYPE_CHECKING:
    from lagless.watch._watch import Watch

_MOST_POINTS = 400
_MOST_EVENTS = 40
_QUIET = ("absorbed", "evaluated", "lead")
_MOST_ROWS = 20_000


class View:
    """Rows so far, and what they add up to; a sink of a watch.

    Args:
        rows: those of an earlier watch.
    """

    def __init__(self, rows: Iterable[dict[str, Any]] = ()) -> None:
        self._rows = list(rows)[-_MOST_ROWS:]
        self._lock, self._count = threading.Lock(), 0

    def __call__(self, row: dict[str, Any]) -> None:
        """Take a row."""
        with self._lock:
            self._rows.append(row)
            del self._rows[: max(0, len(self._rows) - _MOST_ROWS)]
            self._count += 1

    def version(self, watch: Watch) -> str:
        """Another text whenever there is something else to show."""
        pending = sorted((one.seen.path.name, one.torn, one.readiness.reason or "") for one in watch.pending)
        return f"{self._count}-{zlib.crc32(repr(pending).encode())}"

    def losses(self) -> dict[str, dict[int, tuple[float, float | None]]]:
        """Loss and standard error, by name and step; of a step that was measured twice the later."""
        found: dict[str, dict[int, tuple[float, float | None]]] = {}
        for row in self.rows():
            if row.get("event") == "rolled back":
                for steps in found.values():
                    for step in [step for step in steps if step >= row["step"]]:
                        del steps[step]
            if row.get("loss") is not None and "name" in row:
                found.setdefault(row["name"], {})[row["step"]] = row["loss"], row.get("standard_error")
        return found

    def rows(self) -> list[dict[str, Any]]:
        """All rows, oldest first."""
        with self._lock:
            return list(self._rows)

    def data(self, watch: Watch) -> dict[str, Any]:
        """Everything that is shown, as plain JSON."""
        rows, losses, record = self.rows(), self.losses(), watch.averages.record
        steps, absorbed = record.steps, [row for row in rows if row.get("event") == "absorbed"]
        best = watch.models.kept[0] if watch.models.kept else None
        return {
            "version": self.version(watch),
            "run": str(watch.run),
            "out": str(watch.out),
            "step": steps[-1] if steps else None,
            "checkpoints": len(steps),
            "losses": {
                name: [[step, *values] for step, values in thinned(sorted(found.items()))]
                for name, found in losses.items()
            },
            "averages": [_average(name, rule, steps) for name, rule in record.rules.items()],
            "best": best and {"name": best.name, "step": best.step, "loss": best.loss, "path": str(watch.models.best)},
            "advice": advice({n: {s: v[0] for s, v in found.items()} for n, found in losses.items()}, rows),
            "pending": [f"{one.seen.path.name}: {_why(one.torn, one.readiness.reason)}" for one in watch.pending],
            "events": [
                {key: row.get(key) for key in ("time", "event", "text", "step")}
                for row in [row for row in rows if row.get("text") and row["event"] not in _QUIET[1:]][-_MOST_EVENTS:]
            ],
            "disk": {"state": watch.averages.store.nbytes(), "models": watch.models.nbytes()},
            "seconds": {
                "absorbing": sum(row["seconds"] for row in absorbed),
                "evaluating": sum(row["seconds"] for row in rows if row.get("event") == "evaluated"),
                "last": absorbed[-1]["seconds"] if absorbed else None,
            },
        }


def thinned(points: list[Any]) -> list[Any]:
    """At most a few hundred points, the first and the last among them."""
    if len(points) <= _MOST_POINTS:
        return points
    return [points[round(i * (len(points) - 1) / (_MOST_POINTS - 1))] for i in range(_MOST_POINTS)]


def _average(name: str, rule: Any, steps: list[int]) -> dict[str, Any]:
    defaults = {key: parameter.default for key, parameter in inspect.signature(type(rule)).parameters.items()}
    given = rule_to_dict(rule)
    settings = {key: value for key, value in given.items() if key in defaults and value != defaults[key]}
    shown = {"name": name, "rule": type(rule).__name__, "settings": settings}
    try:
        weights = trajectory_weights(rule, steps) if len(steps) > 1 else None
    except ValueError:  # there is no average by this rule yet
        weights = None
    if weights is None:
        return shown
    points = thinned(list(zip(steps, weights.tolist(), schedule_of(weights).tolist(), strict=True)))
    return shown | {
        "mean_age": mean_age(weights, steps),
        "on_start": weight_on_start(weights),
        "weights": [[step, weight] for step, weight, _ in points],
        "schedule": [[step, c] for step, _, c in points],
    }


def _why(torn: bool, reason: str | None) -> str:
    if reason is None:
        return "still changing"
    return f"torn: {reason}" if torn else reason
