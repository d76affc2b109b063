"""Configurations: what is written comes back, and what is wrong is named by file and key."""

import tomllib
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from permjax.config import ConfigError, config_hash, from_dict, load_config, to_dict, to_toml

pytestmark = pytest.mark.fast


@dataclass(frozen=True)
class Train:
    epochs: int = 20
    learning_rate: float = 1e-3
    optimizer: Literal["adam", "sgd"] = "adam"


@dataclass(frozen=True)
class Wide:
    model_type: ClassVar[str] = "wide"
    hidden: tuple[int, ...] = (64, 64)


@dataclass(frozen=True)
class Deep:
    model_type: ClassVar[str] = "deep"
    layers: int = 8

    def __post_init__(self):
        if self.layers < 1:
            raise ValueError(f"'layers' is {self.layers}, but a network needs at least one.")


@dataclass(frozen=True)
class Study:
    experiment: ClassVar[str] = "study"
    seed: int = 0
    title: str = "a study"
    quick: bool = False
    root: str | None = None
    span: tuple[float, float] = (0.0, 1.0)
    pairs: tuple[tuple[int, ...], ...] = ((0, 1),)
    train: Train = Train()
    net: Wide | Deep = Wide()
    data: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Pair:
    """Two studies of its own, with other defaults than theirs."""

    experiment: ClassVar[str] = "pair"
    first: Study = Study(seed=7, train=Train(epochs=5, optimizer="sgd"), net=Deep(3))
    second: Study | None = None


KINDS = {"study": Study, "pair": Pair}


@pytest.fixture
def write(tmp_path):
    def write(text):
        path = tmp_path / "study.toml"
        path.write_text(text)
        return path

    return write


studies = st.builds(
    Study,
    seed=st.integers(0, 2**62),
    title=st.text(st.characters(exclude_categories=("Cs",))),
    quick=st.booleans(),
    root=st.none() | st.just("../données"),
    span=st.tuples(*[st.floats(allow_nan=False)] * 2),
    pairs=st.lists(st.lists(st.integers(0, 9), max_size=3).map(tuple), max_size=3).map(tuple),
    train=st.builds(Train, epochs=st.integers(0, 9), optimizer=st.sampled_from(["adam", "sgd"])),
    net=st.builds(Wide, hidden=st.just((3, 4))) | st.builds(Deep, layers=st.integers(1, 9)),
    data=st.dictionaries(st.sampled_from(["name", "size"]), st.integers(0, 9) | st.just("digits")),
)


@given(studies)
def test_what_is_written_as_toml_reads_back_equal_with_an_equal_hash(study):
    back = from_dict(Study, tomllib.loads(to_toml(study)), where="the file")
    assert back == study
    assert config_hash(back) == config_hash(study)


def test_a_file_fills_nested_tables_and_leaves_the_rest_at_its_defaults(write):
    path = write('experiment = "study"\nspan = [0, 2]\n[train]\nepochs = 3\n[net]\nmodel_type = "deep"\nlayers = 2\n')
    config = load_config(path, [], KINDS)
    assert config == Study(span=(0.0, 2.0), train=Train(epochs=3), net=Deep(2))
    assert isinstance(config.span[1], float)


def test_a_table_that_leaves_keys_out_takes_them_from_the_default_of_its_field():
    config = load_config(None, ["experiment=pair", "first.train.epochs=9", "second.seed=2"], KINDS)
    assert config == Pair(Study(seed=7, train=Train(9, optimizer="sgd"), net=Deep(3)), Study(seed=2))
    wide = load_config(None, ["experiment=pair", "first.net.model_type=wide"], KINDS)
    assert wide.first == replace(Pair().first, net=Wide())


def test_the_written_configuration_holds_every_value_and_no_none():
    values = tomllib.loads(to_toml(Study()))
    assert values["experiment"] == "study"
    assert values["train"] == {"epochs": 20, "learning_rate": 1e-3, "optimizer": "adam"}
    assert values["net"] == {"model_type": "wide", "hidden": [64, 64]}
    assert "root" not in values


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("seed=7", Study(seed=7)),
        ("train.epochs = 3", Study(train=Train(epochs=3))),
        ("train.learning_rate=1", Study(train=Train(learning_rate=1.0))),
        ("title=bare words", Study(title="bare words")),
        ("title='quoted'", Study(title="quoted")),
        ('title=a="b"', Study(title='a="b"')),
        ("quick=true", Study(quick=True)),
        ("root=../data", Study(root="../data")),
        ("pairs=[[0, 1], [2]]", Study(pairs=((0, 1), (2,)))),
        ("data.name=digits", Study(data={"name": "digits"})),
        ("net={model_type = 'deep', layers = 2}", Study(net=Deep(2))),
    ],
)
def test_an_override_sets_one_key(write, override, expected):
    assert load_config(write('experiment = "study"'), [override], KINDS) == expected


def test_overrides_apply_in_order_and_need_no_file():
    config = load_config(None, ["seed=1", "experiment=study", "seed=2"], KINDS)
    assert config == Study(seed=2)


def test_the_hash_tells_configurations_apart_and_depends_on_nothing_else():
    assert config_hash(Study()) == config_hash(Study(seed=0))
    assert len(config_hash(Study())) == 8
    changed = [replace(Study(), seed=1), replace(Study(), train=Train(epochs=21)), replace(Study(), net=Deep())]
    assert len({config_hash(config) for config in [Study(), *changed]}) == 4


def test_paths_become_text_and_none_is_left_out():
    @dataclass(frozen=True)
    class Options:
        models: tuple[Path, ...]
        extra: dict[str, Any]
        seed: int | None = None

    options = Options((Path("a"), Path("b/c")), {"x": 1, "y": None})
    assert to_dict(options) == {"models": ["a", "b/c"], "extra": {"x": 1}}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "does not set 'experiment'.*study"),
        ('experiment = "studi"', "'experiment' is 'studi'.*nearest: 'study'"),
        ("experiment = [1]", r"'experiment' is \[1\]"),
        ('experiment = "study"\nsede = 1', "unknown key 'sede'.*nearest: 'seed'"),
        ('experiment = "study"\n[train]\nepoch = 1', r"unknown key 'train.epoch'.*nearest: 'train.epochs'.*\[train\]"),
        ('experiment = "study"\nepochs = 1', "unknown key 'epochs'.*nearest: 'train.epochs'"),
        ('experiment = "study"\n[trian]\nepochs = 1', "unknown key 'trian'.*nearest: 'train'"),
        ('experiment = "study"\ntrain = 3', "'train' must be a table, not 3"),
        ('experiment = "study"\n[train]\nepochs = 1.5', r"'train.epochs' must be int, not 1.5 \(float\)"),
        ('experiment = "study"\n[train]\nepochs = true', "'train.epochs' must be int, not True"),
        ('experiment = "study"\n[train]\noptimizer = "lion"', "'train.optimizer' must be one of 'adam', 'sgd'"),
        ('experiment = "study"\nspan = [1]', r"'span' must be tuple\[float, float\]"),
        ('experiment = "study"\nroot = 3', r"'root' must be str \| None"),
        ('experiment = "study"\nnet = 3', "'net' must be a table, not 3"),
        ('experiment = "study"\n[net]\nlayers = 3', "does not set 'net.model_type'.*wide, deep"),
        ('experiment = "study"\n[net]\nmodel_type = "deap"', "'net.model_type' is 'deap'.*nearest: 'deep'"),
        (
            'experiment = "study"\n[net]\nmodel_type = "deep"\nlayer = 1',
            r"unknown key 'net.layer'.*nearest: 'net.layers'.*\[net\]",
        ),
        ('experiment = "study"\n[net]\nmodel_type = "deep"\nlayers = 0', "'layers' is 0"),
        ("experiment = ", "is not valid TOML"),
    ],
)
def test_a_wrong_file_is_refused_in_one_line_that_names_file_and_key(write, text, words):
    path = write(text)
    with pytest.raises(ConfigError, match=words) as caught:
        load_config(path, [], KINDS)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("train.epoch=3", "--set train.epoch=3 has the unknown key 'train.epoch'.*nearest: 'train.epochs'"),
        ("train.epochs=many", "--set train.epochs=many: 'train.epochs' must be int, not 'many'"),
        ("seed.x=1", "--set seed.x=1: 'seed' is a value and has no keys"),
        ("seed", "--set seed is no setting"),
        ("=1", "is no setting"),
        ("train.=1", "is no setting"),
    ],
)
def test_a_wrong_override_is_named_rather_than_the_file(write, override, words):
    with pytest.raises(ConfigError, match=words) as caught:
        load_config(write('experiment = "study"\nseed = 1'), [override], KINDS)
    assert "study.toml" not in str(caught.value)


def test_a_broken_file_is_named_although_an_override_is_right(write):
    with pytest.raises(ConfigError, match=r"study.toml has the unknown key"):
        load_config(write('experiment = "study"\nsede = 1'), ["seed=1"], KINDS)


def test_a_key_that_names_the_class_must_name_this_class():
    with pytest.raises(ConfigError, match="'model_type' must be 'deep', not 'wide'"):
        from_dict(Deep, {"model_type": "wide"}, where="the file")


def test_class_variables_other_than_text_are_no_keys():
    @dataclass(frozen=True)
    class Method:
        on_host: ClassVar[bool] = True
        parts: ClassVar[tuple[str, ...]] = ("mean",)
        rank: int = 4

    assert from_dict(Method, {"rank": 2}, where="here") == Method(2)
    with pytest.raises(ConfigError, match="unknown key 'on_host'"):
        from_dict(Method, {"on_host": True}, where="here")


def test_a_wrong_item_of_a_list_is_told_what_items_may_be():
    @dataclass(frozen=True)
    class Choice:
        kinds: tuple[Literal["red", "blue"], ...] = ()

    with pytest.raises(ConfigError, match="'kinds' must be a list, each item one of 'red', 'blue', not"):
        from_dict(Choice, {"kinds": ["green"]}, where="here")
