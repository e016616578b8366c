"""How the model is trained, and what is made of the trajectory: optimizer, learning rate over time, averages."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, PlainSerializer, PlainValidator

from lagless.lab.recipes._section import Section
from lagless.rules import EMA, Rule, rule_from_dict, rule_to_dict


def _rule(value: Any) -> Rule:
    if isinstance(value, Rule):
        return value
    if not isinstance(value, dict):
        raise ValueError(f"{value!r} is no rule; write {{rule: BEMA, ema_power: 0.5}}")
    try:
        return rule_from_dict(value)
    except TypeError as error:  # a setting that is no number
        raise ValueError(str(error)) from error


AveragingRule = Annotated[Rule, PlainValidator(_rule), PlainSerializer(rule_to_dict)]

Beta = Annotated[float, Field(ge=0, lt=1)]


class Optimizer(Section):
    """What all optimizers here have."""

    betas: tuple[Beta, Beta] = Field((0.9, 0.999), description="Decays of the first and second moment.")
    weight_decay: float = Field(0.01, ge=0, description="Decoupled, on all parameters.")


class AdamW(Optimizer):
    """torch.optim.AdamW."""

    kind: Literal["adamw"] = Field(description="torch.optim.AdamW.")
    eps: float = Field(1e-8, ge=0, description="Added to the root of the second moment.")


class Pace(Optimizer):
    """lagless.optim.PACE."""

    kind: Literal["pace"] = Field(description="lagless.optim.PACE: AdamW pulled towards the average that is returned.")
    eps: float = Field(1e-8, gt=0, description="For Adam and for the gain of the pull.")
    pullback: float = Field(0.15, ge=0, description="c, the strength of the pull; 0 is AdamW with an average.")
    clamp: bool = Field(True, description="Gains end at 1.")
    average: AveragingRule = Field(
        EMA(ema_power=0.2, lag=1.0, min_ema_multiplier=1e-4, update_freq=1), description="What is pulled towards."
    )


class BiasCorrectedAdamW(Optimizer):
    """lagless.optim.BiasCorrectedAdamW."""

    kind: Literal["bias_corrected_adamw"] = Field(
        description="lagless.optim.BiasCorrectedAdamW; the microbatches of gradient accumulation are its folds."
    )
    eps: float = Field(1e-8, ge=0, description="Added to the root of the second moment.")
    cross_fit: Literal["none", "split", "symmetric", "leave_one_out"] = Field(
        "leave_one_out", description="Which microbatches numerator and preconditioner are taken from."
    )
    inverse_correction: Literal["none", "post_ema", "pre_ema", "jackknife"] = Field(
        "none", description="How the bias of the inverse is corrected."
    )


class TwoFold(Optimizer):
    """What the bias-corrected optimizers have that take numerator and preconditioner from two halves of a batch."""

    cross_fit: Literal["none", "split"] = Field(
        "split", description="Whether numerator and preconditioner are taken from different microbatches."
    )
    inverse_correction: Literal["none", "post_ema", "pre_ema"] = Field(
        "none", description="How the bias of the inverse is corrected."
    )


class Sophia(TwoFold):
    """lagless.optim.BiasCorrectedSophia."""

    kind: Literal["sophia"] = Field(description="lagless.optim.BiasCorrectedSophia: Sophia-G.")
    betas: tuple[Beta, Beta] = Field((0.965, 0.99), description="Decays of the momentum and of the curvature.")
    eps: float = Field(1e-12, gt=0, description="Added to the preconditioner.")
    rho: float = Field(0.05, gt=0, description="How much curvature counts.")
    batch_size: float = Field(gt=0, description="Samples that the curvature of one estimate is multiplied by.")
    clip: float = Field(1.0, gt=0, description="Largest update per coordinate, in learning rates.")
    hessian_freq: int = Field(10, ge=1, description="Steps between estimates of the curvature.")


class Shampoo(TwoFold):
    """lagless.optim.BiasCorrectedShampoo."""

    kind: Literal["shampoo"] = Field(description="lagless.optim.BiasCorrectedShampoo.")
    betas: tuple[Beta, Beta] = Field((0.9, 0.95), description="Decays of the momentum and of the factors.")
    damping: float = Field(1e-6, gt=0, description="Added to the factors' diagonals.")
    root_freq: int = Field(10, ge=1, description="Steps between roots.")
    block_size: int = Field(1024, ge=1, description="Longest side of a block; larger matrices are cut.")
    grafting: Literal["adamw", "none"] = Field("adamw", description="Whose norm each matrix's update gets.")


class ScheduleFree(Optimizer):
    """AdamWScheduleFree of the package schedulefree."""

    kind: Literal["schedule_free"] = Field(description="AdamWScheduleFree of the package schedulefree.")
    eps: float = Field(1e-8, ge=0, description="Added to the root of the second moment.")
    warmup_steps: int = Field(0, ge=0, description="Its own warm-up, which also weighs its average.")


AnyOptimizer = Annotated[
    AdamW | Pace | BiasCorrectedAdamW | Sophia | Shampoo | ScheduleFree, Field(discriminator="kind")
]


class Schedule(Section):
    """What all schedules have."""

    warmup_steps: int = Field(0, ge=0, description="W: the learning rate is lr·t/W at the steps t = 1, ..., W.")


class Constant(Schedule):
    """No decay."""

    kind: Literal["constant"] = Field(description="No decay.")


class Linear(Schedule):
    """A straight line from the end of warm-up to the end."""

    kind: Literal["linear"] = Field(description="Linear decay from the end of warm-up.")
    floor: float = Field(0.0, ge=0, le=1, description="Share of the learning rate that it ends at.")


class Cosine(Schedule):
    """Half a cosine from the end of warm-up to the end."""

    kind: Literal["cosine"] = Field(description="Cosine decay from the end of warm-up.")
    floor: float = Field(0.0, ge=0, le=1, description="Share of the learning rate that it ends at.")


class WarmupStableDecay(Schedule):
    """Constant, then a straight line."""

    kind: Literal["wsd"] = Field(description="Warm-up, stable, decay: linear decay at the end only.")
    decay: float = Field(0.2, gt=0, le=1, description="Last share of the run, in which it decays.")
    floor: float = Field(0.0, ge=0, le=1, description="Share of the learning rate that it ends at.")


class Power(Schedule):
    """A power of time, which is what PACE amounts to where its gain is clamped."""

    kind: Literal["power"] = Field(description="lr·(1 + t)^-κ at step t: PACE's own decay where its gain is clamped.")
    exponent: float = Field(ge=0, description="κ.")


AnySchedule = Annotated[Constant | Linear | Cosine | WarmupStableDecay | Power, Field(discriminator="kind")]


class Method(Section):
    """The optimizer, its schedule, and the averages that follow the weights."""

    optimizer: AnyOptimizer = Field(description="What makes the steps.")
    schedule: AnySchedule = Field(description="The learning rate over time.")
    averages: dict[str, AveragingRule] = Field(
        {}, description="Averages that are followed, evaluated and written: name → rule and its arguments."
    )
    returned: str = Field(
        "live",
        description="Which weights the method returns: the name of an average, live, or optimizer for the average that "
        "pace and schedule_free keep. What sweeps compare by.",
    )
