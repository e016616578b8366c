"""Oscillation of simulated accuracies with a known answer."""

import numpy as np
import pytest

from lagless.lab.evaluation import oscillation

PROMPTS, SAMPLES = 64, 20


def simulated(accuracies, seed):
    """Shares of right responses when the true accuracy on every prompt is known; shape (T,) → (T, P)."""
    truth = np.repeat(np.asarray(accuracies)[:, None], PROMPTS, axis=1)
    return np.random.default_rng(seed).binomial(SAMPLES, truth) / SAMPLES


def test_a_model_that_does_not_change_does_not_oscillate():
    found = [oscillation(simulated(np.full(40, 0.3), seed), SAMPLES) for seed in range(100)]
    noise = np.sqrt(0.3 * 0.7 / PROMPTS / SAMPLES)
    assert np.mean([f.noise for f in found]) == pytest.approx(noise, rel=0.01)
    # 39 neighbouring differences, each of variance 2 noise²; z-bound 4 over 100 simulations of about 39 terms
    mean_square = np.mean([oscillation_squared(simulated(np.full(40, 0.3), seed)) for seed in range(100)])
    assert abs(mean_square) < 4 * 2 * noise**2 * np.sqrt(2 * 1.5 / 3900)
    assert np.mean([f.mean_absolute for f in found]) == pytest.approx(noise * np.sqrt(4 / np.pi), rel=0.05)


def oscillation_squared(accuracies):
    """step² before it is cut off at 0, written out."""
    a = accuracies.mean(axis=1)
    s2 = (accuracies * (1 - accuracies)).sum(axis=1) / PROMPTS**2 / (SAMPLES - 1)
    return np.mean(np.diff(a) ** 2 - s2[1:] - s2[:-1])


def test_independent_swings_are_recovered():
    sigma = 0.03
    found = []
    for seed in range(100):
        truth = 0.4 + sigma * np.random.default_rng(1000 + seed).standard_normal(60)
        found.append(oscillation(simulated(truth, seed), SAMPLES))
    assert np.sqrt(np.mean([f.step**2 for f in found])) == pytest.approx(np.sqrt(2) * sigma, rel=0.04)
    assert np.sqrt(np.mean([f.jitter**2 for f in found])) == pytest.approx(sigma, rel=0.04)


def test_a_steady_rise_counts_in_step_but_not_in_jitter():
    truth = np.repeat(np.linspace(0.2, 0.8, 13)[:, None], PROMPTS, axis=1)
    exact = oscillation(truth, samples=10**9)
    assert exact.step == pytest.approx(0.05) and exact.mean_absolute == pytest.approx(0.05)
    assert exact.jitter < 1e-4


def test_two_checkpoints_have_no_jitter():
    assert np.isnan(oscillation([[0.0], [1.0]], 5).jitter)


def test_what_cannot_be_told_is_refused():
    with pytest.raises(ValueError, match=r"shape \(1, 2\)"):
        oscillation([[0.0, 1.0]], 5)
    with pytest.raises(ValueError, match="samples=1"):
        oscillation([[0.0], [1.0]], 1)
    with pytest.raises(ValueError, match=r"must lie in \[0, 1\]"):
        oscillation([[0.0], [np.nan]], 5)
