"""Following an optimizer through its step hooks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch.optim import Optimizer


class Attachment:
    """The tie between an Averager and an optimizer; ``remove()`` cuts it.

    Attributes:
        active: until ``remove()``.
        stepping: while ``after`` is called.

    Args:
        optimizer: whose steps are followed; an optimizer of Accelerate's is looked into.
        before: called before every step.
        after: called after every step that changed the weights.

    Raises:
        TypeError: if this is no ``torch.optim.Optimizer``.
    """

    def __init__(self, optimizer: Optimizer, before: Callable[[], None], after: Callable[[], None]) -> None:
        inner: Any = optimizer
        if type(optimizer).__module__.partition(".")[0] == "accelerate":
            inner = getattr(optimizer, "optimizer", optimizer)  # the one whose hooks run
        if not isinstance(inner, Optimizer):
            raise TypeError(f"attach needs a torch.optim.Optimizer, not a {type(inner).__name__}; or call update().")

        def stepped(*_: Any) -> None:
            # A fused optimizer is stepped even when the scaler found infinities, and leaves the weights alone.
            found_inf = getattr(inner, "found_inf", None)
            if found_inf is None or not bool(found_inf):
                self.stepping = True
                try:
                    after()
                finally:
                    self.stepping = False

        self.active, self.stepping = True, False
        self._hooks = [inner.register_step_pre_hook(lambda *_: before()), inner.register_step_post_hook(stepped)]

    def remove(self) -> None:
        """Stop following the optimizer."""
        self.active = False
        for hook in self._hooks:
            hook.remove()
