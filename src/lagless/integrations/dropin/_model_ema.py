"""The interface of timm's ``ModelEmaV3`` over an Averager."""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn

from lagless.averaging import unwrap
from lagless.integrations.dropin._following import FollowingAverager
from lagless.rules import EMA, Rule, Tick, WarmupEMA


class ModelEmaV3(nn.Module):
    """What timm's training script does with its ``ModelEmaV3``, for any averaging rule.

    ``module`` is a copy of the model that holds the average whenever it is looked at. Without ``rule`` the average is
    that of the original, up to rounding, buffers included. With ``rule`` the parameters are averaged by it, and
    everything else is the live model's: running statistics belong to the weights they were gathered under.

    Args:
        model: the live model; its values are θ_0.
        decay: the final decay.
        min_decay: the least decay, with ``use_warmup``.
        update_after_step: burn-in: until then the average follows the live weights.
        use_warmup: warm up by inverse gamma.
        warmup_gamma: γ of that warm-up.
        warmup_power: its power.
        device: of ``module`` and of the average; None for the model's own.
        dtype: accepted for compatibility: averages are kept in float32 in any case, and in bfloat16 for that.
        stochastic_rounding: likewise; bfloat16 averages are rounded stochastically in any case.
        stochastic_rounding_seed: likewise.
        foreach: likewise.
        exclude_buffers: copy buffers in place of averaging them.
        rule: any averaging rule in place of that EMA.

    Raises:
        ValueError: if an argument is out of range.

    >>> import lagless
    >>> model = nn.Linear(2, 1)
    >>> model_ema = ModelEmaV3(model, rule=lagless.EMA(half_life_fraction=0.05))
    >>> model_ema.update(model, step=1)  # after each optimizer step
    >>> averaged = model_ema.module(torch.ones(1, 2))
    """

    def __init__(
        self,
        model: nn.Module,
        decay: float = 0.9999,
        min_decay: float = 0.0,
        update_after_step: int = 0,
        use_warmup: bool = False,
        warmup_gamma: float = 1.0,
        warmup_power: float = 2 / 3,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        stochastic_rounding: bool = True,
        stochastic_rounding_seed: int = 0,
        foreach: bool = True,
        exclude_buffers: bool = False,
        *,
        rule: Rule | None = None,
    ) -> None:
        super().__init__()
        copied = deepcopy(model).eval().requires_grad_(False)
        self._modules["module"] = copied.to(device=device, dtype=dtype)
        self.decay, self.min_decay, self.update_after_step = decay, min_decay, update_after_step
        self.use_warmup, self.warmup_gamma, self.warmup_power = use_warmup, warmup_gamma, warmup_power
        self.exclude_buffers, self.device, self.dtype = exclude_buffers, device, dtype
        self._given = rule
        self._following: FollowingAverager | None = None
        self._live: nn.Module | None = None
        self._stale = False
        self.register_state_dict_pre_hook(lambda *_: self._sync())

    @property
    def module(self) -> nn.Module:
        """The averaged model."""
        self._sync()
        module = self._modules["module"]
        assert module is not None
        return module

    def get_decay(self, step: int | None = None) -> float:
        """Return the decay of the original's EMA at a step."""
        if step is None:
            return self.decay
        number = step - self.update_after_step
        if number <= 1:
            return 0.0
        return 1.0 - self._warmup_rule().update(Tick(step, step - 1, number)).live[0]

    @torch.no_grad()
    def update(self, model: nn.Module, step: int | None = None) -> None:
        """Count one optimizer step of the model.

        Args:
            model: the live one.
            step: its number, as timm's script gives it. Without any, the original's decay is constant from the start.

        Raises:
            ValueError: if a step does not follow the one before.
        """
        model = unwrap(model)
        tensors = self._averaged(model)
        if self._following is None:
            constant = step is None and self._given is None
            rule = self._given or (EMA(decay=self.decay) if constant else self._warmup_rule())
            held = self._averaged(self._held())
            self._following = FollowingAverager(held, rule, step=0 if step is None else step - 1, device=self.device)
        elif step is not None and step != self._following.step + 1:
            raise ValueError(
                f"step={step} follows step {self._following.step}; call update once per optimizer step, with steps "
                "that increase by one."
            )
        self._following.update(tensors)
        self._live, self._stale = model, True

    @torch.no_grad()
    def set(self, model: nn.Module) -> None:
        """Take the model's values as they are; the average begins again with them."""
        self._following, self._stale = None, False
        for own, live in zip(self._held().state_dict().values(), model.state_dict().values(), strict=True):
            own.copy_(live)  # by position, as a wrapper may have renamed them

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Call the averaged model."""
        return self.module(*args, **kwargs)

    def average_state(self) -> dict[str, Any] | None:
        """Return the state to go on from bit for bit; timm's checkpoints hold the averaged model alone."""
        return None if self._following is None else self._following.state_dict()

    def load_average_state(self, state: Mapping[str, Any], model: nn.Module) -> None:
        """Go on from a state of :meth:`average_state`, beside the live model of its step.

        Raises:
            ValueError: if it is one of another rule, or of other parameters.
        """
        model = unwrap(model)
        rule = self._given or self._warmup_rule()
        self._following = FollowingAverager(self._averaged(model), rule, device=self.device)
        self._following.load_state_dict(state)
        self._live, self._stale = model, True

    def _held(self) -> nn.Module:
        module = self._modules["module"]
        assert module is not None
        return module

    @torch.no_grad()
    def _sync(self) -> None:
        """Give the copy the average, and the live model's value of everything else."""
        if not self._stale or self._following is None or self._live is None:
            return
        averages = self._following.values()
        live = self._live.state_dict()
        for name, own in self._held().state_dict().items():
            own.copy_(averages.get(name, live[name]))
        self._stale = False

    def _averaged(self, model: nn.Module) -> dict[str, Tensor]:
        """The tensors that are averaged; tied ones once."""
        parameters = {id(p) for p in model.parameters()}
        state = model.state_dict(keep_vars=True)
        whole = self._given is None and not self.exclude_buffers
        chosen = {
            name: tensor
            for name, tensor in state.items()
            if tensor.is_floating_point() and (whole or id(tensor) in parameters)
        }
        first: dict[int, str] = {}
        return {name: tensor for name, tensor in chosen.items() if first.setdefault(id(tensor), name) == name}

    def _warmup_rule(self) -> WarmupEMA:
        return WarmupEMA(
            decay=self.decay,
            min_decay=self.min_decay if self.use_warmup else 0.0,
            warmup="inverse_gamma" if self.use_warmup else "none",
            inv_gamma=self.warmup_gamma,
            power=self.warmup_power,
            update_after=self.update_after_step,
        )
