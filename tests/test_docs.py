"""Every public name is documented."""

import inspect
from pathlib import Path

import pytest

import lagless
import lagless.optim
import lagless.posthoc
import lagless.testing
import lagless.theory

DOCS = Path(__file__).parents[1] / "docs"
REFERENCE = "".join(path.read_text() for path in sorted(DOCS.glob("reference*.md")))

MODULES = (lagless, lagless.optim, lagless.posthoc, lagless.testing, lagless.theory)


def public(module):
    for name, value in vars(module).items():
        if not name.startswith("_") and (inspect.isclass(value) or inspect.isfunction(value)):
            yield f"{module.__name__}.{name}", value


@pytest.mark.parametrize(
    "name, value",
    [pair for module in MODULES for pair in public(module)],
)
def test_public_names_have_a_docstring_and_a_place_in_the_reference(name, value):
    assert inspect.getdoc(value), f"{name} has no docstring"
    assert f"::: {name}\n" in REFERENCE, f"{name} is missing in docs/reference*.md"
