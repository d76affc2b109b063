"""Weight matching where one group stands on several axes of one leaf: the objective is no longer linear in it."""

from itertools import combinations, permutations

import jax
import numpy as np
import pytest

from permjax.action import permute
from permjax.match.weights import weight_matching
from permjax.symmetry.spec import Fixed, Group, Leaf, Of, PermutationSpec


def match(spec, a, b, seed=0, **hyper):
    return weight_matching(spec, [a, b], key=jax.random.key(seed), **hyper)


def tied() -> PermutationSpec:
    """A residual stream with a square map, a tied pair of maps, and a second hidden group."""
    axes = {"embed": (None, "res"), "square": ("res", "res"), "up": ("res", "ff"), "down": ("ff", "res")}
    sizes = {None: 2, "res": 7, "ff": 9}
    return PermutationSpec.from_axes({n: tuple(sizes[g] for g in a) for n, a in axes.items()}, axes)


def cube() -> PermutationSpec:
    """One group on three axes of one leaf."""
    return PermutationSpec.from_axes({"w": (5, 5, 5), "v": (5, 2)}, {"w": ("h", "h", "h"), "v": ("h", None)})


def stacked() -> PermutationSpec:
    """Two layers in one array, each with its own order on both axes."""
    axes = (Of("layer"), Of("h"), Of("h"))
    leaves = (Leaf("loop", (2, 5, 5), axes), Leaf("in", (2, 5, 3), (Of("layer"), Of("h"), Fixed(3))))
    return PermutationSpec((Group("h", 5, ("layer",)),), leaves, (Group("layer", 2),))


SPECS = {"tied": tied(), "cube": cube(), "stacked": stacked()}


@pytest.mark.fast
@pytest.mark.parametrize("seed", range(20))
def test_the_objective_never_falls(write_recurrent, draw_params, objective, seed):
    spec = write_recurrent(12)
    a, b = draw_params(spec, seed), draw_params(spec, seed + 100)
    result = match(spec, a, b, seed)
    assert (np.diff(result.info.objective) >= 0).all()
    assert result.info.objective[0, -1] > result.info.objective[0, 0]
    assert result.info.objective[0, -1] == pytest.approx(objective(spec, a, result.models[1]), rel=1e-12)
    assert result.info.converged[0]


@pytest.mark.fast
@pytest.mark.parametrize("name", SPECS)
@pytest.mark.parametrize("seed", range(5))
def test_the_objective_never_falls_in_larger_specs(name, draw_params, objective, seed):
    spec = SPECS[name]
    a, b = draw_params(spec, seed), draw_params(spec, seed + 100)
    result = match(spec, a, b, seed, restarts=2)
    assert (np.diff(result.info.objective) >= 0).all()
    assert result.info.objective[0, -1] == pytest.approx(objective(spec, a, result.models[1]), rel=1e-12)
    assert result.info.converged[0]


@pytest.mark.fast
@pytest.mark.parametrize("name", SPECS)
@pytest.mark.parametrize("noise", [0.0, 0.2])
def test_planted_orders_are_recovered(name, plant, noise):
    a, b, truth = plant(SPECS[name], 3, noise)
    found = match(SPECS[name], a, b, restarts=3).plan.permutations(1)
    for group, rows in truth.items():
        np.testing.assert_array_equal(found[group], rows)


@pytest.mark.fast
def test_a_symmetric_square_alone_is_recovered(plant):
    spec = PermutationSpec.from_axes({"w": (6, 6)}, {"w": ("h", "h")})
    hits = 0
    for seed in range(10):
        a, _, truth = plant(spec, seed)
        a = {"w": a["w"] + a["w"].T}
        back = np.argsort(truth["h"])
        found = match(spec, a, permute(spec, {"h": back}, a), restarts=20)
        hits += found.info.l2_after[0] == 0
    assert hits >= 9


@pytest.mark.parametrize("inputs", [0, 3])
def test_brute_force_is_never_beaten_and_mostly_reached(write_recurrent, draw_params, inputs):
    spec, reached = write_recurrent(5, inputs), 0
    orders = [list(p) for p in permutations(range(5))]
    for seed in range(20):
        a, b = draw_params(spec, seed), draw_params(spec, seed + 100)
        single = a["in"].T @ b["in"] + a["out"] @ b["out"].T
        best = max(sum(single[range(5), p]) + (a["loop"] * b["loop"][p][:, p]).sum() for p in orders)
        found = match(spec, a, b, seed, restarts=10).info.objective[0, -1]
        assert found <= best + 1e-4
        reached += found >= best - 1e-4
    assert reached >= 16


@pytest.mark.fast
def test_no_swap_of_two_units_can_improve_the_result(write_recurrent, draw_params, objective):
    spec = write_recurrent(7)
    a, b = draw_params(spec, 1), draw_params(spec, 2)
    result = match(spec, a, b)
    for i, j in combinations(range(7), 2):
        order = np.arange(7, dtype=np.int32)
        order[[i, j]] = order[[j, i]]
        assert objective(spec, a, permute(spec, {"h": order}, result.models[1])) <= result.info.objective[0, -1]
