"""Every tensor that the package makes has a type of its own, whatever ``torch.set_default_dtype`` says.

A counter made in the default type stops at 256 under bfloat16, and at 2,048 under float16.
"""

import ast
from pathlib import Path

import lagless

FACTORIES = {
    *("zeros", "ones", "empty", "full", "tensor", "as_tensor", "scalar_tensor", "arange", "range", "linspace"),
    *("logspace", "eye", "rand", "randn", "randint", "randperm", "normal", "empty_strided", "hann_window"),
}


def calls_without_type(source):
    """Calls of torch's factories that name no dtype; ``**options`` are taken to hold one."""
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
            continue
        module = node.func.value
        if isinstance(module, ast.Name) and module.id == "torch" and node.func.attr in FACTORIES:
            if not any(keyword.arg in ("dtype", None) for keyword in node.keywords):
                yield node.lineno, ast.unparse(node)


def test_no_tensor_of_the_default_type():
    root = Path(lagless.__file__).parent
    found = [
        f"{path.relative_to(root)}:{line}: {call}"
        for path in sorted(root.rglob("*.py"))
        for line, call in calls_without_type(path.read_text())
    ]
    assert not found, "give dtype=:\n" + "\n".join(found)


def test_a_missing_type_is_found():
    assert [call for _, call in calls_without_type("import torch\nx = torch.zeros(3, device='cpu')")]
    assert not [*calls_without_type("x = torch.zeros(3, dtype=d); y = torch.zeros(3, **like); z = np.zeros(3)")]
