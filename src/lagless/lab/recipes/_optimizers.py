"""Sections for optimizers, made from the optimizers' own signatures and docstrings."""

from __future__ import annotations

import inspect
import re
from collections.abc import Sequence
from types import NoneType
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Union

import torch
from pydantic import Field, create_model, model_validator
from torch.optim import Optimizer

import lagless.optim
from lagless._signatures import Argument, arguments_of, choices_of
from lagless.lab.recipes._rules import AveragingRule
from lagless.lab.recipes._section import Section
from lagless.rules import EMA, Rule

ELSEWHERE = {
    "params": "the model's trainable parameters",
    "lr": "training.learning_rate",
    "process_group": "the processes that the launcher starts",
}
"""Arguments of optimizers that recipes set in another way, and how."""

NOT_IN_RECIPES = {
    "AveragedOptimizer": "what optimizers with an average have in common",
    "PrimalAveraging": "wraps another optimizer; its section is written out below",
    "Pullback": "wraps another optimizer; around AdamW it is pace",
}
"""Optimizers of lagless.optim without a section, and why."""

_KINDS = {"BiasCorrectedSophia": "sophia", "BiasCorrectedShampoo": "shampoo"}
_DTYPES = Literal["bfloat16", "float32", "float64"]

Beta = Annotated[float, Field(ge=0, lt=1)]


class OptimizerSection(Section):
    """What sections for optimizers have in common."""

    kind: str = Field(description="Which optimizer.")

    keeps_average: ClassVar[bool] = False
    """Whether the optimizer keeps the average that the method returns."""

    def settings(self) -> dict[str, Any]:
        """Return the arguments for the optimizer, without parameters and learning rate."""
        return {name: getattr(self, name) for name in type(self).model_fields if name != "kind"}


class AdamW(OptimizerSection):
    """torch.optim.AdamW."""

    kind: Literal["adamw"] = Field(description="torch.optim.AdamW.")  # pyright: ignore[reportIncompatibleVariableOverride]
    betas: tuple[Beta, Beta] = Field((0.9, 0.999), description="Decays of the first and second moment.")
    weight_decay: float = Field(0.01, ge=0, description="Decoupled, on all parameters.")
    eps: float = Field(1e-8, ge=0, description="Added to the root of the second moment.")


class ScheduleFree(OptimizerSection):
    """AdamWScheduleFree of the package schedulefree."""

    kind: Literal["schedule_free"] = Field(  # pyright: ignore[reportIncompatibleVariableOverride]
        description="AdamWScheduleFree of the package schedulefree."
    )
    betas: tuple[Beta, Beta] = Field((0.9, 0.999), description="Decays of the first and second moment.")
    weight_decay: float = Field(0.01, ge=0, description="Decoupled, on all parameters.")
    eps: float = Field(1e-8, ge=0, description="Added to the root of the second moment.")
    warmup_steps: int = Field(0, ge=0, description="Its own warm-up, which also weighs its average.")

    keeps_average: ClassVar[bool] = True


class PrimalAveraging(OptimizerSection):
    """lagless.optim.PrimalAveraging around AdamW."""

    kind: Literal["primal_averaging"] = Field(  # pyright: ignore[reportIncompatibleVariableOverride]
        description="lagless.optim.PrimalAveraging: AdamW with its gradients taken between its iterate and the average."
    )
    base: AdamW = Field(
        AdamW.model_validate({"kind": "adamw"}),
        description="The optimizer that steps; betas [0, β₂] for Schedule-Free.",
    )
    average: AveragingRule = Field(EMA(half_life_fraction=0.05), description="Rule of the average that is returned, x.")
    interpolation: float = Field(0.9, ge=0, le=1, description="Share of the average where the gradient is taken.")
    pull: float = Field(0.0, ge=0, le=1, description="How far the iterate moves to the average at its updates.")
    weight_decay_at_y: float = Field(0.0, ge=0, description="Decoupled weight decay where the gradient is taken.")

    keeps_average: ClassVar[bool] = True

    def make(self, groups: Any, lr: float) -> Optimizer:
        """Return the optimizer over parameter groups."""
        settings = self.settings()
        base = torch.optim.AdamW(groups, lr=lr, **settings.pop("base").settings())
        return lagless.optim.PrimalAveraging(base, settings.pop("average"), **settings)


class OwnOptimizer(OptimizerSection):
    """An optimizer of lagless. It checks its arguments itself."""

    make: ClassVar[type[Optimizer]]

    @model_validator(mode="after")
    def _checked(self) -> OwnOptimizer:
        weight = torch.nn.Parameter(torch.zeros(2, 2, dtype=torch.float32, device="cpu"))
        self.make([("weight", weight)], **self.settings())  # pyright: ignore
        return self

    def settings(self) -> dict[str, Any]:
        """Return the arguments for the optimizer, without parameters and learning rate."""
        hints = {name: argument.annotation for name, argument in arguments_of(self.make).items()}
        return {
            name: getattr(torch, value) if value is not None and torch.dtype in choices_of(hints[name]) else value
            for name, value in super().settings().items()
        }


def optimizer_section(make: type[Optimizer]) -> type[OwnOptimizer]:
    """Return the section for an optimizer: one field for each of its arguments."""
    kind = _KINDS.get(make.__name__) or re.sub(r"(?<=[a-z])(?=[A-Z][a-z])", "_", make.__name__).lower()
    about = (inspect.getdoc(make) or "").partition("\n")[0]
    fields: dict[str, Any] = {
        "kind": (Literal[kind], Field(description=f"lagless.optim.{make.__name__}: {about}")),  # pyright: ignore
        **{
            name: (_type(argument), Field(_default(argument), description=argument.text))
            for name, argument in arguments_of(make).items()
            if name not in ELSEWHERE
        },
    }
    section = create_model(make.__name__, __base__=OwnOptimizer, __module__=__name__, **fields)
    section.__doc__ = f"lagless.optim.{make.__name__}."
    section.make, section.keeps_average = make, hasattr(make, "applied")
    return section


def _type(argument: Argument) -> Any:
    """The type of a field: rules as mappings, dtypes by name, sequences as they survive a file."""
    choices = choices_of(argument.annotation)
    if torch.dtype in choices:
        return _DTYPES | None if NoneType in choices else _DTYPES
    if Rule in choices:
        return AveragingRule
    if argument.annotation == Sequence[str]:
        return tuple[str, ...]
    return argument.annotation


def _default(argument: Argument) -> Any:
    return ... if argument.default is inspect.Parameter.empty else argument.default


OWN: dict[str, type[OwnOptimizer]] = {
    name: optimizer_section(make)
    for name, make in vars(lagless.optim).items()
    if inspect.isclass(make)
    and issubclass(make, Optimizer)
    and name not in NOT_IN_RECIPES
    and "optimizer" not in inspect.signature(make).parameters
}
"""The sections of lagless's optimizers, by the optimizer's name."""

if TYPE_CHECKING:
    AnyOptimizer = OptimizerSection
else:
    AnyOptimizer = Annotated[Union[(AdamW, *OWN.values(), PrimalAveraging, ScheduleFree)], Field(discriminator="kind")]
