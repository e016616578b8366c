"""JSON files that may be damaged, unreadable or not what their name promises."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from lagless._validation import is_object
from lagless.checkpoints._errors import CheckpointError


def parse_json(text: str | bytes) -> Any:
    """Return the value that ``text`` describes.

    Raises:
        ValueError: if it is not JSON, or nested more deeply than the interpreter can follow.
    """
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def read_object(path: Path, remedy: str) -> dict[str, Any]:
    """Return the JSON object in a file.

    Args:
        path: the file.
        remedy: how the error message ends.

    Raises:
        CheckpointError: if the file cannot be read or holds something else.
    """
    try:
        found = parse_json(path.read_bytes())
        if not is_object(found):
            raise ValueError(f"a {type(found).__name__}, not an object")
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror}). Check its permissions.") from error
    except ValueError as error:  # also UnicodeDecodeError
        raise CheckpointError(f"{path}: not a JSON object ({error}). {remedy}") from error
    return found
