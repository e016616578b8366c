"""Averages are of one step, whichever thread reads them, and a forked process is told what it lacks."""

from __future__ import annotations

import multiprocessing
import threading

import pytest
import torch
from torch import nn

from lagless import BEMA, EMA, Averager
from lagless.averaging import _buffers, _offload
from lagless.execution import Turns, _turns
from lagless.optim import PACE, PrimalAveraging, Pullback

RULE = BEMA(correction=1.0, anchor="start")
SIZE = 20_000


class Counting(torch.optim.Optimizer):
    """Sets every element of every parameter to the number of the step, one parameter after the other."""

    def __init__(self, parameters):
        super().__init__(parameters, {})
        self.taken = 0

    @torch.no_grad()
    def step(self, closure=None):
        self.taken += 1
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.fill_(float(self.taken))


def parameters(count=30):
    return [nn.Parameter(torch.zeros(SIZE)) for _ in range(count)]


def named(params):
    return {f"w{i}": p for i, p in enumerate(params)}


def of_one_step(average):
    """Whether all elements of all parameters are equal, as they are in averages of weights that are."""
    return len({v for tensor in average.values() for v in (tensor.min().item(), tensor.max().item())}) == 1


def while_training(train, read, reads=60):
    """Read in this thread while another one trains; the averages read."""
    done, failed = threading.Event(), []

    def run():
        try:
            while not done.is_set():
                train()
        except BaseException as error:  # reported by the thread that reads
            failed.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    try:
        found = [read() for _ in range(reads)]
    finally:
        done.set()
        thread.join()
    assert not failed
    return found


@pytest.mark.parametrize("attach", [True, False])
def test_reads_of_another_thread_are_of_one_step(attach):
    params = parameters()
    optimizer, averager = Counting(params), Averager(named(params), RULE)
    if attach:
        averager.attach(optimizer)

    def train():
        optimizer.step()
        if not attach:
            averager.update()

    train()
    found = while_training(train, averager.read)
    assert all(map(of_one_step, found))
    assert len({average["w0"][0].item() for average in found}) > 1  # training went on meanwhile


@pytest.mark.parametrize(
    "make",
    [
        lambda ps: PACE(ps, lr=1.0),
        lambda ps: Pullback(torch.optim.SGD(ps, lr=1.0), 0.3),
        lambda ps: PrimalAveraging(torch.optim.SGD(ps, lr=1.0), EMA(decay=0.5)),
    ],
)
def test_reads_of_another_thread_from_optimizers_are_of_one_step(make):
    params = parameters()
    optimizer = make(params)
    for parameter in params:
        parameter.grad = torch.ones(SIZE)
    optimizer.step()
    assert all(map(of_one_step, while_training(optimizer.step, optimizer.read)))


@pytest.mark.parametrize("attach", [True, False])
def test_states_of_another_thread_load_beside_no_half_step(tmp_path, attach):
    params = parameters(4)
    optimizer, averager = Counting(params), Averager(named(params), RULE)
    if attach:
        averager.attach(optimizer)

    def train():
        optimizer.step()
        if not attach:
            averager.update()

    def save():
        averager.save(tmp_path / "state.safetensors")
        live = {name: torch.zeros(SIZE) for name in named(params)}
        other = Averager(live, RULE)
        other.load(tmp_path / "state.safetensors", check_live=False)
        for tensor in live.values():
            tensor.fill_(float(other.step))
        other.load(tmp_path / "state.safetensors")
        return other.read()

    train()
    assert all(map(of_one_step, while_training(train, save, reads=10)))


def test_one_by_one_ends_with_the_step():
    params = parameters(3)
    optimizer, averager = Counting(params), Averager(named(params), RULE)
    averager.attach(optimizer)
    optimizer.step()
    whole = averager.named_averages()
    assert len(list(whole)) == 3
    averages = averager.named_averages()
    next(averages)
    optimizer.step()
    with pytest.raises(RuntimeError, match="weights have stepped since the first of them.*read"):
        next(averages)
    pace = PACE(params, lr=0.1)
    for parameter in params:
        parameter.grad = torch.ones(SIZE)
    pace.step()
    averages = pace.named_averages()
    next(averages)
    pace.step()
    with pytest.raises(RuntimeError, match="weights have stepped since"):
        next(averages)


def test_a_step_of_any_optimizer_is_refused_while_an_average_is_in_its_place():
    params = parameters(2)
    optimizer, averager = Counting(params), Averager(named(params), RULE)
    optimizer.step()
    averager.update()
    with averager.applied():
        with pytest.raises(RuntimeError, match="cannot step the optimizer while the average 'bema' is in"):
            optimizer.step()
        assert optimizer.taken == 1
    optimizer.step()


def test_a_step_that_does_not_end_is_reported(monkeypatch):
    monkeypatch.setattr(_turns, "LONGEST_WAIT", 0.05)
    params = parameters(2)
    optimizer, averager = Counting(params), Averager(named(params), RULE)
    optimizer.step()
    averager.update()
    thread = threading.Thread(target=optimizer.step)  # without an update
    thread.start()
    thread.join()
    with pytest.raises(RuntimeError, match=r"a step that another one has begun 0.05 s ago has not ended.*update\(\)"):
        averager.read()
    averager.update()
    averager.read()


def test_a_skipped_step_gives_its_turn_back(monkeypatch):
    monkeypatch.setattr(_turns, "LONGEST_WAIT", 0.05)
    params = parameters(2)
    optimizer, averager = Counting(params), Averager(named(params), RULE)
    averager.attach(optimizer)
    optimizer.step()
    optimizer.found_inf = torch.ones(1)
    thread = threading.Thread(target=optimizer.step)
    thread.start()
    thread.join()
    assert averager.step == 1
    averager.read()


def test_turns_of_a_forked_process_are_its_own():
    turns = Turns()
    turns.begin_step()

    def use():
        with turns.still("read"):
            pass

    assert exit_code(use) == 0


@pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="there is no fork")
@pytest.mark.parametrize("use", ["read", "update", "wait", "save"])
def test_an_averager_on_the_host_is_refused_in_a_fork_and_goes_on_in_the_process_that_made_it(
    monkeypatch, tmp_path, use
):
    release = threading.Event()
    monkeypatch.setattr(_buffers, "can_overlap", lambda device: True)
    apply = _offload._finish
    monkeypatch.setattr(_offload, "_finish", lambda staged: (release.wait(), apply(staged))[1])
    weights = {"w": torch.ones(64)}
    averager = Averager(weights, EMA(decay=0.5), device="cpu")
    averager.update()  # under way until released

    def in_fork():
        try:
            averager.save(tmp_path / "x") if use == "save" else getattr(averager, use)()
        except RuntimeError as error:
            return "fork" in str(error) and "'spawn'" in str(error)
        return False

    assert exit_code(in_fork) == 1
    release.set()
    assert torch.equal(averager.read()["w"], torch.ones(64))


def exit_code(work):
    """What ``work`` returns in a forked process, which is ended if it hangs."""
    process = multiprocessing.get_context("fork").Process(target=lambda: exit(int(bool(work()))))
    process.start()
    process.join(30)
    hangs = process.is_alive()
    process.kill()
    process.join()
    assert not hangs
    return process.exitcode
