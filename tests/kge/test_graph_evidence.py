from itertools import product

import numpy as np
import pytest

from permjax.kge.evidence import evidence
from permjax.kge.graph import Graph
from permjax.kge.leakage import leakage
from permjax.kge.triples import KINDS

pytestmark = pytest.mark.fast

N, R = 7, 4


@pytest.fixture(scope="module")
def triples():
    """Random ones, loops among them."""
    rng = np.random.default_rng(0)
    return np.unique(rng.integers(0, (N, R, N), (60, 3)), axis=0)


def by_definition(triples):
    """Every rule with support and confidence, from Python sets."""
    sets = [{(h, t) for h, r, t in triples.tolist() if r == q and h != t} for q in range(R)]
    back = [{(t, h) for h, t in pairs} for pairs in sets]
    found = {}
    for q in range(R):
        found["symmetry", (q,)] = len(sets[q] & back[q]), len(sets[q] & back[q]) / len(sets[q])
        found["antisymmetry", (q,)] = len(sets[q]), 1 - len(sets[q] & back[q]) / len(sets[q])
    for q, r in product(range(R), repeat=2):
        if q < r:
            both = len(sets[q] & back[r])
            found["inverse", (q, r)] = both, both / max(len(sets[q]), len(sets[r]))
            least = min(len(sets[q]), len(sets[r]))
            found["exclusion", (q, r)] = least, 1 - len(sets[q] & sets[r]) / least
        if q != r:
            found["hierarchy", (q, r)] = len(sets[q] & sets[r]), len(sets[q] & sets[r]) / len(sets[q])
    for p, q, r in product(range(R), repeat=3):
        paths = {(x, z) for x, y in sets[p] for w, z in sets[q] if y == w and x != z}
        found["composition", (p, q, r)] = len(paths & sets[r]), len(paths & sets[r]) / max(len(paths), 1)
        both = sets[p] & sets[q]
        if p < q and r not in (p, q) and both and len(both) < min(len(sets[p]), len(sets[q])):
            share = len(both & sets[r]) / len(both)
            if share > max(len(sets[s] & sets[r]) / len(sets[s]) for s in (p, q)):
                found["intersection", (p, q, r)] = len(both & sets[r]), share
    return {rule: numbers for rule, numbers in found.items() if numbers[0]}


def test_support_and_confidence_are_those_of_the_definition(triples):
    found = {(row.kind, row.relations): (row.support, row.confidence) for row in evidence(triples, N, R)}
    expected = by_definition(triples)
    assert found.keys() == expected.keys()
    for rule, numbers in expected.items():
        assert found[rule] == pytest.approx(numbers), rule


def test_kinds_and_support_choose_among_the_rules(triples):
    every = evidence(triples, N, R)
    assert {row.kind for row in every} == {*KINDS}
    some = evidence(triples, N, R, kinds=("composition", "inverse"), support=4)
    assert some == tuple(r for r in every if r.kind in ("composition", "inverse") and r.support >= 4)


def test_neither_order_nor_repetitions_of_triples_matter(triples):
    assert evidence(np.concatenate([triples[::-1], triples]), N, R) == evidence(triples, N, R)


def leaky() -> Graph:
    """Relation 0 and 1 are inverse, 2 is symmetric, 3 says what 0 says; 4 stands alone."""
    there = [(0, 1), (2, 3), (4, 5)]
    train = [(h, r, t) for h, t in there for r in (0, 3)] + [(t, 1, h) for h, t in there]
    train += [(0, 2, 5), (1, 2, 3), (3, 2, 1), (0, 4, 2), (5, 1, 6), (6, 3, 5), (0, 4, 1)]
    test = [(6, 0, 5), (5, 2, 0), (0, 4, 3), (0, 4, 1)]
    return Graph("leaky", tuple("abcdefg"), tuple("pqrst"), *(np.array(part) for part in (train, [(0, 4, 6)], test)))


def test_leakage_counts_what_train_says_in_other_words():
    report = leakage(leaky())
    assert (report.split, report.triples, report.repeated, report.answered) == ("test", 4, 1, 3)
    twins = {(twin.rule.kind, twin.rule.relations): twin.answered for twin in report.twins}
    assert twins == {("inverse", ("p", "q")): 1, ("hierarchy", ("p", "s")): 1, ("symmetry", ("r",)): 1}
    assert "3 of 4 test triples (75%) can be read off from train, 1 of them" in report.sentences()[0]
    assert "p(x, y) is q(y, x)" in " ".join(report.sentences())


def test_a_graph_without_twins_leaks_nothing():
    report = leakage(leaky(), "valid")
    assert (report.repeated, report.answered, report.twins) == (0, 0, ())


def test_train_does_not_leak_into_itself():
    with pytest.raises(ValueError, match="to 'valid' or 'test', not to 'train'"):
        leakage(leaky(), "train")
