"""Averaging in the Trainer of transformers, and in every trainer that derives from it, such as TRL's."""

try:
    from lagless.integrations.transformers._callback import AveragingCallback as AveragingCallback
    from lagless.integrations.transformers._moving_reference import (
        MovingReferenceCallback as MovingReferenceCallback,
    )
except ModuleNotFoundError as error:
    if error.name not in ("transformers", "accelerate"):
        raise
    raise ImportError(f"{__name__} needs {error.name}: pip install 'lagless[hf]'") from error
