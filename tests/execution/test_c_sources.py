"""C sources that do not compile are skipped in silence: where there is a compiler, all of them must."""

import re
import shutil
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
