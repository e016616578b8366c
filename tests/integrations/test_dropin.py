"""EMAModel and ModelEmaV3 against what the originals did (dropin_traces.json), and with other rules inside."""

from __future__ import annotations

import json
import math
import re
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lagless import BEMA, EMA, Averager, WarmupEMA, trajectory_weights
from lagless.integrations.dropin import EMAModel, ModelEmaV3

TRACES: dict[str, Any] = json.loads((Path(__file__).parent / "dropin_traces.json").read_text())
STEPS = 12
PAGE = Path(__file__).parents[2] / "docs" / "dropin.md"


def _live(step: int) -> list[float]:
    return [math.sin(0.7 * step + i) for i in range(3)]


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(3, dtype=torch.float64))
        self.register_buffer("running_mean", torch.zeros(3, dtype=torch.float64))
        self.register_buffer("count", torch.tensor(0))
        self.put(0)

    @torch.no_grad()
    def put(self, step: int) -> None:
        self.weight.copy_(torch.tensor(_live(step), dtype=torch.float64))
        self.running_mean.copy_(2 * self.weight)
        self.count.fill_(step)

    def forward(self) -> Tensor:
        return self.weight

    def save_pretrained(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        torch.save(self.state_dict(), folder / "model.pt")
        (folder / "config.json").write_text(json.dumps(self.config))

    config: dict[str, Any] = {}

    def register_to_config(self, **settings: Any) -> None:
        self.config = {**self.config, **settings}

    @classmethod
    def from_pretrained(cls, folder: Path) -> Model:
        model = cls()
        model.load_state_dict(torch.load(Path(folder) / "model.pt", weights_only=True))
        model.config = cls.load_config(folder)
        return model

    @classmethod
    def load_config(cls, folder: Path) -> dict[str, Any]:
        return json.loads((Path(folder) / "config.json").read_text())

    @classmethod
    def from_config(cls, config: dict[str, Any], return_unused_kwargs: bool = False) -> Any:
        return (cls(), dict(config)) if return_unused_kwargs else cls()


@pytest.mark.parametrize("case", TRACES["diffusers"], ids=lambda case: str(case["arguments"]))
def test_ema_model_is_that_of_diffusers(case: dict[str, Any]) -> None:
    model = Model()
    ema = EMAModel(model.parameters(), **case["arguments"])
    decays = []
    for step in range(1, STEPS + 1):
        model.put(step)
        ema.step(model.parameters())
        decays.append(ema.cur_decay_value)
        if step == 6:
            assert ema.shadow_params[0].tolist() == pytest.approx(case["values_at_6"], abs=1e-12)
    assert decays == pytest.approx(case["decays"], abs=1e-15)
    assert ema.shadow_params[0].tolist() == pytest.approx(case["values"], abs=1e-12)


@pytest.mark.parametrize("case", TRACES["timm"], ids=lambda case: f"{case['arguments']}, {case['steps']}")
def test_model_ema_is_that_of_timm(case: dict[str, Any]) -> None:
    model = Model()
    model_ema = ModelEmaV3(model, **case["arguments"])
    for step in range(1, STEPS + 1):
        model.put(step)
        model_ema.update(model, step=step if case["steps"] else None)
        assert model_ema.get_decay(step if case["steps"] else None) == pytest.approx(
            case["decays"][step - 1], abs=1e-15
        )
        if step in (6, STEPS):
            expected = case["values" if step == STEPS else "values_at_6"]
            found = {name: value.tolist() for name, value in model_ema.module.state_dict().items()}
            assert found.keys() == expected.keys() and found["count"] == expected["count"]
            for name in ("weight", "running_mean"):
                assert found[name] == pytest.approx(expected[name], abs=1e-12)


def test_the_ramp_of_ultralytics() -> None:
    """d(x) = decay · (1 - exp(-x/τ)) at the x-th update, as its ModelEMA has it."""
    decay, tau = 0.9999, 3.0
    ema, weights = 1.0, [1.0]
    for x in range(1, 9):
        d = decay * (1 - math.exp(-x / tau))
        weights = [w * d for w in weights] + [1 - d]
        ema = ema * d
    assert trajectory_weights(WarmupEMA(decay=decay, warmup="ramp", tau=tau), range(9)) == pytest.approx(
        weights, abs=1e-15
    )


def test_inverse_gamma_with_power_one_is_the_mean() -> None:
    weights = trajectory_weights(WarmupEMA(warmup="inverse_gamma", power=1.0, decay=1 - 1e-12), range(11))
    assert weights == pytest.approx([0.0] + [0.1] * 10, abs=1e-12)


def _expected(rule: Any, steps: int) -> list[float]:
    weights = trajectory_weights(rule, range(steps + 1))
    return [sum(w * _live(t)[i] for t, w in enumerate(weights)) for i in range(3)]


@pytest.mark.parametrize("rule", [BEMA(half_life_fraction=0.2), EMA(half_life=3.0)])
def test_any_rule_fits_both_interfaces(rule: Any) -> None:
    model = Model()
    ema, model_ema = EMAModel(model.parameters(), rule=rule), ModelEmaV3(model, rule=rule)
    for step in range(1, STEPS + 1):
        model.put(step)
        ema.step(model.parameters())
        model_ema.update(model, step)
    assert ema.shadow_params[0].tolist() == pytest.approx(_expected(rule, STEPS), abs=1e-12)
    assert model_ema.module().tolist() == pytest.approx(_expected(rule, STEPS), abs=1e-12)
    assert model_ema().tolist() == model_ema.state_dict()["module.weight"].tolist() == model_ema.module().tolist()
    assert torch.equal(model_ema.module.running_mean, model.running_mean)  # a rule may have negative weights


def test_the_average_may_begin_with_a_frozen_copy_of_the_model() -> None:
    """As in train_text_to_image.py: the model is loaded twice, and step() is given the other one's parameters."""
    model, copied = Model(), deepcopy(Model()).requires_grad_(False)
    ema = EMAModel(copied.parameters(), rule=EMA(half_life=3.0))
    for step in range(1, STEPS + 1):
        model.put(step)
        ema.step(model.parameters())
    assert ema.shadow_params[0].tolist() == pytest.approx(_expected(EMA(half_life=3.0), STEPS), abs=1e-12)
    assert copied.weight.tolist() == _live(0)


def test_copy_to_and_restore_leave_the_bits() -> None:
    model = Model()
    ema = EMAModel(model.parameters(), decay=0.5)
    for step in range(1, 4):
        model.put(step)
        ema.step(model.parameters())
    before = model.weight.detach().clone()
    with pytest.raises(RuntimeError, match="nothing is stored"):
        ema.restore(model.parameters())
    ema.store(model.parameters())
    ema.copy_to(model.parameters())
    assert not torch.equal(model.weight, before)
    ema.restore(model.parameters())
    assert torch.equal(model.weight, before)
    assert ema.shadow_params[0].tolist() != before.tolist()


@pytest.mark.parametrize("rule", [None, BEMA(half_life_fraction=0.2)])
def test_save_pretrained_and_load_go_on_as_if_nothing_had_happened(tmp_path: Path, rule: Any) -> None:
    model = Model()
    ema = EMAModel(model.parameters(), decay=0.9, model_cls=Model, model_config={"a": 1}, rule=rule)
    for step in range(1, 7):
        model.put(step)
        ema.step(model.parameters())
    ema.save_pretrained(tmp_path / "ema")
    stored = torch.load(tmp_path / "ema" / "model.pt", weights_only=True)["weight"]
    assert torch.equal(stored, ema.shadow_params[0])
    record = json.loads((tmp_path / "ema" / "lagless.json").read_text())
    assert record["weights"] == "average" and record["step"] == 6
    # the load hook of diffusers' scripts
    resumed_model = Model()
    resumed_model.put(6)
    resumed = EMAModel(resumed_model.parameters(), decay=0.9, model_cls=Model, model_config={"a": 1}, rule=rule)
    resumed.load_state_dict(EMAModel.from_pretrained(tmp_path / "ema", Model).state_dict())
    resumed.to(torch.device("cpu"))
    for step in range(7, STEPS + 1):
        for one, average in ((model, ema), (resumed_model, resumed)):
            one.put(step)
            average.step(one.parameters())
    assert torch.equal(resumed.shadow_params[0], ema.shadow_params[0])
    assert resumed.optimization_step == STEPS


def test_a_state_of_diffusers_goes_on_as_there() -> None:
    """Its state dict at step 6, by hand: the scalars and the shadow parameters."""
    case = TRACES["diffusers"][2]
    model = Model()
    ema = EMAModel(model.parameters(), **case["arguments"])
    theirs = {
        **{"decay": 0.9, "min_decay": 0.0, "update_after_step": 0, "use_ema_warmup": True, "inv_gamma": 1.0},
        **{"power": 2 / 3, "optimization_step": 6},
        "shadow_params": [torch.tensor(case["values_at_6"], dtype=torch.float64)],
    }
    model.put(6)
    ema.load_state_dict(theirs)
    assert ema.shadow_params[0].tolist() == case["values_at_6"]
    for step in range(7, STEPS + 1):
        model.put(step)
        ema.step(model.parameters())
    assert ema.shadow_params[0].tolist() == pytest.approx(case["values"], abs=1e-12)
    other = EMAModel(model.parameters(), rule=BEMA(half_life_fraction=0.2))
    with pytest.raises(ValueError, match="is one of diffusers' EMAModel, which BEMA"):
        other.load_state_dict(theirs)


def test_timm_goes_on_from_a_state() -> None:
    model = Model()
    whole = ModelEmaV3(model, decay=0.9, use_warmup=True)
    for step in range(1, 7):
        model.put(step)
        whole.update(model, step)
    resumed_model = Model()
    resumed_model.put(6)
    resumed = ModelEmaV3(resumed_model, decay=0.9, use_warmup=True)
    state = whole.average_state()
    assert state is not None
    resumed.load_average_state(state, resumed_model)
    assert torch.equal(resumed.module.weight, whole.module.weight)
    for step in range(7, STEPS + 1):
        for one, average in ((model, whole), (resumed_model, resumed)):
            one.put(step)
            average.update(one, step)
    assert torch.equal(resumed.module.weight, whole.module.weight)
    with pytest.raises(ValueError, match="step=20 follows step 12"):
        whole.update(model, 20)


def test_other_parameters_are_refused() -> None:
    ema = EMAModel(nn.Linear(2, 3).parameters())
    with pytest.raises(ValueError, match="there are 1, and there were 2"):
        ema.step(nn.Linear(2, 3, bias=False).parameters())
    with pytest.raises(ValueError, match=r"0 has shape \(3, 4\), and had \(3, 2\)"):
        ema.step(nn.Linear(4, 3).parameters())


def test_frozen_parameters_are_the_live_ones() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    model[0].requires_grad_(False)
    ema = EMAModel(model.parameters(), decay=0.5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1.0)
    ema.step(model.parameters())
    other = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    ema.copy_to(other.parameters())
    assert torch.equal(other[0].weight, model[0].weight)


def test_the_average_is_the_averagers() -> None:
    """One engine: the same bits as an Averager that follows the run."""
    model = nn.Linear(3, 2)
    averager = Averager(model, BEMA(half_life_fraction=0.2))
    ema = EMAModel(model.parameters(), rule=BEMA(half_life_fraction=0.2))
    for step in range(1, 6):
        with torch.no_grad():
            model.weight.add_(0.1 * step)
        averager.update()
        ema.step(model.parameters())
    assert torch.equal(ema.shadow_params[0], averager.read()["weight"])


@pytest.mark.parametrize("block", re.findall(r"```python\n(.*?)```", PAGE.read_text(), flags=re.DOTALL))
def test_the_blocks_of_the_page_run(block: str) -> None:
    def train_step(model: nn.Module) -> None:
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.1)

    exec(block, {"model": nn.Linear(2, 2), "train_step": train_step})
