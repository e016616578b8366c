"""Rules of one's own by name: registered, found again, refused with what to import; entry points of packages."""

import dataclasses
import importlib
import json
import math
import sys
import textwrap
import warnings

import pytest
import torch

import lagless
from lagless import BEMA, EMA, Averager
from lagless.optim import PACE
from lagless.rules import (
    RULES,
    EmaBuffer,
    ReadCoefficients,
    Rule,
    UpdateCoefficients,
    UpdateSchedule,
    _registry,
    known_rules,
    rule_from_dict,
    rule_to_dict,
    rules_from_settings,
)
from lagless.testing import check_rule

SOURCE = """
    from dataclasses import dataclass
    from lagless.rules import ConstantGain, EmaBuffer, ReadCoefficients, Rule, UpdateCoefficients

    @dataclass(frozen=True, kw_only=True)
    class NAME(Rule):
        gain: float = 0.25
        update_after: int = 0
        update_freq: int = 1

        @property
        def buffer_keys(self):
            return (EmaBuffer(ConstantGain(1.0 - self.gain), self.schedule),)

        def update(self, tick):
            return UpdateCoefficients(((1.0 - self.gain,),), (self.gain,))

        def read(self, tick):
            return ReadCoefficients((1.0,), 0.0)
"""


@pytest.fixture
def packages(tmp_path, monkeypatch):
    """Write modules, with or without a distribution that declares entry points, and forget them afterwards."""
    monkeypatch.syspath_prepend(str(tmp_path))
    written = []

    def write(module, name, entry_points="", source=SOURCE):
        (tmp_path / f"{module}.py").write_text(textwrap.dedent(source).replace("NAME", name))
        if entry_points:
            info = tmp_path / f"{module}_dist-1.0.dist-info"
            info.mkdir()
            (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {module}-dist\nVersion: 1.0\n")
            (info / "entry_points.txt").write_text(f"[lagless.rules]\n{entry_points}\n")
        importlib.invalidate_caches()
        _registry._declared_on.cache_clear()
        written.append(module)

    yield write
    _registry._declared_on.cache_clear()
    for module in written:
        sys.modules.pop(module, None)


def test_every_public_rule_of_lagless_is_built_in():
    room = lagless.rules
    public = {name for name in dir(room) if isinstance(v := getattr(room, name), type) and issubclass(v, Rule)}
    assert RULES.keys() == public - {"Rule"}
    for name, rule in RULES.items():
        needed = {"total_steps": 70} if name == "DecayAverage" else {}
        record = rule_to_dict(rule(update_freq=7, **needed))
        assert record["rule"] == name and "module" not in record
        assert rule_from_dict(json.loads(json.dumps(record))) == rule(update_freq=7, **needed)


def test_a_rule_is_found_again_by_module_and_name(packages):
    packages("my_rules", "Halfway")
    rule = importlib.import_module("my_rules").Halfway(gain=0.5)
    record = rule_to_dict(rule)
    assert record == {"rule": "Halfway", "module": "my_rules", "gain": 0.5, "update_after": 0, "update_freq": 1}
    assert rule_from_dict(json.loads(json.dumps(record))) == rule == rule_from_dict({"rule": "halfway", "gain": 0.5})
    assert rules_from_settings(["half-way"], {"gain": "0.5"}) == {"halfway": rule}
    check_rule(rule)


def test_an_unknown_rule_is_refused_with_the_import_and_nothing_is_imported(packages):
    packages("never_imported", "Absent", source="raise RuntimeError('imported')")
    record = {"rule": "Absent", "module": "never_imported"}
    with pytest.raises(ValueError, match=r"'Absent' of module 'never_imported' .* write `import never_imported` first"):
        rule_from_dict(record)
    assert "never_imported" not in sys.modules
    with pytest.raises(ValueError, match="is imported, but defines no rule of that name"):
        rule_from_dict({"rule": "Absent", "module": "lagless"})
    with pytest.raises(ValueError, match="defined in a script or notebook"):
        rule_from_dict({"rule": "Absent", "module": "__main__"})
    with pytest.raises(ValueError, match="unknown rule 'Absent'; known: "):
        rule_from_dict({"rule": "Absent"})


@pytest.mark.parametrize("record", [{}, {"rule": 3}, {"rule": "EMA", "module": 3}, {"rule": ["EMA"]}])
def test_records_that_name_nothing_are_refused(record):
    with pytest.raises(ValueError, match="these name a class"):
        rule_from_dict(record)


def test_states_that_name_it_are_refused_with_the_import(packages):
    packages("gone", "Gone")
    rule = importlib.import_module("gone").Gone()
    weights = torch.nn.Parameter(torch.ones(2))
    optimizer = PACE([weights], lr=0.1, average=rule)
    weights.grad = torch.ones(2)
    optimizer.step()
    state = optimizer.state_dict()
    record = json.loads(json.dumps(state["param_groups"][0]["average"]))
    assert record["module"] == "gone"
    state["param_groups"][0]["average"] = {**record, "module": "elsewhere"}
    with pytest.raises(ValueError, match="`import elsewhere` first"):
        PACE([torch.nn.Parameter(torch.ones(2))], lr=0.1).load_state_dict(state)
    state["param_groups"][0]["average"] = record
    resumed = PACE([torch.nn.Parameter(torch.ones(2))], lr=0.1)
    resumed.load_state_dict(state)
    assert resumed.param_groups[0]["average"] == rule


def test_names_clash_in_any_spelling(packages):
    packages("first", "MyRule")
    packages("second", "Myrule")
    importlib.import_module("first")
    with pytest.raises(
        ValueError, match=r"second defines .* Myrule, but first.MyRule has that name.*from first import"
    ):
        importlib.import_module("second")
    for name in ("EMA", "Bema"):
        with pytest.raises(ValueError, match="has that name"):
            type(name, (Rule,), {"__module__": "third"})


def test_definition_again_replaces(packages):
    packages("again", "Again")
    module = importlib.import_module("again")
    first = module.Again
    second = importlib.reload(module).Again
    assert first is not second and known_rules()["again"] is second
    assert type(rule_from_dict(rule_to_dict(first()))) is second


def test_rules_of_functions_and_scripts_give_way():
    def define(gain):
        @dataclasses.dataclass(frozen=True)
        class Local(EMA):
            given: float = gain

        return Local

    first, second = define(0.1), define(0.2)
    assert type(rule_from_dict(rule_to_dict(second()))) is second is not first
    assert "local" not in known_rules()
    script = type("Local", (EMA,), {"__module__": "__main__"})
    assert type(rule_from_dict({"rule": "Local", "module": "moved_to"})) is script


def test_the_same_rule_of_a_script_or_an_earlier_version_resumes(packages):
    packages("moved", "Moved")
    rule = importlib.import_module("moved").Moved()
    averager = Averager({"w": torch.zeros(2)}, rule)
    for module, fits in (("moved", True), (None, True), ("__main__", True), ("another", False)):
        state = Averager({"w": torch.zeros(2)}, rule).state_dict()
        record = state["meta"]["rules"]["moved"]
        record["module"] = module
        if module is None:
            del record["module"]
        if fits:
            averager.load_state_dict(state)
        else:
            with pytest.raises(ValueError, match="made with rules"):
                averager.load_state_dict(state)


def test_hyperparameters_of_every_json_kind_return():
    @dataclasses.dataclass(frozen=True)
    class Rich(EMA):
        widths: tuple = (1, (2.5, math.inf))
        low: float = -math.inf
        name: str | None = None
        strict: bool = True

    rule = Rich(widths=(0.5, ("a", math.inf)), low=-math.inf, name="x")
    assert rule_from_dict(json.loads(json.dumps(rule_to_dict(rule), allow_nan=False))) == rule


def test_check_rule_sees_what_json_loses():
    @dataclasses.dataclass(frozen=True)
    class Lossy(EMA):
        extra: object = frozenset({1})

    from lagless.testing._rules import json_makes_the_rule_again

    with pytest.raises(AssertionError, match="must be plain JSON"):
        json_makes_the_rule_again(Lossy())
    with pytest.raises(AssertionError, match="came back from JSON"):
        json_makes_the_rule_again(Lossy(extra="inf"))

    @dataclasses.dataclass(frozen=True)
    class Taken(EMA):
        module: str = "x"

    with pytest.raises(ValueError, match="a hyperparameter is called module"):
        json_makes_the_rule_again(Taken())


def test_entry_points_are_found_by_what_is_typed_and_by_files(packages):
    packages("plugged", "Plugged", "plugged = plugged:Plugged")
    assert "plugged" not in sys.modules
    rule = rule_from_dict({"rule": "Plugged", "module": "plugged", "gain": 0.5})
    assert type(rule).__module__ == "plugged" and known_rules()["plugged"] is type(rule)
    packages("typed", "Typed", "typed = typed:Typed")
    assert rules_from_settings(["typed"], {"gain": 0.5})["typed"].gain == 0.5
    packages("other_name", "Winding", "spiral = other_name:Winding")
    assert type(rules_from_settings(["spiral"])["spiral"]).__name__ == "Winding"


@pytest.mark.parametrize(
    ("source", "target", "message"),
    [
        ("raise OSError('no such library')", "broken:Any", "OSError: no such library"),
        ("", "broken:Any", "AttributeError"),
        ("Any = 3", "broken:Any", "is 3; the group lagless.rules"),
        ("class Any: pass", "broken:Any", "classes derived from lagless.Rule"),
        ("", "broken_elsewhere:Any", "ModuleNotFoundError"),
    ],
)
def test_a_broken_entry_point_names_its_distribution(packages, source, target, message):
    packages("broken", "Any", f"unusable = {target}", source)
    with pytest.warns(UserWarning, match=f"'unusable' of the distribution broken-dist .*{message}"):
        assert "unusable" not in known_rules()
    with pytest.raises(ValueError, match="Repair or uninstall broken-dist"):
        rule_from_dict({"rule": "Unusable"})
    assert rule_from_dict({"rule": "BEMA"}) == BEMA()  # what does not need it goes on, without a word


def test_two_distributions_with_one_name_are_refused(packages):
    packages("one", "Same", "same = one:Same")
    packages("two", "Other", "same = two:Other")
    with pytest.raises(ValueError, match=r"declared by one-dist \(one:Same\) and two-dist \(two:Other\)"):
        rule_from_dict({"rule": "same"})


def test_a_package_cannot_replace_a_built_in_rule(packages):
    packages("grabbing", "Grabbing", "ema = grabbing:Grabbing")
    assert known_rules()["ema"] is EMA and type(rule_from_dict({"rule": "EMA"})) is EMA
    assert "grabbing" not in sys.modules


def test_former_names_of_what_a_rule_defines_go_on_with_a_warning():
    key = EmaBuffer(EMA().gain, UpdateSchedule(0, 2))
    with pytest.warns(DeprecationWarning, match="Former defines labels, which is called buffer_keys now"):

        class Former(Rule):
            update_after, update_freq = 0, 2

            @property
            def labels(self):
                return (key,)

            def update(self, tick):
                return UpdateCoefficients(((0.5,),), (0.5,))

            def read(self, tick):
                return ReadCoefficients((1.0,), 0.0)

    rule = Former()
    assert rule.buffer_keys == (key,)
    averager = Averager({"w": torch.zeros(2)}, rule)
    averager.update()
    with pytest.warns(DeprecationWarning, match="Former.timing is called schedule now"):
        assert rule.timing == UpdateSchedule(0, 2)

    with pytest.warns(DeprecationWarning, match="defines timing, which is called schedule"):

        class Late(EMA):
            @property
            def timing(self):
                return UpdateSchedule(5, 3)

    assert Late().schedule == UpdateSchedule(5, 3)

    with pytest.warns(DeprecationWarning, match="More defines labels"):

        class More(EMA):
            @property
            def labels(self):
                return (*super().labels, "more")

    with pytest.warns(DeprecationWarning, match="More.labels is called buffer_keys"):
        assert More().buffer_keys == (*EMA().buffer_keys, "more")


def test_a_hyperparameter_may_be_called_like_a_former_name():
    with warnings.catch_warnings():
        warnings.simplefilter("error")

        @dataclasses.dataclass(frozen=True)
        class Labelled(EMA):
            labels: tuple = ()

    assert Labelled(labels=("a",)).buffer_keys == EMA().buffer_keys
