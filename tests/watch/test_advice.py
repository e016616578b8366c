"""Each sentence is said where the numbers show it, and nowhere else."""

from __future__ import annotations

from typing import Any

from lagless.watch._advice import advice

Row = dict[str, Any]


def lead(step: int, value: float, error: float | None = 0.01, over: str = "live") -> Row:
    row = {"event": "lead", "step": step, "name": "ema", "over": over, "lead": value}
    return row if error is None else row | {"standard_error": error}


LOSSES = {"live": dict.fromkeys(range(0, 200, 10), 2.0), "ema": dict.fromkeys(range(0, 200, 10), 1.9)}


def said(rows: list[Row]) -> str:
    return "; ".join(advice(LOSSES, rows))


def test_nothing_is_said_of_nothing() -> None:
    assert advice({}, []) == []


def test_the_best_rule_and_the_standard_error_of_its_lead() -> None:
    text = said([lead(10, 0.5), lead(20, 0.1), lead(20, 0.02, None, "bema")])
    assert text == (
        "best at step 20: ema, with a loss of 1.9000; its lead is +0.1000 ± 0.0100 over the checkpoint itself and "
        "+0.0200 (standard error not known) over bema"
    )


def test_averaging_has_stopped_helping_after_three_evaluations_in_a_row() -> None:
    helped = [lead(step, 0.1) for step in (10, 20)]
    assert "stopped" not in said(helped + [lead(30, 0.0), lead(40, 0.019)])
    assert "stopped helping since step 30" in said(helped + [lead(30, 0.0), lead(40, 0.019), lead(50, -0.2)])
    assert "stopped" not in said(helped + [lead(30, 0.0), lead(40, 0.0), lead(50, 0.02)])
    assert "stopped" not in said([lead(step, 0.0) for step in (30, 40, 50)])  # it never helped


def test_a_rate_that_decays() -> None:
    def rate(step: int, now: float, peak: float = 1e-3) -> Row:
        return {"event": "absorbed", "time": 0.0, "step": step, "learning_rate": now, "peak_rate": peak}

    assert "the rate is decaying: 0.0005 at step 20, 50% of its peak" in said([rate(10, 9e-4), rate(20, 5e-4)])
    assert "decaying" not in said([rate(10, 1e-3), rate(20, 9e-4)])
    assert "decaying" not in said([rate(10, 4e-4), rate(20, 5e-4)])  # warm-up
    assert "decaying" not in said([rate(10, 0.0, 0.0), rate(20, 0.0, 0.0)])


def test_evaluations_that_take_longer_than_checkpoints() -> None:
    absorbed = [{"event": "absorbed", "time": 10.0 * i, "step": 100 * i} for i in range(5)]
    slow, quick = ([{"event": "evaluated", "step": 100, "seconds": seconds}] for seconds in (25.0, 5.0))
    assert "an evaluation takes 25.0 s and a checkpoint comes every 10.0 s; --eval-every 300" in said(absorbed + slow)
    assert "less often" not in said(absorbed + quick)
    skipped = [{"event": "skipped", "step": 100, "text": ""}]
    assert "less often" in said(absorbed + quick + skipped)
