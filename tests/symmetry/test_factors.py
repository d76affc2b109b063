"""Factor trees: union-find with lazy splits of products and sums."""

import pytest

from permjax.symmetry.factors import Node, atoms, concatenation, cut, is_pinned, pin, product, split, unite

pytestmark = pytest.mark.fast


def sizes(node):
    return [a.size for a in atoms(node)]


def test_splitting_an_atom_is_seen_by_every_holder():
    atom = Node(12)
    holder = product([Node(5), atom])
    split(atom, 4)
    assert sizes(holder) == [5, 3, 4]


def test_uniting_products_aligns_from_the_minor_end():
    a, b = product([Node(2), Node(12)]), product([Node(8), Node(3)])
    unite(a, b, "why")
    assert [x for x, y in zip(atoms(a), atoms(b), strict=True) if x is not y] == []
    assert not is_pinned(a)


def test_what_cannot_be_aligned_is_pinned_whole():
    a, b = product([Node(3), Node(4)]), product([Node(4), Node(3)])
    unite(a, b, "why")
    assert is_pinned(a)
    assert is_pinned(b)
    assert {x.reason for x in atoms(a)} == {"why"}


def test_a_pin_travels_through_unions_in_both_directions():
    a, b, c = Node(6), Node(6), Node(6)
    unite(a, b, None)
    pin(b, "late")
    unite(c, a, None)
    assert is_pinned(a)
    assert is_pinned(c)


def test_sums_are_cut_at_all_boundaries():
    a, b = concatenation([Node(4), Node(8)]), concatenation([Node(6), Node(6)])
    unite(a, b, None)
    assert sizes(a) == sizes(b) == [4, 2, 6]


def test_cutting_a_product_cuts_its_major_factor():
    node = product([Node(6), Node(4)])
    pieces = cut(node, [8])
    assert [p.size for p in pieces] == [8, 16]
    assert sizes(node) == [2, 4, 4]
    assert list(atoms(pieces[0]))[-1] is list(atoms(pieces[1]))[-1]


def test_a_product_is_not_cut_inside_its_minor_factor():
    assert cut(product([Node(6), Node(4)]), [6]) is None


def test_a_sum_of_equal_segments_meets_a_product():
    a, b = concatenation([Node(4), Node(4), Node(4)]), product([Node(3), Node(4)])
    unite(a, b, None)
    assert len({id(x) for x in atoms(a)}) <= 4
    assert not is_pinned(list(atoms(b))[-1])


def test_splitting_a_sum_needs_every_segment_to_hold_the_factor():
    assert split(concatenation([Node(4), Node(6)]), 4) is None
    major, minor = split(concatenation([Node(4), Node(6)]), 2)
    assert (major.size, minor.size) == (5, 2)
