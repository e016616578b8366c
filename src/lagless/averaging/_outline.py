"""Which parameters a model has, and where: noticed quickly when it changes."""

from __future__ import annotations

from torch import nn

from lagless.averaging._tables import children_of, parameters_of


class Outline:
    """The modules of a model and the names of their parameters, as they were last seen.

    Comparing takes less than a walk over the model, which makes names.

    Args:
        module: the model.
    """

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self.look()

    def look(self) -> None:
        """Take the present outline for the known one."""
        modules = list(self._module.modules())
        self._children = [(children_of(m), tuple(children_of(m).values())) for m in modules if children_of(m)]
        self._parameters = [(parameters_of(m), _present(m)) for m in modules]

    def changed(self) -> bool:
        """Whether a module has been put in, replaced or taken out since, or a parameter put in or taken out."""
        for now, children in self._children:
            if len(now) != len(children) or any(a is not b for a, b in zip(now.values(), children, strict=True)):
                return True
        return any([key for key, p in now.items() if p is not None] != keys for now, keys in self._parameters)


def _present(module: nn.Module) -> list[str]:
    return [key for key, parameter in parameters_of(module).items() if parameter is not None]
