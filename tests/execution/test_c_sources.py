"""C sources that do not compile are skipped in silence: where there is a compiler, all of them must."""

import os
import platform
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

import lagless.execution._c as c
from lagless.execution import _adam_c, _lerp_c, _pace_c, _primal_c

LIBRARIES = [_adam_c._library, _lerp_c._library, _pace_c._library, _primal_c._library]

SOURCES = Path(c.__file__).parent / "c"


@pytest.mark.parametrize("source", sorted(SOURCES.glob("*.[ch]")), ids=lambda path: path.name)
def test_included_files_exist(source):
    for name in re.findall(r'#include "([^"]+)"', source.read_text()):
        assert (SOURCES / name).is_file(), f"{source.name} includes {name}, which is not among the sources"


@pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler")
@pytest.mark.parametrize("library", LIBRARIES, ids=lambda f: f.__module__)
def test_sources_compile(library):
    assert library() is not None


@pytest.mark.parametrize("name", ["adam.c", "lerp.c", "pace.c", "primal.c"])
def test_loops_are_vectorized(name, tmp_path):
    """A branch in a formula costs several times the speed, and changes no value."""
    compiler = shlex.split(os.environ.get("CC") or "cc")
    flags = [*c._FLAGS, *c.NO_FMA, "-fopt-info-vec-optimized"]
    command = [*compiler, *flags, str(SOURCES / name), "-o", str(tmp_path / "x.so")]
    if shutil.which(compiler[0]) is None or platform.machine() not in ("x86_64", "AMD64", "aarch64"):
        pytest.skip("no compiler, or an unknown processor")
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        pytest.skip("the compiler does not tell what it vectorizes")
    lines = {line.partition(" ")[0] for line in done.stderr.splitlines() if "loop vectorized" in line}
    assert sum(f"{name}:" in line for line in lines) >= 2, done.stderr  # in float and in double
