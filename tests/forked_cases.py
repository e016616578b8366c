"""Cases of fuzzers in processes of their own: one that crashes or hangs is an outcome, and ends nothing else."""

from __future__ import annotations

import json
import os
import signal
import traceback
from collections.abc import Callable


def in_child(case: Callable[[], tuple[str, str]], seconds: int) -> tuple[str, str]:
    """Run one case in a child process. Returns its outcome, raw for an exception and crash for a death, and details."""
    incoming, outgoing = os.pipe()
    if (child := os.fork()) == 0:
        os.close(incoming)
        try:
            signal.alarm(seconds)
            outcome = case()
        except BaseException:
            outcome = "raw", traceback.format_exc()
        os.write(outgoing, json.dumps(outcome).encode()[:60_000])
        os._exit(0)
    os.close(outgoing)
    with os.fdopen(incoming, "rb") as stream:
        told = stream.read()
    _, status = os.waitpid(child, 0)
    if status or not told:
        return "crash", f"the process ended with status {status}"
    outcome, details = json.loads(told)
    return outcome, details
