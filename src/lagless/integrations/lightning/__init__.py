"""Averages in PyTorch Lightning: ``Trainer(callbacks=[AveragingCallback(EMA(half_life_fraction=0.05))])``."""

from lagless.integrations.lightning._callback import AveragingCallback as AveragingCallback
from lagless.integrations.lightning._checkpoint import load_average as load_average
