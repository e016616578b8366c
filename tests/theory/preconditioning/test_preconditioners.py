"""Coupling and inversion bias of Adam's update and its corrected forms, one-step and stationary."""

import numpy as np
import pytest
from hypothesis import given, strategies as st

from lagless.theory import AdamEstimator, GradientLaw, one_step_bias, stationary_bias
from lagless.theory.preconditioning._preconditioners import EmaWeights, Moments

ESTIMATORS = {
    "standard": AdamEstimator(),
    "inverse_post": AdamEstimator(inverse_correction="post_ema"),
    "inverse_pre": AdamEstimator(inverse_correction="pre_ema"),
    "split": AdamEstimator("split"),
    "split_post": AdamEstimator("split", "post_ema"),
    "split_pre": AdamEstimator("split", "pre_ema"),
    "symmetric": AdamEstimator("symmetric"),
    "symmetric_post": AdamEstimator("symmetric", "post_ema"),
    "symmetric_pre": AdamEstimator("symmetric", "pre_ema"),
    "leave_one_out": AdamEstimator("leave_one_out"),
    "jackknife": AdamEstimator("leave_one_out", "jackknife"),
}


# --- the estimators --------------------------------------------------------------------------------------------------

# Two steps of one coordinate, microbatches (1, 3, 2, 4) and (0, 2, -1, 3), betas (.9, .95), eps 0: updates.
BY_HAND = {
    "standard": (1.0, 0.9068711116),
    "split": (0.6324555320, 0.5404278667),
    "inverse_post": (0.9333333333, 0.8935738347),
    "split_post": (0.5692099788, 0.5299428182),
    "split_pre": (0.5470740352, 0.5250054306),
    "symmetric": (0.9870481593, 0.7850369034),
    "symmetric_post": (0.8212613040, 0.7656901537),
    "leave_one_out": (1.0922619048, 0.9279727936),
    "jackknife": (1.0007350933, 0.9114271620),
}
# Two steps of three coordinates, betas (.9, .95), eps 1e-3, lr .1, decoupled weight decay .1: parameters after each.
THREE = (
    [[1, 0.5, 0.02], [2, -1.5, -0.01], [0.5, 1, 0.03], [1.5, -0.2, -0.05]],
    [[0.8, -0.4, 0.01], [-0.3, 0.9, 0.04], [1.2, 0.1, -0.02], [0.6, -0.7, 0.005]],
)
PARAMETERS = {
    "standard": ((0.8900799361, -1.8819607843, 0.5664285714), (0.7885336242, -1.7715470703, 0.5151772160)),
    "split": ((0.8559558141, -1.9107584962, 0.4831603719), (0.7660849568, -1.8746369787, 0.4292156643)),
    "inverse_post": ((0.8967306283, -1.98, 0.495), (0.7956024844, -1.9602, 0.4687414411)),
    "split_post": ((0.8827167584, -1.9320046073, 0.4838242283), (0.7939594427, -1.8961239254, 0.4299944037)),
    "split_pre": ((0.8880785216, -1.9328319642, 0.4841051579), (0.7999235615, -1.8971518399, 0.4303347833)),
    "symmetric": ((0.8913751178, -1.9632518062, 0.5188219295), (0.7951043441, -1.9404493694, 0.4736400722)),
    "symmetric_post": ((0.9079118752, -1.9703067359, 0.5165229884), (0.8122029371, -1.9445976864, 0.4791106528)),
    "leave_one_out": ((0.8808708908, 2.9906522610, 0.7344291755), (0.7780014639, 3.0409095605, 0.5696823361)),
    "jackknife": ((0.8899984247, -1.98, 0.495), (0.7881659662, -1.9602, 0.4900500000)),
}


@pytest.mark.parametrize("name", BY_HAND)
def test_published_updates_of_one_coordinate(name):
    estimator, moments = ESTIMATORS[name], Moments(np.zeros(()), np.zeros(()))
    for step, batch in enumerate(((1, 3, 2, 4), (0, 2, -1, 3)), start=1):
        gradients = np.array(batch, dtype=np.float64)
        update = estimator.folds(gradients, moments, EmaWeights.at((0.9, 0.95), step)).update
        assert update == pytest.approx(BY_HAND[name][step - 1], abs=6e-11)
        moments = estimator.absorb(gradients, moments, (0.9, 0.95))
    expected = (0.28, 0.725) if name.startswith("split") else (0.325, 0.346875)
    assert (float(moments.m), float(moments.v)) == pytest.approx(expected)


@pytest.mark.parametrize("name", PARAMETERS)
def test_published_parameters_of_three_coordinates(name):
    estimator, moments = ESTIMATORS[name], Moments(np.zeros(3), np.zeros(3))
    p = np.array([1.0, -2.0, 0.5])
    for step, batch in enumerate(THREE, start=1):
        gradients = np.array(batch)
        update = estimator.folds(gradients, moments, EmaWeights.at((0.9, 0.95), step), eps=1e-3).update
        p = p * (1 - 0.1 * 0.1) - 0.1 * update
        np.testing.assert_allclose(p, PARAMETERS[name][step - 1], atol=6e-11)
        moments = estimator.absorb(gradients, moments, (0.9, 0.95))


def test_pre_ema_subtracts_half_the_second_derivative():
    """f(s) = 1/(√(v_old·v + v_new·s) + ε): against a finite difference."""
    weights, v, eps = EmaWeights.at((0.9, 0.95), 3), 0.7, 0.05
    gradients = np.array([0.3, 1.1, -0.4, 0.9])
    s = np.square(gradients[2:]).mean()
    f = lambda x: 1.0 / (np.sqrt(weights.v_old * v + weights.v_new * x) + eps)  # noqa: E731
    h = 1e-3
    half = (f(s + h) - 2 * f(s) + f(s - h)) / (2 * h * h)
    variance = np.square(gradients[2:]).var(ddof=1) / 2
    moments = Moments(np.zeros(()), np.array(v))
    folds = ESTIMATORS["split_pre"].folds(gradients, moments, weights, eps)
    assert f(s) - folds.inverse.item() == pytest.approx(half * variance, rel=1e-5)


@given(
    value=st.floats(-3.0, 3.0).filter(lambda g: abs(g) > 1e-3),
    step=st.integers(1, 50),
    m=st.floats(-1.0, 1.0),
    v=st.floats(0.0, 2.0),
)
@pytest.mark.parametrize("name", ESTIMATORS)
def test_identical_microbatches_give_the_standard_update(name, value, step, m, v):
    weights, moments = EmaWeights.at((0.9, 0.99), step), Moments(np.array([m]), np.array([v]))
    gradients = np.full((6, 1), value)
    standard = ESTIMATORS["standard"].folds(gradients, moments, weights, 1e-3).update
    update = ESTIMATORS[name].folds(gradients, moments, weights, 1e-3).update
    np.testing.assert_allclose(update, standard, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", ESTIMATORS)
def test_order_and_scale(name):
    rng = np.random.default_rng(2)
    gradients, weights = rng.standard_normal((6, 5)), EmaWeights.at((0.9, 0.99), 7)
    moments = Moments(rng.standard_normal(5), rng.random(5))
    update = ESTIMATORS[name].folds(gradients, moments, weights, 0.1).update
    shuffled = ESTIMATORS[name].folds(gradients[[2, 0, 1, 4, 5, 3]], moments, weights, 0.1).update
    np.testing.assert_allclose(shuffled, update, rtol=1e-12)
    scaled = ESTIMATORS[name].folds(3 * gradients, Moments(3 * moments.m, 9 * moments.v), weights, 0.3).update
    np.testing.assert_allclose(scaled, update, rtol=1e-12)
    swapped = ESTIMATORS[name].folds(gradients[[3, 4, 5, 0, 1, 2]], moments, weights, 0.1).update
    assert np.allclose(swapped, update, rtol=1e-12) == (not name.startswith("split"))


@pytest.mark.parametrize("name", ESTIMATORS)
def test_zero_gradients_move_nothing(name):
    folds = ESTIMATORS[name].folds(
        np.zeros((4, 2)), Moments(np.zeros(2), np.full(2, 0.5)), EmaWeights.at((0.9, 0.95), 2)
    )
    np.testing.assert_array_equal(folds.update, 0.0)


def test_inverses_are_never_negative():
    """A spread of 10 in one step of an empty history: the correction exceeds what it corrects."""
    gradients = np.array([10.0, 0.1, 0.1, 0.1, 0.1, 0.1, 0.1, 0.1])
    moments = Moments(np.array(1.0), np.array(1e-6))
    for name in ("inverse_post", "inverse_pre", "jackknife"):
        folds = ESTIMATORS[name].folds(gradients, moments, EmaWeights.at((0.9, 0.95), 3))
        assert folds.update >= 0.0


@pytest.mark.parametrize(
    ("name", "count", "message"),
    [
        ("leave_one_out", 1, "1 microbatches; .* needs >= 2"),
        ("inverse_post", 1, "needs >= 2"),
        ("split", 3, "3 microbatches; .* needs an even number >= 2"),
        ("symmetric_pre", 2, "2 microbatches; .* needs an even number >= 4"),
    ],
)
def test_unsuitable_numbers_of_microbatches_are_refused(name, count, message):
    with pytest.raises(ValueError, match=message):
        ESTIMATORS[name].folds(np.ones(count), Moments(np.zeros(()), np.ones(())), EmaWeights.at((0.9, 0.95)))


def test_unknown_forms_are_refused():
    with pytest.raises(ValueError, match="cross_fit='half'; it must be one of 'none', 'split'"):
        AdamEstimator("half")  # pyright: ignore
    with pytest.raises(ValueError, match="inverse_correction='jackknife'; it must be one of 'none', 'post_ema', 'pre"):
        AdamEstimator("split", "jackknife")
    with pytest.raises(ValueError, match="inverse_correction='post_ema'; it must be one of 'none', 'jackknife'"):
        AdamEstimator("leave_one_out", "post_ema")


# --- their biases ----------------------------------------------------------------------------------------------------

# (mean, std of a microbatch, microbatches, β₂): percent, with the printed standard error where it is not 0.000.
# split is given twice the microbatches: halves as large as the others' batches.
ONE_STEP = {
    (0.5, 1.0, 8, 0.5): {
        "standard": (-6.954, 0.004),
        "leave_one_out": (7.885, 0.008),
        "jackknife": (-2.725, 0.007),
        "split": (2.114, 0.007),
        "split_post": (1.230, 0.007),
        "split_pre": (0.437, 0.008),
        "inverse_post": (-11.646, 0.004),
        "symmetric": (10.415, 0.018),
        "symmetric_post": (6.554, 0.019),
    },
    (0.5, 1.0, 8, 0.95): {
        "standard": (-1.499, 0.001),
        "leave_one_out": (-0.006, 0.001),
        "jackknife": (-0.130, 0.001),
        "split": (0.022, 0.001),
        "split_post": (0.009, 0.001),
        "split_pre": (0.001, 0.001),
        "inverse_post": (-1.647, 0.001),
        "symmetric": (0.369, 0.003),
        "symmetric_post": (0.179, 0.003),
    },
    (0.2, 0.5, 16, 0.95): {
        "standard": (-1.269, 0.001),
        "leave_one_out": (0.045, 0.001),
        "jackknife": (-0.054, 0.001),
        "split": (0.012, 0.001),
        "split_post": (0.005, 0.001),
        "split_pre": (0.001, 0.001),
        "inverse_post": (-1.415, 0.001),
        "symmetric": (0.404, 0.003),
        "symmetric_post": (0.206, 0.003),
    },
}


def law_for(name, mean, std, microbatches):
    return GradientLaw(mean, std, microbatches * (2 if name.startswith("split") else 1))


@pytest.mark.parametrize("setting", ONE_STEP, ids=str)
@pytest.mark.parametrize("name", ONE_STEP[(0.5, 1.0, 8, 0.5)])
def test_one_step_table(setting, name):
    """|z| < 4 between two simulations."""
    *law, beta2 = setting
    bias = one_step_bias(ESTIMATORS[name], law_for(name, *law), beta2, samples=200_000, seed=17)
    printed, printed_error = ONE_STEP[setting][name]
    error = np.hypot(100 * bias.total.standard_error, printed_error)
    assert abs(100 * bias.total.mean - printed) < 4 * error
    assert bias.total.mean == pytest.approx(bias.coupling.mean + bias.inversion.mean, abs=1e-12)


def test_one_step_standard_bias_by_quadrature():
    """E[ḡ/(√(a + κḡ²) + ε)] with 200 Gauss-Hermite nodes; |z| < 4."""
    nodes, node_weights = np.polynomial.hermite_e.hermegauss(200)
    node_weights /= node_weights.sum()
    mean, std, n, beta2, eps = 0.5, 1.0, 8, 0.8, 0.1
    g = mean + std / np.sqrt(n) * nodes
    v = mean**2 + std**2 / n
    inverse = 1 / (np.sqrt(beta2 * v + (1 - beta2) * g * g) + eps)
    scale = np.sqrt(v) + eps
    exact = (
        node_weights @ (g * inverse) * scale / mean - 1,
        node_weights @ ((g - mean) * inverse) * scale / mean,
        node_weights @ inverse * scale - 1,
    )
    bias = one_step_bias(ESTIMATORS["standard"], GradientLaw(mean, std, n), beta2, samples=200_000, seed=1, eps=eps)
    for found, expected in zip(bias, exact, strict=True):
        assert abs(found.mean - expected) < 4 * found.standard_error


def test_cross_fitting_removes_one_steps_coupling():
    """|z| < 4 from no coupling, where the standard update's is 100 standard errors and more away from it."""
    for name in ("split", "symmetric", "leave_one_out"):
        bias = one_step_bias(ESTIMATORS[name], law_for(name, 0.5, 1.0, 8), 0.95, samples=200_000, seed=5)
        assert abs(bias.coupling.mean) < 4 * bias.coupling.standard_error
    standard = one_step_bias(ESTIMATORS["standard"], GradientLaw(0.5, 1.0, 8), 0.95, samples=200_000, seed=5)
    assert standard.coupling.mean < -100 * standard.coupling.standard_error
    one_out = one_step_bias(ESTIMATORS["leave_one_out"], GradientLaw(0.5, 1.0, 8), 0.95, samples=200_000, seed=5)
    assert abs(one_out.total.mean) < 0.1 * abs(standard.total.mean)


# Percent (coupling, inversion) with β₁ = .9, long run. Printed without standard errors; two rows of that table which
# must agree differ by 0.014, so 0.02 is allowed for them.
STATIONARY = {
    (0.5, 1.0, 8, 0.95): {
        "standard": (-1.165, 1.089),
        "split": (-0.001, 0.231),
        "symmetric": (-0.900, 1.183),
        "leave_one_out": (-0.994, 0.981),
        "split_post": (-0.001, 0.218),
    },
    (0.2, 1.0, 16, 0.95): {
        "standard": (-2.129, 1.642),
        "split": (-0.001, 0.111),
        "symmetric": (-1.291, 1.821),
        "leave_one_out": (-1.822, 1.547),
        "split_post": (-0.001, 0.104),
    },
    (0.5, 1.0, 8, 0.9): {
        "standard": (-1.824, 2.245),
        "split": (0.0, 0.458),
        "symmetric": (-1.235, 2.489),
        "leave_one_out": (-1.481, 2.050),
        "split_post": (0.0, 0.407),
    },
}


@pytest.mark.parametrize("setting", STATIONARY, ids=str)
@pytest.mark.parametrize("name", STATIONARY[(0.5, 1.0, 8, 0.95)])
def test_stationary_table(setting, name):
    *law, beta2 = setting
    bias = stationary_bias(ESTIMATORS[name], law_for(name, *law), (0.9, beta2), steps=500, chains=1000, seed=23)
    for found, printed in zip(bias[1:], STATIONARY[setting][name], strict=True):
        assert abs(100 * found.mean - printed) < 4 * 100 * found.standard_error + 0.02


@pytest.mark.parametrize(("mean", "std", "n", "beta2"), [(0.5, 0.3, 8, 0.95), (1.0, 0.8, 16, 0.9)])
def test_stationary_biases_to_second_order(mean, std, n, beta2):
    """Coupling -Cov(m̂, v̂)/(2μv*), inversion (3/8)Var(v̂)/v*², each right to a few percent of itself; |z| < 4."""
    beta1 = 0.9
    noise = std**2 / n
    v = mean**2 + noise
    covariance = (1 - beta1) * (1 - beta2) / (1 - beta1 * beta2) * 2 * mean * noise
    variance = (1 - beta2) / (1 + beta2) * (4 * mean**2 * noise + 2 * noise**2)
    law = GradientLaw(mean, std, n)
    bias = stationary_bias(ESTIMATORS["standard"], law, (beta1, beta2), steps=500, chains=1000, seed=2)
    for found, expected in ((bias.coupling, -covariance / (2 * mean * v)), (bias.inversion, 3 / 8 * variance / v**2)):
        assert abs(found.mean - expected) < 4 * found.standard_error + 0.05 * abs(expected)


def test_the_two_biases_of_adam_nearly_cancel():
    """With real moving averages: -1.17 % and +1.08 % leave -0.09 %, and no correction of one of them alone helps."""
    law, betas, size = GradientLaw(0.5, 1.0, 8), (0.9, 0.95), {"steps": 500, "chains": 1000, "seed": 29}
    standard = stationary_bias(ESTIMATORS["standard"], law, betas, **size)
    assert standard.coupling.mean < -0.01 < 0.01 < standard.inversion.mean
    assert abs(standard.total.mean) + 4 * standard.total.standard_error < 0.15 * abs(standard.coupling.mean)
    # Leaving one out removes a sixth of the coupling: the history stays coupled.
    one_out = stationary_bias(ESTIMATORS["leave_one_out"], law, betas, **size)
    assert 0.8 < one_out.coupling.mean / standard.coupling.mean < 0.9
    # Correcting the inverse alone uncovers coupling; separating the batches alone uncovers inversion.
    inverse = stationary_bias(ESTIMATORS["inverse_post"], law, betas, **size)
    split = stationary_bias(ESTIMATORS["split"], law_for("split", 0.5, 1.0, 8), betas, **size)
    assert inverse.total.mean < 1.5 * standard.total.mean < 0.0
    assert abs(split.coupling.mean) < 4 * split.coupling.standard_error
    assert split.total.mean > 1.5 * abs(standard.total.mean)


def test_seeds():
    arguments = (ESTIMATORS["standard"], GradientLaw(0.5, 1.0, 8), 0.9)
    assert one_step_bias(*arguments, samples=1000, seed=1) == one_step_bias(*arguments, samples=1000, seed=1)
    assert one_step_bias(*arguments, samples=1000, seed=1) != one_step_bias(*arguments, samples=1000, seed=2)
    # more samples than fit into one chunk
    many = one_step_bias(*arguments, samples=120_000, seed=1)
    assert many.total.standard_error < one_step_bias(*arguments, samples=50_000, seed=1).total.standard_error


def test_bad_arguments_are_refused():
    with pytest.raises(ValueError, match="mean=0; biases are relative to it"):
        GradientLaw(0.0, 1.0, 4)
    with pytest.raises(ValueError, match="GradientLaw: std=0.0"):
        GradientLaw(1.0, 0.0, 4)
    with pytest.raises(ValueError, match="GradientLaw: microbatches=0"):
        GradientLaw(1.0, 1.0, 0)
    law = GradientLaw(1.0, 1.0, 4)
    with pytest.raises(ValueError, match=r"beta2=1\.0; it must lie in \[0, 1\)"):
        one_step_bias(ESTIMATORS["standard"], law, 1.0, samples=10, seed=0)
    with pytest.raises(ValueError, match="samples=1; it must be an integer >= 2"):
        one_step_bias(ESTIMATORS["standard"], law, 0.9, samples=1, seed=0)
    with pytest.raises(ValueError, match="beta1=nan"):
        stationary_bias(ESTIMATORS["standard"], law, (float("nan"), 0.9), steps=1, chains=2, seed=0)
    with pytest.raises(ValueError, match="eps=-1e-08; it must be a finite number >= 0"):
        one_step_bias(ESTIMATORS["standard"], law, 0.9, samples=10, seed=0, eps=-1e-8)
    with pytest.raises(ValueError, match=r"betas=\(0\.9,\); it must be"):
        stationary_bias(ESTIMATORS["standard"], law, (0.9,), steps=1, chains=2, seed=0)
    with pytest.raises(ValueError, match="chains=1"):
        stationary_bias(ESTIMATORS["standard"], law, (0.9, 0.9), steps=1, chains=1, seed=0)
