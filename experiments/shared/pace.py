"""PACE and its baselines as fields of a recipe, and claims that compare them."""

from __future__ import annotations

from typing import Any

from lagless.lab.report import Claim

CLAMPED = 1e12  # a pullback that clamps every gain
KAPPAS = tuple(i / 10 for i in range(2, 10))
WARMUP = 20
PAPER = "Au and Block, arXiv 2606.25086"


def ema(kappa: float) -> dict[str, Any]:
    """Return the recipe's section for an EMA with exponent κ."""
    return {"rule": "EMA", "ema_power": kappa, "lag": 1.0, "min_ema_multiplier": 1e-4, "update_freq": 1}


def schedule(kind: str, **more: Any) -> dict[str, Any]:
    """Return the recipe's section for a learning-rate schedule after the warm-up."""
    return {"kind": kind, "warmup_steps": WARMUP, **more}


def pace(schedule: dict[str, Any], **more: Any) -> dict[str, Any]:
    """Return the fields for PACE, which returns its own average."""
    return {
        "method.optimizer": {"kind": "pace", "average": ema(0.5), **more},
        "method.schedule": schedule,
        "method.returned": "optimizer",
    }


def adamw(schedule: dict[str, Any]) -> dict[str, Any]:
    """Return the fields for AdamW, which returns its live weights."""
    return {"method.optimizer": {"kind": "adamw"}, "method.schedule": schedule, "method.returned": "live"}


EMAS = {f"ema{kappa}": {"kappa": kappa} for kappa in KAPPAS}
WITH_EMAS = adamw(schedule("constant")) | {
    "method.averages": {name: ema(kappa) for name, kappa in zip(EMAS, KAPPAS, strict=True)}
}
SCHEDULE_FREE = {
    "method.optimizer": {"kind": "schedule_free", "warmup_steps": WARMUP},
    "method.schedule": {"kind": "constant"},
    "method.returned": "optimizer",
}


def claim(text: str, method: str, baseline: str, source: str, number: str | None = None, sign: int = -1) -> Claim:
    """Return a claim about test losses at settings chosen on validation."""
    return Claim(
        text=text,
        source=source,
        number=number,
        method=method,
        baseline=baseline,
        score="test/loss",
        claimed=-1 if sign < 0 else 1,
        selected_by="valid/loss",
    )
