"""Averages of stored checkpoints: find them, combine them in one pass, write models that load."""

from lagless._deprecated import former_names as _former_names
from lagless.posthoc._average import (
    AverageSummary as AverageSummary,
    RunSummary as RunSummary,
    average_checkpoints as average_checkpoints,
    inspect_run as inspect_run,
)
from lagless.posthoc._combine import combine_checkpoints as combine_checkpoints
from lagless.posthoc._groups import TensorGroups as TensorGroups
from lagless.posthoc._merge import merge_models as merge_models
from lagless.posthoc._notes import (
    decay_note as decay_note,
    factors_note as factors_note,
    notes_on as notes_on,
    short_steps as short_steps,
)
from lagless.posthoc._weighted_sums import (
    Accumulate as Accumulate,
    Consumer as Consumer,
    Progress as Progress,
    stream_product as stream_product,
)

__getattr__ = _former_names(
    __name__,
    {
        name: f"lagless.checkpoints:{name}"
        for name in (
            "Checkpoint",
            "CheckpointError",
            "Trajectory",
            "find_checkpoints",
            "fingerprint",
            "open_checkpoint",
        )
    },
)
