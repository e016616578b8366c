"""The table of docs/choose.md is what trajectory_weights gives."""

import re
from pathlib import Path

import numpy as np
import pytest

from lagless import BEMA, DEMA, EMA, OUEMA, mean_age, trajectory_weights

TEXT = (Path(__file__).parents[2] / "docs" / "choose.md").read_text(encoding="utf-8")
ROWS = re.findall(r"^\| `([A-Z]+[^`]*\))` \|((?: [+-]?\d\.\d{3} \|){6})$", TEXT, re.M)


@pytest.mark.parametrize("name, figures", ROWS, ids=[name for name, _ in ROWS])
def test_a_row_of_the_table(name, figures):
    rule = eval(name, {"BEMA": BEMA, "DEMA": DEMA, "EMA": EMA, "OUEMA": OUEMA})
    found = []
    for T in (300, 30_000):
        weights = trajectory_weights(rule, range(T + 1))
        found.append((weights[int(0.9 * T) + 1 :].sum(), mean_age(weights, range(T + 1)) / T, weights[0]))
    numbers = [float(figure) for figure in figures.strip(" |").split(" | ")]
    assert np.array(found).T.ravel() == pytest.approx(numbers, abs=6e-4)


def test_the_table_is_there():
    assert len(ROWS) == 6
