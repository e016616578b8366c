"""A rule of somebody else's package goes wherever lagless's own go."""

import json
import subprocess
import sys

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import nn

from lagless import Averager, trajectory_weights
from lagless.optim import PACE
from lagless.testing import check_rule

HYPERPARAMETERS = {"half_life_fraction": 0.2, "slowness": 2.0, "mix": 0.5}


def llama():
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = dict(hidden_size=8, intermediate_size=12, num_hidden_layers=1, num_attention_heads=1)
    return LlamaForCausalLM(LlamaConfig(vocab_size=16, max_position_embeddings=16, **sizes))


def rows(count=12):
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(0, 16, (count, 6), generator=generator)
    return [{"input_ids": row, "labels": row.clone()} for row in tokens]


def python(code, *arguments, env):
    return subprocess.run([sys.executable, "-c", code, *map(str, arguments)], env=env, capture_output=True, text=True)


def command(*arguments, env):
    return python("import sys; from lagless.cli import main; sys.argv[0] = 'lagless'; main()", *arguments, env=env)


@pytest.fixture
def run(tmp_path):
    """Checkpoints of a random walk, and the weights in them."""
    walk = torch.randn(5, 6, generator=torch.Generator().manual_seed(0)).cumsum(dim=0)
    for i, weights in enumerate(walk):
        folder = tmp_path / "run" / f"checkpoint-{10 * i}"
        folder.mkdir(parents=True)
        safetensors.torch.save_file({"w": weights.clone()}, folder / "model.safetensors")
        (folder / "config.json").write_text("{}")
    return tmp_path / "run", walk


def test_it_is_a_rule(two_speeds):
    check_rule(two_speeds.TwoSpeeds(update_freq=3, update_after=2, **HYPERPARAMETERS))


def test_states_resume_in_a_process_that_imported_nothing_of_it(two_speeds, environment, tmp_path):
    rule = two_speeds.TwoSpeeds(**HYPERPARAMETERS)
    weights = nn.Parameter(torch.ones(4))
    optimizer, averager = PACE([weights], lr=0.1, average=rule), Averager({"w": weights}, rule)
    averager.attach(optimizer)
    for step in range(5):
        weights.grad = torch.full((4,), 0.5 - step)
        optimizer.step()
    torch.save({"optimizer": optimizer.state_dict(), "weights": weights.detach()}, tmp_path / "state.pt")
    averager.save(tmp_path / "averages.safetensors")
    code = """
import sys, torch
from lagless import Averager
from lagless.optim import PACE
from lagless.rules import rule_from_dict
saved = torch.load(sys.argv[1], weights_only=True)
weights = torch.nn.Parameter(saved["weights"])
optimizer = PACE([weights], lr=0.1)
optimizer.load_state_dict(saved["optimizer"])
averager = Averager({"w": weights}, rule_from_dict(saved["optimizer"]["param_groups"][0]["average"]))
averager.load(sys.argv[2])
print(optimizer.read()["0"].tolist(), averager.read()["w"].tolist())
"""
    paths = tmp_path / "state.pt", tmp_path / "averages.safetensors"
    found, lost = (python(code, *paths, env=env) for env in environment)
    assert found.returncode == 0, found.stderr
    assert found.stdout.strip() == f"{optimizer.read()['0'].tolist()} {averager.read()['w'].tolist()}"
    assert lost.returncode and "'TwoSpeeds' of module 'two_speeds' is not known here" in lost.stderr
    assert "write `import two_speeds` first" in lost.stderr


def test_commands_average_and_inspect_with_it(run, environment, tmp_path):
    folder, walk = run
    options = ["--rule", "two-speeds", *(f"--{k.replace('_', '-')}={v}" for k, v in HYPERPARAMETERS.items())]
    averaged = command("average", folder, "-o", tmp_path / "out", *options, env=environment[0])
    assert averaged.returncode == 0, averaged.stderr
    record = json.loads((tmp_path / "out/lagless.json").read_text())["rule"]
    named = {"rule": "TwoSpeeds", "module": "two_speeds", **HYPERPARAMETERS}
    assert record == {**named, "update_after": 0, "update_freq": 10}
    weights = torch.tensor(record_weights(record, environment[0]), dtype=torch.float64)
    expected = weights @ walk.double()
    stored = safetensors.torch.load_file(tmp_path / "out/model.safetensors")["w"]
    torch.testing.assert_close(stored, expected.float(), rtol=1e-5, atol=1e-6)
    inspected = command("inspect", folder, *options, env=environment[0])
    assert inspected.returncode == 0 and "twospeeds" in inspected.stdout, inspected.stderr
    lost = command("average", folder, "-o", tmp_path / "lost", "--rule", "two-speeds", env=environment[1])
    assert lost.returncode == 2 and "unknown rule 'two-speeds'" in lost.stderr and not (tmp_path / "lost").exists()


def record_weights(record, env):
    code = """
import json, sys, lagless
from lagless.rules import rule_from_dict
print(lagless.trajectory_weights(rule_from_dict(json.loads(sys.argv[1])), range(0, 50, 10)).tolist())
"""
    return json.loads(python(code, json.dumps(record), env=env).stdout)


def test_the_trainer_follows_saves_resumes_and_exports_it(two_speeds, tmp_path):
    from transformers import AutoModelForCausalLM, Trainer, TrainerCallback, TrainingArguments

    from lagless.integrations.transformers import AveragingCallback

    rule = two_speeds.TwoSpeeds(**HYPERPARAMETERS)

    class Iterates(TrainerCallback):
        def on_train_begin(self, args, state, control, model, **kwargs):
            self.seen = [weights(model)]

        def on_step_end(self, args, state, control, model, **kwargs):
            self.seen.append(weights(model))

    def weights(model):
        return torch.cat([p.detach().double().flatten() for p in model.parameters()])

    def train(folder, steps, **resume):
        settings = dict(max_steps=steps, per_device_train_batch_size=2, learning_rate=1e-2, save_steps=3, seed=1)
        quiet = dict(
            lr_scheduler_type="constant", report_to="none", disable_tqdm=True, use_cpu=True, dataloader_pin_memory=False
        )
        callbacks = [AveragingCallback({"mine": rule}), iterates := Iterates()]
        arguments = TrainingArguments(str(folder), logging_strategy="no", **settings, **quiet)
        trainer = Trainer(llama(), arguments, train_dataset=rows(), callbacks=callbacks)
        trainer.train(**resume)
        return callbacks[0].averager, iterates.seen

    whole, seen = train(tmp_path / "whole", 6)
    train(tmp_path / "part", 3)
    resumed, _ = train(tmp_path / "part", 6, resume_from_checkpoint=True)
    assert all(torch.equal(value, resumed.read("mine")[name]) for name, value in whole.read("mine").items())
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "part/averaged/mine")
    expected = sum(w * theta for w, theta in zip(trajectory_weights(rule, range(7)), seen, strict=True))
    torch.testing.assert_close(weights(exported), expected, rtol=1e-5, atol=1e-6)
    record = json.loads((tmp_path / "part/averaged/mine/lagless.json").read_text())["rule"]
    assert (record["rule"], record["module"]) == ("TwoSpeeds", "two_speeds")


@pytest.mark.filterwarnings(
    "ignore:.*LeafSpec.*:FutureWarning", "ignore:.*does not have many workers", "ignore:Checkpoint directory"
)
def test_lightning_follows_saves_resumes_and_loads_it(two_speeds, tmp_path):
    pl = pytest.importorskip("lightning.pytorch")
    from torch.utils.data import DataLoader, TensorDataset

    from lagless.integrations.lightning import AveragingCallback, load_average

    class Line(pl.LightningModule):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.line = nn.Linear(3, 1)

        def training_step(self, batch, index):
            return self.line(batch[0]).square().mean()

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    data = DataLoader(TensorDataset(torch.randn(8, 3, generator=torch.Generator().manual_seed(2))), batch_size=2)

    def fit(folder, epochs, path=None):
        saved = pl.callbacks.ModelCheckpoint(dirpath=folder, save_last=True)
        callback = AveragingCallback({"mine": two_speeds.TwoSpeeds(**HYPERPARAMETERS)})
        quiet = dict(accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False)
        trainer = pl.Trainer(max_epochs=epochs, callbacks=[callback, saved], default_root_dir=folder, **quiet)
        trainer.fit(Line(), data, ckpt_path=path, weights_only=True)
        return callback.averager.read("mine"), saved.last_model_path

    whole, _ = fit(tmp_path / "whole", 2)
    _, path = fit(tmp_path / "part", 1)
    resumed, last = fit(tmp_path / "part", 2, path)
    loaded = load_average(last, "mine")
    for name, value in whole.items():
        assert torch.equal(value, resumed[name]) and torch.equal(value, loaded[name])


def test_it_is_tuned_in_what_tune_knows(two_speeds, tmp_path):
    from lagless.lab.evaluation import Sequences
    from lagless.lab.tune import tune

    model = llama()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for step in range(0, 50, 10):
        model.save_pretrained(tmp_path / f"run/checkpoint-{step}")
        for row in rows():
            optimizer.zero_grad()
            model(input_ids=row["input_ids"][None], labels=row["labels"][None]).loss.backward()
            optimizer.step()
    start = two_speeds.TwoSpeeds(update_freq=10, **HYPERPARAMETERS)
    tokens = [torch.randint(0, 16, (6, 6), generator=torch.Generator().manual_seed(seed)) for seed in (3, 4)]
    held = [Sequences(each, each.clone()) for each in tokens]
    found = tune(tmp_path / "run", {"mine": start}, *held, evaluations=4)
    assert isinstance(found.best, two_speeds.TwoSpeeds) and found.best.slowness == start.slowness
    assert found.considered > 20 and np.isfinite(found.best_minus_start.value)


def test_recipes_name_it_with_and_without_its_module(two_speeds):
    pydantic = pytest.importorskip("pydantic")
    from lagless.lab.recipes._method import AveragingRule

    adapter = pydantic.TypeAdapter(AveragingRule)
    rule = two_speeds.TwoSpeeds(**HYPERPARAMETERS)
    assert adapter.validate_python({"rule": "TwoSpeeds", **HYPERPARAMETERS}) == rule
    assert adapter.validate_python(adapter.dump_python(rule)) == rule
