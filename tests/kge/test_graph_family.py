from itertools import product

import numpy as np
import pytest

from permjax.kge.family import RELATIONS, family_graph, family_rules

pytestmark = pytest.mark.fast


def facts(*splits):
    return {(h, RELATIONS[r], t) for triples in splits for h, r, t in triples.tolist()}


@pytest.fixture(scope="module")
def family():
    return family_graph()


def pairs_of(triples):
    """Pairs by relation, without entities that are related to themselves."""
    return {name: {(h, t) for h, r, t in triples if r == name and h != t} for name in RELATIONS}


def broken(rule, pairs):
    """The pairs that break a rule, by the definition of its sentence."""
    first, *others = (pairs[name] for name in rule.relations)
    if rule.kind == "symmetry":
        return {(y, x) for x, y in first} - first
    if rule.kind == "antisymmetry":
        return {(y, x) for x, y in first} & first
    if rule.kind == "inverse":
        return {(y, x) for x, y in first} ^ others[0]
    if rule.kind == "hierarchy":
        return first - others[0]
    if rule.kind == "exclusion":
        return first & others[0]
    if rule.kind == "intersection":
        return (first & others[0]) - others[1]
    second, third = others
    return {(x, z) for (x, y), (w, z) in product(first, second) if y == w and x != z} - third


@pytest.mark.parametrize("seed", [0, 1])
def test_the_rules_hold_without_exception(seed):
    graph = family_graph(seed, couples=5)
    pairs = pairs_of(facts(*graph.splits.values()))
    for rule in {*graph.rules, *family_rules()}:
        assert not broken(rule, pairs), str(rule)


def test_the_rules_of_the_words_are_among_those_of_the_graph(family):
    assert {*family_rules()} <= {*family.rules}


def test_what_is_held_out_follows_from_train_by_the_rules(family):
    """Forward chaining with sets, until nothing new follows."""
    pairs = pairs_of(facts(family.train))
    forward = [rule for rule in family_rules() if rule.kind in ("hierarchy", "intersection", "composition")]
    size = -1
    while size != (size := sum(map(len, pairs.values()))):
        for rule in forward:
            first, *others = (pairs[name] for name in rule.relations)
            if rule.kind == "hierarchy":
                others[0] |= first
            elif rule.kind == "intersection":
                others[1] |= first & others[0]
            else:
                after = {}
                for y, z in others[0]:
                    after.setdefault(y, set()).add(z)
                others[1] |= {(x, z) for x, y in first for z in after.get(y, ()) if x != z}
        for rule in family_rules():
            if rule.kind in ("symmetry", "inverse"):
                there, back = (pairs[name] for name in (rule.relations * 2)[:2])
                back |= {(y, x) for x, y in there}
                there |= {(y, x) for x, y in back}
    assert pairs == pairs_of(facts(*family.splits.values()))


def test_the_tree_is_the_same_for_one_seed_and_another_for_another(family):
    again, other = family_graph(0), family_graph(1)
    assert again.entities == family.entities
    for split in family.splits:
        np.testing.assert_array_equal(again.splits[split], family.splits[split])
    assert other.entities != family.entities


def test_the_splits_are_disjoint_and_of_the_shares_asked_for(family):
    sizes = [len(triples) for triples in family.splits.values()]
    assert len(facts(*family.splits.values())) == sum(sizes)
    assert sizes[1] == sizes[2] == round(0.1 * sum(sizes))
    assert 150 <= family.size <= 400


def test_everybody_is_in_train_and_people_marry_outside_their_kin(family):
    assert not len(family.unseen)
    pairs = pairs_of(facts(*family.splits.values()))
    assert not pairs["married_to"] & (pairs["sibling_of"] | pairs["cousin_of"])
    assert len({h for h, _ in pairs["married_to"]}) == len(pairs["married_to"])
