"""Optimizers that see microbatches: a collector, a recorder of corrections, a filter of parameters and a method."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from lagless._deprecated import former_method
from lagless.execution import without_autocast
from lagless.optim._loaded_state import Entry, load_checked, with_format
from lagless.optim.bias_corrected._collected_noise import moments_of
from lagless.optim.bias_corrected._exclusion import Exclusion
from lagless.optim.bias_corrected._gradients import all_finite, check_gradients
from lagless.optim.bias_corrected._loading import prepared_state, settle
from lagless.optim.bias_corrected._method import Group, Method, corrects, steps_taken, tensors_of
from lagless.optim.bias_corrected._microbatches import Microbatches, data_parallel
from lagless.optim.bias_corrected._noise_record import MeasuresNoise, NoiseRecord
from lagless.optim.bias_corrected._report import Correction, CorrectionRecorder
from lagless.optim.bias_corrected._sums import PowerSums
from lagless.optim.bias_corrected._token_weights import weigh_by_tokens
from lagless.rules import CheckedCall

_log = logging.getLogger("lagless")


class BiasCorrected(CheckedCall, MeasuresNoise, Optimizer):
    """An optimizer that sees microbatches; its method says which sums are needed and steps.

    Args:
        params: parameters, named parameters or parameter groups.
        defaults: of the groups.
        exclude: parts of names; parameters with them form groups of their own, stepped without correction.
        report_freq: steps between records for :meth:`correction_report`; 0 for none.
        process_group: data-parallel processes; None for the default group, if there is one.
    """

    _method_type: ClassVar[type[Method]]

    def __init__(
        self,
        params: Any,
        defaults: dict[str, Any],
        *,
        exclude: Sequence[str],
        report_freq: int,
        process_group: dist.ProcessGroup | None,
    ) -> None:
        self._method = method = self._method_type(type(self).__name__)
        self._exclusion = Exclusion(exclude, method.corrected, method.plain, method.plain_words)
        self._recorder = CorrectionRecorder(report_freq)
        self._folds_seen, self._noise = False, NoiseRecord()
        self._microbatches = Microbatches(data_parallel(process_group))
        super().__init__(params, defaults)
        self._exclusion.report(method.name, self.param_groups)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # pyright: ignore
        """One optimizer step, with every microbatch since the last one.

        If a gradient or a sum over microbatches is not finite nothing changes: weights, moments and counters stay.

        Raises:
            RuntimeError: if a correction needs several microbatches and there never were any; for sparse gradients, and
                for those that do not lie on the ranks as their parameters do.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        parameters = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        check_gradients(self._method.name, parameters)
        with without_autocast(p.device for p in parameters):
            self._step(parameters)
        self._microbatches.close()
        self._method.forget()
        return loss

    def _step(self, parameters: list[Tensor]) -> None:
        microbatches, method, states = self._microbatches, self._method, self.state
        collected = microbatches.read(parameters)
        own = method.totals(states, self.param_groups, microbatches)
        finite = all_finite(parameters, [*(found.totals for found in collected.values()), *own])
        # Followers of this optimizer's steps look here, as they do for those that a gradient scaler skips.
        self.found_inf = torch.tensor(float(not finite), dtype=torch.float32)
        if not finite:
            return
        moments = moments_of(self.param_groups, collected)
        if moments is not None:
            self._noise.add(moments, next(iter(collected.values())).weights.total)
        self._folds_seen |= any(found.count > 1 for found in collected.values())
        # torch.distributed.checkpoint makes states by a step of learning rate 0 with gradients out of nowhere.
        due = [g for g in self.param_groups if g["lr"] > 0.0 and any(p.grad is not None for p in g["params"])]
        if not self._folds_seen:
            _require_microbatches(method.name, due, microbatches)
        method.require_ready(states, due, microbatches)
        for index, group in enumerate(self.param_groups):
            rate, sums = float(group["lr"]), None  # of a tensor on the device, a wait per group
            if corrects(group):
                step = 1 + steps_taken(states, group)
                sums = self._recorder.begin(index, step, partial(method.records, states, group))
            method.update(states, group | {"lr": rate}, collected, sums)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget the gradients, and the microbatches that they are made of."""
        super().zero_grad(set_to_none)
        if self._microbatches.begun:  # curvature is estimated before its microbatch's backward(): this may be between
            self._method.forget()
        self._microbatches.close()

    def set_microbatch_weight(self, weight: float) -> None:
        """Say what the next microbatch weighs in the sum of gradients; call it before each ``backward()`` or none.

        Its loss is then ``weight`` times a mean over the microbatch, up to a factor that all have in common, and the
        variance of that mean's gradient goes as 1/``weight``: a sum of token losses over the number of tokens in the
        whole step has its own number of tokens for a weight. Losses that are means of each microbatch have equal ones,
        whatever their lengths. Only ratios of weights count.

        Args:
            weight: ≥ 0; a microbatch of weight 0 is ignored. In data parallel in the same unit on all processes, under
                FSDP2 that of all processes' microbatches together.

        Raises:
            ValueError: for a negative or infinite weight.
        """
        self._microbatches.weights.announce(weight)

    weigh_microbatch = former_method("weigh_microbatch", "set_microbatch_weight")

    def weigh_by_tokens(self, model: nn.Module, *, shifted: bool = True) -> RemovableHandle:
        """Weigh microbatches by their supervised tokens where ``model``'s loss is divided by those of the whole step.

        That is so where it is called for training with ``num_items_in_batch``, as transformers' Trainer does; otherwise
        losses are means of each microbatch, and all weigh the same. Call it with the model that is not wrapped yet. One
        forward pass per ``backward()``. Where the labels are on a GPU, counting them waits for it once per microbatch.

        Args:
            model: called with ``labels``, -100 where there is no supervision.
            shifted: whether labels are shifted by one position in the loss, as for causal language models.

        Returns:
            A handle whose ``remove()`` ends it.
        """
        return weigh_by_tokens(self, type(self).set_microbatch_weight, model, shifted)

    def correction_report(self) -> list[Correction]:
        """Return how much the correction matters: one record per group, from the latest step it was recorded in.

        Raises:
            RuntimeError: if none was recorded yet.
        """
        return self._recorder.report(self.param_groups)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group; parameters whose names match ``exclude`` form one of their own, unless it sets cross_fit."""
        for part in self._exclusion.split(param_group, self.defaults):
            whole = self.defaults | part
            if any(p.is_complex() for p in tensors_of(whole)):
                raise ValueError(f"{self._method.name}: complex parameters; give torch.view_as_real of them.")
            super().add_param_group(checked_settings(self, whole))
            _follow(self.param_groups[-1], self._method, self.state, self._microbatches)

    def state_dict(self) -> dict[str, Any]:
        """Return the state as ``torch.optim`` has it, with the number of its format."""
        return with_format(super().state_dict())

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over a state; moments keep the precision they were saved in, whatever the parameters have.

        Settings that a group of an earlier version, or of torch's AdamW, lacks stay as they are here.

        Raises:
            ValueError: if an entry is missing, a tensor has another shape or type than this optimizer works with, a
                setting is out of range, or the state is of a later version. Nothing is changed then.
        """
        begun = self._microbatches.begun
        given = load_checked(
            self,
            super().load_state_dict,
            state_dict,
            lambda state: prepared_state(
                state, self.param_groups, self._method, lambda group: checked_settings(self, group)
            ),
        )
        if begun:
            _log.warning(
                "%s: a state is loaded between backward() and step(); %d microbatches that p.grad still holds are "
                "forgotten. Call zero_grad(), or load before the first backward().",
                self._method.name,
                begun,
            )
        settle(self.state, self.param_groups, self._method, given)
        self._method.loaded(self.state, self.param_groups)

    def __getstate__(self) -> dict[str, Any]:
        kept = ("_exclusion", "_recorder", "_folds_seen")
        return super().__getstate__() | {name: getattr(self, name) for name in kept}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        # Loading comes here as well, and brings the hyperparameters that say what is to be collected.
        former = self.__dict__.get("_microbatches")
        if former is not None:
            former.hooks.remove()
        self._method, self._noise = self._method_type(type(self).__name__), NoiseRecord()
        self._microbatches = Microbatches(data_parallel(None) if former is None else former.group)
        for group in self.param_groups:
            _follow(group, self._method, self.state, self._microbatches)


def checked_settings(optimizer: BiasCorrected, group: Group) -> Group:
    """Return the settings of a group, those that are None for "as fits the others" set.

    Raises:
        ValueError: if one is out of range.
    """
    checked = dict(group)
    optimizer._method.check(optimizer, checked, optimizer._microbatches.group is None)
    return checked


def entries_of(optimizer: BiasCorrected, group: Group, parameter: Tensor) -> dict[str, Entry]:
    """Return the tensors of a parameter's state, besides the count of steps, once it has one."""
    return optimizer._method.entries(group, parameter)


def _follow(group: Group, method: Method, states: Mapping[Tensor, dict[str, Any]], microbatches: Microbatches) -> None:
    for p in group["params"]:
        sums, keep = method.needs(states, group, p)
        if sums is not None or keep:
            microbatches.track(p, sums or PowerSums(()), keep)
    if any(isinstance(p, DTensor) for p in group["params"]):
        microbatches.group = None  # sharded gradients arrive reduced: a microbatch is that of all processes


def _require_microbatches(name: str, groups: Sequence[Group], microbatches: Microbatches) -> None:
    if any(p in microbatches for group in groups for p in group["params"]):
        raise RuntimeError(
            f"{name} needs the gradients of at least 2 microbatches per step and saw {microbatches.begun}. Accumulate "
            "gradients over several backward() calls made after the optimizer was, or set cross_fit='none' and "
            "inverse_correction='none'."
        )
