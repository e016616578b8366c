"""Examples and the blocks of the documentation run as they stand."""

import importlib.util
import re
from pathlib import Path

import pytest
from accelerate.state import AcceleratorState

ROOT = Path(__file__).parents[1]
EXAMPLES = {path.stem: path for path in sorted((ROOT / "examples").glob("*.py"))}
EXPECTED = {
    "plain_loop": ["live", "ema", "bema", "stopped at step 5 and resumed: averages bitwise the same: True"],
    "accelerate_loop": ["after 10 optimizer steps", "live", "ema", "bema", "from step 5: bema bitwise the same: True"],
    "dpo_average": ["live  step    9", "bema  step    9", "what follows: live 'c d e"],
    "bema_reference": ["start      live", "bema       bema", "none       live"],
}

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*is deprecated and will be removed in v6:FutureWarning",  # what TRL asks of transformers
)


@pytest.fixture(autouse=True)
def fresh_accelerator():
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def test_every_example_is_tried():
    assert EXAMPLES.keys() == EXPECTED.keys()


@pytest.mark.parametrize("name", EXPECTED)
def test_example(name, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    spec = importlib.util.spec_from_file_location(name, EXAMPLES[name])
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.main(["--steps", "10"])
    printed = capsys.readouterr().out
    for text in EXPECTED[name]:
        assert text in printed, printed
    assert not list(tmp_path.iterdir()), "an example leaves nothing behind"


def blocks(page):
    text = (ROOT / "docs" / page).read_text()
    for section in re.split(r"^## ", text, flags=re.M)[1:]:
        code = re.findall(r"^```python\n(.*?)^```", section, flags=re.M | re.S)
        yield pytest.param("\n".join(code), id=section.splitlines()[0])


@pytest.mark.filterwarnings(
    "ignore:.*LeafSpec", "ignore:.*does not have many workers", "ignore:.*tensorboardX", "ignore:.*log_every_n_steps"
)
@pytest.mark.parametrize("code", [block for block in blocks("trainers.md") if block.id != "Trainer and TRL"])
def test_documented_code(code, monkeypatch, tmp_path):
    assert code, "a section without a block to run"
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "docs", "exec"), {"__name__": "docs"})
