"""Averaging in the Trainer of transformers, and in every trainer that derives from it, such as TRL's."""

from lagless.integrations.transformers._callback import AveragingCallback as AveragingCallback
from lagless.integrations.transformers._moving_reference import (
    MovingReferenceCallback as MovingReferenceCallback,
)
