"""The architecture of checkpoint files comes from a configuration or from a function of the user."""

import json
import sys
import textwrap
from pathlib import Path

import jax
import numpy as np
import pytest

from permjax import tree
from permjax.experiments.files import AlignOptions, MergeOptions, align, merge
from permjax.io.checkpoint import load_tree, save_tree
from permjax.nets.registry import build, config_from_dict

pytestmark = pytest.mark.fast

MODULE = """
    import jax
    import jax.numpy as jnp

    def apply(params, x):
        return jax.nn.relu(x @ params["first"]["w"]) @ params["second.w"]

    def build():
        return apply, (jnp.ones((2, 4)),)

    def lone_input():
        return apply, jnp.ones((2, 4))

    def other_leaves():
        return (lambda params, x: x @ params["first"]["v"]), (jnp.ones((2, 4)),)

    def other_shapes():
        return apply, (jnp.ones((2, 9)),)

    def unused_leaf():
        return (lambda params, x: x @ params["second.w"]), (jnp.ones((2, 6)),)

    def no_units():
        return (lambda params, x: (x @ params["first"]["w"], params["second.w"])), (jnp.ones((2, 4)),)

    def broken():
        raise RuntimeError("no weights today\\nsecond line")

    def wrong():
        return apply

    def no_arrays():
        return apply, ("text",)

    number = 3
"""


@pytest.fixture
def own(tmp_path, monkeypatch):
    """Two models of an architecture in `own_model.py` of the current folder; the second is a permuted copy."""
    draw = np.random.default_rng(0)
    a = {"first": {"w": draw.standard_normal((4, 6))}, "second.w": draw.standard_normal((6, 3))}
    order = draw.permutation(6)
    b = {"first": {"w": a["first"]["w"][:, order]}, "second.w": a["second.w"][order]}
    (tmp_path / "own_model.py").write_text(textwrap.dedent(MODULE))
    (tmp_path / "broken_model.py").write_text("1 / 0\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path / "elsewhere")  # forgets what was found in older folders
    monkeypatch.delitem(sys.modules, "own_model", raising=False)
    save_tree("a.safetensors", a)
    save_tree("b.safetensors", b)
    return a


@pytest.mark.parametrize("function", ["build", "lone_input"])
def test_a_function_of_the_current_folder_gives_the_architecture(own, function):
    outcome = align(AlignOptions(("a.safetensors", "b.safetensors"), "out.safetensors", arch=f"own_model:{function}"))
    assert outcome.metrics["groups"] == 1
    found = tree.flatten(load_tree("out.safetensors"))
    for name, expected in tree.flatten(own).items():
        np.testing.assert_array_equal(found[name], expected)


def test_a_configuration_that_is_named_goes_before_the_one_beside_the_models(tmp_path):
    config = {"model_type": "mlp", "input_shape": [4], "hidden": [8], "classes": 3}
    models = tuple(str(tmp_path / f"{name}.safetensors") for name in "ab")
    for seed, path in enumerate(models):
        save_tree(path, build(config_from_dict(config)).init(jax.random.key(seed)))
    (tmp_path / "config.json").write_text('{"model_type": "nothing"}')
    (tmp_path / "mlp.json").write_text(json.dumps(config))
    options = AlignOptions(models, str(tmp_path / "out.safetensors"), config=str(tmp_path / "mlp.json"))
    assert align(options).metrics["groups"] == 1


@pytest.mark.parametrize(
    ("arch", "pattern"),
    [
        ("own_model", r"--arch is 'own_model', but must be module:function"),
        ("own_model:", r"must be module:function"),
        ("no_model:build", r"module 'no_model' cannot be imported \(ModuleNotFoundError"),
        ("broken_model:build", r"module 'broken_model' cannot be imported \(ZeroDivisionError"),
        ("own_model:biuld", r"no function 'biuld' \(nearest: 'build'\)"),
        ("own_model:number", r"no function 'number'"),
        ("own_model:broken", r"own_model:broken failed .*RuntimeError: no weights today\)"),
        ("own_model:wrong", r"must return \(apply, example_inputs\) with a function `apply`, not function"),
        ("own_model:no_arrays", r"must return example inputs that are arrays, or a tuple of them, not str"),
        ("own_model:other_leaves", r"own_model:other_leaves asks for 'v', which a\.safetensors lacks \(nearest"),
        ("own_model:other_shapes", r"does not run on the shapes of a\.safetensors \(TypeError"),
        ("own_model:unused_leaf", r"a\.safetensors: leaf 'first/w' has no effect on the output"),
        ("own_model:no_units", r"a\.safetensors can be permuted"),
    ],
)
def test_functions_that_give_no_architecture_are_refused(own, arch, pattern):
    options = AlignOptions(("a.safetensors", "b.safetensors"), "out.safetensors", arch=arch)
    with pytest.raises(ValueError, match=pattern) as caught:
        align(options)
    assert "\n" not in str(caught.value)
    assert not Path("out.safetensors").exists()


def test_constants_that_differ_are_refused_before_a_merge(own):
    stepped = MODULE.replace('params["second.w"]\n', 'params["second.w"] + params["steps"].astype(jnp.float32)\n', 1)
    Path("stepped_model.py").write_text(textwrap.dedent(stepped))
    for path, steps in (("a.safetensors", 3), ("b.safetensors", 4)):
        save_tree(path, {**load_tree(path), "steps": np.array(steps, np.int32)})
    with pytest.raises(ValueError, match="frozen leaf 'steps' differs between model 0 and model 1"):
        merge(MergeOptions(("a.safetensors", "b.safetensors"), "out.safetensors", arch="stepped_model:build"))
