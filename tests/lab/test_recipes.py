"""Recipes: complete, documented, true to the papers, and strict about what people write."""

import inspect

import pytest
import torch

pytest.importorskip("pydantic")

from typer.testing import CliRunner  # noqa: E402

import lagless.optim  # noqa: E402
from lagless import BEMA, EMA, trajectory_weights, weight_on_start  # noqa: E402
from lagless.cli import app  # noqa: E402
from lagless.lab.recipes import (  # noqa: E402
    describe,
    load_recipe,
    open_fields,
    parse_override,
    recipe_names,
)
from lagless.lab.recipes._optimizers import ELSEWHERE, NOT_IN_RECIPES, OWN, optimizer_section  # noqa: E402
from lagless.lab.recipes._section import Section  # noqa: E402
from lagless.lab.training._optimizer import build_optimizer  # noqa: E402
from lagless.rules import rule_names, rule_to_dict, rules_from_settings  # noqa: E402


def filled(name):
    return load_recipe(name, {field: "somewhere" for field in open_fields(name)})


def sections(kind=Section):
    for each in kind.__subclasses__():
        yield each
        yield from sections(each)


@pytest.mark.parametrize("name", recipe_names())
def test_packaged_recipes(name, tmp_path):
    recipe = filled(name)
    assert recipe.name == name and recipe.summary
    assert recipe.needs_accelerator != name.endswith("small")
    assert set(open_fields(name)) <= {"data.path", "model.path"}
    assert bool(open_fields(name)) == name.endswith("small")
    data = recipe.model_dump()
    for path in recipe.ours:
        node = data
        for key in path.split("."):
            node = node[key]
    # What `lagless recipes NAME` prints is the same recipe.
    printed = tmp_path / "printed.yaml"
    printed.write_text(describe(recipe))
    assert load_recipe(printed) == recipe
    # Every value of its sweep makes a recipe, with the first values of the other fields.
    grid = recipe.sweep.grid if recipe.sweep else {}
    first = {path: "somewhere" for path in open_fields(name)}
    first |= dict(parse_override(f"{field}={values[0]}") for field, values in grid.items())
    for field, values in grid.items():
        for value in values:
            changed = load_recipe(name, first | dict([parse_override(f"{field}={value}")]))
            assert changed.digest() != recipe.digest() or changed == recipe


def test_every_family_has_a_small_twin():
    families = {name.rsplit("-", 1)[0] for name in recipe_names() if name.endswith("small")}
    assert families == {"bema-sft", "pace-sft", "pace-pretrain", "bias-sft", "bias-pretrain", "bias-pretrain-noisy"}


def test_every_field_is_described():
    found = list(sections())
    assert len(found) > 15
    for section in found:
        for name, field in section.model_fields.items():
            assert field.description, f"{section.__name__}.{name}"


def test_bema_values():
    """Tables 1 and 2 of Block and Zhang."""
    recipe = load_recipe("bema-sft-qwen2.5-1.5b")
    training, optimizer = recipe.training, recipe.method.optimizer
    assert recipe.model.path == "Qwen/Qwen2.5-1.5B"
    assert (training.epochs, training.learning_rate, training.batch_size) == (2, 3e-5, 256)
    assert (recipe.method.schedule.kind, recipe.method.schedule.warmup_steps) == ("constant", 0)
    assert (training.precision, training.max_grad_norm) == ("float16", 1.0)
    assert (optimizer.kind, optimizer.betas, optimizer.eps) == ("adamw", (0.9, 0.999), 1e-8)
    assert optimizer.weight_decay == 0.0  # Adam
    assert recipe.method.averages == {
        "bema": BEMA.paper(ema_power=0.5, bias_power=0.2, multiplier=1.0, lag=10.0, update_after=0, update_freq=400),
        "ema": EMA(ema_power=0.5, multiplier=1.0, lag=10.0, update_after=0, update_freq=400),
    }
    assert (recipe.data.max_length, recipe.data.too_long, recipe.data.validation_fraction) == (4096, "drop", 0.01)
    assert recipe.evaluation.sequences == 200
    for other in ("bema-sft-gemma3-1b", "bema-sft-llama3.2-1b"):
        assert load_recipe(other).model.chat_template == recipe.model.path
        assert load_recipe(other).training == training


@pytest.mark.parametrize(
    ("name", "lr", "pullback", "power"),
    [
        ("pace-sft-smollm2-1.7b", 1e-3, 0.15, 0.2),
        ("pace-sft-qwen3-1.7b", 5e-4, 0.25, 0.5),
        ("pace-sft-gemma3-1b", 1e-3, 0.15, 0.5),
    ],
)
def test_pace_values(name, lr, pullback, power):
    """Figure 1 of Au and Block, and the settings that all its runs share."""
    recipe = load_recipe(name)
    optimizer, training = recipe.method.optimizer, recipe.training
    assert (training.learning_rate, optimizer.pullback, optimizer.average.ema_power) == (lr, pullback, power)
    # (1 + γ max(0, t - ρ))^-κ with γ = 1, ρ = 0, floor 1e-4, φ = 1
    assert (optimizer.average.multiplier, optimizer.average.lag) == (1.0, 1.0)
    assert (optimizer.average.update_freq, optimizer.average.min_ema_multiplier) == (1, 1e-4)
    assert (optimizer.betas, optimizer.eps, optimizer.weight_decay) == ((0.9, 0.999), 1e-8, 0.01)
    assert (training.epochs, training.batch_size, training.max_grad_norm) == (1, 256, 1.0)
    assert (recipe.method.schedule.kind, recipe.method.schedule.warmup_steps) == ("constant", 50)
    assert (recipe.data.max_length, recipe.data.loss_on, recipe.model.chat_template) == (1280, "assistant", "chatml")
    assert recipe.seed == 42


def clock(rule, steps):
    """The weights of a rule on a run's iterates at its update steps, by the recursion."""
    return trajectory_weights(rule, range(0, steps + 1, rule.update_freq))


def test_the_small_twin_of_bema_has_the_papers_clock():
    """The same weights over t/T: 360 steps are a 20th of the paper's 7,200, and φ = 20, γ = 20 there."""
    paper, twin = load_recipe("bema-sft-qwen2.5-1.5b"), filled("bema-sft-small")
    assert twin.training.max_steps == 360 and 360 % twin.training.save_every == 0
    assert {rule.update_freq for rule in twin.averages().values()} == {20}
    assert {rule.multiplier for rule in twin.averages().values()} == {20.0}
    for name in ("bema", "ema"):
        weights = clock(paper.method.averages[name], 7200)
        assert clock(twin.averages()[name], 360) == pytest.approx(weights, abs=1e-12)
    # The numbers of Algorithm 1 at κ = .5, η = .2, ρ = 10, φ = 400, T = 7,200.
    assert weight_on_start(clock(twin.averages()["bema"], 360)) == pytest.approx(0.5284, abs=1e-3)
    assert weight_on_start(clock(twin.averages()["ema"], 360)) == pytest.approx(0.6975, abs=1e-4)


@pytest.mark.parametrize("steps", [36, 90, 400, 1000, 7200, 20000])
@pytest.mark.parametrize("rule", ["BEMA", "OUEMA", "EMA", "DEMA"])
def test_averages_of_a_run_of_any_length_have_the_papers_clock(steps, rule):
    """Where φ is no whole number of steps it is rounded, and the weights nearly agree."""
    settings = {"rule": rule, "ema_power": 0.5, "lag": 10, "update_freq": 400}
    recipe = load_recipe(
        "bema-sft-small",
        {
            "model.path": "x", "data.path": "x", "training.max_steps": steps, "method.averages": {"a": settings},
            "method.returned": "a",
        },
    )  # fmt: skip
    [found], [stated] = recipe.averages().values(), recipe.method.averages.values()
    assert found.multiplier == 7200 / steps and found.update_freq == max(1, round(steps / 18))
    end = steps // found.update_freq * found.update_freq
    assert weight_on_start(clock(found, end)) == pytest.approx(weight_on_start(clock(stated, 7200)), abs=0.02)


def test_what_the_clock_of_averages_leaves_alone():
    fill = {field: "x" for field in open_fields("bema-sft-small")}
    free = {"method.averages": {"a": {"rule": "EMA", "half_life_fraction": 0.1}}, "method.returned": "a"}
    as_stated = {"method.averages_steps": None}
    for changes in (free, as_stated, {"training.max_steps": None, "training.epochs": 2}):
        recipe = load_recipe("bema-sft-small", fill | changes)
        assert recipe.averages() == recipe.method.averages
    rest = {"training.max_steps": 400, "method.averages.bema.update_after": 1800}
    assert load_recipe("bema-sft-small", fill | rest).averages()["bema"].update_after == 100


def test_standard_rows_and_baselines():
    """Every corrected row has its standard one, at the batch of one half; PACE has its baselines."""
    for kind, batch in (("sophia", 512), ("shampoo", None)):
        corrected, standard = (load_recipe(f"bias-pretrain-qwen2.5-0.5b-{kind}{end}") for end in ("", "-standard"))
        settings = standard.method.optimizer
        assert (settings.cross_fit, settings.inverse_correction) == ("none", "none")
        assert (standard.training.batch_size, corrected.training.batch_size) == (512, 1024)
        assert standard.training.learning_rate == corrected.training.learning_rate
        assert batch is None or settings.batch_size == batch
        # The authors take the second half from the next step; that is said.
        assert any("half as many" in line for line in corrected.differences)
        assert not any("half as many" in line for line in standard.differences)
    published = load_recipe("bias-pretrain-qwen2.5-0.5b-published").method.optimizer
    assert (published.constants, published.folds, published.warm_start) == ("reference", "exact", 0)
    pace, adamw, free = (load_recipe(f"pace-sft-smollm2-1.7b{end}") for end in ("", "-adamw", "-schedule-free"))
    assert pace.sweep.seeds == adamw.sweep.seeds == free.sweep.seeds == [42, 1337, 2024]
    assert pace.data == adamw.data == free.data and adamw.method.schedule.kind == "cosine"
    assert adamw.averages()["ema"].ema_power == 0.5
    assert (free.method.optimizer.betas, free.method.optimizer.weight_decay) == ((0.98, 0.95), 0.05)
    assert free.training.max_grad_norm == 0


def test_bema_sweep_and_stored_iterates():
    recipe = load_recipe("bema-sft-qwen2.5-1.5b")
    assert recipe.sweep.grid["training.batch_size"] == [256, 512]
    assert "{kind: linear, floor: 0.3}" in recipe.sweep.grid["method.schedule"]
    assert all(phi % recipe.training.save_every == 0 for phi in (100, 200, 400))


def test_primal_averaging_in_recipes():
    fill = {"data.path": "x"}
    section = {"kind": "primal_averaging", "average": {"rule": "EMA", "decay": 0.9}, "interpolation": 0.7}
    recipe = load_recipe("pace-pretrain-small", fill | {"method.optimizer": section})
    optimizer = build_optimizer(recipe, torch.nn.Linear(2, 2))
    assert isinstance(optimizer, lagless.optim.PrimalAveraging)
    assert isinstance(optimizer.optimizer, torch.optim.AdamW)
    assert [(g["lr"], g["average"], g["interpolation"]) for g in optimizer.param_groups] == [
        (recipe.training.learning_rate, EMA(decay=0.9), 0.7)
    ]
    for change, message in (("interpolation=2", "less than or equal to 1"), ("base.betas=[2, 0.9]", "less than 1")):
        with pytest.raises(ValueError, match=message):
            load_recipe("pace-pretrain-small", fill | {"method.optimizer": section} | dict([parse_override(
                f"method.optimizer.{change}")]))  # fmt: skip


def test_pretraining_values():
    gpt2 = load_recipe("pace-pretrain-gpt2-124m")
    tokens = gpt2.training.max_steps * gpt2.training.batch_size * gpt2.data.sequence_length
    assert gpt2.training.max_steps == 4750 and tokens == pytest.approx(2.5e9, rel=0.01)
    corrected, standard = (load_recipe(f"bias-pretrain-qwen2.5-0.5b{end}") for end in ("", "-adamw"))
    assert corrected.training.max_steps * 512 * 1024 == pytest.approx(262e6, rel=0.01)
    assert (corrected.training.learning_rate, corrected.training.embedding_learning_rate) == (9e-4, 6e-4)
    assert (standard.training.learning_rate, standard.training.embedding_learning_rate) == (6e-4, None)
    assert (corrected.method.schedule.floor, standard.method.schedule.floor) == (0.2, 0.0)
    assert standard.method.optimizer.kind == "adamw" and corrected.method.optimizer.kind == "bias_corrected_adamw"
    assert corrected.data == standard.data
    noise = load_recipe("bias-pretrain-qwen2.5-0.5b-noisy").data.noise
    assert (noise.sequences, noise.least, noise.most, noise.block, noise.seed) == (0.2, 0.2, 0.4, 64, 123)


BAD = [
    ("training.lerning_rate=1", r"training\.lerning_rate: unknown field; did you mean learning_rate\?"),
    ("method.optimizer.kind=adamw", r"method\.optimizer\.pullback: is no field of this kind of section"),
    ("model={kind: knew}", r"model\.kind='knew'; it must be one of 'pretrained', 'new'"),
    ("model={path: x}", r"model\.kind: is required"),
    ("training.batch_size=0", r"training\.batch_size=0: Input should be greater than or equal to 1"),
    ("training.learning_rate=.nan", r"training\.learning_rate=nan: Input should be a finite number"),
    ("training.max_steps=5", r"training=?.*: give one of max_steps and epochs"),
    ("method.averages={b: {rule: BEMA, power: 1}}", r"method\.averages\.b: BEMA has no argument power"),
    ("method.averages={b: {rule: BEMA, ema_power: -1}}", r"method\.averages\.b: .*ema_power=-1"),
    ("method.averages={b: 3}", r"method\.averages\.b=3: 3 is no rule; write \{rule: BEMA"),
    ("method.averages={live: {rule: EMA}}", "live cannot be the name of an average"),
    ("method.averages={../x: {rule: EMA}}", r"'\.\./x' is to be the name of a folder"),
    ("method.returned=bema", r"method\.returned='bema'; there are live, optimizer"),
    ("data.input_column=context", "input_column needs prompt_column"),
    ("data.prompt_column=question", "belong together; give both or neither"),
    ("data.validation_path=x", "validation_path and validation_split are both given"),
    ("data.path.x=1", "path has no fields of its own"),
    ("training.learning_rate", "write FIELD=VALUE"),
    ("data={kind", "is no YAML value"),
    ("training.batch_size=true", "training: batch_size: true and false are no numbers"),
    ("method.optimizer.betas=[true, 0.9]", "betas: true and false are no numbers"),
    ("method.optimizer.eps=-1", r"method\.optimizer: PACE: eps=-1\.0; it must be a finite number > 0"),
    ("method.optimizer.eps=[1]", r"method\.optimizer\.eps=\[1\]: "),
    ("method.optimizer.pullbak=1", r"method\.optimizer\.pullbak: unknown field; did you mean pullback\?"),
    ("method.optimizer.average={rule: [1]}", r"\{'rule': \[1\]\} is no rule"),
    ("method.optimizer.average={1: 2}", r"is no rule"),
    ("method.optimizer.average_dtype=float16", r"average_dtype='float16'"),
    ("training.max_grad_norm=" + "9" * 5000, "max_grad_norm"),
]


@pytest.mark.parametrize(("change", "message"), BAD)
def test_bad_changes(change, message):
    with pytest.raises(ValueError, match=message):
        load_recipe("pace-sft-smollm2-1.7b", [change])


def test_bad_recipes(tmp_path):
    with pytest.raises(ValueError, match="'bema-sft-smal' is unknown; did you mean bema-sft-small"):
        load_recipe("bema-sft-smal")
    with pytest.raises(ValueError, match="there is no such recipe file"):
        load_recipe(tmp_path / "none.yaml")
    laughs = "".join(f"x{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9 if n else ['1'])}]\n" for n in range(12))
    for text, message in [
        ("[1, 2]", "is a mapping"),
        ("a: [", "is no YAML"),
        ("extends: x", "is no packaged recipe"),
        (f"extends: {tmp_path / 'bad.yaml'}\n", "is no packaged recipe.*extends a packaged one"),
        ("a: &a {b: *a}", "nested too deeply"),
        ("a: " + "[" * 3000 + "]" * 3000, "nested too deeply"),
        ("a: " + "{b: " * 3000 + "1" + "}" * 3000, "nested too deeply"),
        (laughs, "more than 100,000 values"),
        ("name: x\nname: y\n", "'name' occurs twice"),
        ("extends: bema-sft-small\ndata: {path: a, path: b}\n", "'path' occurs twice"),
        ("a: 2020-13-45", "cannot be understood"),
        ('a: !!int ""', "cannot be understood"),
        ("a: !!python/object:os.system x", "is no YAML"),
        ("a: \x00", "is no YAML"),
        (b"name: \xff\xfe", "is no text in UTF-8 .byte 6 is 0xff"),
        ("1: 2", "bad.yaml"),
    ]:
        (tmp_path / "bad.yaml").write_bytes(text if isinstance(text, bytes) else text.encode())
        with pytest.raises(ValueError, match=message) as caught:
            load_recipe(tmp_path / "bad.yaml")
        assert "bad.yaml" in str(caught.value) and "\n" not in str(caught.value)
    (tmp_path / "bad.yaml").unlink()
    (tmp_path / "bad.yaml").mkdir()
    with pytest.raises(ValueError, match="there is no such recipe file"):
        load_recipe(tmp_path / "bad.yaml")
    with pytest.raises(ValueError, match=r"model\.path: is required.*data\.path: is required.*lagless recipes"):
        load_recipe("bema-sft-small")
    with pytest.raises(ValueError, match="tokenizers are trained for pretraining only"):
        load_recipe(
            "bema-sft-small",
            {"model": {"kind": "new", "architecture": "llama", "config": {}, "tokenizer": 300}, "data.path": "x"},
        )
    with pytest.raises(ValueError, match="chat_template is for conversations"):
        load_recipe("pace-pretrain-small", {"model.chat_template": "chatml", "data.path": "x"})


def test_numbers_of_json_and_yaml():
    for text in ("3e-4", "0.0003", "3.0e-04"):
        assert parse_override(f"a={text}") == ("a", 3e-4)
    assert parse_override("a=1e3x") == ("a", "1e3x")


def test_digest_is_of_what_decides_the_run_but_the_seed():
    recipe = filled("pace-pretrain-small")
    assert recipe.sweep is not None
    assert recipe.digest() == recipe.resolved(seed=7).digest()
    assert recipe.resolved(7).seed == 7 and recipe.resolved(7).sweep is None
    for change in ("training.learning_rate=1e-4", "method.optimizer.average.ema_power=0.3", "data.split_seed=1"):
        assert load_recipe("pace-pretrain-small", ["data.path=somewhere", change]).digest() != recipe.digest()


def test_command():
    listed = CliRunner().invoke(app, ["recipes"], env={"COLUMNS": "200"})
    assert listed.exit_code == 0 and all(name in listed.stdout for name in recipe_names())
    printed = CliRunner().invoke(app, ["recipes", "bema-sft-small", "--set", "training.learning_rate=1e-5"])
    assert "# Peak learning rate.\n  learning_rate: 1.0e-05" in printed.stdout
    assert "path: FILL IN" in printed.stdout


def test_changes_are_left_as_they_were():
    section = {"kind": "pace", "pullback": 0.1}
    overrides = {"data.path": "text.txt", "method.optimizer": section, "method.optimizer.pullback": 0.2}
    recipe = load_recipe("pace-pretrain-small", overrides)
    assert recipe.method.optimizer.pullback == 0.2 and section == {"kind": "pace", "pullback": 0.1}


def test_an_empty_section_of_an_extending_recipe_empties_it(tmp_path):
    path = tmp_path / "mine.yaml"
    needed = ["model.path=x", "data.path=y"]
    for text, left in (
        ("averages: {}", []),
        ("averages: {fast: {rule: EMA}}", ["bema", "ema", "ouema", "dema", "fast"]),
    ):
        path.write_text(f"extends: bema-sft-small\nmethod: {{returned: live, {text}}}\n")
        assert list(load_recipe(path, needed).method.averages) == left


def optimizers():
    return {
        name: make
        for name, make in vars(lagless.optim).items()
        if inspect.isclass(make) and issubclass(make, torch.optim.Optimizer) and name not in NOT_IN_RECIPES
    }


def test_every_argument_of_every_optimizer_is_a_field():
    assert {"PACE", "BiasCorrectedAdamW", "BiasCorrectedSophia", "BiasCorrectedShampoo"} <= optimizers().keys()
    assert optimizers().keys() == OWN.keys()
    for name, make in optimizers().items():
        arguments = inspect.signature(make).parameters
        fields = OWN[name].model_fields
        assert arguments.keys() - ELSEWHERE.keys() == fields.keys() - {"kind"}, name
        for argument in arguments.keys() - ELSEWHERE.keys():
            default = arguments[argument].default
            assert fields[argument].default == default or default is inspect.Parameter.empty, (name, argument)


def test_a_new_argument_of_an_optimizer_is_a_field_at_once():
    class Mine(torch.optim.SGD):
        """Step.

        Args:
            extent: how far.
        """

        def __init__(self, params, lr: float = 0.1, *, extent: float = 0.5) -> None:
            super().__init__(params, lr)

    field = optimizer_section(Mine).model_fields["extent"]
    assert (field.annotation, field.default, field.description) == (float, 0.5, "how far.")


def test_the_published_configuration_is_reachable():
    settings = {
        "folds": "skewed",
        "constants": "reference",
        "warm_start": 3,
        "update_clip": 1.5,
        "compile": True,
        "support_eps": 1e-10,
        "exclude": ["embed"],
    }
    changes = {f"method.optimizer.{name}": value for name, value in settings.items()}
    recipe = load_recipe("bias-pretrain-small", {"data.path": "x", **changes})
    optimizer = build_optimizer(recipe, torch.nn.Linear(2, 2))
    group = optimizer.param_groups[0]
    for name in settings.keys() - {"exclude"}:
        assert group[name] == settings[name]
    pace = load_recipe("pace-pretrain-small", {"data.path": "x", "method.optimizer.average_dtype": "bfloat16"})
    assert build_optimizer(pace, torch.nn.Linear(2, 2)).param_groups[0]["average_dtype"] is torch.bfloat16


def test_rules_of_recipes_have_every_argument_of_every_rule():
    for kind in rule_names():
        rule = rules_from_settings([kind], {"total_steps": 100} if kind == "decayaverage" else {})[kind]
        written = rule_to_dict(rule)
        optional = type(rule).recorded_when_given
        assert written.keys() - {"rule"} == {
            name for name in inspect.signature(type(rule)).parameters if name in written or name not in optional
        }
        changed = load_recipe(
            "bema-sft-small",
            {"model.path": "x", "data.path": "x", "method.averages": {"a": written}, "method.returned": "a"},
        )
        assert changed.method.averages == {"a": rule}
