"""Every public name is documented."""

import inspect
import re
from pathlib import Path

import pytest

import lagless
import lagless.optim
import lagless.posthoc
import lagless.testing
import lagless.theory
from lagless.rules._words import OTHER_NAMES

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


def test_the_vocabulary_has_every_argument_that_other_names_lead_to():
    page = (DOCS / "vocabulary.md").read_text()
    symbols = [name for name in OTHER_NAMES if name in ("kappa", "eta", "phi", "rho", "tau", "gamma", "beta", "alpha")]
    assert len(symbols) == 8
    for symbol in symbols:
        assert symbol in page and f"`{OTHER_NAMES[symbol][0]}`" in page, symbol
    for written in re.findall(r"answered with\s+`(.*?)`", page):
        with pytest.raises(TypeError, match=re.escape(f"Write {written}.")):
            lagless.EMA(alpha=0.01)


README = (DOCS.parent / "README.md").read_text()


@pytest.mark.parametrize("block", re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL))
def test_the_blocks_of_the_readme_run(block, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    exec(block, {})
    for said in re.findall(r"print\(.*\)  # (.*?)(?:\.\.\.)?\n", block):
        assert capsys.readouterr().out.startswith(said)
    assert ("averaged.pt" in block) == (tmp_path / "averaged.pt").is_file()


def test_the_readme_is_short_and_its_links_lead_somewhere():
    assert len(README.splitlines()) <= 120
    for link in re.findall(r"\]\(([^)#:]*)\)", README):
        assert (DOCS.parent / link).exists(), link
