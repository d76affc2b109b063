"""Groups within groups: the nested assignment against brute force over all inner and outer orders."""

from functools import partial
from itertools import permutations, product

import numpy as np
import pytest

from permjax.match.assignment import solve
from permjax.match.nested import Named, Nest, assigned, attained, pick, settle, solve_nested, spread, stays, total

pytestmark = pytest.mark.fast

H, D, E = (lambda side: ("head", side)), (lambda side: ("in", side)), (lambda side: ("other", side))
NEST = Nest({"head": (), "in": ("head",), "other": ("head",), "layer": (), "deep": ("head", "in")}, partial(solve))


def draw(shape, seed):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def brute(kernels, sizes: dict[str, int]) -> float:
    """The best value over all orders of heads and, for every head, all inner orders."""
    heads, *inner = sizes
    best = -np.inf
    for outer in permutations(range(sizes[heads])):
        value = 0.0
        for h, g in enumerate(outer):
            choices = product(*(permutations(range(sizes[name])) for name in inner))
            value += max(sum(k(h, g, dict(zip(inner, orders, strict=True))) for k in kernels) for orders in choices)
        best = max(best, value)
    return best


@pytest.mark.parametrize("seed", range(5))
def test_heads_with_separate_inner_groups_are_solved_exactly(seed):
    own, one, two = draw((3, 3), seed), draw((3, 3, 3, 3), seed + 50), draw((3, 2, 3, 2), seed + 99)
    kernels = [
        Named((H(0), H(1)), own),
        Named((H(0), D(0), H(1), D(1)), one),
        Named((H(0), E(0), H(1), E(1)), two),
    ]
    reference = [
        lambda h, g, _: own[h, g],
        lambda h, g, o: sum(one[h, i, g, j] for i, j in enumerate(o["in"])),
        lambda h, g, o: sum(two[h, i, g, j] for i, j in enumerate(o["other"])),
    ]
    rows = solve_nested(NEST, kernels, "head")
    assert float(attained(NEST, kernels, rows)) == pytest.approx(
        brute(reference, {"head": 3, "in": 3, "other": 2}), rel=1e-5
    )


def test_inner_groups_that_share_a_kernel_are_solved_in_turn():
    hits = 0
    for seed in range(20):
        joint = draw((2, 3, 2, 2, 3, 2), seed)
        lone = draw((2, 3, 2, 3), seed + 50)
        kernels = [
            Named((H(0), D(0), E(0), H(1), D(1), E(1)), joint),
            Named((H(0), D(0), H(1), D(1)), lone),
        ]
        reference = [
            lambda h, g, o, k=joint: sum(
                k[h, i, a, g, j, b] for i, j in enumerate(o["in"]) for a, b in enumerate(o["other"])
            ),
            lambda h, g, o, k=lone: sum(k[h, i, g, j] for i, j in enumerate(o["in"])),
        ]
        best = brute(reference, {"head": 2, "in": 3, "other": 2})
        found = float(attained(NEST, kernels, solve_nested(NEST, kernels, "head")))
        assert found <= best + 1e-4
        hits += found > best - 1e-4
    assert hits >= 16


def test_an_optimum_at_hand_is_kept():
    orders = list(product(permutations(range(3)), permutations(range(3))))
    for seed in range(20):
        joint, lone = draw((3, 3, 3, 3), seed), draw((3, 3), seed + 50)  # inner units of one head against another's
        values = {
            (p, q): sum(joint[i, a, p[i], q[a]] for i in range(3) for a in range(3)) + lone[range(3), p].sum()
            for p, q in orders
        }
        p, q = max(values, key=values.get)
        kernels = [
            Named((H(0), D(0), E(0), H(1), D(1), E(1)), joint[:, :, p][:, :, :, q][None, :, :, None]),
            Named((H(0), D(0), H(1), D(1)), lone[:, p][None, :, None]),
        ]
        assert float(attained(NEST, kernels, solve_nested(NEST, kernels, "head"))) >= values[p, q] - 1e-4


def test_three_levels_are_solved_exactly():
    deep = draw((2, 2, 2, 2, 2, 2), 3)
    labels = (("head", 0), ("in", 0), ("deep", 0), ("head", 1), ("in", 1), ("deep", 1))
    kernels = [Named(labels, deep)]
    orders = list(permutations(range(2)))
    best = max(
        sum(
            max(
                sum(max(sum(deep[h, i, k, g, j, o[k]] for k in range(2)) for o in orders) for i, j in enumerate(inner))
                for inner in orders
            )
            for h, g in enumerate(outer)
        )
        for outer in orders
    )
    assert float(attained(NEST, kernels, solve_nested(NEST, kernels, "head"))) == pytest.approx(best, rel=1e-5)


def test_held_groups_are_solved_side_by_side():
    values = draw((4, 3, 3), 1)
    rows = solve_nested(Nest({"x": ("layer",)}, solve), [Named((("layer", 0), ("x", 0), ("x", 1)), values)], "x")
    np.testing.assert_array_equal(rows["x"].values, solve(values))


def test_an_assignment_is_told_its_group():
    told = []

    def assign(cost, what):
        told.append((what, cost.shape))
        return solve(cost, what=what)

    kernels = [Named((H(0), D(0), H(1), D(1)), draw((3, 2, 3, 2), 0))]
    solve_nested(NEST._replace(assign=assign), kernels, "head")
    assert told == [("the cost of group 'in'", (3, 3, 2, 2)), ("the cost of group 'head'", (3, 3))]


def test_what_only_ties_with_staying_is_not_a_move():
    assert assigned(NEST, [Named((H(0), H(1)), np.zeros((3, 3), np.float32))], "head") == {}
    assert assigned(NEST, [Named((H(0), H(1)), np.eye(3, dtype=np.float32))], "head") == {}
    swap = assigned(NEST, [Named((H(0), H(1)), np.eye(2, dtype=np.float32)[::-1])], "head")
    np.testing.assert_array_equal(swap["head"], [1, 0])


def test_picking_keeps_one_partner_for_each_unit():
    x = Named((H(0), D(0), H(1)), draw((3, 2, 3), 0))
    picked = pick(x, "head", Named((H(0),), np.array([2, 0, 1])))
    assert picked.labels == (H(0), D(0))
    np.testing.assert_array_equal(picked.values, x.values[np.arange(3), :, [2, 0, 1]])


def test_totals_and_spreading_follow_labels():
    x = Named((H(0), D(0)), draw((3, 2), 0))
    np.testing.assert_allclose(total(x, (D(0),)), x.values.sum(0))
    np.testing.assert_array_equal(total(x, (D(0), H(0))), x.values.T)
    np.testing.assert_array_equal(spread(x, (D(0), E(0), H(0))), x.values.T[:, None])


def test_settling_picks_outer_groups_first():
    kernel = Named((H(0), D(0), H(1), D(1)), draw((2, 3, 2, 3), 0))
    inner = np.array([[1, 0, 2], [2, 1, 0]])
    rows = {"head": Named((H(0),), np.array([1, 0])), "in": Named((H(0), D(0)), inner)}
    expected = [[kernel.values[h, i, 1 - h, inner[h, i]] for i in range(3)] for h in range(2)]
    np.testing.assert_array_equal(settle(NEST, kernel, rows).values, expected)


def test_only_the_identity_stays():
    assert stays(np.array([[0, 1], [0, 1]]))
    assert not stays(np.array([[0, 1], [1, 0]]))
