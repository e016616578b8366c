"""Train for the model you return: averaged weights without the lag.

>>> from lagless import BEMA, trajectory_weights
>>> w = trajectory_weights(BEMA.paper(update_freq=10), range(0, 101, 10))
>>> round(float(w.sum()), 12)
1.0
"""

from importlib import import_module as _import_module
from typing import TYPE_CHECKING, Any as _Any

from lagless._citation import citation as citation
from lagless._deprecated import install as _install
from lagless._version import __version__ as __version__
from lagless.rules import (
    BEMA as BEMA,
    DEMA as DEMA,
    EMA as EMA,
    OUEMA as OUEMA,
    Anchor as Anchor,
    DecayAverage as DecayAverage,
    PowerEMA as PowerEMA,
    Reconstruction as Reconstruction,
    Rule as Rule,
    UniformAverage as UniformAverage,
    WarmupAverage as WarmupAverage,
    WarmupEMA as WarmupEMA,
    WindowAverage as WindowAverage,
    anchor as anchor,
    count_updates as count_updates,
    effective_iterates as effective_iterates,
    equivalent_schedule as equivalent_schedule,
    mean_age as mean_age,
    reconstruct as reconstruct,
    trajectory_weights as trajectory_weights,
    weight_on_start as weight_on_start,
)

if TYPE_CHECKING:
    from lagless.averaging import Averager as Averager
    from lagless.optim import GradientNoise as GradientNoise

_install()


_LATER = {"Averager": "lagless.averaging", "GradientNoise": "lagless.optim"}


def __getattr__(name: str) -> _Any:
    if name in _LATER:  # torch is loaded by what needs it, and not by `lagless --help`
        globals()[name] = value = getattr(_import_module(_LATER[name]), name)
        return value
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_LATER})
