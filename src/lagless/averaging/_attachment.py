"""Following an optimizer through its step hooks."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from lagless.execution import untraced


class Attachment:
    """The tie between an Averager and an optimizer; ``remove()`` cuts it.

    Attributes:
        active: until ``remove()``.
        stepping: while ``after`` is called.

    Args:
        optimizer: whose steps are followed; an optimizer of Accelerate's is looked into.
        before: called before every step.
        after: called after every step that changed the weights.
        skipped: called after every other step.
        averaged: name → tensor that is averaged. A warning names those that this optimizer does not step and that had
            a gradient, but had not moved, when it first stepped: they would be averaged one step late.

    Raises:
        TypeError: if this is no ``torch.optim.Optimizer``, or one whose ``step()`` runs no hooks.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        before: Callable[[], None],
        after: Callable[[], None],
        skipped: Callable[[], None],
        averaged: Mapping[str, Tensor] | None = None,
    ) -> None:
        inner: Any = optimizer
        if type(optimizer).__module__.partition(".")[0] == "accelerate":
            inner = getattr(optimizer, "optimizer", optimizer)  # the one whose hooks run
        if not isinstance(inner, Optimizer):
            raise TypeError(f"attach needs a torch.optim.Optimizer, not a {type(inner).__name__}; {_remedy(inner)}.")
        _require_hooks(inner)
        stepped_here = {id(p) for group in inner.param_groups for p in group["params"]}
        elsewhere = {name: tensor for name, tensor in (averaged or {}).items() if id(tensor) not in stepped_here}
        versions = {name: tensor._version for name, tensor in elsewhere.items()}
        wrapped = [value for value in vars(inner).values() if isinstance(value, Optimizer) and value is not inner]
        outside = True  # of the step of the optimizer that is followed

        def entered(*_: Any) -> None:
            nonlocal outside
            outside = False
            before()

        def wrapped_stepped(*_: Any) -> None:
            if outside:
                raise RuntimeError(
                    f"{type(wrapped[0]).__name__} stepped without {type(inner).__name__}.step(), which alone runs the "
                    f"hooks of {type(inner).__name__}, so nothing would be averaged; remove() the attachment, then "
                    f"{_remedy(inner)}."
                )

        def stepped(*_: Any) -> None:
            nonlocal outside
            outside = True
            # A fused optimizer is stepped even when the scaler found infinities, and leaves the weights alone.
            found_inf = getattr(inner, "found_inf", None)
            if found_inf is None or not bool(found_inf):
                _warn_of_late(elsewhere, versions, inner)
                elsewhere.clear()
                self.stepping = True
                try:
                    after()
                finally:
                    self.stepping = False
            else:
                skipped()

        self.active, self.stepping = True, False
        self._hooks = [
            inner.register_step_pre_hook(untraced(entered)),
            inner.register_step_post_hook(untraced(stepped)),
        ]
        self._hooks += [
            other.register_step_pre_hook(untraced(wrapped_stepped)) for other in wrapped if _runs_hooks(other)
        ]

    def remove(self) -> None:
        """Stop following the optimizer."""
        self.active = False
        for hook in self._hooks:
            hook.remove()


def _runs_hooks(optimizer: Optimizer) -> bool:
    # Optimizer.__init__ makes the dictionary of hooks, and replaces the class's step by one that calls them.
    return hasattr(type(optimizer).step, "hooked") and hasattr(optimizer, "_optimizer_step_post_hooks")


def _require_hooks(optimizer: Optimizer) -> None:
    if not _runs_hooks(optimizer):
        raise TypeError(
            f"{type(optimizer).__name__}.step() runs no hooks, since the class does not call Optimizer.__init__, so "
            f"nothing would be averaged; {_remedy(optimizer)}."
        )


def _remedy(optimizer: Any) -> str:
    wrapped = [name for name, value in getattr(optimizer, "__dict__", {}).items() if isinstance(value, Optimizer)]
    inner = f"attach to the optimizer that it wraps (its attribute {wrapped[0]!r}), or " if wrapped else ""
    return f"{inner}call update() after every step"


def _warn_of_late(elsewhere: Mapping[str, Tensor], versions: Mapping[str, int], optimizer: Optimizer) -> None:
    late = [
        name
        for name, tensor in elsewhere.items()
        if tensor.is_leaf and tensor.grad is not None and tensor._version == versions[name]
    ]
    if late:
        warnings.warn(
            f"{len(late)} averaged parameters, such as {late[0]!r}, are in no group of the attached "
            f"{type(optimizer).__name__} and had not moved when it stepped, though they have gradients: another "
            "optimizer's steps would enter the average one step late. Attach to the optimizer that steps last, or call "
            "update() after all of them; freeze what no optimizer trains.",
            stacklevel=2,
        )
