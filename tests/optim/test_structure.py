"""Optimizers are put together from parts that fit on a page."""

import ast
import inspect
from pathlib import Path

import pytest

import lagless.optim.bias_corrected as package
from lagless.optim import BiasCorrectedAdamW, BiasCorrectedShampoo, BiasCorrectedSophia

FILES = sorted(Path(package.__file__).parent.glob("*.py"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_files_and_classes_are_short(path):
    source = path.read_text()
    assert len(source.splitlines()) <= 250, f"{path.name} holds more than one idea"
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ClassDef):
            methods = [child.name for child in node.body if isinstance(child, ast.FunctionDef)]
            assert len(methods) <= 12, f"{node.name} has {len(methods)} methods: {methods}"


@pytest.mark.parametrize("optimizer", [BiasCorrectedAdamW, BiasCorrectedSophia, BiasCorrectedShampoo])
def test_settings_are_listed_under_their_own_names(optimizer):
    parameters = inspect.signature(optimizer).parameters
    assert "exclude" in parameters and "standard" not in parameters
