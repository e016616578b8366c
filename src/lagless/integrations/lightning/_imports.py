"""Lightning under either of its names, ``lightning.pytorch`` or ``pytorch_lightning``."""

from typing import Any

try:
    from lightning.pytorch import Callback as Callback, LightningModule as LightningModule
    from lightning.pytorch.loggers.logger import DummyLogger as DummyLogger
    from lightning.pytorch.utilities.rank_zero import rank_zero_warn as rank_zero_warn
    from lightning.pytorch.utilities.seed import isolate_rng as isolate_rng
except ModuleNotFoundError:
    from pytorch_lightning import Callback as Callback, LightningModule as LightningModule
    from pytorch_lightning.loggers.logger import DummyLogger as DummyLogger
    from pytorch_lightning.utilities.rank_zero import rank_zero_warn as rank_zero_warn
    from pytorch_lightning.utilities.seed import isolate_rng as isolate_rng

Trainer = Any  # of either name; its callbacks and flags are attributes that only exist at run time
