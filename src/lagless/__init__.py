"""Train for the model you return: averaged weights without the lag.

>>> from lagless import BEMA, trajectory_weights
>>> w = trajectory_weights(BEMA(update_freq=10), range(0, 101, 10))
>>> round(float(w.sum()), 12)
1.0
"""

from lagless._version import __version__ as __version__
from lagless.averaging import Averager as Averager
from lagless.filters import (
    Anchor as Anchor,
)
from lagless.filters import (
    anchor as anchor,
)
from lagless.filters import (
    count_updates as count_updates,
)
from lagless.filters import (
    effective_iterates as effective_iterates,
)
from lagless.filters import (
    mean_age as mean_age,
)
from lagless.filters import (
    trajectory_weights as trajectory_weights,
)
from lagless.filters import (
    weight_on_start as weight_on_start,
)
from lagless.reconstruction import Reconstruction as Reconstruction
from lagless.reconstruction import reconstruct as reconstruct
from lagless.rules import BEMA as BEMA
from lagless.rules import DEMA as DEMA
from lagless.rules import EMA as EMA
from lagless.rules import OUEMA as OUEMA
from lagless.rules import PowerEMA as PowerEMA
from lagless.rules import Rule as Rule
from lagless.rules import UniformAverage as UniformAverage
from lagless.rules import WindowAverage as WindowAverage
