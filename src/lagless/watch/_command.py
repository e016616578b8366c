"""Evaluation by a command of the user's, which gets a model folder and prints JSON."""

from __future__ import annotations

import json
import math
import os
import shlex
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from lagless.watch._measured import Measured
from lagless.watch._plans import CommandPlan, EvaluationError
from lagless.watch._snapshot import Snapshot

PLACEHOLDER = "{model}"


class CommandEvaluation:
    """Runs a command for each model folder.

    The command's last line that is a JSON object counts. It has ``loss``, the smaller the better, and may have
    ``standard_error``, ``n``, further numbers, and ``losses``, one per item, from which the standard errors of
    differences between models are found.

    Args:
        plan: the command; ``{model}`` in it stands for the model folder, which else comes last. After the timeout it is
            ended, with all that it has started.
        stopped: asked meanwhile; ends the command when true.

    Raises:
        ValueError: if the command is empty, or its quotes do not match.
    """

    in_memory = False

    def __init__(self, plan: CommandPlan, stopped: Callable[[], bool] = lambda: False) -> None:
        self._words, self._timeout, self._stopped = shlex.split(plan.command), plan.timeout, stopped
        if not self._words:
            raise ValueError("--eval-command is empty; give a command that prints JSON with a number 'loss'.")

    def __call__(self, snapshot: Snapshot, name: str, folder: Path | None, /) -> Measured:
        """Evaluate a model folder.

        Raises:
            EvaluationError: if the command cannot be started, fails, takes too long or prints no loss.
        """
        assert folder is not None
        words = [word.replace(PLACEHOLDER, str(folder)) for word in self._words]
        if words == self._words:
            words.append(str(folder))
        try:
            # A session of its own, so that what it starts can be ended with it.
            process = subprocess.Popen(
                words, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True
            )
        except OSError as error:
            raise EvaluationError(f"{words[0]} cannot be started ({error.strerror})") from error
        try:
            output, errors = self._communicate(process)
        finally:
            _end(process)
        if process.returncode:
            last = errors.decode(errors="replace").strip().splitlines()[-1:] or ["it printed no error"]
            raise EvaluationError(f"the command ended with {process.returncode}: {last[0][:300]}")
        return parse(output.decode(errors="replace"))

    def _communicate(self, process: subprocess.Popen[bytes]) -> tuple[bytes, bytes]:
        waited = 0.0
        while True:
            try:
                return process.communicate(timeout=0.5)
            except subprocess.TimeoutExpired:
                waited += 0.5
                if self._stopped():
                    raise EvaluationError("the watch ended meanwhile") from None
                if waited >= self._timeout:
                    raise EvaluationError(
                        f"the command took longer than {self._timeout:g} s (--eval-timeout) and was ended"
                    ) from None


def parse(output: str) -> Measured:
    """Return what the last JSON object among the lines of ``output`` says.

    Raises:
        EvaluationError: if there is none, or it has no number ``loss``.
    """
    objects = [value for line in (output, *output.splitlines()) if isinstance(value := _json(line), dict)]
    found: dict[str, Any] | None = objects[-1] if objects else None
    if found is None or not _is_number(found.get("loss")):
        shown = "no JSON object" if found is None else f"{found!r:.200}"
        raise EvaluationError(f"the command printed {shown}; it must print JSON with a number 'loss'")
    losses = [value for value in _listed(found.get("losses")) if _is_number(value)]
    items = (np.array(losses, dtype=np.float64), np.ones(len(losses))) if losses else None
    error, n = found.get("standard_error"), found.get("n", len(losses) or None)
    if not _is_number(error):
        error = float(np.std(losses, ddof=1)) / math.sqrt(len(losses)) if len(losses) > 1 else None
    known = ("loss", "losses", "standard_error", "n", "time", "step", "name", "event", "text", "seconds")
    further = {str(key): float(value) for key, value in found.items() if key not in known and _is_number(value)}
    return Measured(float(found["loss"]), error, n if isinstance(n, int) else None, further, items)


def _json(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _end(process: subprocess.Popen[bytes]) -> None:
    """End a command and all that it has started, and collect it."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except (ProcessLookupError, PermissionError):
        pass
    process.wait()
    for stream in (process.stdout, process.stderr):
        if stream is not None:
            stream.close()
