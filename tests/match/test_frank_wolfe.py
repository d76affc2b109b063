"""Frank-Wolfe: exact steps, an objective that never falls, planted orders back, and nothing lost to its start."""

import dataclasses
from itertools import permutations

import jax
import numpy as np
import pytest

from permjax import tree
from permjax.match import line_search, relaxation
from permjax.match.frank_wolfe import FrankWolfe, frank_wolfe
from permjax.match.objective import counted
from permjax.match.search import RUNS
from permjax.match.soft import barycentre, from_permutations
from permjax.match.weights import weight_matching
from permjax.permutation import identity
from permjax.steps import MergeState
from permjax.symmetry.spec import PermutationSpec

KEY = jax.random.key(0)
CUBE = PermutationSpec.from_axes({"w": (5, 5, 5), "v": (5, 2)}, {"w": ("h", "h", "h"), "v": ("h", None)})


def match(spec, *models, **hyper):
    return frank_wolfe(spec, models, key=hyper.pop("key", KEY), **hyper)


value = jax.jit(relaxation.value, static_argnums=0)


def between(spec, draw_permutations, seed, *, models=1):
    """A soft permutation `[1, models, ...]` between three hard ones."""
    weights = np.random.default_rng(seed).dirichlet(np.ones(3), models).astype(np.float32)

    def one(m):
        points = [from_permutations(spec, draw_permutations(spec, 9 * seed + 3 * m + i)) for i in range(3)]
        return {g: sum(w * point[g] for w, point in zip(weights[m].tolist(), points, strict=True)) for g in points[0]}

    return {g: x[None] for g, x in tree.stack([one(m) for m in range(models)]).items()}


# the line search


@pytest.mark.fast
@pytest.mark.parametrize("order", range(1, 9))
def test_no_point_of_a_grid_is_better_than_the_best_step(order):
    rng, grid = np.random.default_rng(order), np.linspace(0, 1, 5001)
    for _ in range(20):
        polynomial = np.polynomial.Polynomial(rng.standard_normal(order + 1))
        step, gain = line_search.best_step(polynomial(line_search.samples(order)))
        assert 0 <= step <= 1
        assert gain == pytest.approx(polynomial(step) - polynomial(0), abs=1e-9)
        assert gain >= (polynomial(grid) - polynomial(0)).max() - 1e-9


@pytest.mark.fast
def test_a_constant_gains_nothing():
    assert line_search.best_step(np.full(4, 7.0))[1] == pytest.approx(0, abs=1e-12)


@pytest.mark.fast
@pytest.mark.parametrize(
    ("name", "places"),
    [("perceptron", 2), ("residual convolutions", 2), ("attention with heads", 3), ("grouped queries", 4)],
)
def test_the_degree_is_the_largest_number_of_places_in_a_block(networks, draw_params, name, places):
    spec = networks[name]
    models = [draw_params(spec, seed) for seed in range(3)]
    spec = counted(spec, models[0])
    assert relaxation.relax(spec, models[0], models[1:2], "scipy").order == places
    assert relaxation.relax(spec, None, models, "scipy").order == 2 * places


@pytest.mark.fast
@pytest.mark.parametrize("name", ["residual convolutions", "grouped queries", "cube"])
def test_the_objective_on_a_line_is_the_interpolated_polynomial(networks, draw_params, draw_permutations, name):
    spec = CUBE if name == "cube" else networks[name]
    anchor, other = draw_params(spec, 0), draw_params(spec, 1)
    problem = relaxation.relax(counted(spec, anchor), anchor, [other], "scipy")
    ends = [{g: x[0] for g, x in between(spec, draw_permutations, seed).items()} for seed in (1, 2)]

    def at(t):
        soft = jax.tree.map(lambda x, y: (1 - t) * x + t * y, *ends)
        return float(value(problem.kinds, soft, problem.fixed, problem.moving))

    polynomial = line_search.interpolant(np.array([at(t) for t in line_search.samples(problem.order)]))
    for t in (0.13, 0.41, 0.77, 0.95):
        assert polynomial(t) == pytest.approx(at(t), abs=1e-5 * problem.scale)


# the relaxation


def test_hard_points_have_the_objective_of_weight_matching(network, draw_params, draw_permutations):
    a, b = draw_params(network, 1), draw_params(network, 2)
    p = draw_permutations(network, 3)
    expected = weight_matching(network, [a, b], key=KEY, init=[p]).info.objective[0, 0]
    problem = relaxation.relax(counted(network, a), a, [b], "scipy")
    soft = {g: x[None] for g, x in from_permutations(network, p).items()}
    found = value(problem.kinds, soft, problem.fixed, problem.moving)
    assert float(found) == pytest.approx(expected, abs=1e-5 * problem.scale)


@pytest.mark.fast
@pytest.mark.parametrize("name", ["grouped queries", "recurrent"])
def test_the_gradient_is_the_slope_times_the_weight_of_the_outer_pair(networks, draw_params, draw_permutations, name):
    spec = networks[name]
    models = [draw_params(spec, seed) for seed in range(2)]
    problem = relaxation.relax(counted(spec, models[0]), None, models, "scipy")
    soft = between(spec, draw_permutations, 4, models=2)
    slopes = relaxation._slopes(problem.kinds, soft, problem.fixed, problem.moving)
    one = {g: x[0] for g, x in soft.items()}
    gradient = jax.jit(jax.grad(relaxation.value, 1), static_argnums=0)(
        problem.kinds, one, problem.fixed, problem.moving
    )
    for group in spec.groups:
        weight = 1.0
        for outer in group.per:
            weight = one[outer][..., None, None]
        np.testing.assert_allclose(gradient[group.name], weight * slopes[group.name][0], atol=1e-3, err_msg=group.name)


@pytest.mark.fast
def test_the_gap_bounds_the_first_order_gain_of_every_vertex(networks, draw_params, draw_permutations):
    spec = networks["perceptron"]
    a, b = draw_params(spec, 1), draw_params(spec, 2)
    problem = relaxation.relax(spec, a, [b], "scipy")
    soft = {g: x[None, None] for g, x in barycentre(spec).items()}
    _, course = relaxation.ascend(problem, soft, 0, 1e-7)

    def slope(target):
        def at(t):
            soft = {g: (1 - t) * x + t * target[g] for g, x in barycentre(spec).items()}
            return value(problem.kinds, {g: x[None] for g, x in soft.items()}, problem.fixed, problem.moving)

        return float(jax.jvp(at, (0.0,), (1.0,))[1])

    slopes = [slope(from_permutations(spec, draw_permutations(spec, seed))) for seed in range(20)]
    assert course.gap[0] >= max(slopes) > 0
    assert not course.converged[0]


@pytest.mark.fast
@pytest.mark.parametrize("init", RUNS)
def test_the_relaxed_objective_never_falls_and_the_gap_is_never_negative(networks, draw_params, init):
    spec = networks["perceptron"]
    a, b = draw_params(spec, 1), draw_params(spec, 2)
    info = match(spec, a, b, init=init, restarts=2).info
    assert (np.diff(info.objective) >= -1e-6 * abs(info.objective).max()).all()
    assert info.objective.dtype == np.float64
    assert (info.gap >= 0).all()
    assert info.converged.all()
    assert info.polished >= info.rounded


@pytest.mark.fast
def test_a_hard_end_without_gap_cannot_be_improved_by_any_group(write_chain, draw_params):
    spec = write_chain((6, 12, 9, 4))
    a, b = draw_params(spec, 5), draw_params(spec, 6)
    info = match(spec, a, b, init="identity", polish=False).info
    assert info.gap[0] == 0
    assert info.rounded[0] == pytest.approx(info.objective[0, -1], rel=1e-5)
    assert match(spec, a, b, init="identity").info.polished[0] == pytest.approx(info.rounded[0], rel=1e-9)


# what comes out


def test_a_planted_order_is_recovered_exactly(network, plant):
    a, b, truth = plant(network, 1)
    result = match(network, a, b, init="barycentre", polish=False)
    for group, rows in truth.items():
        np.testing.assert_array_equal(result.plan.permutations(1)[group], rows)
    assert result.info.l2_after[0] == 0 < result.info.l2_before[0]


@pytest.mark.fast
@pytest.mark.parametrize("name", ["perceptron", "recurrent", "grouped queries"])
def test_a_planted_order_is_recovered_under_noise(networks, plant, name):
    a, b, truth = plant(networks[name], 2, noise=0.2)
    result = match(networks[name], a, b)
    for group, rows in truth.items():
        np.testing.assert_array_equal(result.plan.permutations(1)[group], rows)


@pytest.mark.fast
@pytest.mark.parametrize("seed", range(3))
def test_it_is_at_least_as_good_as_coordinate_ascent(write_chain, draw_params, objective, seed):
    spec = write_chain((24, 48, 48, 48, 10))
    a, b = draw_params(spec, 2 * seed), draw_params(spec, 2 * seed + 1)
    result, other = match(spec, a, b, restarts=2), weight_matching(spec, [a, b], key=KEY)
    assert result.info.polished[0] == pytest.approx(objective(spec, a, result.models[1]), rel=1e-12)
    assert result.info.polished[0] >= other.info.objective[0, -1]


@pytest.mark.fast
@pytest.mark.parametrize("init", RUNS)
def test_the_result_is_never_worse_than_the_models_as_they_are(networks, draw_params, objective, init):
    spec = networks["recurrent"]
    for seed in range(2):
        a, b = draw_params(spec, seed), draw_params(spec, seed + 50)
        for polish in (True, False):
            assert match(spec, a, b, init=init, polish=polish).info.polished[0] >= objective(spec, a, b)


@pytest.mark.fast
def test_brute_force_is_never_beaten_and_mostly_reached(write_chain, draw_params):
    spec, reached = write_chain((2, 4, 4, 2)), 0
    orders = [np.array(p) for p in permutations(range(4))]
    for seed in range(6):
        a, b = draw_params(spec, seed), draw_params(spec, seed + 100)
        ends = a["0/kernel"].T @ b["0/kernel"] + np.outer(a["0/bias"], b["0/bias"]), a["2/kernel"] @ b["2/kernel"].T
        ends = ends[0], ends[1] + np.outer(a["1/bias"], b["1/bias"])
        fixed = a["2/bias"] @ b["2/bias"]
        best = fixed + max(
            ends[0][range(4), p].sum() + ends[1][range(4), q].sum() + (a["1/kernel"] * b["1/kernel"][p][:, q]).sum()
            for p in orders
            for q in orders
        )
        found = match(spec, a, b, restarts=6).info.polished[0]
        assert found <= best + 1e-4
        reached += found >= best - 1e-4
    assert reached >= 4


@pytest.mark.fast
def test_equal_models_and_dead_units_stay_as_they_are(write_chain, draw_params):
    spec = write_chain((5, 8, 3))
    a = draw_params(spec)
    a["0/kernel"][:, 2:6] = a["0/bias"][2:6] = a["1/kernel"][2:6] = 0
    found = match(spec, a, a).plan.permutations(1)
    np.testing.assert_array_equal(found["h1"], np.arange(8))


@pytest.mark.fast
def test_what_does_not_count_moves_but_does_not_decide(draw_params):
    axes = {"w": (None, "h"), "v": ("h", None), "mean": ("h",), "counts": ("h",), "alone": ("k",)}
    shapes = {"w": (4, 6), "v": (6, 3), "mean": (6,), "counts": (6,), "alone": (5,)}
    spec = PermutationSpec.from_axes(shapes, axes, roles={"mean": "statistic", "alone": "statistic"})
    a, b = draw_params(spec, 1), draw_params(spec, 2)
    a["counts"], b["counts"] = np.arange(6), np.arange(6)[::-1].copy()
    result = match(spec, a, b, restarts=2, init="random")
    p = result.plan.permutations(1)
    np.testing.assert_array_equal(p["k"], np.arange(5))
    np.testing.assert_array_equal(result.models[1]["counts"], b["counts"][p["h"]])
    changed = {**b, "mean": 100 * b["mean"]}
    np.testing.assert_array_equal(match(spec, a, changed, restarts=2, init="random").plan.permutations(1)["h"], p["h"])


@pytest.mark.fast
def test_a_model_without_groups_that_count_is_refused(draw_params):
    spec = PermutationSpec.from_axes({"w": (3, 2), "mean": (4,)}, {"mean": ("h",)}, roles={"mean": "statistic"})
    with pytest.raises(ValueError, match="nothing can be matched"):
        match(spec, draw_params(spec, 1), draw_params(spec, 2))


@pytest.mark.fast
def test_every_other_model_is_aligned_to_the_first(write_chain, plant, draw_params):
    spec = write_chain((5, 8, 3))
    a, b, truth = plant(spec, 1)
    result = match(spec, a, draw_params(spec, 9), b)
    assert result.models[0] is a
    assert result.info.polished.shape == (2,)
    np.testing.assert_array_equal(result.plan.permutations(2)["h1"], truth["h1"])
    np.testing.assert_array_equal(result.plan.permutations(0)["h1"], identity(spec)["h1"])


@pytest.mark.fast
def test_a_limit_on_iterations_is_kept_and_told(networks, draw_params):
    spec = networks["perceptron"]
    info = match(spec, draw_params(spec, 1), draw_params(spec, 2), init="barycentre", max_iterations=1).info
    assert info.iterations.tolist() == [1]
    assert not info.converged[0]
    assert info.gap[0] > 0


@pytest.mark.fast
def test_the_step_does_what_the_function_does(write_chain, draw_params):
    spec = write_chain((5, 8, 3))
    models = [draw_params(spec, 1), draw_params(spec, 2)]
    step = FrankWolfe(init="random", restarts=2)
    after = step(MergeState.create(spec, models, key=KEY))
    expected = match(spec, *models, key=jax.random.split(KEY)[1], init="random", restarts=2)
    np.testing.assert_array_equal(after.plan.permutations(1)["h1"], expected.plan.permutations(1)["h1"])
    assert after.infos[0].runs.tolist() == expected.info.runs.tolist()
    assert FrankWolfe(**dataclasses.asdict(step)) == step


@pytest.mark.fast
@pytest.mark.parametrize(
    ("hyper", "message"),
    [
        ({"init": "barycenter"}, r"no init 'barycenter' \(nearest: 'barycentre'\)"),
        ({"restarts": 0}, "must be at least 1, not 0 and 200"),
        ({"max_iterations": 0}, "must be at least 1, not 1 and 0"),
        ({"tolerance": -1.0}, "tolerance must be at least 0"),
        ({"solver": "magic"}, "no solver 'magic'"),
    ],
)
def test_bad_hyper_parameters_are_refused(write_chain, draw_params, hyper, message):
    spec = write_chain((5, 8, 3))
    with pytest.raises(ValueError, match=message):
        match(spec, draw_params(spec, 1), draw_params(spec, 2), **hyper)


@pytest.mark.fast
def test_bad_models_are_refused(write_chain, draw_params):
    spec = write_chain((5, 8, 3))
    a = draw_params(spec)
    with pytest.raises(ValueError, match="two models or more, not 1"):
        match(spec, a)
    with pytest.raises(ValueError, match=r"'0/bias' of model 1 holds 8 NaN"):
        match(spec, a, {**a, "0/bias": np.full(8, np.nan, np.float32)})
