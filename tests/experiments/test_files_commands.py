"""Checkpoint files are aligned and merged exactly, and refused in one line if they do not fit."""

import functools
import json

import jax
import ml_dtypes
import numpy as np
import pytest

from permjax import tree
from permjax.action import permute
from permjax.cli import main
from permjax.experiments.files import AlignOptions, MergeOptions, align, merge
from permjax.experiments.progress import Progress
from permjax.io.checkpoint import load_tree, open_checkpoint, save_checkpoint, save_tree
from permjax.nets.registry import build, config_from_dict
from permjax.permutation import random_permutations
from permjax.plan import Plan
from permjax.symmetry.trace import trace_spec

BF16 = ml_dtypes.bfloat16
MLP = {"model_type": "mlp", "input_shape": [4], "hidden": [8, 6], "classes": 3}
GPT2 = {"model_type": "gpt2", "vocab_size": 7, "n_positions": 6, "n_embd": 8, "n_layer": 1, "n_head": 2, "n_inner": 10}
RESNET = {
    "model_type": "resnet",
    "input_shape": [6, 6, 3],
    "channels": [4, 5],
    "blocks": [1, 1],
    "classes": 3,
    "norm": "batch",
}
CONFIGS = {"mlp": MLP, "gpt2": GPT2, "resnet": RESNET}


def network(config):
    return build(config_from_dict(config))


def model(config, seed=0, dtype=np.float32):
    """Random weights that all show in the outputs; scales and running variances are positive."""
    draw = np.random.default_rng(seed)

    def fill(name, leaf):
        vector = len(leaf.shape) < 2
        return (draw.uniform(0.5, 1.5, leaf.shape) if vector else draw.standard_normal(leaf.shape)).astype(dtype)

    return tree.map_named(fill, jax.eval_shape(network(config).init, jax.random.key(0)))


@functools.cache
def spec_of(name):
    net = network(CONFIGS[name])
    like = jax.eval_shape(net.init, jax.random.key(0))
    return trace_spec(net.apply, like, *net.example_inputs(2), verify=False)


def shuffled(name, params, seed=3):
    drawn = random_permutations(spec_of(name), jax.random.key(seed))
    return permute(spec_of(name), {group: np.asarray(rows) for group, rows in drawn.items()}, params)


def write(folder, config, **models):
    """Files `a.safetensors`, ... with their `config.json`; returns their paths."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    for name, params in models.items():
        save_tree(folder / f"{name}.safetensors", params)
    return tuple(str(folder / f"{name}.safetensors") for name in models)


def assert_same_bits(found, expected):
    found, expected = ({n: np.asarray(x) for n, x in tree.flatten(dict(t)).items()} for t in (found, expected))
    assert set(found) == set(expected)
    for name, array in expected.items():
        assert (found[name].dtype, found[name].shape) == (array.dtype, array.shape), name
        assert found[name].tobytes() == array.tobytes(), name


# aligning


@pytest.mark.parametrize("name", ["mlp", "resnet"])
def test_aligning_a_permuted_copy_gives_back_every_bit(tmp_path, name):
    a = model(CONFIGS[name])
    b = shuffled(name, a)
    assert any((x != y).any() for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))
    outcome = align(AlignOptions(write(tmp_path, CONFIGS[name], a=a, b=b), str(tmp_path / "out.safetensors")))
    assert_same_bits(open_checkpoint(tmp_path / "out.safetensors"), tree.flatten(a))
    assert outcome.metrics["groups"] == len(spec_of(name).groups)
    assert outcome.metrics["l2_before"] > 1
    assert outcome.metrics["l2_after"] == 0
    assert outcome.metrics["l2_reduction_percent"] == pytest.approx(100)
    assert outcome.metrics["equivalence_error"] < 1e-5


def test_an_aligned_independent_model_is_nearer_and_computes_what_it_did(tmp_path):
    a, b = model(MLP), model(MLP, seed=1)
    options = AlignOptions(write(tmp_path, MLP, a=a, b=b), str(tmp_path / "out.safetensors"), restarts=2)
    outcome = align(options)
    out = load_tree(tmp_path / "out.safetensors", like=b)
    x = jax.random.normal(jax.random.key(2), (5, 4))
    apply = network(MLP).apply
    np.testing.assert_allclose(apply(out, x), apply(b, x), rtol=1e-4, atol=1e-5)

    def distance(one, two):
        pairs = zip(jax.tree.leaves(one), jax.tree.leaves(two), strict=True)
        return np.sqrt(sum(np.sum((x.astype(float) - y) ** 2) for x, y in pairs))

    assert outcome.metrics["l2_before"] == pytest.approx(distance(a, b))
    assert outcome.metrics["l2_after"] == pytest.approx(distance(a, out))
    assert outcome.metrics["l2_after"] < outcome.metrics["l2_before"]


def test_the_outcome_has_a_row_for_every_model_and_group(tmp_path):
    a = model(MLP)
    paths = write(tmp_path, MLP, a=a, b=shuffled("mlp", a))
    outcome = align(AlignOptions(paths, str(tmp_path / "out.safetensors")))
    models, groups = outcome.tables
    assert [row[0] for row in models.rows] == [paths[1]]
    assert [row[0] for row in groups.rows] == [group.name for group in spec_of("mlp").groups]
    assert all(len(row) == len(table.columns) for table in outcome.tables for row in table.rows)
    for *_, before, after in groups.rows:
        assert before < 0.9
        assert after == pytest.approx(1)
    assert "params/Dense_0/kernel:1: 8 units" in outcome.texts[0].body
    assert outcome.figures[0].kind == "bars"
    assert {type(value) for value in outcome.metrics.values()} <= {int, float}
    assert set(outcome.headline) <= set(outcome.metrics)


def test_names_order_dtypes_metadata_shards_and_companions_of_a_hugging_face_folder_are_kept(tmp_path):
    named = {f"transformer.{name}": leaf for name, leaf in model(GPT2, dtype=BF16).items()}
    a = dict(reversed(named.items())) | {"transformer.h.0.attn.bias": np.tri(6, dtype=np.float32)[None, None]}
    permuted = shuffled("gpt2", {name.removeprefix("transformer."): leaf for name, leaf in named.items()})
    b = {name: permuted.get(name.removeprefix("transformer."), leaf) for name, leaf in a.items()}
    companions = {"config.json": json.dumps(GPT2), "tokenizer.json": "{}"}
    for folder, tensors, size in (("one", a, None), ("two", b, 600)):
        (tmp_path / folder).mkdir()
        for file, text in companions.items():
            (tmp_path / folder / file).write_text(text)
        save_checkpoint(tmp_path / folder, tensors, metadata={"format": "pt", "note": folder}, shard_size=size)
    align(AlignOptions((str(tmp_path / "one"), str(tmp_path / "two")), str(tmp_path / "out")))
    two, out = open_checkpoint(tmp_path / "two"), open_checkpoint(tmp_path / "out")
    assert_same_bits(out, a)
    assert len(out.shards) > 2
    assert (list(out), out.shards, out.metadata, out.config) == (list(two), two.shards, two.metadata, GPT2)
    assert (tmp_path / "out" / "tokenizer.json").read_text() == "{}"


def test_several_models_go_to_one_folder_under_their_names(tmp_path):
    a = model(MLP)
    paths = write(tmp_path, MLP, a=a, b=shuffled("mlp", a, 1), c=shuffled("mlp", a, 2))
    outcome = align(AlignOptions(paths, str(tmp_path / "out")))
    assert {file.name for file in (tmp_path / "out").iterdir()} == {"b.safetensors", "c.safetensors"}
    for name in ("b", "c"):
        assert_same_bits(open_checkpoint(tmp_path / "out" / f"{name}.safetensors"), tree.flatten(a))
    befores = [outcome.metrics["l2_before_1"], outcome.metrics["l2_before_2"]]
    assert befores[0] != befores[1]
    assert outcome.metrics["l2_before"] == pytest.approx(np.mean(befores))
    assert len(outcome.tables[0].rows) == 2


def test_models_of_the_same_name_are_numbered(tmp_path):
    a = model(MLP)
    paths = [*write(tmp_path, MLP, a=a), *write(tmp_path / "s1", MLP, b=a), *write(tmp_path / "s2", MLP, b=a)]
    align(AlignOptions(tuple(paths), str(tmp_path / "out")))
    assert {file.name for file in (tmp_path / "out").iterdir()} == {"1-b.safetensors", "2-b.safetensors"}


@pytest.mark.parametrize("ending", ["json", "safetensors"])
def test_the_plan_that_is_written_leads_from_the_second_model_to_the_aligned_one(tmp_path, ending):
    a = model(MLP)
    b = shuffled("mlp", a)
    plan = tmp_path / "plans" / f"plan.{ending}"
    align(AlignOptions(write(tmp_path, MLP, a=a, b=b), str(tmp_path / "out.safetensors"), plan=str(plan)))
    assert_same_bits(permute(spec_of("mlp"), Plan.load(plan).permutations(1), b), a)
    paths = (str(tmp_path / "a.safetensors"), str(tmp_path / "b.safetensors"))
    again = align(AlignOptions(paths, str(tmp_path / "again.safetensors"), init=str(plan)))
    assert_same_bits(open_checkpoint(tmp_path / "again.safetensors"), tree.flatten(a))
    assert again.metrics["l2_after"] == 0


# merging


@pytest.mark.parametrize(("name", "dtype"), [("mlp", np.float32), ("resnet", BF16)])
def test_merging_permuted_copies_gives_back_the_original(tmp_path, name, dtype):
    a = model(CONFIGS[name], dtype=dtype)
    paths = write(tmp_path, CONFIGS[name], a=a, b=shuffled(name, a, 1), c=shuffled(name, a, 2))
    outcome = merge(MergeOptions(paths, str(tmp_path / "out.safetensors")))
    out = open_checkpoint(tmp_path / "out.safetensors")
    for leaf, expected in tree.flatten(a).items():
        assert out[leaf].dtype == dtype
        np.testing.assert_allclose(
            out[leaf].read().astype(np.float32), expected.astype(np.float32), rtol=float(ml_dtypes.finfo(dtype).eps)
        )
    assert outcome.metrics["models"] == 3
    assert ("running statistics" in outcome.summary) == (name == "resnet")


def test_the_merged_model_is_the_weighted_mean_of_the_aligned_ones_stored_like_the_first(tmp_path):
    a, b = model(MLP, dtype=BF16), model(MLP, seed=1)
    paths = write(tmp_path, MLP, a=a, b=b)
    save_checkpoint(paths[0], dict(reversed(tree.flatten(a).items())), metadata={"note": "first"})
    align(AlignOptions(paths, str(tmp_path / "aligned.safetensors"), seed=4))
    merge(MergeOptions(paths, str(tmp_path / "out.safetensors"), seed=4, weights=(3.0, 1.0)))
    first, second, out = (
        open_checkpoint(path) for path in (paths[0], tmp_path / "aligned.safetensors", tmp_path / "out.safetensors")
    )
    assert second["params/Dense_0/kernel"].dtype == np.float32
    assert (list(out), out.metadata) == (list(first), {"note": "first"})
    mean = {
        n: np.float32(0.75) * first[n].read().astype(np.float32) + np.float32(0.25) * second[n].read() for n in first
    }
    assert_same_bits(out, {name: array.astype(BF16) for name, array in mean.items()})


def test_without_alignment_the_models_are_taken_as_they_are(tmp_path):
    a, b = model(MLP), model(MLP, seed=1)
    outcome = merge(MergeOptions(write(tmp_path, MLP, a=a, b=b), str(tmp_path / "out.safetensors"), align=False))
    mean = tree.map_named(lambda _, x, y: np.float32(0.5) * x + np.float32(0.5) * y, a, b)
    assert_same_bits(load_tree(tmp_path / "out.safetensors"), mean)
    assert "without alignment" in outcome.summary
    assert outcome.metrics == {"groups": 2}
    assert outcome.tables == ()


def test_slerp_keeps_the_length_and_its_weights_say_where_on_the_arc(tmp_path):
    a = model(MLP)
    length = tree.norm(a)
    b = tree.map_named(
        lambda _, x: (x * (length / tree.norm(model(MLP, seed=1)))).astype(np.float32), model(MLP, seed=1)
    )
    paths = write(tmp_path, MLP, a=a, b=b)
    far, mid = (str(tmp_path / f"{name}.safetensors") for name in ("far", "mid"))
    merge(MergeOptions(paths, mid, method="slerp", align=False))
    outcome = merge(MergeOptions(paths, far, method="slerp", weights=(0.0, 2.0), align=False))
    assert tree.norm(load_tree(mid)) == pytest.approx(length, rel=1e-5)
    for leaf, expected in tree.flatten(b).items():
        np.testing.assert_allclose(open_checkpoint(far)[leaf].read(), expected, rtol=1e-5, atol=1e-6)
    assert outcome.metrics["cosine"] == pytest.approx(tree.dot(a, b) / length**2, rel=1e-4)


def test_folders_merge_into_a_folder_with_the_companions_of_the_first(tmp_path):
    a = model(MLP, dtype=np.float16)
    for name, params in {"one": a, "two": shuffled("mlp", a)}.items():
        write(tmp_path / name, MLP, model=params)
    (tmp_path / "one" / "notes.txt").write_text("of the first")
    merge(MergeOptions((str(tmp_path / "one"), str(tmp_path / "two")), str(tmp_path / "out")))
    assert_same_bits(open_checkpoint(tmp_path / "out"), tree.flatten(a))
    assert open_checkpoint(tmp_path / "out").config == MLP
    assert (tmp_path / "out" / "notes.txt").read_text() == "of the first"


# progress and the command line


class Log(Progress):
    def __init__(self):
        self.entries = []

    def start(self, name, total):
        self.entries.append((name, total))

    def step(self, n=1, **_):
        self.entries.append(n)

    def done(self):
        self.entries.append("done")


def test_progress_is_told_of_every_stage_but_not_of_the_checks(tmp_path):
    a, log = model(MLP), Log()
    out = str(tmp_path / "out.safetensors")
    merge(MergeOptions(write(tmp_path, MLP, a=a, b=a), out), log)
    assert log.entries == [("matching", 1), 1, "done", ("merging", 1), 1, "done"]
    broken, log = tree.map_named(lambda _, leaf: leaf * np.float32(np.nan), a), Log()
    with pytest.raises(ValueError, match="NaN"):
        merge(MergeOptions(write(tmp_path, MLP, a=a, b=broken), out), log)
    assert log.entries == []


def test_the_commands_write_the_model_and_a_report(tmp_path, capsys):
    a = model(MLP)
    models = write(tmp_path, MLP, a=a, b=shuffled("mlp", a))
    file, folder = tmp_path / "out.safetensors", tmp_path / "folder"
    assert main(["align", *models, "-o", str(file), "--no-progress"]) == 0
    assert "l2_reduction_percent" in capsys.readouterr().out
    assert main(["merge", *models, "-o", str(folder), "--method", "average", "--weights", "0.5,0.5"]) == 0
    for path, report in ((file, tmp_path / "out.safetensors.report"), (folder, folder / "report")):
        assert_same_bits(open_checkpoint(path), tree.flatten(a))
        metrics = json.loads((report / "metrics.json").read_text())
        assert metrics["l2_reduction_percent"] == pytest.approx(100)
        assert metrics["l2_after"] == 0
        assert (report / "report.html").is_file()
