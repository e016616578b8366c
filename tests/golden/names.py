"""The public names that the golden tests use, so that a name that moves is one edit."""

from lagless import (
    BEMA as BEMA,
    DEMA as DEMA,
    EMA as EMA,
    OUEMA as OUEMA,
    Averager as Averager,
    PowerEMA as PowerEMA,
    UniformAverage as UniformAverage,
    WindowAverage as WindowAverage,
    trajectory_weights as trajectory_weights,
)
from lagless.checkpoints import open_checkpoint as open_checkpoint
from lagless.integrations.distributed import export_model as export_model
from lagless.integrations.lightning import AveragingCallback as AveragingCallback, load_average as load_average
from lagless.optim import (
    PACE as PACE,
    BiasCorrectedAdamW as BiasCorrectedAdamW,
    BiasCorrectedShampoo as BiasCorrectedShampoo,
    BiasCorrectedSophia as BiasCorrectedSophia,
    Pullback as Pullback,
)
from lagless.posthoc import average_checkpoints as average_checkpoints, combine_checkpoints as combine_checkpoints
