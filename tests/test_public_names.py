"""The public interface changes on purpose only: names and signatures are compared with tests/public_names.txt.

To accept a change, run ``python tests/test_public_names.py > tests/public_names.txt`` and explain it in the changelog.
"""

import importlib
import inspect
from pathlib import Path

from torch.optim import Optimizer

MODULES = (
    "lagless",
    "lagless.averaging",
    "lagless.checkpoints",
    "lagless.integrations.distributed",
    "lagless.integrations.lightning",
    "lagless.integrations.transformers",
    "lagless.optim",
    "lagless.posthoc",
    "lagless.rules",
    "lagless.testing",
    "lagless.theory",
    "lagless.updates",
)


def parameters(value) -> str:
    try:
        signature = inspect.signature(value)
    except (TypeError, ValueError):
        return ""
    shown = []
    for name, parameter in signature.parameters.items():
        star = {parameter.VAR_POSITIONAL: "*", parameter.VAR_KEYWORD: "**"}.get(parameter.kind, "")
        optional = "=" if parameter.default is not parameter.empty else ""
        shown.append(f"{star}{name}{optional}")
    return f"({', '.join(shown)})"


def public_names() -> list[str]:
    lines = []
    for module_name in MODULES:
        module = importlib.import_module(module_name)
        for name in dir(module):
            value = getattr(module, name)
            if name.startswith("_") or inspect.ismodule(value):
                continue
            lines.append(f"{module_name}.{name}{parameters(value) if callable(value) else ''}")
            if inspect.isclass(value) and value.__module__.startswith("lagless"):
                for member, attribute in sorted(vars(value).items()):
                    patched = member == "step" and issubclass(value, Optimizer)  # torch wraps it at the first use
                    if not member.startswith("_") and not patched:
                        lines.append(
                            f"{module_name}.{name}.{member}{parameters(attribute) if callable(attribute) else ''}"
                        )
    return lines


def test_the_public_interface_is_the_one_on_record():
    on_record = (Path(__file__).parent / "public_names.txt").read_text().splitlines()
    now = public_names()
    assert now == on_record, {"gone": sorted({*on_record} - {*now}), "new": sorted({*now} - {*on_record})}


if __name__ == "__main__":
    print("\n".join(public_names()))
