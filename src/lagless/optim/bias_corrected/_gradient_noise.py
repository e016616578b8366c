"""The gradient noise scale beside any optimizer."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from lagless._validation import require_number, shown
from lagless.execution import exact_dtype, sum_over
from lagless.optim.bias_corrected._gradients import sums_of_whole
from lagless.optim.bias_corrected._microbatches import Microbatches, data_parallel
from lagless.optim.bias_corrected._noise_record import HALF_LIFE, MeasuresNoise, NoiseRecord
from lagless.optim.bias_corrected._sums import SquareSum
from lagless.optim.bias_corrected._token_weights import weigh_by_tokens
from lagless.updates import noise_moments


class GradientNoise(MeasuresNoise):
    """The gradient noise scale of a run, from the microbatches that gradient accumulation and data parallelism have.

        |G|² = (n|ḡ|² - S)/(n - 1),   tr Σ = B (S - |ḡ|²)/(n - 1),   B_simple = tr Σ/|G|²

    for n microbatches with gradients g_j, their mean ḡ and the mean S of |g_j|², in a step of B samples. A batch of
    B_simple samples has as much noise in its gradient as signal: much smaller ones are all noise, much larger ones
    gain little. Estimates of |G|² and tr Σ are unbiased; their ratio is not, so they are smoothed one by one.

    Microbatches are seen by hooks: make this before the first ``backward()``. Nothing about training changes. Ranks of
    data parallelism are microbatches too; under FSDP2 a microbatch is that of all ranks. A step with one microbatch
    says nothing and is left out, and so is one with fewer microbatches than the step before. Norms are those before
    clipping, and include the factor of a gradient scaler, which cancels in B_simple.

    Args:
        params: a module, parameters, named parameters, or parameter groups, each of which is measured by itself.
        samples_per_microbatch: b > 0, on average, so that B = n·b. None to count in microbatches, or, where they were
            given weights, in the unit of these: tokens after :meth:`weigh_by_tokens`.
        half_life: steps after which one counts half in the smoothed estimates; > 0.
        process_group: data-parallel processes; None for the default group, if there is one.

    Raises:
        ValueError: if there are no parameters or some are complex, or a number is out of range.

    Reference:
        McCandlish et al. (2018), *An Empirical Model of Large-Batch Training*, arXiv 1812.06162, Appendix A.1.

    >>> import torch
    >>> model = torch.nn.Linear(3, 1)
    >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    >>> noise = GradientNoise(model, samples_per_microbatch=8)
    >>> handle = noise.attach(optimizer)
    >>> for _ in range(4):
    ...     model(torch.randn(8, 3)).square().mean().backward()
    >>> optimizer.step()
    >>> noise.noise_scale().samples
    32.0
    """

    def __init__(
        self,
        params: nn.Module | Iterable[Any],
        samples_per_microbatch: float | None = None,
        *,
        half_life: float = HALF_LIFE,
        process_group: dist.ProcessGroup | None = None,
    ) -> None:
        name = type(self).__name__
        require_number(f"{name}: samples_per_microbatch", samples_per_microbatch, above=0.0, finite=True, optional=True)
        require_number(f"{name}: half_life", half_life, above=0.0, finite=True)
        self.param_groups: list[dict[str, Any]] = [{"params": group} for group in _groups(params)]
        self._size, self._warned = samples_per_microbatch, False
        self._microbatches = Microbatches(data_parallel(process_group), strict=False)
        self._noise = NoiseRecord(half_life)
        for parameter in self._parameters():
            self._microbatches.track(parameter, SquareSum(), False)
        if any(isinstance(p, DTensor) for p in self._parameters()):
            self._microbatches.group = None  # sharded gradients arrive reduced: a microbatch is that of all processes

    def attach(self, optimizer: Optimizer) -> RemovableHandle:
        """Call :meth:`update` after every step of ``optimizer``.

        Returns:
            A handle whose ``remove()`` ends it.

        Raises:
            TypeError: if this is no ``torch.optim.Optimizer``.
        """
        inner: Any = optimizer
        if type(optimizer).__module__.partition(".")[0] == "accelerate":
            inner = getattr(optimizer, "optimizer", optimizer)  # the one whose hooks run
        if not isinstance(inner, Optimizer):
            raise TypeError(
                f"attach needs a torch.optim.Optimizer, not a {type(inner).__name__}; call update() after every step."
            )
        owner = weakref.ref(self)

        def stepped(*_: Any) -> None:
            if (alive := owner()) is not None:
                alive.update()

        return inner.register_step_post_hook(stepped)

    @torch.no_grad()
    def update(self) -> None:
        """Take in the microbatches since the last step; call it after a step and before its gradients are zeroed.

        In data parallel every process calls it, and one small message goes around.

        Raises:
            RuntimeError: if some microbatches of the step were given a weight, and some were not.

        Warns:
            UserWarning: once, if gradients were changed between two microbatches; such steps are left out.
        """
        microbatches = self._microbatches
        spoiled = microbatches.begun and microbatches.spoiled
        if spoiled and not self._warned:
            self._warned = True
            warnings.warn(f"no gradient noise scale of this step: {spoiled}", stacklevel=2)
        weights = microbatches.weights.given() if microbatches.begun else []
        parts = [microbatches.squares(group["params"]) for group in self.param_groups]
        mine = [1.0] * microbatches.begun if weights is None else [w for w in weights if w]
        microbatches.expect_alike()
        microbatches.close()
        device = next((part[1].device for part in parts if part is not None), torch.device("cpu"))
        # Of every group Σ w|g|², |p.grad|² and 1 if there are any; of the step n, Σ w and 1 if it is spoiled.
        rows = [[0.0] * 3 if part is None else [*sums_of_whole(*part).sum(dim=1), 1.0] for part in parts]
        rows.append([float(len(mine)), sum(mine), float(bool(spoiled))])
        table = torch.stack([torch.as_tensor(v, dtype=exact_dtype(device)).to(device) for row in rows for v in row])
        processes = 1
        if microbatches.group is not None:
            sum_over(microbatches.group, [table])
            processes = microbatches.group.size()
        *_, count, weight, refused = table.unbind()
        squares, norms, present = table[:-3].view(-1, 3).unbind(dim=1)
        # p.grad is what arrived, summed here and averaged over the processes: in its units g_j is W/(w_j·processes)
        # times what arrived.
        found = noise_moments(squares * weight / processes**2, norms / present, count / weight, weight)
        samples = weight if self._size is None else count * self._size
        per_sample = torch.stack([found.signal, found.noise * samples / weight], dim=1)
        good = (present > 0.0) & (count > 1.0) & (refused == 0.0)
        self._noise.add(torch.where(good[:, None], per_sample, torch.nan), samples)

    def set_microbatch_weight(self, weight: float) -> None:
        """Say what the next microbatch weighs in the sum of gradients; call it before each ``backward()`` or none.

        Its loss is then ``weight`` times a mean over the microbatch, up to a factor that all have in common.

        Args:
            weight: ≥ 0; a microbatch of weight 0 is ignored. In data parallel in the same unit on all processes.

        Raises:
            ValueError: for a negative or infinite weight.
        """
        self._microbatches.weights.announce(weight)

    def weigh_by_tokens(self, model: nn.Module, *, shifted: bool = True) -> RemovableHandle:
        """Weigh microbatches by their supervised tokens where ``model``'s loss is divided by those of the whole step.

        Arguments and return value as for :meth:`lagless.optim.BiasCorrectedAdamW.weigh_by_tokens`.
        """
        return weigh_by_tokens(self, type(self).set_microbatch_weight, model, shifted)

    def _parameters(self) -> list[Tensor]:
        return [p for group in self.param_groups for p in group["params"]]


def _groups(params: nn.Module | Iterable[Any]) -> list[list[Tensor]]:
    """Return the parameters of every group, each once."""
    given = list(params.parameters() if isinstance(params, nn.Module) else params)
    groups = [group["params"] for group in given] if given and isinstance(given[0], dict) else [given]
    tensors = [[p[1] if isinstance(p, tuple) else p for p in _listed(group)] for group in groups]
    everything = [p for group in tensors for p in group]
    if not everything:
        raise ValueError("GradientNoise: there are no parameters; give a module, parameters, or parameter groups.")
    for p in everything:
        if not isinstance(p, Tensor):
            raise ValueError(f"GradientNoise: {shown(p)} is no parameter; give tensors, or pairs of names and tensors.")
        if p.is_complex():
            raise ValueError("GradientNoise: complex parameters; give torch.view_as_real of them.")
    return [list(dict.fromkeys(group)) for group in tensors]


def _listed(params: Any) -> list[Any]:
    return [params] if isinstance(params, Tensor) else list(params)
