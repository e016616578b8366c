"""Other names of arguments: the papers' symbols, and what other libraries call them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from numbers import Real
from typing import Any, cast

_DECAY = ("decay", "betas")

OTHER_NAMES: Mapping[str, tuple[str, ...]] = {
    **dict.fromkeys(("kappa", "κ"), ("ema_power",)),
    **dict.fromkeys(("eta", "η"), ("bias_power", "lr")),
    **dict.fromkeys(("phi", "φ"), ("update_freq",)),
    **dict.fromkeys(("rho", "ρ"), ("lag",)),
    **dict.fromkeys(("tau", "τ"), ("update_after", "warmup_steps")),
    **dict.fromkeys(("gamma", "γ"), ("multiplier", "inv_gamma")),
    **dict.fromkeys(("beta", "β", "alpha", "α", "momentum", "mu", "μ", "m", "gain", "ema_decay", "decay_rate"), _DECAY),
    **dict.fromkeys(("beta1", "β1", "beta_1", "beta2", "β2", "beta_2"), ("betas",)),
    **dict.fromkeys(("halflife", "half_life_steps"), ("half_life",)),
    **dict.fromkeys(("fraction", "width", "sigma_rel", "f"), ("half_life_fraction", "relative_width", "duration")),
    **dict.fromkeys(("window_size", "size", "k"), ("window", "steps")),
    **dict.fromkeys(("update_every", "every", "interval", "update_interval"), ("update_freq",)),
    **dict.fromkeys(("burn_in", "burnin", "start_step", "update_after_step", "swa_start"), ("update_after",)),
    **dict.fromkeys(("warmup", "warm_up"), ("warmup_steps", "update_after")),
    **dict.fromkeys(("num_steps", "max_steps", "T"), ("total_steps",)),
    **dict.fromkeys(("learning_rate", "eta_lr"), ("lr",)),
    **dict.fromkeys(("wd", "lambda_", "λ"), ("weight_decay",)),
    **dict.fromkeys(("epsilon", "ε"), ("eps",)),
    **dict.fromkeys(("pull_strength", "c", "strength"), ("pullback", "pull", "correction")),
    **dict.fromkeys(("rule", "rules", "ema", "average", "averaging"), ("rules", "average", "rule")),
    **dict.fromkeys(("model", "module"), ("source",)),
    **dict.fromkeys(("parameters",), ("params",)),
    **dict.fromkeys(("opt", "base_optimizer", "inner"), ("optimizer",)),
}
"""Other name → the arguments it may mean, the likeliest first."""

NUMBERS = (
    "decay", "half_life_fraction", "relative_width", "window", "warmup_steps", "half_life", "duration", "update_freq",
    "update_after",
)  # fmt: skip
"""The arguments that a number without a name may mean, the likeliest first."""

EXAMPLES: Mapping[str, Any] = {
    "half_life_fraction": 0.05,
    "relative_width": 0.1,
    "window": 10,
    "decay": 0.999,
    "warmup_steps": 100,
    "duration": 0.2,
    "total_steps": 1000,
}
"""A sensible value of the arguments that set how far back an average reaches."""


def translated(name: str, value: Any, argument: str, default: Any) -> Any:
    """Return ``value``, given under another ``name``, as a value of ``argument``, whose default is ``default``."""
    if isinstance(value, bool) or not isinstance(value, Real):
        return value
    if argument == "betas":
        first, second = cast("tuple[Any, Any]", default) if isinstance(default, tuple) else (0.9, 0.999)
        return (first, value) if "2" in name else (value, second)
    if argument == "decay" and value < 0.5:  # type: ignore[operator]
        return round(1.0 - float(value), 12)  # a gain, the weight of the newest iterate
    return value


def candidates(value: float) -> Iterator[str]:
    """Yield the arguments that the number ``value`` may mean. What is near 1 is a decay and no fraction of a run."""
    for name in NUMBERS:
        near_one = 0.5 <= value < 1.0
        if (name == "decay") <= near_one and not (near_one and name in ("half_life_fraction", "relative_width")):
            yield name
