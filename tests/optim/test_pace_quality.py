"""How the quality benchmark of PACE chooses settings: the same spacing for every method, and no optimum at an edge."""

import math
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def quality(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import pace_quality

    return pace_quality


@pytest.mark.parametrize("lr", [0.004, 0.05, 0.7, 40.0])
@pytest.mark.parametrize("kappa", [0.1, 0.5, 1.3])
@pytest.mark.parametrize("method", ["AdamW, constant", "AdamW + EMA", "PACE"])
def test_a_narrow_valley_is_found_wherever_it_lies(quality, method, lr, kappa):
    chosen = quality.METHODS[method]

    def loss(setting):
        valley = math.log(setting.lr / lr) ** 2
        if chosen.powers:
            valley += (setting.kappa - kappa) ** 2
        if chosen.pull is None:
            valley += 0.1 * math.log10(setting.c / 2.0) ** 2
        return valley if valley < 100.0 else math.nan

    best, _ = quality.best(loss, chosen)
    assert abs(math.log(best.lr / lr)) <= 0.5 * math.log(1.2) + 1e-9
    assert not chosen.powers or best.kappa == min(kappa, 1.0)
    assert chosen.pull is not None or abs(math.log10(best.c / 2.0)) <= 0.25 + 1e-9


def test_an_optimum_at_an_edge_is_refused(quality):
    with pytest.raises(RuntimeError, match="still at an edge"):
        quality.best(lambda setting: -setting.lr, quality.METHODS["AdamW, constant"])


def test_every_method_has_the_same_spacing(quality):
    center = quality.Setting(0, 5, 0)
    for method in quality.METHODS.values():
        for grid, ratio in ((quality.coarse(method), 1.2**2), (quality.around(center, method), 1.2)):
            rates = sorted({setting.lr for setting in grid})
            assert all(math.isclose(b / a, ratio) for a, b in zip(rates, rates[1:], strict=False))
