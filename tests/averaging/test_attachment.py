"""Attaching to optimizers whose hooks never run, or to the first of several."""

import warnings

import pytest
import torch
from torch.optim import SGD, Optimizer

import lagless


class Lookahead(Optimizer):
    """Wraps another optimizer without Optimizer.__init__, as many published ones do."""

    def __init__(self, optimizer):
        self.optimizer = optimizer
        self.param_groups = optimizer.param_groups
        self.state = optimizer.state

    def step(self, closure=None):
        return self.optimizer.step(closure)


class Bare:
    """Wraps another optimizer and is none."""

    def __init__(self, optimizer):
        self.base = optimizer


class SharpnessAware(Optimizer):
    """Has two half steps of its own, which the training loop calls instead of step()."""

    def __init__(self, optimizer):
        super().__init__(optimizer.param_groups, {})
        self.base_optimizer = optimizer

    def first_step(self):
        pass

    def second_step(self):
        self.base_optimizer.step()

    def step(self, closure=None):
        self.first_step()
        self.second_step()


class Averaging:
    def average_parameters(self, params):
        pass


def post_local_sgd(optimizer):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the import, about torch.jit
        from torch.distributed.optim import PostLocalSGDOptimizer
    return PostLocalSGDOptimizer(optimizer, Averaging())


def backward(model):
    model(torch.ones(1, 3)).square().mean().backward()


@pytest.fixture
def model():
    return torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.Linear(3, 2))


@pytest.mark.parametrize(
    ("wrap", "inner"),
    [(Lookahead, "optimizer"), (post_local_sgd, "optim"), (Bare, "base")],
)
def test_wrappers_without_hooks_are_refused_at_once(model, wrap, inner):
    optimizer = wrap(SGD(model.parameters(), lr=0.1))
    avg = lagless.Averager(model, lagless.UniformAverage(update_freq=1))
    with pytest.raises(TypeError, match=rf"{type(optimizer).__name__}.*'{inner}'.*call update\(\)"):
        avg.attach(optimizer)
    avg.attach(getattr(optimizer, inner))  # the remedy
    backward(model)
    if hasattr(optimizer, "step"):
        optimizer.step()
    else:
        getattr(optimizer, inner).step()
    assert avg.step == 1


def test_half_steps_that_run_no_hooks_are_refused(model):
    optimizer = SharpnessAware(SGD(model.parameters(), lr=0.1))
    avg = lagless.Averager(model, lagless.UniformAverage(update_freq=1))
    handle = avg.attach(optimizer)
    backward(model)
    optimizer.step()
    assert avg.step == 1
    with pytest.raises(RuntimeError, match="SGD stepped without SharpnessAware.*'base_optimizer'"):
        optimizer.second_step()
    handle.remove()
    avg.attach(optimizer.base_optimizer)
    optimizer.second_step()
    assert avg.step == 2


@pytest.mark.parametrize("last", [True, False])
def test_the_first_of_two_optimizers_is_named_once(model, last):
    first, second = (SGD(layer.parameters(), lr=0.1) for layer in model)
    avg = lagless.Averager(model, lagless.UniformAverage(update_freq=1))
    avg.attach(second if last else first)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(3):
            model.zero_grad()
            backward(model)
            first.step()
            second.step()
    assert len(caught) == (0 if last else 1)
    if not last:
        assert "2 averaged parameters, such as '1.weight'" in str(caught[0].message)
        assert "steps last" in str(caught[0].message)
