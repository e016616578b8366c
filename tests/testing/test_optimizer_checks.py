"""The optimizers' suite: torch's own pass it, and every kind of defect fails its check."""

import contextlib

import pytest
import torch
from torch.optim import SGD, Adagrad, Adam, AdamW, RMSprop

from lagless.testing import OPTIMIZER_CHECKS
from lagless.testing._optimizers import _same_state

CHECKS = {check.__name__: check for check in OPTIMIZER_CHECKS}


@pytest.mark.parametrize("check", OPTIMIZER_CHECKS, ids=lambda check: check.__name__)
@pytest.mark.parametrize("make", [AdamW, Adam, RMSprop, Adagrad], ids=lambda make: make.__name__)
def test_torch_optimizers_conform(make, check):
    check(make)


class Defective(AdamW):
    """AdamW; subclasses break one thing each."""

    def parameters(self):
        return [p for group in self.param_groups for p in group["params"]]


class Unprintable(Defective):
    def __repr__(self):
        return "an optimizer"


class SkipsScalars(Defective):
    def step(self, closure=None):
        before = [p.detach().clone() for p in self.parameters()]
        loss = super().step(closure)
        for p, old in zip(self.parameters(), before, strict=True):
            if p.dim() == 0:
                p.data.copy_(old)
        return loss


class Flattens(Defective):
    def step(self, closure=None):
        before = [p.detach().clone() for p in self.parameters()]
        loss = super().step(closure)
        for p, old in zip(self.parameters(), before, strict=True):
            if p.numel() and not p.is_contiguous():
                p.data.copy_(old)
        return loss


class DecaysAll(Defective):
    def step(self, closure=None):
        for p in self.parameters():
            p.data.mul_(0.999)
        return super().step(closure)


class DividesByGradient(Defective):
    def step(self, closure=None):
        loss = super().step(closure)
        for p in self.parameters():
            if p.grad is not None:
                p.data.add_(p.grad / p.grad.norm(), alpha=1e-6)
        return loss


class OverwritesGradient(Defective):
    def step(self, closure=None):
        loss = super().step(closure)
        for p in self.parameters():
            if p.grad is not None:
                p.grad.mul_(0.5)
        return loss


class ClosureWithoutGradient(Defective):
    def step(self, closure=None):
        with torch.no_grad():
            loss = None if closure is None else closure()
        super().step()
        return loss


class IgnoresMaximize(Defective):
    def __init__(self, params, **settings):
        super().__init__(params, **settings)
        for group in self.param_groups:
            group["maximize"] = False


class FirstGroupsRate(Defective):
    def step(self, closure=None):
        for group in self.param_groups:
            group["lr"] = self.param_groups[0]["lr"]
        return super().step(closure)


class RemembersRate(Defective):
    def __init__(self, params, **settings):
        super().__init__(params, **settings)
        self.rate = self.param_groups[0]["lr"]

    def step(self, closure=None):
        for group in self.param_groups:
            group["lr"] = self.rate
        return super().step(closure)


class StepsOverInfinities(Defective):
    _step_supports_amp_scaling = True

    def step(self, closure=None):
        if getattr(self, "found_inf", None):
            for p in self.parameters():
                p.data.add_(1.0)
            return None
        return super().step(closure)


class ListInState(Defective):
    def step(self, closure=None):
        loss = super().step(closure)
        for p in self.state:
            self.state[p]["shape"] = list(p.shape)
        return loss


class CountsOutsideItsState(Defective):
    calls = 0

    def step(self, closure=None):
        self.calls += 1
        for p in self.parameters():
            p.data.mul_(1.0 - 1e-3 * self.calls)
        return super().step(closure)


class WideState(Defective):
    """Keeps a float32 copy, which torch's load_state_dict casts to the parameter's dtype."""

    def step(self, closure=None):
        loss = super().step(closure)
        for p in self.state:
            self.state[p]["master"] = p.detach().float()
        return loss


class LossyNames(Defective):
    def load_state_dict(self, state_dict):
        for values in state_dict["state"].values():
            values["exp_avg"] = torch.zeros_like(values["exp_avg"])
        super().load_state_dict(state_dict)


class LossySwap(Defective):
    """Leaves a rounding error behind, as swapping by algebra does."""

    @contextlib.contextmanager
    def applied(self):
        for p in self.parameters():
            p.data.mul_(1.1)
        self.step = self._refuse
        try:
            yield
        finally:
            del self.step
            for p in self.parameters():
                p.data.div_(1.1)

    def _refuse(self):
        raise RuntimeError("swapped")


class StepsWhileSwapped(Defective):
    @contextlib.contextmanager
    def applied(self):
        live = [p.detach().clone() for p in self.parameters()]
        yield
        for p, bits in zip(self.parameters(), live, strict=True):
            p.data.copy_(bits)


class SilentlySparse(Defective):
    def step(self, closure=None):
        for p in self.parameters():
            if p.grad is not None and p.grad.is_sparse:
                p.grad = None
        return super().step(closure)


class Ascends(Defective):
    def step(self, closure=None):
        for group in self.param_groups:
            group["maximize"] = True
        return super().step(closure)


@pytest.mark.parametrize(
    "defective, check",
    [
        (Unprintable, "optimizer_is_an_object"),
        (SkipsScalars, "parameters_keep_their_dtype"),
        (Flattens, "layout_does_not_matter"),
        (DecaysAll, "no_gradient_no_change"),
        (DividesByGradient, "zero_gradients_are_finite"),
        (OverwritesGradient, "gradients_are_left_alone"),
        (ClosureWithoutGradient, "closure_is_evaluated"),
        (IgnoresMaximize, "maximizing_is_minimizing_the_negative"),
        (FirstGroupsRate, "groups_are_independent"),
        (RemembersRate, "learning_rate_may_change"),
        (StepsOverInfinities, "scaler_skips_a_step"),
        (ListInState, "state_is_plain"),
        (CountsOutsideItsState, "resumed_equals_never_stopped"),
        (WideState, "resumed_equals_never_stopped"),
        (LossyNames, "state_goes_by_parameter_name"),
        (LossySwap, "evaluation_is_neutral"),
        (StepsWhileSwapped, "evaluation_is_neutral"),
        (SilentlySparse, "sparse_and_complex_are_right_or_refused"),
        (Ascends, "it_descends"),
    ],
    ids=lambda value: value if isinstance(value, str) else value.__name__,
)
def test_a_defect_fails_its_check(defective, check):
    with pytest.raises(AssertionError):
        CHECKS[check](defective)


def test_every_check_has_a_defect_that_it_finds():
    marks = test_a_defect_fails_its_check.pytestmark[0].args[1]
    assert {check for _, check in marks} == CHECKS.keys()


def test_an_optimizer_without_state_conforms():
    for check in OPTIMIZER_CHECKS:
        check(lambda params: SGD(params, lr=0.01))


def test_states_are_compared_by_type_dtype_and_bits():
    one = {"a": torch.ones(2), "b": 1}
    assert _same_state(one, {"a": torch.ones(2), "b": 1})
    assert not _same_state(one, {"a": torch.ones(2, dtype=torch.float64), "b": 1})
    assert not _same_state(one, {"a": torch.ones(2), "b": 1.0})
    assert not _same_state(one, {"a": torch.ones(2)})
