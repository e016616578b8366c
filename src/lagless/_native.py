"""C sources of the package, compiled at first use by the machine's own compiler."""

from __future__ import annotations

import ctypes
import os
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

_FLAGS = ("-O3", "-march=native", "-shared", "-fPIC")


def compile_source(source: Path, flags: Sequence[str]) -> ctypes.CDLL | None:
    """The functions of a C file; None without a working compiler, which the environment variable ``CC`` may name.

    They are compiled for this very processor in a tenth of a second, so nothing is kept that another machine with the
    same home folder could pick up.
    """
    compiler = os.environ.get("CC", "cc").split()
    with tempfile.TemporaryDirectory(prefix="lagless-") as folder:
        target = Path(folder, source.with_suffix(".so").name)
        try:
            # The flags come last: libraries are searched for what is asked for before them.
            subprocess.run(
                [*compiler, *_FLAGS, str(source), "-o", str(target), *flags], check=True, capture_output=True
            )
            return ctypes.CDLL(str(target))
        except (OSError, subprocess.CalledProcessError):
            return None
