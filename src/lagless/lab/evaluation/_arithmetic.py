"""Word problems with a chain of thought, in the style of GSM8K, that small models can learn.

A problem is a start and a list of operations; names and things are only its dress. Whether a problem is for training or
for testing depends on its numbers alone, through a digest: the two never meet, whatever is drawn with whatever seed.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

Split = Literal["train", "test"]

LEVELS = (1, 2, 3)
_TEST_SHARE = 10  # one problem in ten is for testing
_MOST_GIVEN, _MOST = 50, 100
_NAMES = ("Ann", "Ben", "Eva", "Max", "Mia", "Sam", "Tom", "Zoe")
_THINGS = ("apples", "books", "cards", "coins", "eggs", "pens", "stars", "toys")
_VERBS = {"+": ("gets", "more"), "-": ("gives away", "of them"), "*": ("then has", "times as many")}


@dataclass(frozen=True)
class Problem:
    """A word problem.

    Attributes:
        question: the text.
        answer: the chain of thought, ending in ``#### N`` as in GSM8K.
        key: its start and operations, e.g. ``"7+5-3"``; problems with one key differ in names only.
    """

    question: str
    answer: str
    key: str


def problems(split: Split, seed: int = 0, level: int = 1) -> Iterator[Problem]:
    """Word problems without end, the same ones for the same seed.

    Args:
        split: ``"train"`` or ``"test"``; their keys are disjoint.
        seed: of what is drawn.
        level: 1: one addition or subtraction; 2: two of them; 3: three operations, one of them a multiplication by 2 to
            5. What is given is at most 50, every result at most 100.

    Raises:
        ValueError: if ``split`` or ``level`` is unknown.

    >>> problem = next(problems("train", level=2))
    >>> print(problem.question, problem.answer, sep="\\n")
    Tom has 45 coins. Tom gives away 4 of them. Tom gives away 35 of them. How many coins does Tom have?
    45 - 4 = 41
    41 - 35 = 6
    #### 6
    """
    if split not in ("train", "test"):
        raise ValueError(f"split={split!r}; it must be 'train' or 'test'.")
    if level not in LEVELS:
        raise ValueError(f"level={level!r}; it must be one of {', '.join(map(str, LEVELS))}.")
    draw = random.Random(f"{split} {seed} {level}")
    while True:
        numbers = _numbers(draw, level)
        key = str(numbers[0]) + "".join(f"{operation}{number}" for operation, number in numbers[1])
        if (int(hashlib.sha256(key.encode()).hexdigest(), 16) % _TEST_SHARE == 0) == (split == "test"):
            yield _dress(*numbers, key, draw)


def _numbers(draw: random.Random, level: int) -> tuple[int, list[tuple[str, int]]]:
    """A start and operations whose intermediate results stay between 0 and 100."""
    kinds = [draw.choice("+-") for _ in range(level)]
    if level == 3:
        kinds[draw.randrange(3)] = "*"
    while True:
        start = value = draw.randint(2, _MOST_GIVEN)
        operations: list[tuple[str, int]] = []
        for kind in kinds:
            number = draw.randint(2, 5) if kind == "*" else draw.randint(1, _MOST_GIVEN)
            value = _apply(value, kind, number)
            operations.append((kind, number))
            if not 0 <= value <= _MOST:
                break
        else:
            return start, operations


def _apply(value: int, kind: str, number: int) -> int:
    return value * number if kind == "*" else value + number if kind == "+" else value - number


def _dress(start: int, operations: list[tuple[str, int]], key: str, draw: random.Random) -> Problem:
    name, thing = draw.choice(_NAMES), draw.choice(_THINGS)
    asked, thought, value = [f"{name} has {start} {thing}."], [], start
    for kind, number in operations:
        verb, rest = _VERBS[kind]
        asked.append(f"{name} {verb} {number} {rest}.")
        result = _apply(value, kind, number)
        thought.append(f"{value} {kind} {number} = {result}")
        value = result
    asked.append(f"How many {thing} does {name} have?")
    return Problem(" ".join(asked), "\n".join([*thought, f"#### {value}"]), key)
