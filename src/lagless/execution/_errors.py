"""Errors of the room that moves tensors."""


class RankError(RuntimeError):
    """Raised on every rank when a step that all ranks take together failed on another one, or would differ."""
