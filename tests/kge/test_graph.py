import numpy as np
import pytest

from permjax.data.dataset import MissingData
from permjax.kge.graph import GRAPHS, Graph, GraphError, knowledge_graph

pytestmark = pytest.mark.fast

ENTITIES, RELATIONS = ("ann", "bob", "cid"), ("likes", "knows")


def small(train=((0, 0, 1), (1, 1, 2)), valid=((2, 0, 0),), test=((0, 1, 0),), **options) -> Graph:
    splits = (np.array(triples, int).reshape(-1, 3) for triples in (train, valid, test))
    return Graph("small", options.get("entities", ENTITIES), options.get("relations", RELATIONS), *splits)


def test_triples_are_kept_as_int32():
    assert {triples.dtype.name for triples in small().splits.values()} == {"int32"}


def test_both_ways_follows_every_triple_by_its_reciprocal():
    np.testing.assert_array_equal(small().both_ways("train"), [[0, 0, 1], [1, 2, 0], [1, 1, 2], [2, 3, 1]])


def test_names_and_ids_are_inverse_to_each_other_for_reciprocal_relations_too():
    graph = small()
    assert [graph.relation(graph.relation_name(r)) for r in range(4)] == [0, 1, 2, 3]
    assert graph.relation_name(3) == "knows^-1"
    assert [graph.entity(name) for name in ENTITIES] == [0, 1, 2]


def test_a_relation_whose_name_ends_like_a_reciprocal_one_is_itself():
    assert small(relations=("likes", "likes^-1")).relation("likes^-1") == 1


def test_unseen_entities_are_those_that_train_does_not_have():
    np.testing.assert_array_equal(small(train=((0, 0, 1), (1, 1, 0))).unseen, [2])
    assert not len(small().unseen)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda g: g.entity("anne"), "no entity 'anne'.*'ann'"),
        (lambda g: g.relation("like"), "no relation 'like'.*'likes'"),
        (lambda g: g.relation("know^-1"), "no relation 'know'.*'knows'"),
    ],
)
def test_an_unknown_name_is_answered_by_the_nearest(call, message):
    with pytest.raises(GraphError, match=message):
        call(small())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"test": ()}, "split test of the graph small is empty"),
        ({"valid": ((0, 0, 3),)}, r"Triple 0 of the valid triples of small has the tail id 3.*0\.\.2"),
        ({"train": ((0, 0, 1), (-1, 1, 0))}, "Triple 1 of the train triples of small has the head id -1"),
        ({"train": ((0, 2, 1),)}, r"relation id 2.*0\.\.1"),
        ({"train": ((0, 0, 1),)}, "'knows' has 1 test triples in small but none in train"),
        ({"entities": ("ann", "bob", "ann")}, "two entity ids for 'ann'"),
        ({"relations": ("likes", "likes")}, "two relation ids for 'likes'"),
    ],
)
def test_a_graph_that_cannot_be_used_is_refused(change, message):
    with pytest.raises(GraphError, match=message):
        small(**change)


@pytest.mark.parametrize("triples", [np.zeros((2, 3)), np.zeros((2, 2), int), np.zeros(3, int)])
def test_triples_of_another_type_or_shape_are_refused(triples):
    good = np.zeros((1, 3), int)
    with pytest.raises(GraphError, match=r"must be integers of shape \[n, 3\], not"):
        Graph("g", ("a",), ("r",), triples, good, good)


# by name


def test_the_default_graph_needs_no_file(monkeypatch):
    monkeypatch.delenv("PERMJAX_DATA", raising=False)
    assert knowledge_graph().name == "family"
    assert knowledge_graph(couples=4, generations=3).size < knowledge_graph().size


def test_a_graph_whose_files_are_missing_names_them_and_the_setting(tmp_path):
    for name in set(GRAPHS) - {"family", "folder"}:
        with pytest.raises(MissingData, match=r"kg/.*PERMJAX_DATA|kg/.*path"):
            knowledge_graph(name, tmp_path)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("famly", {}, "no graph 'famly'.*'family'"),
        ("family", {"cuples": 3}, "no option 'cuples'.*'couples'"),
        ("umls", {"seed": 3}, "no option 'seed'; it takes none"),
        ("folder", {}, "needs the option 'path'"),
        ("family", {"couples": 1}, "needs 4 couples"),
    ],
)
def test_an_unknown_name_or_option_is_refused(name, options, message):
    with pytest.raises(GraphError, match=message):
        knowledge_graph(name, **options)
