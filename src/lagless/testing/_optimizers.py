"""What every optimizer must do, each as a function that takes a factory ``make(params) -> Optimizer`` and asserts."""

from __future__ import annotations

import contextlib
import copy
import io
import math
import pickle
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from torch.optim import Optimizer
from torch.optim.lr_scheduler import StepLR

from lagless.testing._problem import STEPS, Problem

Factory = Callable[[Any], Optimizer]
"""From parameters or parameter groups, as ``torch.optim`` takes them, to an optimizer."""


def check_optimizer(make: Factory, microbatches: int = 1) -> None:
    """Run every check of :data:`OPTIMIZER_CHECKS` on the optimizers that ``make`` gives.

    Args:
        make: called with parameters or with parameter groups, which override its settings; every call must give the
            same optimizer.
        microbatches: ``backward()`` calls per step, for optimizers that look at each.

    Raises:
        AssertionError: naming the property that fails.
    """
    for check in OPTIMIZER_CHECKS:
        check(make, microbatches)


def optimizer_is_an_object(make: Factory, microbatches: int = 1) -> None:
    """It prints, and copies by ``deepcopy`` and ``pickle`` go on bit for bit like the original."""
    problem = Problem(make, microbatches=microbatches).run(2)
    assert type(problem.optimizer).__name__ in repr(problem.optimizer), "repr names the class"
    for copied in (copy.deepcopy(problem), pickle.loads(pickle.dumps(problem))):
        assert copied.optimizer.defaults.keys() >= problem.optimizer.defaults.keys(), "a copy keeps the defaults"
        assert _same(copied.run(2), copy.deepcopy(problem).run(2)), "a copy steps otherwise than the original"


def parameters_keep_their_dtype(make: Factory, microbatches: int = 1) -> None:
    """Parameters of every floating dtype move, stay finite and keep their dtype."""
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        # bfloat16 swallows steps much smaller than this learning rate.
        problem = Problem(lambda p: make([{"params": p, "lr": 0.05}]), dtype, microbatches=microbatches)
        before = problem.bits()
        problem.run(3)
        for was, parameter in zip(before, problem.parameters, strict=True):
            assert parameter.dtype == dtype, f"a {dtype} parameter became {parameter.dtype}"
            assert torch.isfinite(parameter).all(), f"a {dtype} parameter is not finite"
            assert not torch.equal(was, parameter), f"a {dtype} parameter of shape {tuple(was.shape)} did not move"


def layout_does_not_matter(make: Factory, microbatches: int = 1) -> None:
    """Transposed and channels-last parameters move like contiguous ones; empty ones are accepted."""
    for shape in ((4, 3), (2, 3, 4, 5)):
        values = torch.linspace(-1.0, 1.0, math.prod(shape), dtype=torch.float64).view(shape)
        strided = values.clone(memory_format=torch.channels_last) if len(shape) == 4 else values.t().contiguous().t()
        plain, other = nn.Parameter(values.clone()), nn.Parameter(strided)
        assert not other.is_contiguous()
        for parameter in (plain, other):
            Problem(
                make,
                parameters=[parameter, nn.Parameter(torch.empty(0, 3, dtype=torch.float64))],
                microbatches=microbatches,
            ).run(3)
        torch.testing.assert_close(plain, other, rtol=1e-12, atol=1e-12)


def no_gradient_no_change(make: Factory, microbatches: int = 1) -> None:
    """Parameters without a gradient are skipped, also in the middle of a group, and count no step."""
    for frozen in (False, True):
        problem = Problem(make, microbatches=microbatches)
        before = problem.bits()
        problem.optimizer.step()
        assert _equal(before, problem.bits()), "a step without any gradient changed a parameter"
        alone = Problem(
            make,
            parameters=[p for i, p in enumerate(Problem(make).parameters) if i != 1],
            microbatches=microbatches,
        )
        problem.parameters[1].requires_grad_(not frozen)
        skipped = problem.parameters[1].detach().clone()
        for _ in range(3):
            problem.backward()
            problem.parameters[1].grad = None
            problem.update()
            alone.run(1)
        assert torch.equal(skipped, problem.parameters[1]), "a parameter without a gradient moved"
        assert _equal(problem.bits()[:1] + problem.bits()[2:], alone.bits()), "a skipped parameter changed the others"


def zero_gradients_are_finite(make: Factory, microbatches: int = 1) -> None:
    """Gradients of exactly zero give no infinity and no NaN."""
    problem = Problem(make, microbatches=microbatches)
    for _ in range(3):
        problem.backward(0.0)
        problem.update()
    assert all(torch.isfinite(p).all() for p in problem.parameters), "zero gradients made a parameter non-finite"


def gradients_are_left_alone(make: Factory, microbatches: int = 1) -> None:
    """A step changes no bit of the gradients."""
    problem = Problem(make, microbatches=microbatches)
    for _ in range(3):
        problem.backward()
        before = [_grad(p).clone() for p in problem.parameters]
        problem.update()
        assert _equal(before, [_grad(p) for p in problem.parameters]), "a step changed the gradients"


def closure_is_evaluated(make: Factory, microbatches: int = 1) -> None:
    """``step(closure)`` evaluates the closure once with gradients enabled, returns its loss, and steps as without."""
    by_closure, plain = Problem(make, microbatches=microbatches), Problem(make, microbatches=microbatches)
    optimizer: Any = by_closure.optimizer  # torch declares closures that return a float; tensors are what they return
    calls: list[Tensor] = []

    def closure() -> Tensor:
        assert torch.is_grad_enabled(), "the closure runs without gradients"
        calls.append(by_closure.backward())
        return calls[-1]

    for step in range(1, 4):
        with torch.no_grad():
            loss = optimizer.step(closure)
        by_closure.step += 1
        assert loss is calls[-1] and len(calls) == step, "the closure is called once, and its loss returned"
        plain.run(1)
    assert _same(by_closure, plain), "a step with a closure differs from one without"


def maximizing_is_minimizing_the_negative(make: Factory, microbatches: int = 1) -> None:
    """``maximize=True``, where there is such a setting, is the step on negated gradients."""
    down, up = Problem(make, microbatches=microbatches), Problem(make, microbatches=microbatches)
    if "maximize" not in down.optimizer.defaults:
        return
    up = Problem(lambda p: make([{"params": p, "maximize": True}]), sign=-1.0, microbatches=microbatches)
    assert _same(down.run(3), up.run(3)), "maximize=True differs from negated gradients"


def groups_are_independent(make: Factory, microbatches: int = 1) -> None:
    """Parameter groups with their own learning rates move like optimizers of their own, added late or not."""

    def grouped(parameters: list[nn.Parameter]) -> Optimizer:
        optimizer = make([{"params": parameters[:2], "lr": 0.01}, {"params": []}])
        optimizer.add_param_group({"params": parameters[2:], "lr": 0.03})
        return optimizer

    together = Problem(grouped, microbatches=microbatches).run(3)
    first = Problem(lambda p: make([{"params": p[:2], "lr": 0.01}]), microbatches=microbatches).run(3)
    second = Problem(lambda p: make([{"params": p[2:], "lr": 0.03}]), microbatches=microbatches).run(3)
    assert _equal(together.bits(), first.bits()[:2] + second.bits()[2:]), "groups influence one another"


def learning_rate_may_change(make: Factory, microbatches: int = 1) -> None:
    """A scheduler acts on the next step, and a learning rate of zero stops the weights; a tensor does like a number.

    With primal averaging a learning rate of zero stops z; the parameters still follow the average, which nears z.
    """
    problem = Problem(make, microbatches=microbatches)
    scheduler = StepLR(problem.optimizer, step_size=2, gamma=0.0)
    problem.run(1)
    scheduler.step()
    before = problem.bits()
    problem.run(1)
    scheduler.step()
    assert not _equal(before, problem.bits()), "a step with a positive learning rate moved nothing"
    if any(group.get("pull") for group in problem.optimizer.param_groups):
        return  # moves z to the average at any learning rate
    before = _stepped(problem)
    problem.run(1)
    assert _equal(before, _stepped(problem)), "a step with learning rate 0 moved a parameter"

    number = Problem(lambda p: make([{"params": p, "lr": 0.02}]), microbatches=microbatches)
    tensor = Problem(
        lambda p: make([{"params": p, "lr": torch.tensor(0.02, dtype=torch.float64)}]), microbatches=microbatches
    )
    for a, b in zip(number.run(3).parameters, tensor.run(3).parameters, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def scaler_skips_a_step(make: Factory, microbatches: int = 1) -> None:
    """A step that a gradient scaler skips, for infinite gradients, changes neither weights nor state."""
    problem = Problem(make, microbatches=microbatches).run(2)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    before, state = problem.bits(), copy.deepcopy(problem.optimizer.state_dict()["state"])
    problem.backward(scaler.scale(torch.tensor(float("inf"), dtype=torch.float32)))
    scaler.step(problem.optimizer)
    scaler.update()
    assert _equal(before, problem.bits()), "a skipped step moved a parameter"
    assert _same_state(state, problem.optimizer.state_dict()["state"]), "a skipped step changed the state"


def state_is_plain(make: Factory, microbatches: int = 1) -> None:
    """The state holds tensors and numbers by name, and loads without executing code."""
    problem = Problem(make, microbatches=microbatches).run(2)
    state = problem.optimizer.state_dict()
    for values in state["state"].values():
        for name, value in values.items():
            assert isinstance(name, str) and isinstance(value, Tensor | int | float), f"{name!r} is a {type(value)}"
    loaded = _through_file(state)
    assert _same_state(state["state"], loaded["state"]), "the state changes on its way through a file"


def resumed_equals_never_stopped(make: Factory, microbatches: int = 1) -> None:
    """Saving and loading the state after any step changes no bit and no dtype of what follows."""
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        whole = Problem(make, dtype, microbatches=microbatches).run(STEPS)
        for stop in range(STEPS):
            part = Problem(make, dtype, microbatches=microbatches).run(stop)
            state = _through_file(part.optimizer.state_dict())
            resumed = Problem(make, dtype, parameters=part.parameters, step=stop, microbatches=microbatches)
            resumed.optimizer.load_state_dict(state)
            held = resumed.optimizer.state_dict()
            assert _same_state(state["state"], held["state"]), f"loading {dtype} state changes it"
            assert _same(resumed.run(STEPS - stop), whole), f"{dtype}, resumed after step {stop}: other bits"


def state_goes_by_parameter_name(make: Factory, microbatches: int = 1) -> None:
    """``torch.distributed.checkpoint`` takes the state by parameter name and gives it back bit for bit."""
    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2, bias=False))
    problem = Problem(make, parameters=list(model.parameters()), microbatches=microbatches).run(2)
    twin = copy.deepcopy(model)
    state = copy.deepcopy(get_optimizer_state_dict(model, problem.optimizer))
    resumed = Problem(make, parameters=list(twin.parameters()), step=2, microbatches=microbatches)
    set_optimizer_state_dict(twin, resumed.optimizer, state)
    assert _same(problem.run(2), resumed.run(2)), "the state does not survive its way by parameter names"


def evaluation_is_neutral(make: Factory, microbatches: int = 1) -> None:
    """``eval()``/``train()``, ``applied()`` and ``read()``, where there are such, change no bit of training.

    ``eval()`` and ``train()`` return the optimizer and may be called twice; a step in between is refused, and an error
    inside ``applied()`` restores the weights too. In the first steps, before there is an average, ``applied()`` and
    ``read()`` may refuse.
    """
    whole, problem = Problem(make, microbatches=microbatches).run(STEPS), Problem(make, microbatches=microbatches)
    optimizer: Any = problem.optimizer
    applied = not hasattr(optimizer, "applied")
    for _ in range(STEPS):
        problem.run(1)
        live = problem.bits()
        if hasattr(optimizer, "eval"):
            assert optimizer.eval() is optimizer and optimizer.eval() is optimizer, "eval() returns the optimizer"
            _refuses_a_step(problem, "after eval()")
            assert optimizer.train() is optimizer and optimizer.train() is optimizer, "train() returns the optimizer"
            assert _equal(live, problem.bits()), "train() does not restore the weights"
        if hasattr(optimizer, "read"):
            with contextlib.suppress(RuntimeError):
                optimizer.read()
            assert _equal(live, problem.bits()), "read() changed the weights"
        if hasattr(optimizer, "applied"):
            with contextlib.suppress(ZeroDivisionError, RuntimeError), optimizer.applied():
                applied = True
                _refuses_a_step(problem, "inside applied()")
                problem.parameters[0].detach().zero_()
                raise ZeroDivisionError
            assert _equal(live, problem.bits()), "applied() does not restore the weights"
    assert applied, f"applied() refuses for {STEPS} steps"
    assert _same(problem, whole), "evaluation changed the training"


def sparse_and_complex_are_right_or_refused(make: Factory, microbatches: int = 1) -> None:
    """Sparse gradients and complex parameters are handled like dense and real ones, or refused."""
    dense, sparse = Problem(make, microbatches=microbatches), Problem(make, microbatches=microbatches)
    dense.run(1)
    sparse.backward()
    refusal = contextlib.suppress(RuntimeError, TypeError, ValueError, NotImplementedError)
    with refusal, torch.sparse.check_sparse_tensor_invariants():
        sparse.parameters[0].grad = _grad(sparse.parameters[0]).to_sparse()
        sparse.optimizer.step()
        assert torch.allclose(dense.parameters[0], sparse.parameters[0]), "a sparse gradient gives another step"
    with refusal:
        real = nn.Parameter(torch.linspace(-1.0, 1.0, 8, dtype=torch.float32).view(4, 2))
        whole = nn.Parameter(torch.view_as_complex(real.detach().clone()))
        pair = make([real]), make([whole])
        for _ in range(2):
            real.grad = real.detach() + 0.1
            whole.grad = torch.view_as_complex(real.grad.clone())
            for optimizer in pair:
                optimizer.step()
        assert torch.allclose(torch.view_as_real(whole.detach()), real), "a complex parameter is not two real ones"


def it_descends(make: Factory, microbatches: int = 1) -> None:
    """The loss of a parabola falls to less than half in 200 steps at learning rate 0.02: a smoke test."""
    problem = Problem(lambda p: make([{"params": p, "lr": 0.02}]), noise=0.0, microbatches=microbatches)
    first = problem.loss()
    assert problem.run(200).loss() < 0.5 * first, "the loss of a parabola did not fall to half"


OPTIMIZER_CHECKS: tuple[Callable[..., None], ...] = (
    optimizer_is_an_object,
    parameters_keep_their_dtype,
    layout_does_not_matter,
    no_gradient_no_change,
    zero_gradients_are_finite,
    gradients_are_left_alone,
    closure_is_evaluated,
    maximizing_is_minimizing_the_negative,
    groups_are_independent,
    learning_rate_may_change,
    scaler_skips_a_step,
    state_is_plain,
    resumed_equals_never_stopped,
    state_goes_by_parameter_name,
    evaluation_is_neutral,
    sparse_and_complex_are_right_or_refused,
    it_descends,
)


def _stepped(problem: Problem) -> list[Tensor]:
    """Return copies of what the optimizer steps: the parameters, or z where gradients are taken elsewhere."""
    state = problem.optimizer.state
    return [(state[p].get("z", p) if p in state else p).detach().clone() for p in problem.parameters]


def _refuses_a_step(problem: Problem, when: str) -> None:
    try:
        problem.optimizer.step()
    except RuntimeError:
        return
    raise AssertionError(f"a step {when} is not refused")


def _grad(parameter: Tensor) -> Tensor:
    assert parameter.grad is not None
    return parameter.grad


def _through_file(state: dict[str, Any]) -> dict[str, Any]:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def _equal(a: list[Tensor], b: list[Tensor]) -> bool:
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def _same(a: Problem, b: Problem) -> bool:
    same_state = _same_state(a.optimizer.state_dict()["state"], b.optimizer.state_dict()["state"])
    return _equal(a.bits(), b.bits()) and same_state


def _same_state(a: Any, b: Any) -> bool:
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(_same_state(a[k], b[k]) for k in a)
    if isinstance(a, Tensor):
        return isinstance(b, Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    return type(a) is type(b) and a == b
