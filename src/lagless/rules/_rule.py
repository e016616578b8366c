"""What an averaging rule is: buffers that move by scalars, and an average read from them.

A rule owns r buffers b. At an update they move by scalars that depend on the tick alone, and the average is an affine
combination of them:

    b ← M b + v θ_t        M lower triangular, rows of [M v] sum to 1
    μ̂ = c·b + d θ_t        c·1 + d = 1
"""

from __future__ import annotations

import inspect
import warnings
from abc import ABC, abstractmethod
from collections.abc import Hashable
from typing import Any, ClassVar, NamedTuple

from lagless._validation import check_integer
from lagless.rules._calls import CheckedCall
from lagless.rules._clock import Tick, UpdateSchedule
from lagless.rules._gains import Gain
from lagless.rules._registry import register

Row = tuple[float, ...]


class UpdateCoefficients(NamedTuple):
    """``b ← M b + v θ_t``: ``matrix`` is M (r rows of r numbers), ``live`` is v (r numbers)."""

    matrix: tuple[Row, ...]
    live: Row


class ReadCoefficients(NamedTuple):
    """``μ̂ = c·b + d θ_t``: ``buffers`` is c (r numbers), ``live`` is d."""

    buffers: Row
    live: float


class InitialWeights(NamedTuple):
    """Label of a buffer that holds θ_0, as it is at the end of burn-in."""

    update_after: int


class EmaBuffer(NamedTuple):
    """Label of a buffer that holds the EMA of ``source`` (None: of the iterates) with the given gain and schedule."""

    gain: Gain
    schedule: UpdateSchedule
    source: Hashable = None


class SnapshotBuffer(NamedTuple):
    """Label of a buffer that holds one of the last ``window`` iterates."""

    slot: int
    window: int
    schedule: UpdateSchedule


class _FormerName(property):
    """A property that a subclass still defines under its former name."""

    def __init__(self, former: str) -> None:
        super().__init__(lambda rule: getattr(rule, former))


_FORMER = {"labels": "buffer_keys", "timing": "schedule"}


def _former(name: str, new: str) -> property:
    """A property under its former name, also for ``super().name`` of a subclass that defines it."""

    def read(rule: Rule) -> Any:
        warnings.warn(
            f"{type(rule).__name__}.{name} is called {new} now; the former name goes with the next release.",
            DeprecationWarning,
            stacklevel=2,
        )
        defined = (kind.__dict__[new] for kind in type(rule).__mro__ if new in kind.__dict__)
        own = next(value for value in defined if not isinstance(value, _FormerName))
        return own.__get__(rule, type(rule)) if hasattr(own, "__get__") else own

    return property(read)


class Rule(CheckedCall, ABC):
    """What every averaging rule is: hyperparameters, buffers, coefficients.

    To write a rule of your own, subclass with a frozen dataclass and give ``buffer_keys``, ``update`` and ``read``;
    then run ``lagless.testing.check_rule`` on it. A rule is known by its name from its definition on; a package
    declares its rules in the entry-point group ``lagless.rules``, which makes them known to commands and recipes.

    Attributes:
        update_after: τ, burn-in in optimizer steps, ≥ 0.
        update_freq: φ, optimizer steps from one update to the next, ≥ 1.
    """

    update_after: int
    update_freq: int
    recorded_when_given: ClassVar[tuple[str, ...]] = ()
    """Hyperparameters that a record of the rule leaves out where they are None."""

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        for former, new in _FORMER.items():
            defined = former in cls.__dict__ and new not in cls.__dict__
            if defined and former not in inspect.get_annotations(cls):  # a hyperparameter may be called so
                warnings.warn(
                    f"{cls.__name__} defines {former}, which is called {new} now: rename it. The former name goes with "
                    "the next release.",
                    DeprecationWarning,
                    stacklevel=2,
                )
                setattr(cls, new, _FormerName(former))
        register(cls)

    def __repr__(self) -> str:
        shown = ((name, value) for name, value in vars(self).items() if value is not None)
        return f"{type(self).__name__}({', '.join(f'{name}={value!r}' for name, value in shown)})"

    def __post_init__(self) -> None:
        check_integer(self, "update_after", minimum=0)
        check_integer(self, "update_freq", minimum=1)

    labels = _former("labels", "buffer_keys")
    timing = _former("timing", "schedule")

    @property
    def schedule(self) -> UpdateSchedule:
        """When this rule follows, updates and rests."""
        return UpdateSchedule(self.update_after, self.update_freq)

    @property
    @abstractmethod
    def buffer_keys(self) -> tuple[Hashable, ...]:
        """One label per buffer; buffers of different rules with equal labels have equal contents and are shared."""

    @abstractmethod
    def update(self, tick: Tick) -> UpdateCoefficients:
        """The coefficients M and v of the update ``tick``."""

    @abstractmethod
    def read(self, tick: Tick) -> ReadCoefficients:
        """The coefficients c and d of a read right after the update ``tick``."""


def lerp(beta: float) -> UpdateCoefficients:
    """The update of a single buffer towards the iterate: (1 - β) b + β θ."""
    return UpdateCoefficients(((1.0 - beta,),), (beta,))
