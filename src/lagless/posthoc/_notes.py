"""What a user may not expect of an average."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from lagless.checkpoints import Trajectory, logged_rates
from lagless.posthoc._average import AverageSummary
from lagless.posthoc._merged_factors import factor_pairs
from lagless.rules import WindowAverage, common_update_freq, rate_note, spread_note, start_note


def notes_on(s: AverageSummary) -> Iterator[str]:
    """Yield what a user may not expect of an average, a sentence each."""
    spread = spread_note(s.rule, s.effective_iterates, len(s.steps) - 1, kind="checkpoints")
    if s.rule is None:
        if spread:
            yield spread
        return
    skipped = [step for step in s.steps[1:] if step > s.rule.update_after and not s.rule.schedule.updates(step)]
    if skipped[-1:] == [s.steps[-1]]:
        skipped.pop()  # the last one counts in any case
    if skipped:
        yield (
            f"update_freq={s.rule.update_freq} leaves out {len(skipped)} of {len(s.steps)} checkpoints (steps "
            f"{short_steps(tuple(skipped))}); {common_update_freq(s.steps, s.rule.update_after)} uses all"
        )
    if isinstance(s.rule, WindowAverage):
        yield f"θ_0 (step {s.steps[0]}) is not one of the snapshots averaged"
        if len(s.steps) - 1 < s.rule.window:
            yield f"these are all {len(s.steps) - 1} there are, fewer than window={s.rule.window}"
    start = start_note(s.rule, s.anchor, s.steps[-1])
    if spread and (not start or s.effective_iterates < 1.0):
        yield spread
    if start:
        yield start


def decay_note(trajectory: Trajectory) -> str | None:
    """Return what a learning rate that ended low means for averages; None without a log of it or without a decay."""
    rates = logged_rates(trajectory.checkpoints[-1].folder)
    return rate_note(rates[max(rates)] / max(rates.values())) if rates else None


def factors_note(trajectory: Trajectory) -> str | None:
    """Return what the factors of LoRA adapters lose when each is averaged by itself; None without any."""
    layers = len(factor_pairs(dict(trajectory.checkpoints[-1].tensors)))
    if not layers:
        return None
    return (
        f"A and B of {layers} LoRA layers are averaged apart: their product is not the average of the products BA, as "
        "it mixes factors of different steps. lagless average --merged-lora averages BA itself, as does "
        "AveragingCallback(merged_lora=True) while training"
    )


def short_steps(steps: Sequence[int]) -> str:
    """Return steps as text, with the middle left out where there are many."""
    return ", ".join(map(str, steps)) if len(steps) <= 8 else f"{steps[0]}, {steps[1]}, ..., {steps[-1]}"
