"""The C sources under the sanitizers, where the compiler has them, by the script ``sanitized``."""

from __future__ import annotations

import pytest

from .sanitized import run, runtime

pytestmark = pytest.mark.skipif(runtime() is None, reason="no C compiler with sanitizers")


def test_no_input_makes_c_overstep_or_do_what_is_undefined() -> None:
    done = run()
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(done.stdout.split()) == 6


def test_the_sanitizer_notices_what_oversteps() -> None:
    done = run("--overrun")
    assert done.returncode == 99
    assert "heap-buffer-overflow" in done.stderr
