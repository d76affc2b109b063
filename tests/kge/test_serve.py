"""Answers of a trained model are the best by its own scores, and an index of inner products gives the same ranking."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from permjax.kge.export import export
from permjax.kge.graph import Graph, GraphError
from permjax.kge.model_files import KgeModel, family_named
from permjax.kge.models import FAMILIES, score, score_all
from permjax.kge.serve import index_keys, index_queries, predict

pytestmark = pytest.mark.fast

ENTITIES, RELATIONS = tuple(f"e{i}" for i in range(9)), ("knows", "likes", "owns")


def model_of(name):
    rng = np.random.default_rng(0)
    splits = {split: rng.integers(0, (9, 3, 9), (n, 3)).astype(np.int32) for split, n in (("valid", 4), ("test", 5))}
    train = np.concatenate([np.array([[0, r, 1] for r in range(3)], np.int32), splits["valid"][:, ::-1][:, [0, 1, 2]]])
    graph = Graph("small", ENTITIES, RELATIONS, train, **splits)
    family = family_named(name, {"dimension": 4})
    return KgeModel(family, family.init(jax.random.key(1), 9, 6, bound=0.6), graph, gamma=2.0)


@pytest.fixture(scope="module", params=["nfe_1", "nfe_2", "nfe_3", "distmult", "rotate"])
def model(request):
    return model_of(request.param)


def test_answers_are_the_best_by_the_definition_of_the_score(model):
    graph = model.graph
    for tail in (False, True):
        asked = {"tail": "e4"} if tail else {"head": "e4"}
        found = predict(model, "likes", **asked, top=9)
        triples = jnp.array([[4, 1 + 3 * tail, t] for t in range(9)])
        exact = 2.0 + np.asarray(score(model.family, model.params, triples))
        assert [one.name for one in found.answers] == [graph.entities[i] for i in np.argsort(-exact)]
        np.testing.assert_allclose([one.score for one in found.answers], np.sort(exact)[::-1], rtol=1e-4, atol=1e-4)


def test_known_answers_are_marked_with_their_first_split(model):
    graph = model.graph
    for head, relation, tail in graph.test.tolist():
        for asked, name in (({"head": f"e{head}"}, f"e{tail}"), ({"tail": f"e{tail}"}, f"e{head}")):
            marks = {one.name: one.known for one in predict(model, RELATIONS[relation], **asked, top=9).answers}
            splits = [split for split, triples in graph.splits.items() if [head, relation, tail] in triples.tolist()]
            assert marks[name] == splits[0]
    assert predict(model, "likes", head="e0").answers[-1].known in ("", "train", "valid", "test")


def test_a_reverse_relation_asks_the_other_way(model):
    there, back = predict(model, "owns", tail="e2"), predict(model, "owns^-1", head="e2")
    assert there == back
    assert predict(model, "owns", head="e2") == predict(model, "owns^-1", tail="e2")


def test_laws_have_a_spread_and_points_have_none(model):
    found = predict(model, "likes", head="e0", top=1)
    laws = model.family.deviation(model.family.entity(model.params["entity"])) is not None
    assert (found.spread is not None) == laws == (found.answers[0].spread is not None)


def test_the_spread_is_that_of_the_moved_law():
    model = model_of("nfe_1")
    head = np.abs(model.params["entity"]["slopes"][3, 0])
    scale = np.abs(model.params["relation"]["scale"][2])
    found = predict(model, "owns", head="e3")
    assert found.spread == pytest.approx(np.sqrt(np.mean((scale * head) ** 2)), rel=1e-5)
    own = np.sqrt(np.mean(np.asarray(model.params["entity"]["slopes"][:, 0]) ** 2, axis=1))
    assert {one.name: one.spread for one in found.answers} == pytest.approx(dict(zip(ENTITIES, own, strict=True)))


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ({"relation": "like", "head": "e0"}, "no relation 'like' \\(nearest: 'likes'\\)"),
        ({"relation": "likes", "head": "e00"}, "no entity 'e00' \\(nearest: 'e0'\\)"),
        ({"relation": "likes", "tail": "x"}, "no entity 'x'"),
        ({"relation": "likes"}, "a head or a tail"),
        ({"relation": "likes", "head": "e0", "tail": "e1"}, "a head or a tail"),
        ({"relation": "likes", "head": "e0", "top": 0}, "'top' is 0"),
    ],
)
def test_questions_without_sense_are_refused(asked, words):
    with pytest.raises(ValueError, match=words):
        predict(model_of("distmult"), **asked)
    if "no " in words:
        with pytest.raises(GraphError):
            predict(model_of("distmult"), **asked)


# for other programs


@pytest.mark.parametrize("name", FAMILIES)
def test_inner_products_with_constants_are_the_scores(name):
    model = model_of(name)
    heads, relations = np.array([0, 3, 8]), np.array([1, 4, 5])
    vectors, constants = index_queries(model, heads, relations)
    found = vectors @ index_keys(model).T + constants[:, None]
    wanted = 2.0 + score_all(model.family, model.params, jnp.asarray(heads), jnp.asarray(relations))
    np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-4)


def test_an_archive_has_names_meanings_and_vectors_that_rank_as_the_model(tmp_path, model):
    export(model, tmp_path / "deep" / "model.npz")
    found = np.load(tmp_path / "deep" / "model.npz")
    assert tuple(found["entities"]) == ENTITIES
    assert tuple(found["relations"]) == (*RELATIONS, *(f"{name}^-1" for name in RELATIONS))
    for part, values in model.family.relation(model.params["relation"]).items():
        np.testing.assert_array_equal(found[f"relation_{part}"], values)
    scores = found["index_queries"] @ found["index_keys"].T
    heads, relations = jnp.asarray(found["question_heads"]), jnp.asarray(found["question_relations"])
    wanted = np.asarray(score_all(model.family, model.params, heads, relations))
    np.testing.assert_array_equal(scores.argmax(1), wanted.argmax(1))
    np.testing.assert_allclose(scores + found["question_scores"][:, None] - 2.0, wanted, rtol=1e-4, atol=1e-4)


def test_lines_of_text_give_the_numbers_back(tmp_path):
    model = model_of("nfe_2")
    export(model, tmp_path / "model.tsv")
    lines = [line.split("\t") for line in (tmp_path / "model.tsv").read_text().splitlines()]
    found = {(*line[:3],): np.array(line[3:], np.float32) for line in lines}
    np.testing.assert_array_equal(found["entity", "e2", "mean"], model.params["entity"]["mean"][2])
    np.testing.assert_array_equal(found["entity", "e2", "slopes_2"], np.abs(model.params["entity"]["slopes"][2, 1]))
    np.testing.assert_array_equal(found["relation", "owns^-1", "scale"], model.params["relation"]["scale"][5])
    np.testing.assert_array_equal(found["key", "e8", "vector"], index_keys(model)[8])
    assert len(lines) == 9 * (1 + 2 + 1) + 6 * 2


def test_other_endings_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"model\.csv has no ending that is known"):
        export(model_of("distmult"), tmp_path / "model.csv")
    assert not list(tmp_path.iterdir())
