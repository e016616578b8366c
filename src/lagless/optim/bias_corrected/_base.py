"""What bias-corrected optimizers have in common: microbatches, patterns of parameters, skipped steps, wide states."""

from __future__ import annotations

import logging
import weakref
from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from lagless._validation import require_integer, require_number
from lagless.execution import sum_over_mesh
from lagless.optim._loaded_state import require_fitting
from lagless.optim.bias_corrected._microbatches import Collected, Microbatches, norms
from lagless.optim.bias_corrected._report import Correction, CorrectionSums
from lagless.optim.bias_corrected._sums import PowerSums, Sums

STANDARD = ("embed", "lm_head", "wte", "shared.")
_log = logging.getLogger("lagless")


class BiasCorrected(Optimizer):
    """An optimizer that sees microbatches; subclasses say which sums they need and how they step.

    Args:
        params: parameters, named parameters or parameter groups.
        defaults: of the groups.
        standard: parts of names; parameters with them form groups of their own, stepped without correction.
        report_freq: steps between records for :meth:`correction_report`; 0 for none.
        process_group: data-parallel processes; None for the default group, if there is one.
    """

    def __init__(
        self,
        params: Any,
        defaults: dict[str, Any],
        *,
        standard: Sequence[str],
        report_freq: int,
        process_group: dist.ProcessGroup | None,
    ) -> None:
        self._standard = (standard,) if isinstance(standard, str) else tuple(standard)
        self._report_freq = require_integer("report_freq", report_freq, minimum=0)
        self._sums: dict[int, CorrectionSums] = {}
        self._folds_seen = False
        self._microbatches = Microbatches(_data_parallel(process_group))
        super().__init__(params, defaults)
        self._say_what_is_standard()

    _plain: ClassVar[dict[str, Any]]
    """The settings of a group of parameters whose names are in ``standard``."""
    _plain_words: ClassVar[str] = "no correction"

    @abstractmethod
    def _check(self, group: dict[str, Any]) -> None:
        """Raise ValueError for bad hyperparameters."""

    @abstractmethod
    def _needs(self, group: dict[str, Any], parameter: Tensor) -> tuple[Sums | None, bool]:
        """What to sum over a parameter's microbatches, and whether to keep their gradients."""

    @abstractmethod
    def _update(self, group: dict[str, Any], collected: dict[Tensor, Collected], sums: CorrectionSums | None) -> None:
        """Step the parameters of a group; ``sums`` wants to know about the correction, or is None."""

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
        self._check_gradients(parameters)
        collected = self._microbatches.read(parameters)
        finite = self._all_finite(parameters, [found.totals for found in collected.values()])
        # Followers of this optimizer's steps look here, as they do for those that a gradient scaler skips.
        self.found_inf = torch.tensor(float(not finite))
        if finite:
            self._folds_seen |= any(found.count > 1 for found in collected.values())
            # torch.distributed.checkpoint makes states by a step of learning rate 0 with gradients out of nowhere.
            self._refuse(
                [g for g in self.param_groups if g["lr"] > 0.0 and any(p.grad is not None for p in g["params"])]
            )
            for index, group in enumerate(self.param_groups):
                rate = float(group["lr"])  # of a tensor on the device, a wait per group
                self._update(group | {"lr": rate}, collected, self._recorder(index, group))
        self._forget(stepped=True)
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget the gradients, and the microbatches that they are made of."""
        super().zero_grad(set_to_none)
        self._forget(stepped=False)

    def set_microbatch_weight(self, weight: float) -> None:
        """Say what the next microbatch weighs in the sum of gradients; call it before each ``backward()`` or none.

        Its loss is then ``weight`` times a mean over the microbatch, up to a factor that all have in common, and the
        variance of that mean's gradient goes as 1/``weight``: a sum of token losses over the number of tokens in the
        whole step has its own number of tokens for a weight. Losses that are means of each microbatch have equal ones,
        whatever their lengths. Only ratios of weights count.

        Args:
            weight: ≥ 0; a microbatch of weight 0 has nothing to say and is not counted. In data parallel in the same
                unit on all processes, under FSDP2 that of all processes' microbatches together.

        Raises:
            ValueError: for a negative or infinite weight.
        """
        weight = float(weight)  # of a tensor, too
        require_number("weight", weight, minimum=0.0, finite=True)
        self._microbatches.announce(weight)

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
        owner = weakref.ref(self)

        def weigh(module: nn.Module, _: Any, arguments: dict[str, Any]) -> None:
            optimizer, labels = owner(), arguments.get("labels")
            if optimizer is None or labels is None or not (module.training and torch.is_grad_enabled()):
                return
            if arguments.get("num_items_in_batch") is not None:
                tokens = (labels[..., 1:] if shifted else labels).ne(-100).sum()
                optimizer.set_microbatch_weight(optimizer._over_shards(tokens))

        return model.register_forward_pre_hook(weigh, with_kwargs=True)

    def _over_shards(self, count: Tensor) -> float:
        """A count over all processes that share sharded parameters, whose microbatches are one."""
        sharded = next((p for g in self.param_groups for p in g["params"] if isinstance(p, DTensor)), None)
        if sharded is not None:
            count = sum_over_mesh(count, sharded)
        return float(count)

    def correction_report(self) -> list[Correction]:
        """How much the correction matters, one record per parameter group, from the latest step it was recorded in.

        Raises:
            RuntimeError: if none was recorded yet.
        """
        if not self._sums:
            raise RuntimeError(
                f"no step has been recorded; report_freq={self._report_freq}: every so many steps of a corrected group "
                "are, from its first corrected one on."
            )
        return [self._sums[i].result(i, g) for i, g in enumerate(self.param_groups) if i in self._sums]

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group; parameters whose names match ``standard`` form one of their own, unless it sets cross_fit."""
        for part in self._parts(param_group):
            whole = self.defaults | part
            if any(p.is_complex() for p in tensors_of(whole)):
                raise ValueError(f"{type(self).__name__}: complex parameters; give torch.view_as_real of them.")
            self._check(whole)
            super().add_param_group(whole)
            self._follow(self.param_groups[-1])

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over a state; moments keep the precision they were saved in, whatever the parameters have.

        Raises:
            ValueError: if a tensor has another shape or type than this optimizer works with. Nothing is changed then.
        """
        self._require_fitting(state_dict)
        if self._microbatches.begun:
            _log.warning(
                "%s: a state is loaded between backward() and step(); %d microbatches that p.grad still holds are "
                "forgotten. Call zero_grad(), or load before the first backward().",
                type(self).__name__,
                self._microbatches.begun,
            )
        own = [{k: v for k, v in group.items() if k != "params"} for group in self.param_groups]
        saved = state_dict["param_groups"]
        if len(own) == len(saved):  # torch says what is wrong otherwise; a state of torch's AdamW lacks our settings
            state_dict = state_dict | {"param_groups": [a | b for a, b in zip(own, saved, strict=True)]}
        super().load_state_dict(state_dict)
        numbers = [i for group in saved for i in group["params"]]
        for i, p in zip(numbers, (p for group in self.param_groups for p in group["params"]), strict=True):
            for key, value in state_dict["state"].get(i, {}).items():
                if isinstance(value, Tensor):  # torch has cast it to the parameter's dtype
                    self.state[p][key] = value.to("cpu" if key == "step" else p.device, copy=True)

    def _require_fitting(self, state_dict: dict[str, Any]) -> None:
        """Refuse tensors of other shapes; torch refuses other numbers of groups and parameters."""
        for own, saved in zip(self.param_groups, state_dict["param_groups"]):  # noqa: B905
            for index, p in zip(saved["params"], own["params"]):  # noqa: B905
                state = state_dict["state"].get(index, {})
                require_fitting(index, state, self._shapes({**own, **saved}, p), "step")

    def _shapes(self, group: dict[str, Any], parameter: Tensor) -> dict[str, Sequence[int]]:
        """The shapes of entries of the parameter's state; entries may be missing before the first step."""
        return dict.fromkeys(("exp_avg", "exp_avg_sq", "hessian", "inverse"), parameter.shape)

    def __getstate__(self) -> dict[str, Any]:
        kept = ("_standard", "_report_freq", "_sums", "_folds_seen")
        return super().__getstate__() | {name: getattr(self, name) for name in kept}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        # Loading comes here as well, and brings the hyperparameters that say what is to be collected.
        former = self.__dict__.get("_microbatches")
        if former is not None:
            former.remove()
        self._microbatches = Microbatches(_data_parallel(None) if former is None else former.group)
        for group in self.param_groups:
            self._follow(group)

    def _follow(self, group: dict[str, Any]) -> None:
        for p in group["params"]:
            sums, keep = self._needs(group, p)
            if sums is not None or keep:
                self._microbatches.track(p, sums or PowerSums(()), keep)
        if any(isinstance(p, DTensor) for p in group["params"]):
            self._microbatches.group = None  # sharded gradients arrive reduced: a microbatch is that of all processes

    def _forget(self, stepped: bool) -> None:
        self._microbatches.close()

    def _refuse(self, groups: Sequence[dict[str, Any]]) -> None:
        """Raise, before anything has changed, if ``groups`` need microbatches and there never were any."""
        if not self._folds_seen and any(p in self._microbatches for group in groups for p in group["params"]):
            raise RuntimeError(
                f"{type(self).__name__} needs the gradients of at least 2 microbatches per step and saw "
                f"{self._microbatches.begun}. Accumulate gradients over several backward() calls made after the "
                "optimizer was, or set cross_fit='none' and inverse_correction='none'."
            )

    def _check_gradients(self, parameters: Sequence[Tensor]) -> None:
        for p in parameters:
            gradient: Any = p.grad
            if gradient.is_sparse:
                raise RuntimeError(
                    f"{type(self).__name__}: sparse gradients; use dense ones, e.g. sparse=False in Embedding."
                )
            if isinstance(p, DTensor) and gradient.placements != p.placements:
                raise RuntimeError(
                    f"{type(self).__name__}: a parameter {tuple(p.shape)} lies on the ranks as {p.placements}, its "
                    f"gradient as {gradient.placements}, as of weights within SequenceParallel. Shard them with "
                    "fully_shard, which reduces gradients."
                )

    def _all_finite(self, parameters: Sequence[Tensor], sums: Iterable[dict[Any, Tensor]]) -> bool:
        if not parameters:
            return True
        finite = torch.stack([n.float() for n in norms(parameters)]).isfinite().all()
        # Sums of powers may overflow where gradients do not, those of even ones upwards (off-diagonal elements of a
        # Gram matrix not before diagonal ones); NaN is the largest of all. Of fourth powers the Euclidean norm is
        # infinite before they are.
        filled = [(key.exponent % 2, t) for totals in sums for key, t in totals.items() if t.numel()]
        even, odd = ([t for rest, t in filled if rest == parity] for parity in (0, 1))
        extremes = [*(torch._foreach_max(even) if even else ()), *(t for each in odd for t in torch.aminmax(each))]
        if extremes:
            wide = max((t.dtype for t in extremes), key=lambda d: d.itemsize)
            finite &= torch.stack([t.to(wide) for t in extremes]).isfinite().all()
        sharded = next((p for p in parameters if isinstance(p, DTensor)), None)
        if sharded is not None:
            return not bool(sum_over_mesh((~finite).float(), sharded))
        return bool(finite)  # the step's one wait for the device

    def _recorder(self, index: int, group: dict[str, Any]) -> CorrectionSums | None:
        if not self._report_freq or not self._corrects(group):
            return None
        steps = [int(self.state[p]["step"]) for p in group["params"] if "step" in self.state[p]]
        step = 1 + max(steps, default=0)
        if not self._records(group, step, self._sums.get(index)):
            return None
        self._sums[index] = CorrectionSums(step)
        return self._sums[index]

    def _records(self, group: dict[str, Any], step: int, former: CorrectionSums | None) -> bool:
        """Whether ``step`` (1-based) is one to record."""
        return step > group.get("warm_start", 0) and (former is None or step % self._report_freq == 0)

    def _parts(self, group: dict[str, Any]) -> Iterator[dict[str, Any]]:
        params = [group["params"]] if isinstance(group["params"], Tensor) else list(group["params"])
        named = bool(params) and all(isinstance(p, tuple) for p in params)
        if not named or not self._standard or "cross_fit" in group or not self._special(self.defaults | group):
            yield group | {"params": params}
            return
        plain = [any(part in name for part in self._standard) for name, _ in params]
        if not all(plain):
            yield group | {"params": [p for p, standard in zip(params, plain, strict=True) if not standard]}
        if any(plain):
            chosen = [p for p, standard in zip(params, plain, strict=True) if standard]
            yield (group | {"params": chosen} | self._plain)

    def _special(self, group: dict[str, Any]) -> bool:
        """Whether a group is stepped otherwise than those in ``standard``."""
        return self._corrects(group)

    @staticmethod
    def _corrects(group: dict[str, Any]) -> bool:
        return group["cross_fit"] != "none" or group["inverse_correction"] != "none"

    def _say_what_is_standard(self) -> None:
        if not any(self._special(group) for group in self.param_groups) or not self._standard:
            return
        if "param_names" not in self.param_groups[0]:
            _log.warning(
                "%s: parameters came without names, so embeddings could not be told apart and are corrected too. "
                "Rows of rare tokens then get a numerator without a preconditioner; pass model.named_parameters().",
                type(self).__name__,
            )
            return
        plain = [n for g in self.param_groups if not self._special(g) for n in g["param_names"]]
        if plain:
            _log.warning(
                "%s: %s for %s (names with %s); standard=() treats them like the others.",
                type(self).__name__,
                self._plain_words,
                ", ".join(plain) if len(plain) < 5 else f"{', '.join(plain[:4])} and {len(plain) - 4} more",
                ", ".join(self._standard),
            )


def tensors_of(group: dict[str, Any]) -> list[Tensor]:
    """The parameters of a group, named or not."""
    return [p[1] if isinstance(p, tuple) else p for p in group["params"]]


def _data_parallel(group: dist.ProcessGroup | None) -> dist.ProcessGroup | None:
    if group is None and dist.is_available() and dist.is_initialized():
        group = dist.group.WORLD
    return None if group is None or group.size() == 1 else group
