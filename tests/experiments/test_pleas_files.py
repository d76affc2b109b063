"""Files merged by PLeaS are what the functions make of them, run from the file, and come with an honest report."""

import json
import sys
import textwrap
import warnings
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from permjax import tree
from permjax.action import permute
from permjax.cli import main
from permjax.experiments.calibration_files import read_calibration
from permjax.experiments.file_options import AlignOptions, MergeOptions, PleasOptions
from permjax.experiments.files import align, merge
from permjax.experiments.model_files import examine, open_all
from permjax.io.checkpoint import load_tree, open_checkpoint, save_checkpoint, save_tree
from permjax.match.activations import activation_matching
from permjax.merge.export import CONFIG_KEY, is_merged, load_merged
from permjax.merge.planning import pleas_plan
from permjax.merge.pleas import pleas
from permjax.nets.registry import build, config_from_dict
from permjax.permutation import random_permutations

MLP = {"model_type": "mlp", "input_shape": [4], "hidden": [8, 6], "classes": 3}
NET = build(config_from_dict(MLP))
X = jnp.asarray(np.random.default_rng(5).standard_normal((40, 4), np.float32))

NORMED = """
    import jax
    import jax.numpy as jnp

    def apply(variables, x):
        params, running = variables["params"], variables["batch_stats"]
        h = (x @ params["first"] - running["mean"][None]) * jax.lax.rsqrt(running["var"] + 1e-3)[None]
        return jax.nn.relu(h) @ params["second"]

    def build():
        return apply, jnp.ones((2, 4))
"""


def model(seed, scale=1.0):
    drawn = NET.init(jax.random.key(seed))
    rng = np.random.default_rng(seed)
    return tree.map_named(lambda _, x: np.asarray(x + 0.1 * rng.standard_normal(x.shape, np.float32)) * scale, drawn)


def write(folder, models, config=MLP, **arrays):
    """Models with their `config.json`, and inputs in `x.npz`."""
    (folder / "config.json").write_text(json.dumps(config))
    for name, params in models.items():
        save_tree(folder / f"{name}.safetensors", params)
    np.savez(folder / "x.npz", x=X, owner=np.arange(40) % 2, **arrays)


@pytest.fixture
def two(tmp_path, monkeypatch):
    """The current folder holds `a.safetensors`, `b.safetensors`, their `config.json` and `x.npz`."""
    write(tmp_path, {"a": model(0), "b": model(1)})
    monkeypatch.chdir(tmp_path)
    return tmp_path


def options(out="out.safetensors", models=("a.safetensors", "b.safetensors"), how=None, **others):
    given = {"method": "pleas", "calibration": "x.npz", "batch_size": 20} | others
    return MergeOptions(models, out, pleas=PleasOptions(**(how or {})), **given)


def outputs(path, x=X):
    params, network = load_merged(path, NET.apply)
    return np.asarray(network(params, x))


def parents(x=X):
    return [np.asarray(NET.apply(load_tree(f"{name}.safetensors"), x)) for name in "ab"]


def test_the_command_writes_what_the_functions_make_and_tells_what_it_costs(two, capsys):
    flags = ["--method", "pleas", "--budget", "1.3", "--calibration", "x.npz", "--batch-size", "20", "--no-progress"]
    assert main(["merge", "a.safetensors", "b.safetensors", "-o", "out.safetensors", *flags]) == 0
    assert "residual_after" in capsys.readouterr().out
    files = examine(open_all(("a.safetensors", "b.safetensors")), None, None)
    data = read_calibration("x.npz", files.architecture, models=2, samples=None, batch_size=20, seed=0)
    aligned = activation_matching(files.spec, files.load(), apply=NET.apply, data=data.batches).models
    plan = pleas_plan(files.spec, aligned, apply=NET.apply, data=data.batches, budget=1.3)
    result = pleas(files.spec, aligned, plan, apply=NET.apply, data=data.batches)
    params, network = load_merged("out.safetensors", NET.apply)
    for name, leaf in tree.flatten(result.models[0]).items():
        np.testing.assert_array_equal(tree.flatten(params)[name], leaf)
    assert dict(network.wide.plan.widths) == dict(plan.widths)
    metrics = json.loads(Path("out.safetensors.report/metrics.json").read_text())
    assert 1.2 < metrics["flops"] <= 1.3 < metrics["dense_params"]
    assert metrics["residual_after"] == pytest.approx(result.info.after.mean())
    assert metrics["residual_after"] < metrics["residual_before"] / 2
    assert (metrics["samples"], metrics["layers_fitted"], metrics["warnings"]) == (40, 3, 0)
    page = Path("out.safetensors.report/report.html").read_text()
    assert "permjax.load_merged runs it at that cost" in page
    assert Path("out.safetensors.report/figures/residual.png").is_file()


def test_at_the_cost_of_both_models_the_network_is_both_of_them(two):
    outcome = merge(options(how={"budget": 2.0}))
    assert outcome.metrics["flops"] == pytest.approx(2)
    np.testing.assert_allclose(outputs("out.safetensors"), sum(parents()) / 2, rtol=2e-4, atol=1e-5)


def test_own_heads_stand_one_after_the_other(two):
    merge(options(how={"width": ("1",), "heads": "own"}))
    np.testing.assert_allclose(outputs("out.safetensors"), np.concatenate(parents(), -1), rtol=2e-4, atol=1e-5)
    params, _ = load_merged("out.safetensors", NET.apply)
    assert params["params"]["Dense_2"]["kernel"].shape == (12, 6)


def test_a_folder_says_that_widths_differ(two):
    merge(options("out", how={"budget": 1.3}))
    assert CONFIG_KEY in open_checkpoint("out").config
    assert {key: value for key, value in open_checkpoint("out").config.items() if key != CONFIG_KEY} == MLP
    assert outputs("out").shape == (40, 3)


def test_the_permuted_twin_merges_into_the_model_itself_which_is_an_ordinary_file(two):
    a = load_tree("a.safetensors")
    spec = examine(open_all(("a.safetensors", "b.safetensors")), None, None).spec
    drawn = {g: np.asarray(rows) for g, rows in random_permutations(spec, jax.random.key(3)).items()}
    save_tree("b.safetensors", permute(spec, drawn, a))
    outcome = merge(options(how={"canonical_scale": True}))
    assert outcome.metrics["flops"] == 1
    assert "stored like" in outcome.summary
    found = open_checkpoint("out.safetensors")
    assert not is_merged(found)
    np.testing.assert_allclose(NET.apply(load_tree(found.path), X), NET.apply(a, X), rtol=1e-3, atol=1e-4)
    found = align(AlignOptions(("a.safetensors", "out.safetensors"), "again.safetensors"))
    assert found.metrics["groups"] == 2


def test_matching_by_activations_gives_a_permuted_twin_back_in_align_and_average_too(two):
    a = load_tree("a.safetensors")
    spec = examine(open_all(("a.safetensors", "b.safetensors")), None, None).spec
    drawn = {g: np.asarray(rows) for g, rows in random_permutations(spec, jax.random.key(3)).items()}
    save_tree("b.safetensors", permute(spec, drawn, a))
    data = {"matching": "activations", "calibration": "x.npz"}
    outcome = align(AlignOptions(("a.safetensors", "b.safetensors"), "out.safetensors", **data))
    assert outcome.metrics["l2_after"] == 0
    assert outcome.metrics["correlation_after"] == pytest.approx(1)
    merge(MergeOptions(("a.safetensors", "b.safetensors"), "mean.safetensors", **data))
    for path in ("out.safetensors", "mean.safetensors"):
        for name, leaf in tree.flatten(a).items():
            np.testing.assert_array_equal(open_checkpoint(path)[name].read(), leaf)


def test_owners_change_what_shared_units_learn(two):
    for targets in ("mean", "owner"):
        how = {"width": ("0.25",), "mode": "sequential", "targets": targets}
        outcome = merge(options(f"{targets}.safetensors", how=how))
    assert "the model in whose domain the sample is" in outcome.summary
    assert np.abs(outputs("mean.safetensors") - outputs("owner.safetensors")).max() > 1e-3


def test_a_group_can_be_named_and_models_taken_as_they_are(two):
    outcome = merge(options(align=False, how={"width": ("params/Dense_1/kernel:1=0.5",)}))
    assert "without alignment" in outcome.summary
    _, network = load_merged("out.safetensors", NET.apply)
    assert network.wide.plan.widths == {"params/Dense_0/kernel:1": 8, "params/Dense_1/kernel:1": 9}
    units = next(table for table in outcome.tables if table.title == "Units")
    assert units.rows == (("params/Dense_0/kernel:1", 8, 8, 8, 0), ("params/Dense_1/kernel:1", 6, 9, 3, 6))


def test_what_to_beware_of_is_said_in_the_report_alone(two):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        outcome = merge(options(calibration="generated:white_noise:5", how={"budget": 1.3}))
    assert outcome.metrics["warnings"] == 2
    assert "Warning: calibrated on generated noise" in outcome.summary
    assert "fewer equations than unknowns" in outcome.summary


def test_the_dtype_and_the_metadata_of_the_first_model_are_kept(two):
    half = {name: leaf.astype(np.float16) for name, leaf in open_checkpoint("a.safetensors").load().items()}
    save_checkpoint("a.safetensors", half, metadata={"note": "first"})
    merge(options(how={"budget": 1.3}))
    found = open_checkpoint("out.safetensors")
    assert {lazy.dtype for lazy in found.values()} == {np.dtype(np.float16)}
    assert found.metadata["note"] == "first"


def test_running_statistics_that_no_one_can_estimate_are_averaged_and_it_is_said(tmp_path, monkeypatch):
    (tmp_path / "normed_model.py").write_text(textwrap.dedent(NORMED))
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "normed_model", raising=False)
    rng = np.random.default_rng(0)
    np.save("x.npy", X)
    for name in "ab":
        params = {"first": rng.standard_normal((4, 6)), "second": rng.standard_normal((6, 3))}
        running = {"mean": rng.standard_normal(6), "var": rng.random(6) + 0.5}
        save_tree(f"{name}.safetensors", {"params": params, "batch_stats": running})
    given = {"arch": "normed_model:build", "calibration": "x.npy", "align": False}
    outcome = merge(options(**given))
    assert "running statistics are means of the models'" in outcome.summary
    a, b, out = (open_checkpoint(f"{name}.safetensors")["batch_stats/var"].read() for name in ("a", "b", "out"))
    np.testing.assert_allclose(out, (a + b) / 2, rtol=1e-6)
