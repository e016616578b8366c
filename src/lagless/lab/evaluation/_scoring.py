"""The score of all responses to one prompt; the task files beside name these functions as ``process_results``."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from typing import Any

from lagless.lab.evaluation._answers import extract_choice, extract_number, extract_yes_no

Score = dict[str, float]


def number(document: dict[str, Any], results: Sequence[Sequence[str]]) -> Score:
    """How many of the responses arrive at the right number."""
    return _score([extract_number(text) for text in results[0]], Fraction(document["gold"]))


def yes_no(document: dict[str, Any], results: Sequence[Sequence[str]]) -> Score:
    """How many of the responses say the right one of yes and no."""
    return _score([extract_yes_no(text) for text in results[0]], document["gold"] == "yes")


def choice(document: dict[str, Any], results: Sequence[Sequence[str]]) -> Score:
    """How many of the responses choose the right letter."""
    return _score([extract_choice(text, document["choices"]) for text in results[0]], document["gold"])


def _score(answers: Sequence[object], gold: object) -> Score:
    """The share of responses that are right, and the share that give any answer."""
    return {
        "accuracy": sum(answer == gold for answer in answers) / len(answers),
        "answered": sum(answer is not None for answer in answers) / len(answers),
    }
