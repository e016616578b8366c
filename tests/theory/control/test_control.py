"""PACE's control problem: Riccati solution, gains, and the exact cost of five controls."""

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from scipy.integrate import quad, solve_ivp

from lagless.theory import (
    ControlProblem,
    certainty_equivalent_control,
    control_cost,
    early_gain,
    no_control,
    oracle_control,
    plug_in_control,
    posterior_mean,
    posterior_variance,
    practical_control,
    relaxed_early_gain,
    relaxed_gain,
    riccati,
)

CONTROLS = (no_control, oracle_control, certainty_equivalent_control, plug_in_control, practical_control)
PROBLEMS = {
    "fast": ControlProblem(rate=1.0, noise=1.0, horizon=20.0, penalty=0.01),
    "slow": ControlProblem(rate=0.1, noise=1.0, horizon=20.0, penalty=0.01),
    "noisy": ControlProblem(rate=0.3, noise=2.0, horizon=50.0, penalty=0.001),
    "far": ControlProblem(rate=0.05, noise=0.3, horizon=100.0, penalty=0.1, prior_std=2.0),
    "displaced": ControlProblem(
        rate=0.4, noise=0.7, horizon=6.0, penalty=0.05, prior_mean=1.5, prior_std=0.8, start=-2.0
    ),
}
problems = st.builds(
    ControlProblem,
    rate=st.floats(0.0, 3.0),
    noise=st.floats(0.1, 3.0),
    horizon=st.floats(0.5, 30.0),
    penalty=st.floats(1e-3, 10.0),
    prior_mean=st.floats(-2.0, 2.0),
    prior_std=st.floats(0.1, 3.0),
    start=st.floats(-2.0, 2.0),
)


def integrated(rates, end, horizon):
    """Solve backwards from ``end`` at T to 0, as a function of time."""
    solved = solve_ivp(
        rates, (horizon, 0.0), end, method="DOP853", rtol=1e-11, atol=1e-14, dense_output=True, max_step=horizon / 20
    )
    return solved.sol


@given(problem=problems)
@settings(max_examples=25, deadline=None)
def test_riccati_solution_solves_its_equations(problem):
    a, lam = problem.rate, problem.penalty

    def rates(_, y):
        m, n, s = y
        return [2 * a * m - 2 * n + m * m / lam, a * n - s + m * n / lam, n * n / lam]

    solution = integrated(rates, [0.0, 0.0, problem.horizon**-2], problem.horizon)
    times = np.linspace(0.0, problem.horizon, 11)
    np.testing.assert_allclose(np.stack(riccati(problem, times)), solution(times), rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("x", [0.0, 1e-9, 1e-4, 0.3, 0.999, 1.0, 1.001, 7.0, 300.0])
def test_riccati_is_accurate_for_any_curvature(x):
    horizon, lam = 2.0, 1e-12  # the penalty makes g, where the closed form cancels, the whole of D
    problem = ControlProblem(rate=x / horizon, noise=1.0, horizon=horizon, penalty=lam)
    response = lambda s: s if x == 0.0 else -np.expm1(-problem.rate * s) / problem.rate  # noqa: E731
    g = quad(lambda s: response(s) ** 2, 0.0, horizon, epsabs=0.0, epsrel=1e-13)[0]
    value = riccati(problem, 0.0)
    assert value.S == pytest.approx(1.0 / (horizon**2 + g / lam), rel=1e-12)
    assert value.M * value.S == pytest.approx(value.N**2, rel=1e-14)


@given(problem=problems)
@settings(max_examples=25, deadline=None)
def test_relaxed_gain_solves_its_equation(problem):
    a, lam, horizon = problem.rate, problem.penalty, problem.horizon
    solution = integrated(lambda _, p: 2 * a * p - 1 / horizon + p * p / lam, [0.0], horizon)
    times = np.linspace(0.0, horizon, 11)
    np.testing.assert_allclose(relaxed_gain(problem, times), solution(times)[0] / lam, rtol=1e-8, atol=1e-12)


def test_gains_far_from_the_end():
    problem = ControlProblem(rate=2.0, noise=1.0, horizon=5000.0, penalty=0.01)
    assert riccati(problem, 0.0).M / problem.penalty == pytest.approx(early_gain(problem), rel=1e-4)
    assert early_gain(problem) == pytest.approx(1 / 5000 / (1 + 0.01 * 4 * 5000), rel=1e-14)
    # aT = 3: nowhere near, as the reduction needs aT >> 3/2
    slow = ControlProblem(rate=0.1, noise=1.0, horizon=30.0, penalty=1e-6)
    assert riccati(slow, 0.0).M / slow.penalty > 1.5 * early_gain(slow)
    assert relaxed_gain(problem, 0.0) == pytest.approx(relaxed_early_gain(problem), rel=1e-12)
    w = np.sqrt(4.0 + 1 / (0.01 * 5000))
    assert relaxed_early_gain(problem) == pytest.approx(1 / (0.01 * 5000 * (w + 2.0)), rel=1e-12)


# J of none, oracle, certainty equivalent, plug-in and practical: exact, as confirmed by the independent routes below,
# and as once tabulated, with the last digits of Euler's method with some 3,000 steps.
TABLE = {
    "fast": ((0.04875, 0.01772, 0.04873, 0.04998, 0.04902), "0.04875 0.01772 0.04873 0.04999 0.04903"),
    "slow": ((2.09069, 0.05352, 0.85825, 1.55489, 1.83427), "2.091 0.0536 0.858 1.554 1.834"),
    "noisy": ((0.80444, 0.02124, 0.47794, 0.82611, 0.79174), "0.8045 0.0213 0.4780 0.8261 0.7918"),
    "far": ((0.41082, 0.03576, 0.35917, 0.57617, 0.45372), "0.4109 0.0358 0.3592 0.5763 0.4538"),
}


@pytest.mark.parametrize("name", TABLE)
def test_cost_table(name):
    exact, _ = TABLE[name]
    costs = [control_cost(PROBLEMS[name], control).total for control in CONTROLS]
    np.testing.assert_allclose(costs, exact, rtol=0.0, atol=5.01e-6)


def euler_cost(problem, control, steps):
    """J of the discretised process: first order in the step."""
    dt = problem.horizon / steps
    start = np.array([problem.start, 0.0, 0.0, problem.prior_mean, 1.0])
    moments = np.outer(start, start) + np.diag([0.0, 0.0, 0.0, problem.prior_std**2, 0.0])
    cost = 0.0
    for k in control(problem, np.arange(steps) * dt):
        advance = np.eye(5)
        advance[0] += dt * (k + problem.rate * np.array([-1.0, 0.0, 0.0, 1.0, 0.0]))
        advance[1, 0] += dt
        advance[2] += dt * k
        cost += problem.penalty * dt * k @ moments @ k
        moments = advance @ moments @ advance.T
        moments[0, 0] += problem.noise**2 * dt
    miss = np.array([0.0, 1.0 / problem.horizon, 0.0, -1.0, 0.0])
    return cost + miss @ moments @ miss


@pytest.mark.parametrize("name", TABLE)
def test_tabulated_last_digits_are_those_of_a_finite_step(name):
    _, printed = TABLE[name]
    for control, value in zip(CONTROLS, printed.split(), strict=True):
        unit = 10.0 ** -len(value.split(".")[1])
        assert abs(euler_cost(PROBLEMS[name], control, 3000) - float(value)) < 0.9 * unit
    coarse, fine = (euler_cost(PROBLEMS[name], plug_in_control, steps) for steps in (1500, 3000))
    exact = control_cost(PROBLEMS[name], plug_in_control).total
    assert 2 * fine - coarse == pytest.approx(exact, rel=1e-5)  # what Richardson extrapolation leaves


@pytest.mark.parametrize("problem", PROBLEMS.values(), ids=PROBLEMS)
def test_no_control_costs_what_the_flat_average_does(problem):
    a, horizon = problem.rate, problem.horizon
    e1, e2 = -np.expm1(-a * horizon), -np.expm1(-2 * a * horizon)
    distance = (problem.start - problem.prior_mean) ** 2 + problem.prior_std**2
    variance = problem.noise**2 / a**2 * (horizon - (2 * e1 - e2 / 2) / a)
    cost = control_cost(problem, no_control)
    assert cost.error == pytest.approx((e1 / (a * horizon)) ** 2 * distance + variance / horizon**2, rel=1e-9)
    assert cost.effort == 0.0
    assert control_cost(PROBLEMS["noisy"], no_control).total == pytest.approx(0.8044445, abs=1e-7)  # not 0.8045


@pytest.mark.parametrize("problem", PROBLEMS.values(), ids=PROBLEMS)
def test_optimal_costs_from_the_value_function(problem):
    """J = E z₀·P₀z₀ + σ²∫M for the oracle, and λ∫κ² Var(μ*|θ) more without it, κ = (M + tN)/λ."""
    lam, horizon = problem.penalty, problem.horizon
    noise = quad(lambda t: float(riccati(problem, t).M), 0.0, horizon, epsabs=1e-12, epsrel=1e-11, limit=200)[0]
    distance = (problem.start - problem.prior_mean) ** 2 + problem.prior_std**2
    oracle = float(riccati(problem, 0.0).M) * distance + problem.noise**2 * noise

    def ignorance(t):
        value = riccati(problem, t)
        return float((value.M + t * value.N) ** 2 / lam * posterior_variance(problem, t))

    price = quad(ignorance, 0.0, horizon, epsabs=1e-12, epsrel=1e-11, limit=200)[0]
    assert control_cost(problem, oracle_control).total == pytest.approx(oracle, rel=1e-7)
    assert control_cost(problem, certainty_equivalent_control).total == pytest.approx(oracle + price, rel=1e-7)


@pytest.mark.parametrize("problem", PROBLEMS.values(), ids=PROBLEMS)
@pytest.mark.parametrize("control", [plug_in_control, practical_control])
def test_cost_of_pulling_to_the_average_against_an_ode_solver(problem, control):
    """Moments of (θ - μ*, θ̄ - μ*) instead, where the average obeys θ̄' = (θ - θ̄)/t."""
    a, lam, horizon = problem.rate, problem.penalty, problem.horizon

    def gain(t):
        return float(riccati(problem, t).M) / lam if control is plug_in_control else early_gain(problem)

    def rates(t, y):
        xx, xy, yy, _ = y
        k = gain(t)
        return [
            2 * (-(a + k) * xx + k * xy) + problem.noise**2,
            -(a + k) * xy + k * yy + (xx - xy) / t,
            2 * (xy - yy) / t,
            lam * k * k * (xx - 2 * xy + yy),
        ]

    distance = (problem.start - problem.prior_mean) ** 2 + problem.prior_std**2
    begin = 1e-9
    solved = solve_ivp(rates, (begin, horizon), [distance] * 3 + [0.0], method="DOP853", rtol=1e-10, atol=1e-13)
    cost = control_cost(problem, control)
    assert cost.error == pytest.approx(solved.y[2, -1], rel=1e-6)
    assert cost.effort == pytest.approx(solved.y[3, -1], rel=1e-6)


def test_costs_and_the_posterior_by_simulation():
    """Euler with 2,000 steps on 4,000 paths; |z| < 4 with an allowance of 1 % for the step."""
    problem, steps, paths = PROBLEMS["displaced"], 2000, 4000
    rng = np.random.default_rng(5)
    dt = problem.horizon / steps
    times = np.arange(steps) * dt
    for control in CONTROLS:
        coefficients = control(problem, times)
        target = problem.prior_mean + problem.prior_std * rng.standard_normal(paths)
        theta, integral, effort, price = (
            np.full(paths, problem.start),
            np.zeros(paths),
            np.zeros(paths),
            np.zeros(paths),
        )
        for k in coefficients:
            u = k[0] * theta + k[1] * integral + k[2] * effort + k[3] * target + k[4]
            shock = problem.noise * np.sqrt(dt) * rng.standard_normal(paths)
            integral, effort, price = integral + theta * dt, effort + u * dt, price + problem.penalty * u * u * dt
            theta = theta + (problem.rate * (target - theta) + u) * dt + shock
        costs = (integral / problem.horizon - target) ** 2 + price
        exact = control_cost(problem, control).total
        assert abs(costs.mean() - exact) < 4 * costs.std() / np.sqrt(paths) + 0.01 * exact

        state = np.stack([theta, integral, effort, target, np.ones(paths)])
        miss = posterior_mean(problem, [problem.horizon])[0] @ state - target
        spread = float(posterior_variance(problem, problem.horizon))
        assert abs(miss.mean()) < 4 * np.sqrt(spread / paths)
        assert abs(miss.var() / spread - 1.0) < 4 * np.sqrt(2 / paths) + 0.01


def test_posterior_mean_with_a_flat_prior_is_not_the_running_average():
    problem = ControlProblem(rate=0.7, noise=1.3, horizon=5.0, penalty=1.0, prior_std=1e7, start=0.4)
    t, theta, integral, effort = 3.0, 1.1, 2.5, 0.3
    coefficients = posterior_mean(problem, [t])[0]
    expected = integral / t + (theta - 0.4 - effort) / (0.7 * t)
    assert coefficients @ [theta, integral, effort, 0.0, 1.0] == pytest.approx(expected, rel=1e-9)


@given(problem=problems)
@settings(max_examples=10, deadline=None)
def test_knowing_more_costs_less(problem):
    none, oracle, equivalent, plug_in, practical = (
        control_cost(problem, control, intervals=100).total for control in CONTROLS
    )
    slack = 1 + 1e-4
    assert oracle <= equivalent * slack
    assert equivalent <= min(none, plug_in, practical) * slack


def test_plugging_in_the_average_can_be_worse_than_doing_nothing():
    total = {
        name: {control: control_cost(problem, control).total for control in CONTROLS}
        for name, problem in PROBLEMS.items()
    }
    assert total["far"][plug_in_control] > 1.3 * total["far"][no_control]
    assert total["far"][practical_control] > total["far"][no_control]
    assert total["noisy"][plug_in_control] > total["noisy"][no_control] > total["noisy"][practical_control]
    assert total["slow"][practical_control] < total["slow"][no_control]


@pytest.mark.parametrize("factor", [0.9, 1.1])
def test_no_other_strength_beats_the_optimal_control(factor):
    problem = PROBLEMS["slow"]
    for control in (oracle_control, certainty_equivalent_control):
        scaled = lambda problem, time, control=control: factor * control(problem, time)  # noqa: E731
        assert control_cost(problem, scaled).total > control_cost(problem, control).total


def test_intervals_converge():
    for problem in PROBLEMS.values():
        for control in CONTROLS:
            coarse, fine = (control_cost(problem, control, intervals=n).total for n in (250, 500))
            assert coarse == pytest.approx(fine, rel=1e-6)


def test_controls_are_finite_at_both_ends():
    for control in CONTROLS:
        assert np.isfinite(control(PROBLEMS["displaced"], [0.0, PROBLEMS["displaced"].horizon])).all()
    assert (plug_in_control(PROBLEMS["slow"], [0.0]) == 0.0).all()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rate": -0.1}, r"rate=-0.1; it must be a finite number >= 0"),
        ({"noise": 0.0}, r"noise=0.0; it must be a finite number > 0"),
        ({"horizon": float("nan")}, "horizon=nan"),
        ({"penalty": float("inf")}, "penalty=inf"),
        ({"prior_std": 0.0}, "prior_std=0.0"),
        ({"start": float("nan")}, "start=nan"),
    ],
)
def test_bad_problems_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        ControlProblem(**{"rate": 1.0, "noise": 1.0, "horizon": 1.0, "penalty": 1.0, **changes})


def test_times_outside_the_horizon_are_refused():
    problem = PROBLEMS["fast"]
    for time in (-0.1, 20.1, float("nan")):
        with pytest.raises(ValueError, match=r"it must lie in \[0, 20\]"):
            riccati(problem, time)
    with pytest.raises(ValueError, match="intervals=0; it must be an integer >= 1"):
        control_cost(problem, no_control, intervals=0)
