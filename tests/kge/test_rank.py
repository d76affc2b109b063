"""Filtered ranks: cases by hand, a double loop in NumPy, invariances, closed forms, bad input."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from permjax.kge.breakdown import by_cardinality, by_direction, by_relation, cardinalities
from permjax.kge.models import FAMILIES
from permjax.kge.queries import queries
from permjax.kge.rank import rank_metrics, rank_model, rank_queries, ranks
from permjax.kge.triples import Graph

pytestmark = pytest.mark.fast

POLICIES = ("optimistic", "realistic", "pessimistic", "libkge")
NONE = np.zeros((0, 3), np.int32)


class Bare(Graph):
    """A graph that may have empty splits and relations that are never trained, so that cases stay small."""

    def __post_init__(self):
        pass


def graph_of(entities, relations, train=NONE, valid=NONE, test=NONE):
    """A graph with labels e0, e1, ... and r0, r1, ..."""
    names = (tuple(f"{letter}{i}" for i in range(n)) for letter, n in (("e", entities), ("r", relations)))
    return Bare("made up", *names, *(np.array(part, np.int32).reshape(-1, 3) for part in (train, valid, test)))


def random_graph(entities=9, relations=3, sizes=(40, 12, 15), seed=0):
    """Triples drawn with repetition, within splits and between them."""
    rng = np.random.default_rng(seed)
    limits = (entities, relations, entities)
    return graph_of(entities, relations, *(rng.integers(0, limits, (n, 3)) for n in sizes))


def looked_up(scores):
    """A scorer that reads scores `[E, 2R, E]`; the table is an argument, so that programs are shared."""
    return jax.tree_util.Partial(_look_up, jnp.asarray(scores, jnp.float32))


def _look_up(table, heads, relations):
    return table[heads, relations]


def of_one_query(scores, answer=0, known=()):
    """The ranks of `answer` as the tail of (e0, r0, ?) with these scores, and `known` other tails."""
    n = len(scores)
    table = np.zeros((n, 2, n))
    table[0, 0] = scores
    graph = graph_of(n, 1, train=[(0, 0, t) for t in known], test=[(0, 0, answer)])
    found = ranks(looked_up(table), graph)
    return tuple(float(getattr(found, policy)[0]) for policy in POLICIES)


def drawn_scores(graph, seed=0):
    """Integers 0 to 3, so that ties abound."""
    rng = np.random.default_rng(seed)
    return rng.integers(0, 4, (graph.size, 2 * len(graph.relations), graph.size)).astype(np.float32)


def by_double_loop(scores, graph, split, filtered):
    """Optimistic, pessimistic and rounded mean rank of every query, from the definitions."""
    known, size = {tuple(row) for name in filtered for row in graph.splits[name].tolist()}, len(graph.relations)
    out = []
    for h, r, t in graph.splits[split].tolist():
        for left, relation, answer in ((h, r, t), (t, r + size, h)):
            better = equal = 0
            for e in range(graph.size):
                triple = (left, r, e) if relation < size else (e, r, left)
                if e != answer and triple not in known:
                    better += scores[left, relation, e] > scores[left, relation, answer]
                    equal += scores[left, relation, e] == scores[left, relation, answer]
            out.append((1 + better, 1 + better + equal / 2, 1 + better + equal, 1 + better + (1 + equal) // 2))
    return np.array(out).T


def assert_same(a, b):
    """Every field of two `Ranks` is the same."""
    for x, y in zip(a, b, strict=True):
        np.testing.assert_array_equal(x, y)


# by hand


@pytest.mark.parametrize(
    ("scores", "known", "expected"),
    [
        ([10, 10, 10, 11, 9], (), (2, 3, 4, 3)),  # two ties and one above
        ([10, 10, 10, 11, 9], (3,), (1, 2, 3, 2)),  # the one above is known
        ([10, 10, 10, 11, 9], (1, 3, 4), (1, 1.5, 2, 2)),  # one tie: LibKGE rounds up
        ([10, 10, 10, 11, 9], (0, 1, 1, 2, 3, 4), (1, 1, 1, 1)),  # nothing else is left; known twice counts once
        ([7, 7, 7, 7, 7], (), (1, 3, 5, 3)),  # all equal
        ([9, 1, 2, 3, 4], (), (1, 1, 1, 1)),
        ([0, 1, 2, 3, 4], (), (5, 5, 5, 5)),
        ([0, np.inf, -np.inf, 1, np.inf], (), (4, 4, 4, 4)),
        ([np.inf, np.inf, -np.inf, 1, np.inf], (), (1, 2, 3, 2)),  # infinite scores tie
        ([-np.inf, 0, -np.inf, 1, 2], (), (4, 4.5, 5, 5)),
        ([5], (), (1, 1, 1, 1)),  # one entity
    ],
)
def test_ranks_of_one_query_are_as_by_hand(scores, known, expected):
    assert of_one_query(scores, known=known) == expected


def test_only_the_policy_of_libkge_takes_near_scores_for_ties():
    above, far = 1 + 5e-5, 1 + 3e-4
    assert of_one_query([1, above, far]) == (3, 3, 3, 3)
    assert of_one_query([1, above, above, above]) == (4, 4, 4, 3)
    assert of_one_query([0, 9e-6, 2e-5]) == (3, 3, 3, 3)


def test_a_triple_that_stands_twice_is_ranked_twice():
    found = ranks(looked_up(np.zeros((4, 2, 4))), graph_of(4, 1, test=[(0, 0, 1), (0, 0, 1), (0, 0, 2)]))
    np.testing.assert_array_equal(found.triples[:, 2], [1, 0, 1, 0, 2, 0])
    np.testing.assert_array_equal(found.candidates, [3, 4, 3, 4, 3, 4])  # of tails, one other is known
    np.testing.assert_array_equal(found.pessimistic, found.candidates)


# oracles


@pytest.mark.parametrize(
    ("split", "filtered"),
    [("test", ("train", "valid", "test")), ("valid", ("train", "valid")), ("train", ("train",)), ("test", ())],
)
def test_ranks_are_those_of_a_double_loop(split, filtered):
    graph = random_graph()
    scores = drawn_scores(graph)
    explicit = ranks(looked_up(scores), graph, split, filtered=filtered)
    np.testing.assert_array_equal(
        [getattr(explicit, policy) for policy in POLICIES], by_double_loop(scores, graph, split, filtered)
    )
    if filtered:
        assert_same(explicit, ranks(looked_up(scores), graph, split))


def test_an_oracle_comes_first_and_its_opposite_last():
    graph = random_graph()
    triples = np.concatenate([graph.both_ways(split) for split in graph.splits])
    truth = np.zeros((graph.size, 2 * len(graph.relations), graph.size))
    truth[tuple(triples.T)] = 1
    best, worst = ranks(looked_up(truth), graph), ranks(looked_up(-truth), graph)
    assert rank_metrics(best, "pessimistic")["mrr"] == rank_metrics(best)["amri"] == 1
    np.testing.assert_array_equal(worst.optimistic, worst.candidates)
    assert rank_metrics(worst)["amri"] == pytest.approx(-1)


# laws


@pytest.mark.parametrize("batch", [1, 4, 7, 1000])
def test_the_size_of_a_batch_changes_nothing(batch):
    graph = random_graph()
    scores = drawn_scores(graph)
    assert_same(ranks(looked_up(scores), graph, batch=batch), ranks(looked_up(scores), graph))


def test_batches_of_one_size_hold_every_query_once_and_then_the_last_one():
    graph = random_graph(sizes=(5, 0, 5))
    asked = queries(graph, batch=4)
    batches = asked.batches
    flat = np.stack([batches.heads, batches.relations, batches.answers], axis=-1).reshape(-1, 3)
    assert batches.heads.shape == (3, 4)
    np.testing.assert_array_equal(flat, [*asked.triples, asked.triples[-1], asked.triples[-1]])


@pytest.mark.parametrize("name", ["nfe_1", "nfe_3", "complex"])
def test_other_ids_for_entities_and_relations_change_no_metric(name):
    graph, rng = random_graph(30, 4, (60, 10, 20)), np.random.default_rng(1)
    family, relations = FAMILIES[name](dimension=8), len(graph.relations)
    params = family.init(jax.random.key(0), graph.size, 2 * relations)
    params["entity"] = {part: rows.at[7].set(rows[3]) for part, rows in params["entity"].items()}  # ties
    entity, relation = rng.permutation(graph.size), rng.permutation(relations)  # new id -> old id
    new_entity, new_relation = np.argsort(entity), np.argsort(relation)
    new = (new_entity, new_relation, new_entity)
    relabelled = ([ids[column] for ids, column in zip(new, part.T, strict=True)] for part in graph.splits.values())
    other = graph_of(graph.size, relations, *(np.transpose(part) for part in relabelled))
    both = np.concatenate([relation, relation + relations])
    order = {"entity": entity, "relation": both}
    moved = {table: {part: rows[order[table]] for part, rows in parts.items()} for table, parts in params.items()}
    ours, theirs = rank_model(family, params, graph), rank_model(family, moved, other)
    assert all(rank_metrics(ours, policy) == rank_metrics(theirs, policy) for policy in POLICIES)
    assert ours.ties.any()


def test_a_filter_never_worsens_a_rank():
    graph = random_graph()
    scores = looked_up(drawn_scores(graph))
    filtered, raw = ranks(scores, graph), ranks(scores, graph, filtered=())
    for policy in POLICIES:
        assert (getattr(filtered, policy) <= getattr(raw, policy)).all()
    assert (filtered.realistic < raw.realistic).any()
    assert (raw.candidates == graph.size).all()


def test_validation_knows_nothing_of_the_test_triples():
    graph = random_graph()
    scores = looked_up(drawn_scores(graph))
    without = Bare(graph.name, graph.entities, graph.relations, graph.train, graph.valid, NONE)
    assert_same(ranks(scores, graph, "valid"), ranks(scores, without, "valid"))


def test_a_constant_scorer_has_the_rank_of_chance():
    graph = random_graph()
    found = ranks(looked_up(np.full((9, 6, 9), 2.5)), graph)
    np.testing.assert_array_equal(found.realistic, (found.candidates + 1) / 2)
    assert rank_metrics(found)["amr"] == pytest.approx(1, abs=1e-12)
    assert rank_metrics(found)["amri"] == pytest.approx(0, abs=1e-12)
    assert rank_metrics(found, "optimistic")["mrr"] == 1


def test_policies_are_ordered():
    graph = random_graph()
    found = ranks(looked_up(drawn_scores(graph)), graph)
    assert (found.optimistic <= found.realistic).all()
    assert (found.realistic <= found.pessimistic).all()
    np.testing.assert_array_equal(found.libkge, np.ceil(found.realistic))


def test_a_partial_is_compiled_once_for_all_its_arguments():
    graph = random_graph()
    traced = []

    def scorer(table, heads, relations):
        traced.append(1)
        return table[heads, relations]

    asked = queries(graph)
    for seed in range(3):
        rank_queries(jax.tree_util.Partial(scorer, jnp.asarray(drawn_scores(graph, seed))), asked)
    assert len(traced) == 1


# metrics


def test_metrics_are_their_closed_forms():
    graph = graph_of(12, 1, test=[(0, 0, 1), (2, 0, 3)])
    table = np.zeros((12, 2, 12))
    table[0, 0, 1] = 1  # rank 1; rank 6.5 twice among twelve equals; and rank 3 below
    table[2, 0] = np.arange(12) == 5
    table[2, 0, 7], table[2, 0, 3] = 1, 0.5
    found = ranks(looked_up(table), graph)
    np.testing.assert_array_equal(found.realistic, [1, 6.5, 3, 6.5])
    assert rank_metrics(found) == pytest.approx(
        {
            "mrr": (1 + 2 / 6.5 + 1 / 3) / 4,
            "mr": 17 / 4,
            "hits_at_1": 0.25,
            "hits_at_3": 0.5,
            "hits_at_10": 1.0,
            "amr": 17 / 4 / 6.5,
            "amri": 1 - 3.25 / 5.5,
        }
    )
    assert rank_metrics(found, "pessimistic")["hits_at_10"] == 0.5


def test_breakdowns_are_metrics_of_parts():
    graph = random_graph()
    found = ranks(looked_up(drawn_scores(graph)), graph)
    sides = by_direction(found)
    assert rank_metrics(found)["mrr"] == pytest.approx((sides["head"]["mrr"] + sides["tail"]["mrr"]) / 2)
    assert sides["head"]["mr"] == found.realistic[1::2].mean()
    parts, counts = by_relation(found, graph), np.bincount(graph.test[:, 1])
    assert list(parts) == list(graph.relations)
    weighted = sum(n * part["mr"] for n, part in zip(counts, parts.values(), strict=True)) / counts.sum()
    assert rank_metrics(found)["mr"] == pytest.approx(weighted)
    assert by_cardinality(found, graph, "libkge") == {"N-N": rank_metrics(found, "libkge")}


def test_cardinalities_are_split_at_one_and_a_half():
    one = [(i, 0, i + 1) for i in range(4)]
    tails = [(0, 1, 1), (0, 1, 2), (0, 1, 3), (4, 1, 5)]  # two tails per head
    heads = [(1, 2, 0), (2, 2, 0), (3, 2, 0), (5, 2, 4)]
    many = [(h, 3, t) for h in range(3) for t in range(3, 6)]
    border = [(0, 4, 1), (0, 4, 2), (3, 4, 4)]  # 1.5 tails per head
    below = [(0, 5, 1), (0, 5, 2), (3, 5, 4), (5, 5, 5)]
    graph = graph_of(6, 7, train=one + tails + heads, valid=many + border, test=below + below)
    assert cardinalities(graph) == ("1-1", "1-N", "N-1", "N-N", "1-N", "1-1", "1-1")
    found = ranks(looked_up(np.zeros((6, 14, 6))), graph, "valid")
    assert list(by_cardinality(found, graph)) == ["1-N", "N-N"]


# bad input


@pytest.mark.parametrize(("place", "question"), [((1, 0), r"\(e1, r0, \?\)"), ((2, 1), r"\(\?, r0, e2\)")])
def test_a_score_that_is_no_number_is_an_error_that_names_the_query(place, question):
    scores = np.zeros((3, 2, 3))
    scores[place] = (0, 1, np.nan)
    with pytest.raises(ValueError, match=f"query {question} is NaN"):
        ranks(looked_up(scores), graph_of(3, 1, test=[(0, 0, 1), (1, 0, 2)]))


def test_a_split_that_graphs_do_not_have_is_refused():
    with pytest.raises(ValueError, match="'tests' is no split of a graph; choose one of train, valid, test"):
        ranks(looked_up(np.zeros((3, 2, 3))), graph_of(3, 1, test=[(0, 0, 1)]), "tests")


def test_a_model_without_reciprocal_relations_is_refused():
    graph, family = graph_of(3, 2, test=[(0, 0, 1)]), FAMILIES["transe"](dimension=2)
    with pytest.raises(ValueError, match="3 entities and 2 relation rows, but made up needs 3 and 4"):
        rank_model(family, family.init(jax.random.key(0), 3, 2), graph)


def test_no_ranks_have_no_metrics():
    found = ranks(looked_up(np.zeros((3, 2, 3))), graph_of(3, 1, test=[(0, 0, 1)]))
    with pytest.raises(ValueError, match="no ranks"):
        rank_metrics(found.where(np.zeros(2, bool)))
