"""What learned weights mean, in words and in one line of blocks."""

from __future__ import annotations

from collections.abc import Iterator

from lagless.lab.learn._learned import Comparison, Learned
from lagless.lab.statistics import LEVEL
from lagless.rules import schedule_of

_SHOWN = (("live", "best rule"), ("best checkpoint", "prior"))


def conclusions(found: Learned) -> Iterator[str]:
    """Yield what a reader should take away, the most important first."""
    by_role = {comparison.role: comparison for comparison in found.comparisons}
    count = len(found.parts.report.documents)
    shown = [_against(by_role[role]) for role in _SHOWN[found.steps is None] if role in by_role]
    yield f"learned weights: {', '.join(shown)}; on {count} documents that had no part in learning"
    if found.setting is None:
        yield "no weights that were tried beat the prior on the part that chooses: the prior is what is written"
    else:
        yield (
            f"chosen: mode {found.setting.mode}, ridge {found.setting.ridge:g}; {found.degrees_of_freedom:.1f} degrees "
            f"of freedom, {found.parts.fit.size:,} targets to fit them on; {len(found.evaluations)} evaluations, each "
            f"{found.reads[0] / len(found.evaluations):.2f} reads of the files"
        )
    if found.on_edge:
        yield (
            "warning: the weights sit on the edge of the trust region, so the loss may fall further beyond it. Allow "
            "more evaluations (--evaluations)"
        )


def schedule_in_words(found: Learned) -> str:
    """Return where along the run the schedule that the weights equal falls below 90 %, 50 % and 10 %."""
    assert found.steps is not None and len(found.group_names) == 1
    schedule, steps = schedule_of(found.weights)[1:], found.steps
    first, last = steps[0], steps[-1]
    below = []
    for level in (0.9, 0.5, 0.1):
        above = [step for c, step in zip(schedule, steps[1:], strict=True) if c >= level]
        if above and above[-1] < last:
            below.append(f"{level:.0%} for the last {(last - above[-1]) / (last - first):.0%} of the run")
    peak = f"between {schedule.min():.2f} and {schedule.max():.2f} of the rate that was used"
    return f"{peak}; below {', '.join(below)}" if below else peak


def _against(comparison: Comparison) -> str:
    difference = comparison.difference
    name = comparison.role if comparison.role == "live" else f"{comparison.role} ({comparison.name})"
    text = f"{difference.value:+.4f} ± {difference.standard_error:.4f} against {name}"
    return text if difference.p_value < LEVEL else f"{text} (no difference that shows)"
