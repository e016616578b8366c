"""Averages in PyTorch Lightning: ``Trainer(callbacks=[AveragingCallback(EMA(half_life_fraction=0.05))])``."""

try:
    from lagless.integrations.lightning._callback import AveragingCallback as AveragingCallback
    from lagless.integrations.lightning._checkpoint import load_average as load_average
except ModuleNotFoundError as error:
    if error.name not in ("lightning", "pytorch_lightning"):
        raise
    raise ImportError(f"{__name__} needs {error.name}: pip install 'lagless[lightning]'") from error
