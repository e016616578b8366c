"""A grid of averaging rules for a run of given length."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields

from lagless._validation import require_integer
from lagless.rules import BEMA, DEMA, EMA, OUEMA, PowerEMA, Rule, UniformAverage, WindowAverage

EMA_POWERS = (0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
HALF_LIVES = (0.0025, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5)
CORRECTED_POWERS = (0.2, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
BIAS_POWERS = (0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5, 0.7)
WIDTHS = (0.02, 0.05, 0.1, 0.15, 0.2)
WINDOWS = (3, 5, 10)
SHARES = (0.02, 0.05, 0.1, 0.2, 0.5)
LAST_UPDATES = 1000


def default_rules(steps: int, *, update_freq: int | None = None, copies: int = 10) -> dict[str, Rule]:
    """About 190 settings of all families that suit a run of ``steps`` optimizer steps; their names are the calls.

    EMA by power κ and by half-life (a share of the run), BEMA and OUEMA over κ × η, DEMA over κ, PowerEMA by relative
    width, UniformAverage with burn-in, WindowAverage by number of snapshots and the share of the run they span.

    Args:
        steps: ≥ 1, the length of the run.
        update_freq: φ ≥ 1 for all but WindowAverage, whose snapshots lie further apart; None for steps/1000.
        copies: ≥ 1; rules that keep more copies of the parameters are left out.

    Raises:
        ValueError: if an argument is out of range or ``update_freq`` exceeds ``steps``.

    >>> list(default_rules(1000, copies=1))[:2]
    ['EMA(ema_power=0.2)', 'EMA(ema_power=0.3)']
    """
    require_integer("steps", steps, minimum=1)
    require_integer("copies", copies, minimum=1)
    freq = max(1, steps // LAST_UPDATES) if update_freq is None else update_freq
    require_integer("update_freq", freq, minimum=1)
    if freq > steps:
        raise ValueError(f"update_freq={freq} gives no update in {steps} steps; choose at most {steps}.")
    return {call(rule): rule for rule in _rules(steps, freq) if len(rule.buffer_keys) <= copies}


def _rules(steps: int, freq: int) -> Iterator[Rule]:
    for power in EMA_POWERS:
        yield EMA(ema_power=power, update_freq=freq)
    for share in HALF_LIVES:
        yield EMA(half_life=_rounded(share * steps), update_freq=freq)
    for power in CORRECTED_POWERS:
        yield DEMA.paper(ema_power=power, update_freq=freq)
        for bias in BIAS_POWERS:
            yield BEMA.paper(ema_power=power, bias_power=bias, update_freq=freq)
            yield OUEMA.paper(ema_power=power, bias_power=bias, update_freq=freq)
    for width in WIDTHS:
        yield PowerEMA(relative_width=width, update_freq=freq)
    for share in (0.0, 0.25, 0.5, 0.75):
        after = round(share * steps) // freq * freq
        if after + freq <= steps:
            yield UniformAverage(update_after=after, update_freq=freq)
    for window in WINDOWS:
        for share in SHARES:
            yield WindowAverage(window=window, update_freq=max(1, round(share * steps / window)))


def call(rule: Rule) -> str:
    """The call that makes ``rule``, without the arguments left at their defaults.

    >>> call(BEMA.paper(update_freq=10))
    'BEMA.paper(update_freq=10)'
    """
    kind = type(rule)
    paper = getattr(kind, "paper", None)
    on_paper = paper is not None and getattr(rule, "ema_power", None) is not None
    defaults = vars(paper()) if on_paper else {field.name: field.default for field in fields(rule)}  # type: ignore
    changed = [
        f"{field.name}={value!r}"
        for field in fields(rule)  # type: ignore[arg-type]
        if (value := getattr(rule, field.name)) != defaults[field.name]
    ]
    return f"{kind.__name__}{'.paper' if on_paper else ''}({', '.join(changed)})"


def _rounded(value: float) -> float:
    return float(f"{value:.3g}")
