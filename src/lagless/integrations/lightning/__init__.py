"""Averages in PyTorch Lightning: ``Trainer(callbacks=[AveragingCallback(BEMA())])``."""

from lagless.integrations.lightning._callback import AveragingCallback as AveragingCallback
from lagless.integrations.lightning._checkpoint import load_average as load_average
