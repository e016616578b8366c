"""The Averager under Accelerate: what counts as a step, names, checkpoints, many processes."""

from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import nn
from torch.utils.data import DataLoader

from lagless import EMA, Averager

from ..processes import launch, run_script


@pytest.fixture(autouse=True)
def fresh_accelerator():
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def run(accelerator, batches=12):
    """A model, its optimizer, and a function that trains on the next batch and tells whether the weights moved."""
    torch.manual_seed(0)
    data = torch.randn(batches, 4)
    model = nn.Linear(4, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)
    model, optimizer, loader = accelerator.prepare(model, optimizer, DataLoader(data, batch_size=1))

    def steps():
        for batch in loader:
            before = [p.detach().clone() for p in model.parameters()]
            with accelerator.accumulate(model):
                accelerator.backward((model(batch) - 100).square().mean())
                optimizer.step()
                optimizer.zero_grad()
            yield any(not torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))

    return model, optimizer, steps()


@pytest.mark.parametrize("accumulate", [1, 3])
def test_accumulated_gradients_are_one_step(accumulate):
    model, optimizer, steps = run(Accelerator(cpu=True, gradient_accumulation_steps=accumulate))
    avg = Averager(model, EMA(decay=0.9))
    avg.attach(optimizer)
    assert sum(steps) == avg.step == 12 // accumulate


def test_a_step_that_the_gradient_scaler_skips_does_not_count():
    accelerator = Accelerator(cpu=True)
    # On a CPU, Accelerate makes none itself.
    accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127, backoff_factor=2.0**-64)
    model, optimizer, steps = run(accelerator)
    avg = Averager(model, EMA(decay=0.9))
    avg.attach(optimizer)
    moved = list(steps)
    assert not moved[0] and 0 < sum(moved) < 12
    assert avg.step == sum(moved)


def test_names_are_those_of_the_plain_module_and_export_fits_it():
    accelerator = Accelerator(cpu=True)
    model, optimizer, steps = run(accelerator)
    avg = Averager(model, EMA(decay=0.9))
    avg.attach(optimizer)
    list(steps)
    plain = nn.Linear(4, 1)
    with avg.applied():
        plain.load_state_dict(accelerator.get_state_dict(model))
    assert avg.read().keys() == {"weight", "bias"}
    assert all(torch.equal(plain.state_dict()[name], value) for name, value in avg.read().items())


def test_the_state_is_one_that_accelerate_accepts(tmp_path):
    accelerator = Accelerator(cpu=True)
    model, optimizer, steps = run(accelerator)
    avg = Averager(model, EMA(decay=0.9))
    avg.attach(optimizer)
    accelerator.register_for_checkpointing(avg)
    for _ in range(4):
        next(steps)
    accelerator.save_state(tmp_path)
    saved = avg.read()
    list(steps)
    assert avg.step == 12 and not torch.equal(avg.read()["weight"], saved["weight"])
    accelerator.load_state(tmp_path)
    assert avg.step == 4 and all(torch.equal(avg.read()[name], saved[name]) for name in saved)
    # What Accelerate wrote can be read without trusting it, although Accelerate itself does trust it.
    assert torch.load(tmp_path / "custom_checkpoint_0.pkl", weights_only=True)["meta"]["step"] == 4


@pytest.mark.parametrize("script", [[], [Path(__file__).with_name("accelerate_fsdp_run.py")]], ids=["DDP", "FSDP2"])
def test_the_example_saves_and_resumes_on_two_processes(tmp_path, monkeypatch, script):
    monkeypatch.chdir(tmp_path)
    example = Path(__file__).parents[2] / "examples" / "accelerate_loop.py"
    ranks = launch(run_script, 2, *script, example, "--steps", "6")
    printed = "".join(rank.output for rank in ranks)
    assert printed.count("resumed from step 3: bema bitwise the same: True") == 1, printed
    assert not list(tmp_path.iterdir())
