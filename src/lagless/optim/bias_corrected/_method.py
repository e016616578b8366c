"""What an optimizer does with collected microbatches: the part in which bias-corrected optimizers differ."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar

from torch import Tensor

from lagless.optim._loaded_state import Entry, wide_dtype
from lagless.optim.bias_corrected._collected import Collected
from lagless.optim.bias_corrected._microbatches import Microbatches
from lagless.optim.bias_corrected._report import CorrectionSums
from lagless.optim.bias_corrected._sums import Sums

Group = dict[str, Any]
States = Mapping[Tensor, dict[str, Any]]


class Method(ABC):
    """A way to step parameters from what is known about their microbatches.

    Args:
        name: of the optimizer, for errors.
    """

    plain: ClassVar[Group]
    """The settings of a group of parameters that are excluded from corrections."""
    plain_words: ClassVar[str] = "no correction"

    def __init__(self, name: str) -> None:
        self.name = name

    @abstractmethod
    def check(self, owner: object, group: Group, alone: bool) -> None:
        """Raise ValueError for bad hyperparameters.

        Args:
            owner: the optimizer, for errors.
            group: the hyperparameters; those that are None for "as fits the others" are set.
            alone: whether there are no data-parallel processes.
        """

    @abstractmethod
    def needs(self, states: States, group: Group, parameter: Tensor) -> tuple[Sums | None, bool]:
        """Return what to sum over a parameter's microbatches, and whether to keep their gradients."""

    @abstractmethod
    def update(
        self, states: States, group: Group, collected: dict[Tensor, Collected], sums: CorrectionSums | None
    ) -> None:
        """Step the parameters of a group; ``sums`` wants to know about the correction, or is None."""

    @staticmethod
    def corrected(group: Group) -> bool:
        """Whether a group is stepped otherwise than excluded ones."""
        return corrects(group)

    def entries(self, group: Group, parameter: Tensor) -> dict[str, Entry]:
        """Return the tensors of a parameter's state, besides the count of steps, once it has one."""
        return dict.fromkeys(("exp_avg", "exp_avg_sq"), Entry(parameter.shape, (wide_dtype(parameter),)))

    def records(self, states: States, group: Group, step: int, former: int | None, freq: int) -> bool:
        """Whether to record ``step`` (1-based) of a corrected group, where ``former`` was the latest that was."""
        return step > group.get("warm_start", 0) and (former is None or step % freq == 0)

    def totals(
        self, states: States, groups: Sequence[Group], microbatches: Microbatches
    ) -> Iterable[dict[Any, Tensor]]:
        """Return sums of its own, over all processes, that must be finite for a step."""
        return ()

    def require_ready(self, states: States, groups: Sequence[Group], microbatches: Microbatches) -> None:  # noqa: B027
        """Raise RuntimeError, before anything has changed, if something is missing for a step of ``groups``."""

    def forget(self) -> None:  # noqa: B027
        """Forget what was collected for the step."""

    def loaded(self, states: States, groups: Sequence[Group]) -> None:  # noqa: B027
        """Follow a state that was loaded."""


def corrects(group: Group) -> bool:
    """Return whether a group's hyperparameters ask for a correction."""
    return group["cross_fit"] != "none" or group["inverse_correction"] != "none"


def steps_taken(states: States, group: Group) -> int:
    """Return how many steps the parameter of a group that has taken most has."""
    taken = [int(states[p]["step"]) for p in group["params"] if p in states and "step" in states[p]]
    return max(taken, default=0)


def tensors_of(group: Group) -> list[Tensor]:
    """Return the parameters of a group, named or not."""
    return [p[1] if isinstance(p, tuple) else p for p in group["params"]]
