"""The public names that the golden tests use, so that a name that moves is one edit."""

from lagless import BEMA as BEMA
from lagless import DEMA as DEMA
from lagless import EMA as EMA
from lagless import OUEMA as OUEMA
from lagless import Averager as Averager
from lagless import PowerEMA as PowerEMA
from lagless import UniformAverage as UniformAverage
from lagless import WindowAverage as WindowAverage
from lagless import trajectory_weights as trajectory_weights
from lagless.integrations.distributed import export_model as export_model
from lagless.integrations.lightning import AveragingCallback as AveragingCallback
from lagless.integrations.lightning import load_average as load_average
from lagless.optim import PACE as PACE
from lagless.optim import BiasCorrectedAdamW as BiasCorrectedAdamW
from lagless.optim import BiasCorrectedShampoo as BiasCorrectedShampoo
from lagless.optim import BiasCorrectedSophia as BiasCorrectedSophia
from lagless.optim import Pullback as Pullback
from lagless.posthoc import average_checkpoints as average_checkpoints
from lagless.posthoc import combine_checkpoints as combine_checkpoints
from lagless.posthoc import open_checkpoint as open_checkpoint
