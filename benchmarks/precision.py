"""Error of averages stored in float32, relative to the way they went, after up to a million updates.

Weights move by 0.1 % in all, with noise of 2e-5 per step; every built-in rule at its default settings, and others with
small gains. The exact average is the weighted sum of the trajectory in float64.
Run: ``python benchmarks/precision.py [--steps 1000000]``. A million steps take 15 to 60 minutes.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator

import numpy as np
import torch
from _harness import report

from lagless import BEMA, EMA, Averager, PowerEMA, trajectory_weights
from lagless.averaging import _buffers
from lagless.rules import Rule
from lagless.rules._registry import built_in_rules

WEIGHTS, CHUNK = 64, 10_000


def rules(steps: int) -> dict[str, Rule]:
    """Return the rules to follow, by name."""
    known = {
        name: kind(**({"total_steps": steps} if name == "DecayAverage" else {}))
        for name, kind in built_in_rules().items()
    }
    return known | {
        "EMA-decay.9999": EMA(decay=0.9999),
        "EMA-decay.999999": EMA(decay=0.999999),
        "EMA-half_life_fraction.05": EMA(half_life_fraction=0.05),
        "EMA-half_life_fraction.2": EMA(half_life_fraction=0.2),
        "EMA-ema_power1": EMA(ema_power=1.0, lag=1.0),
        "PowerEMA-.2": PowerEMA(relative_width=0.2),
        "BEMA-paper-every-step": BEMA.paper(update_freq=1),
    }


def trajectory(steps: int) -> Iterator[np.ndarray]:
    """Yield the iterates 0 to ``steps`` in order, in chunks of shape (n, WEIGHTS), as float32 numbers."""
    generator = np.random.default_rng(0)
    start = generator.standard_normal(WEIGHTS).astype(np.float32) * np.float32(0.02)
    way = 1e-3 * start * generator.standard_normal(WEIGHTS)
    for begin in range(0, steps + 1, CHUNK):
        t = np.arange(begin, min(begin + CHUNK, steps + 1))[:, None]
        noise = 2e-5 * generator.standard_normal((len(t), WEIGHTS)) * (t > 0)
        yield (start + way * t / steps + start * noise).astype(np.float32)


def errors(steps: int) -> dict[str, float]:
    """Return the relative error of each rule after ``steps`` updates."""
    _buffers.LERP_C_SMALLEST = 1  # few weights go the way of many
    followed = rules(steps)
    weights = {name: trajectory_weights(rule, range(steps + 1)) for name, rule in followed.items()}
    exact = {name: np.zeros(WEIGHTS) for name in followed}
    chunks, begin, first = trajectory(steps), 0, np.zeros(WEIGHTS)
    live, averager = torch.zeros(WEIGHTS), None
    for chunk in chunks:
        for name in followed:
            exact[name] += weights[name][begin : begin + len(chunk)] @ chunk.astype(np.float64)
        for iterate in torch.from_numpy(chunk):
            live.copy_(iterate)
            if averager is None:
                averager, first = Averager({"w": live}, followed), chunk[0].astype(np.float64)
            else:
                averager.update()
        begin += len(chunk)
    assert averager is not None
    found = {name: averager.read(name)["w"].double().numpy() for name in followed}
    return {
        name: float(np.linalg.norm(found[name] - exact[name]) / np.linalg.norm(exact[name] - first))
        for name in followed
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=1_000_000)
    steps = parser.parse_args().steps
    found = errors(steps)
    for name, error in sorted(found.items(), key=lambda item: -item[1]):
        print(f"{name:32s} {error:.2e}")
    report(
        f"precision-{steps}",
        {"steps": steps, "weights": WEIGHTS, "relative error": found},
        {"largest relative error": (max(found.values()), "<=", 0.01)},
    )


if __name__ == "__main__":
    main()
