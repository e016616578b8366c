"""How the model is trained, and what is made of the trajectory: optimizer, learning rate over time, averages."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from lagless.lab.recipes._optimizers import AnyOptimizer
from lagless.lab.recipes._rules import AveragingRule
from lagless.lab.recipes._section import Section


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
    averages_steps: int | None = Field(
        None,
        ge=1,
        description="T of the runs that the averages are stated for. On a run of another length, training.max_steps, "
        "their φ, τ and γ are rescaled, so that they weigh the run's fractions t/T alike. None: taken as they are.",
    )
    returned: str = Field(
        "live",
        description="Which weights the method returns: the name of an average, live, or optimizer for the average that "
        "pace, schedule_free and primal_averaging keep. What sweeps compare by.",
    )
