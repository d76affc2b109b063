"""Models in files: what is saved comes back, the same model gives the same bytes, and broken files are named."""

import json
from dataclasses import replace

import jax
import numpy as np
import pytest

from permjax.io.checkpoint import CheckpointError, open_checkpoint, save_checkpoint
from permjax.kge.graph import Graph, GraphError
from permjax.kge.model_files import KgeModel, KgeModelError, family_name, family_named, load_kge, renamed, save_kge
from permjax.kge.models import FAMILIES
from permjax.kge.triples import Rule

pytestmark = pytest.mark.fast

TRIPLES = np.array([[0, 0, 1], [1, 1, 2], [2, 0, 3], [3, 1, 0]], np.int32)
GRAPH = Graph(
    "small",
    ("ann", "böb", "c d", 'e"f'),
    ("knows", "likes"),
    TRIPLES,
    np.array([[0, 1, 3]], np.int32),
    np.array([[2, 1, 0]], np.int32),
    rules=(Rule("inverse", ("knows", "likes")),),
    notes=("a note",),
)


def model_of(name="nfe_2", **settings):
    family = family_named(name, {"dimension": 3} | settings)
    params = family.init(jax.random.key(0), GRAPH.size, 2 * len(GRAPH.relations), bound=0.5)
    return KgeModel(family, params, GRAPH, 2.0, {"seed": 3, "training": {"epochs": 4}})


@pytest.fixture
def saved(tmp_path):
    save_kge(tmp_path / "model", model_of())
    return tmp_path / "model"


def rewrite(folder, *, without=(), metadata=None, **changed):
    """Save the tensors of a model again, some of them left out or changed."""
    file = open_checkpoint(folder)
    tensors = {name: tensor.read() for name, tensor in file.items() if name not in without} | changed
    save_checkpoint(folder, tensors, metadata=metadata or file.metadata)


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_comes_back_with_its_tables(name, tmp_path):
    model = model_of(name)
    save_kge(tmp_path / "one.safetensors", model)
    back = load_kge(tmp_path / "one.safetensors")
    assert back.family == model.family
    jax.tree.map(np.testing.assert_array_equal, back.params, model.params)


def test_everything_beside_the_tables_comes_back(saved):
    back = load_kge(saved)
    assert (back.gamma, back.about) == (2.0, {"seed": 3, "training": {"epochs": 4}})
    for name in ("name", "entities", "relations", "rules", "notes"):
        assert getattr(back.graph, name) == getattr(GRAPH, name)
    for split, triples in GRAPH.splits.items():
        np.testing.assert_array_equal(back.graph.splits[split], triples)


def test_the_same_model_gives_the_same_bytes(saved, tmp_path):
    save_kge(tmp_path / "again", model_of())
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == (saved / "model.safetensors").read_bytes()


def test_hyper_parameters_come_back(tmp_path):
    save_kge(tmp_path, model_of("nfe_k", pieces=3, mode="published", base="uniform"))
    family = load_kge(tmp_path).family
    assert family == family_named("nfe_k", {"dimension": 3, "pieces": 3, "mode": "published", "base": "uniform"})
    assert family_name(family) == "nfe_k"


@pytest.mark.parametrize(
    ("name", "settings", "words"),
    [
        ("nfe_4", {}, "no family 'nfe_4' \\(nearest: 'nfe_k'\\); known are nfe_1, "),
        ("distmult", {"mode": "exact"}, "'distmult' has no setting 'mode' .*; known are dimension"),
        ("nfe_2", {"mode": "exakt"}, "'mode' must be one of 'published', 'exact'"),
        ("nfe_2", {"dimension": 0}, "at least one coordinate"),
    ],
)
def test_families_that_do_not_exist_are_refused(name, settings, words):
    with pytest.raises(KgeModelError, match=words):
        family_named(name, settings)


def test_a_model_that_is_not_finite_is_not_saved(saved):
    model = model_of()
    before = (saved / "model.safetensors").read_bytes()
    model.params["entity"]["mean"] = model.params["entity"]["mean"].at[1, 1].set(np.nan)
    with pytest.raises(ValueError, match="entity/mean"):
        save_kge(saved, model)
    assert (saved / "model.safetensors").read_bytes() == before


def test_files_that_hold_something_else_are_named(saved, tmp_path):
    save_checkpoint(tmp_path / "other", {"x": np.zeros(3)})
    with pytest.raises(KgeModelError, match=r"other.* is no model of a knowledge graph"):
        load_kge(tmp_path / "other")
    with pytest.raises(CheckpointError, match="nowhere"):
        load_kge(tmp_path / "nowhere")
    (saved / "model.safetensors").write_bytes((saved / "model.safetensors").read_bytes()[:-9])
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        load_kge(saved)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"without": ["train"]}, "lacks the tensor 'train'"),
        ({"without": ["entity/slopes"]}, "lacks the tensor 'entity/slopes'"),
        ({"entity/mean": np.zeros((5, 3), np.float32)}, r"'entity/mean' .* \(5, 3\), but \(4, 3\)"),
        ({"relations": np.frombuffer(b"[1", np.uint8)}, "labels 'relations' .* cannot be read"),
        ({"entity/mean": np.full((4, 3), np.inf, np.float32)}, "entity/mean"),
        ({"train": TRIPLES + 4}, "ids there are 0..3"),
    ],
)
def test_tables_that_do_not_fit_are_named(saved, change, words):
    without = change.pop("without", ())
    rewrite(saved, without=without, **change)
    with pytest.raises(ValueError, match=words):
        load_kge(saved)


def test_a_family_from_another_version_is_named(saved):
    about = json.loads(open_checkpoint(saved).metadata["permjax_kge"])
    about["family"]["name"] = "nfe_9"
    rewrite(saved, metadata={"permjax_kge": json.dumps(about)})
    with pytest.raises(KgeModelError, match="no family 'nfe_9'"):
        load_kge(saved)


def test_triples_take_the_ids_of_another_graph():
    order = np.array([2, 0, 3, 1])
    entities = tuple(GRAPH.entities[i] for i in np.argsort(order))
    splits = {split: np.stack([order[t[:, 0]], 1 - t[:, 1], order[t[:, 2]]], 1) for split, t in GRAPH.splits.items()}
    other = Graph("other", entities, GRAPH.relations[::-1], **splits)
    back = renamed(other, GRAPH)
    assert back.name == "other"
    for split, triples in GRAPH.splits.items():
        np.testing.assert_array_equal(back.splits[split], triples)
    with pytest.raises(GraphError, match="no entity 'anna' \\(nearest: 'ann'\\)"):
        renamed(replace(GRAPH, entities=("anna", *GRAPH.entities[1:])), GRAPH)
