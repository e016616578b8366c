"""How the studies choose settings: the same search for every method."""

import pytest

for package in ("datasets", "optuna", "trl"):
    pytest.importorskip(package)


@pytest.fixture
def tuning():
    return pytest.importorskip("experiments.shared.tuning", reason="the studies are not part of an installed package")


def axes(tuning):
    return (
        tuning.Axis("lr", "training.learning_rate", tuning.factors(1e-2, 2)),
        tuning.Axis("kappa", "kappa", tuning.steps(0.5, 0.2, 0.1, 1.0)),
    )


@pytest.mark.parametrize("best", [(0, 0), (9, -3), (-13, 6)])
def test_the_search_ends_at_the_best_grid_point(tuning, best):
    calls = []

    def loss(position):
        calls.append(position)
        return sum((a - b) ** 2 for a, b in zip(position, best, strict=True))

    tried = tuning.pattern_search(axes(tuning), loss, 60)
    assert min(tried, key=lambda position: tried[position]) == best
    assert len(calls) == len(set(calls)) == len(tried) < 60


def test_the_search_keeps_to_its_budget_and_the_grid(tuning):
    tried = tuning.pattern_search(axes(tuning), lambda position: position[0] ** 2 - position[1], 10)
    assert len(tried) == 10
    kappas = [axes(tuning)[1].value(position[1]) for position in tried]
    assert max(kappas) == 1.0 and None not in kappas


def test_a_setting_that_diverges_is_passed_over(tuning):
    tried = tuning.pattern_search(axes(tuning), lambda p: float("inf") if p[0] > 3 else abs(p[0] + 4), 30)
    assert min(tried, key=lambda position: tried[position])[0] == -4


def test_grids(tuning):
    lr, kappa = axes(tuning)
    assert [lr.text(lr.value(i)) for i in (-4, 0, 2, 4)] == ["0.005", "0.01", "0.01414", "0.02"]
    assert [kappa.value(i) for i in (-9, -8, 0, 10, 11)] == [None, 0.1, 0.5, 1.0, None]
