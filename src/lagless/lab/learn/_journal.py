"""A file of all that was measured, from which a search that was stopped goes on."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

_FORMAT = 1


class Journal:
    """Results by name, written to a file as they come, and taken from it instead of measured when they are there.

    Numbers are written with all their digits, so that what follows from them is the same bit for bit.

    Args:
        path: the file; None to keep nothing.
        identity: what the results depend on; a file of another identity is refused.

    Raises:
        ValueError: if the file is damaged, or of another search.
    """

    def __init__(self, path: Path | None, identity: Mapping[str, Any]) -> None:
        self._path, self._identity = path, json.loads(json.dumps(identity))
        self._results: dict[str, Any] = {}
        if path is not None and path.is_file():
            self._results = self._read(path)

    def __len__(self) -> int:
        return len(self._results)

    def get(self, name: str, measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """Return the result ``name``, measured now if it is not yet known.

        Args:
            name: the same for the same measurement in every run of the search.
            measure: returns what JSON can hold.
        """
        if name not in self._results:
            self._results[name] = json.loads(json.dumps(measure()))
            if self._path is not None:
                self._write(self._path)
        return self._results[name]

    def remove(self) -> None:
        """Remove the file, once the search is done and its result is kept elsewhere."""
        if self._path is not None:
            self._path.unlink(missing_ok=True)

    def _read(self, path: Path) -> dict[str, Any]:
        remedy = "Remove it to start anew, or name another file (--state)."
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
            identity, results = dict(found["identity"]), dict(found["results"])
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path}: is no state of a search ({error}). {remedy}") from error
        keys = self._identity.keys() | identity.keys()
        for key in sorted(key for key in keys if identity.get(key) != self._identity.get(key)):
            raise ValueError(
                f"{path}: is of another search: its {key} is {_short(identity.get(key))}, and "
                f"{_short(self._identity.get(key))} here. {remedy}"
            )
        return results

    def _write(self, path: Path) -> None:
        temporary = path.with_name(f".{path.name}.partial")
        try:
            record = {"format": _FORMAT, "identity": self._identity, "results": self._results}
            temporary.write_text(json.dumps(record), encoding="utf-8")
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 100 else text[:97] + "..."
