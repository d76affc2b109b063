"""Files and options that do not fit are refused in one line, and nothing is written."""

import json
import re
from pathlib import Path

import jax
import numpy as np
import pytest

from permjax.cli import main
from permjax.experiments.files import AlignOptions, MergeOptions, align, merge
from permjax.io.checkpoint import open_checkpoint, save_checkpoint, save_tree
from permjax.nets.registry import build, config_from_dict

pytestmark = pytest.mark.fast

MLP = {"model_type": "mlp", "input_shape": [4], "hidden": [8, 6], "classes": 3}
GPT2 = {"model_type": "gpt2", "vocab_size": 7, "n_positions": 6, "n_embd": 8, "n_layer": 1, "n_head": 2, "n_inner": 10}


def write(folder, config, names):
    """Models with their `config.json`."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    for seed, name in enumerate(names):
        save_tree(folder / f"{name}.safetensors", build(config_from_dict(config)).init(jax.random.key(seed)))


def changed(path, **leaves):
    """Write a model again with some leaves replaced, added, or left out where None."""
    values = open_checkpoint(path).load() | {name.replace("__", "/"): leaf for name, leaf in leaves.items()}
    Path(path).unlink()
    save_checkpoint(path, {name: leaf for name, leaf in values.items() if leaf is not None})


def with_value(path, name, value):
    leaf = open_checkpoint(path)[name].read()
    leaf.reshape(-1)[3] = value
    changed(path, **{name: leaf})


def configured(text):
    Path("config.json").write_text(text if isinstance(text, str) else json.dumps(text))


def other_heads():
    """Two models whose weights have the same shapes, but not the same meaning."""
    for name, heads in (("one", 2), ("two", 4)):
        write(Path(name), GPT2 | {"n_head": heads}, ["model"])
    return {"models": ("one", "two")}


def truncate(path):
    Path(path).write_bytes(Path(path).read_bytes()[:-7])


def as_pickle(path):
    Path(path).rename(Path(path).with_suffix(".pt"))
    return {"models": ("a.safetensors", "b.pt")}


def started(labels, second="params/Dense_1/kernel:1"):
    """A plan to start from, with the given labels of the second model's first group."""
    rows = {"params/Dense_0/kernel:1": [list(range(8)), list(labels)], second: [list(range(6))] * 2}
    widths = {"params/Dense_0/kernel:1": 8, second: 6}
    text = {"format": "permjax-plan", "widths": widths, "per": dict.fromkeys(widths, ()), "labels": rows}
    Path("init.json").write_text(json.dumps(text))
    return {"init": "init.json"}


def link(target, path):
    path.symlink_to(target)
    return {"out": str(path)}


B = "b.safetensors"
KERNEL = "params/Dense_1/kernel"
OPTIONS = {"models": ("a.safetensors", B), "out": "out.safetensors"}
THREE = ("a.safetensors", "b.safetensors", "a.safetensors")

REFUSED = {
    "missing leaf": (lambda: changed(B, params__Dense_1__bias=None), r"b\.safetensors lacks .*'params/Dense_1/bias'"),
    "extra leaf": (
        lambda: changed(B, params__Dense_9__bias=np.ones(3)),
        r"b\.safetensors has the leaf 'params/Dense_9/bias', which the mlp of config\.json lacks.*nearest",
    ),
    "other shape": (
        lambda: changed(B, params__Dense_0__kernel=np.ones((4, 9), np.float32)),
        r"'params/Dense_0/kernel', axis 1, has shape \(4, 9\) in b\.safetensors but \(4, 8\)",
    ),
    "other rank": (
        lambda: changed(B, params__Dense_0__bias=np.ones((8, 1))),
        r"'params/Dense_0/bias' has shape \(8, 1\)",
    ),
    "no floats": (
        lambda: changed(B, params__Dense_0__bias=np.ones(8, np.int8)),
        r"'params/Dense_0/bias' has dtype int8 in b\.safetensors but float32",
    ),
    "NaN": (lambda: with_value(B, KERNEL, np.nan), rf"'{KERNEL}' of b\.safetensors holds 1 NaN and 0 Inf"),
    "Inf": (
        lambda: with_value("a.safetensors", KERNEL, -np.inf),
        rf"'{KERNEL}' of a\.safetensors holds 0 NaN and 1 Inf",
    ),
    "truncated": (lambda: truncate(B), r"b\.safetensors cannot be opened as a whole safetensors file"),
    "pickle": (lambda: as_pickle(B), r"b\.pt is a pickle"),
    "no such file": (lambda: {"models": ("a.safetensors", "c.safetensors")}, r"no checkpoint at c\.safetensors"),
    "one model": (lambda: {"models": ("a.safetensors",)}, r"Two models or more are needed"),
    "unknown key": (
        lambda: configured(MLP | {"hiden": [8]}),
        r"config\.json: .*unknown key 'hiden' \(nearest: 'hidden'\)",
    ),
    "unknown type": (
        lambda: configured(MLP | {"model_type": "mpl"}),
        r"config\.json: .*'mpl' is unknown \(nearest: 'mlp'\)",
    ),
    "no type": (lambda: configured({}), r"config\.json: .*'model_type'"),
    "no JSON": (lambda: configured("{"), r"config\.json is no readable JSON"),
    "no architecture": (
        lambda: Path("config.json").unlink(),
        r"a\.safetensors is not known: .*config\.json.*--config FILE.*--arch module:f",
    ),
    "other meaning": (other_heads, r"different structure: 'n_head' is 2 for one/\S* but 4 for two/"),
    "--config missing": (
        lambda: {"config": "none.json"},
        r"--config none\.json cannot be read as JSON \(.*No such file",
    ),
    "--config no JSON": (lambda: {"config": "a.safetensors"}, r"--config a\.safetensors cannot be read as JSON"),
    "--config a list": (lambda: configured([]) or {"config": "config.json"}, r"config\.json holds a JSON list"),
    "--config and --arch": (lambda: {"config": "config.json", "arch": "m:f"}, r"only one of them"),
    "out is an input": (lambda: {"out": "./b.safetensors"}, r"over the model b\.safetensors"),
    "out is a link to an input": (lambda: link(B, Path("l.safetensors")), r"over the model b\.safetensors"),
    "out is the folder of an input": (lambda: {"out": "."}, r"\. would be written over the model a\.safetensors"),
    "out is a pickle": (lambda: {"out": "out.pt"}, r"out\.pt is no place for a checkpoint"),
    "out is another file": (lambda: {"out": "config.json"}, r"config\.json is no place for a checkpoint"),
    "plan of another kind": (lambda: {"plan": "plan.txt"}, r"\.json or \.safetensors, not plan\.txt"),
    "plan is an input": (
        lambda: {"plan": "config.json"},
        r"plan config\.json would be written over a file of a\.safetensors",
    ),
    "plan is the model": (lambda: {"plan": "out.safetensors"}, r"cannot both be out\.safetensors"),
    "init is no bijection": (
        lambda: started([0, 0, 1, 2, 3, 4, 5, 6]),
        r"plan init\.json cannot be a start: model 1, group 'params/Dense_0/kernel:1': .* not one to one",
    ),
    "init out of range": (lambda: started([8, *range(7)]), r"init\.json.*labels reach from 0 to 8"),
    "init of another model": (
        lambda: started(range(8), second="other"),
        r"permutations do not match the spec's groups.*'other'",
    ),
    "init is no plan": (lambda: {"init": "config.json"}, r"config\.json' holds no permjax plan"),
    "no restarts": (lambda: {"restarts": 0}, r"restarts must be at least 1"),
}
REFUSED_BY_ALIGN = {
    "several into a file": ({"models": THREE}, r"2 aligned models need a folder, not the file out\.safetensors"),
    "several over an input": ({"models": THREE, "out": "."}, r"over the model [ab]\.safetensors"),
}
REFUSED_BY_MERGE = {
    "weights of others": ({"weights": (0.5, 0.25, 0.25)}, r"2 models need 2 weights, not 3 \(0\.5, 0\.25, 0\.25\)"),
    "negative weights": ({"weights": (1.5, -0.5)}, r"weights 1\.5, -0\.5 must be numbers >= 0"),
    "no weight": ({"weights": (0.0, 0.0)}, r"weights 0\.0, 0\.0 must be"),
    "NaN weight": ({"weights": (1.0, float("nan"))}, r"weights 1\.0, nan must be"),
    "an arc of three": ({"models": THREE, "method": "slerp"}, r"slerp runs between two models, not 3"),
    "plan of nothing": ({"align": False, "plan": "plan.json"}, r"no plan to write"),
}


@pytest.fixture
def two(tmp_path, monkeypatch):
    """The current folder holds `a.safetensors`, `b.safetensors` and their `config.json`."""
    write(tmp_path, MLP, ["a", "b"])
    monkeypatch.chdir(tmp_path)
    return tmp_path


def everything_in(folder):
    return {str(f.relative_to(folder)): f.read_bytes() for f in folder.rglob("*") if f.is_file() and f.suffix != ".pyc"}


def assert_refused(folder, run, options, pattern):
    """A ValueError of one line that matches, and no file made or changed."""
    before = everything_in(folder)
    with pytest.raises(ValueError, match=pattern) as caught:
        run(options)
    assert "\n" not in str(caught.value)
    assert everything_in(folder) == before


@pytest.mark.parametrize(("run", "kind"), [(align, AlignOptions), (merge, MergeOptions)])
@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_fit_is_refused_in_one_line_and_nothing_is_written(two, case, run, kind):
    change, pattern = REFUSED[case]
    assert_refused(two, run, kind(**OPTIONS | (change() or {})), pattern)


@pytest.mark.parametrize("case", REFUSED_BY_ALIGN)
def test_places_that_do_not_fit_several_models_are_refused(two, case):
    change, pattern = REFUSED_BY_ALIGN[case]
    assert_refused(two, align, AlignOptions(**OPTIONS | change), pattern)


@pytest.mark.parametrize("case", REFUSED_BY_MERGE)
def test_methods_and_weights_that_do_not_fit_are_refused(two, case):
    change, pattern = REFUSED_BY_MERGE[case]
    assert_refused(two, merge, MergeOptions(**OPTIONS | change), pattern)


@pytest.mark.parametrize("case", REFUSED)
def test_the_commands_say_in_one_line_what_does_not_fit(two, capsys, case):
    change, pattern = REFUSED[case]
    options = OPTIONS | (change() or {})
    before = everything_in(two)
    models = options.pop("models")
    flags = [text for name, value in options.items() for text in (f"--{name}", str(value))]
    assert main(["align", *models, *flags]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert re.fullmatch(f"permjax: .*{pattern}.*\n", said.err)
    assert everything_in(two) == before


def test_an_option_that_does_not_exist_is_bad_input(two, capsys):
    assert main(["merge", "a.safetensors", B, "-o", "out.safetensors", "--method", "avrage"]) == 2
    assert "average" in capsys.readouterr().err
    assert main(["align", "a.safetensors", B]) == 2
