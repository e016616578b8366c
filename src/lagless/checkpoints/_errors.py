"""What goes wrong with files."""

from __future__ import annotations


class CheckpointError(Exception):
    """A checkpoint or folder cannot be used; the message names the file, the cause and the remedy."""
