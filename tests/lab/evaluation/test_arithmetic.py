"""Generated word problems."""

import itertools
import re

import pytest

from lagless.lab.evaluation import extract_number, problems


def drawn(split, level, seed=0, count=400):
    return list(itertools.islice(problems(split, seed, level), count))


@pytest.mark.parametrize("level", [1, 2, 3])
def test_the_chain_of_thought_computes_what_is_asked(level):
    for problem in drawn("train", level):
        *thoughts, last = problem.answer.split("\n")
        assert len(thoughts) == level
        for thought in thoughts:
            left, right = thought.split(" = ")
            assert eval(left) == int(right)
        given = [int(number) for number in re.findall(r"\d+", problem.question)]
        assert given == [int(number) for number in re.findall(r"\d+", problem.key)]
        assert last == f"#### {thoughts[-1].split(' = ')[1]}"
        assert extract_number(problem.answer) == int(last.removeprefix("#### "))
        assert all(0 <= int(thought.split(" = ")[1]) <= 100 for thought in thoughts)


@pytest.mark.parametrize("level", [1, 2, 3])
def test_training_and_testing_never_meet(level):
    train = {problem.key for seed in range(3) for problem in drawn("train", level, seed, 2000)}
    test = {problem.key for seed in range(3) for problem in drawn("test", level, seed, 500)}
    assert len(train) > 1000 and len(test) > 100
    assert not train & test


def test_seeds_repeat_and_differ():
    assert drawn("train", 2, seed=1) == drawn("train", 2, seed=1)
    assert drawn("train", 2, seed=1) != drawn("train", 2, seed=2)


def test_unknown_split_and_level():
    with pytest.raises(ValueError, match="split='valid'; it must be"):
        next(problems("valid"))
    with pytest.raises(ValueError, match="level=4; it must be one of 1, 2, 3"):
        next(problems("test", level=4))
