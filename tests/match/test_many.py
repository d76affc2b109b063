"""Many models: one common order, in which cycles close exactly, and what pairs matched by themselves leave open."""

import dataclasses
from functools import partial
from itertools import combinations, permutations, product

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from permjax.action import permute
from permjax.lmc.barrier import barrier
from permjax.match.many import (
    MergeMany,
    barrier_matrix,
    cycle_error,
    merge_many,
    pairwise_maps,
    pairwise_matching,
)
from permjax.match.objective import counted, joint_objective, pair_objectives
from permjax.match.universe import UniverseMatching, universe_matching
from permjax.match.weights import weight_matching
from permjax.permutation import compose, invert
from permjax.steps import MergeState
from permjax.symmetry.spec import PermutationSpec

KEY = jax.random.key(0)
METHODS = {"merge_many": merge_many, "universe": universe_matching}
alone = partial(weight_matching, key=KEY)


@pytest.fixture(params=METHODS)
def method(request):
    return partial(METHODS[request.param], key=KEY)


def drawn(spec, draw_params, n=3, seed=0):
    return [draw_params(spec, 10 * seed + i) for i in range(n)]


def planted(spec, draw_params, draw_permutations, n=4, noise=0.0):
    """Permuted copies of one model: disturbed, and the permutations that bring them into the order of the first."""
    base, shuffles = draw_params(spec, 50), [draw_permutations(spec, seed) for seed in range(n)]
    noises = [draw_params(spec, 60 + i) for i in range(n)]
    near = [{name: leaf + np.float32(noise) * other[name] for name, leaf in base.items()} for other in noises]
    models = [permute(spec, p, model) for p, model in zip(shuffles, near, strict=True)]
    return models, [compose(spec, shuffles[0], invert(spec, p)) for p in shuffles]


# one common order


@pytest.mark.parametrize("name", ["perceptron", "grouped queries"])
def test_cycles_close_exactly_and_the_anchor_stays(method, networks, draw_params, name):
    spec = networks[name]
    models = drawn(spec, draw_params, 4)
    result = method(spec, models)
    maps = pairwise_maps(spec, result.plan)
    assert cycle_error(spec, maps) == 0
    for i, j, k in combinations(range(4), 3):
        around = compose(spec, invert(spec, maps[i, k]), compose(spec, maps[i, j], maps[j, k]))
        for rows in around.values():
            np.testing.assert_array_equal(rows, np.broadcast_to(np.arange(rows.shape[-1]), rows.shape))
    assert result.models[0] is models[0]
    for m, model in enumerate(models):
        again = permute(spec, result.plan.permutations(m), model)
        for leaf in model:
            np.testing.assert_array_equal(result.models[m][leaf], again[leaf])


def test_pairs_matched_by_themselves_leave_cycles_open(networks, draw_params):
    spec = networks["perceptron"]
    pairs = pairwise_matching(spec, drawn(spec, draw_params, 4), alone)
    assert sorted(pairs) == [*combinations(range(4), 2)]
    assert 0 < cycle_error(spec, pairs) <= 1


@pytest.mark.parametrize("name", ["recurrent", "residual convolutions"])
def test_planted_orders_are_recovered_exactly(method, networks, draw_params, draw_permutations, name):
    models, truth = planted(networks[name], draw_params, draw_permutations, noise=0.1)
    result = method(networks[name], models)
    for m, expected in enumerate(truth):
        for group, rows in expected.items():
            np.testing.assert_array_equal(result.plan.permutations(m)[group], rows)


def test_half_precision_and_jax_leaves_are_matched_and_kept(method, write_chain, draw_params, draw_permutations):
    spec = write_chain((6, 9, 4))
    models, truth = planted(spec, draw_params, draw_permutations, n=3)
    models = [jax.tree.map(lambda x: jnp.asarray(x, jnp.bfloat16), model) for model in models]
    result = method(spec, models)
    np.testing.assert_array_equal(result.plan.permutations(2)["h1"], truth[2]["h1"])
    assert {leaf.dtype for leaf in result.models[2].values()} == {jnp.dtype(jnp.bfloat16)}


# merge_many


@pytest.mark.parametrize("seed", range(3))
def test_merging_never_lowers_the_objective_and_tells_that_of_the_result(networks, draw_params, seed):
    spec = networks["residual convolutions"]
    models = drawn(spec, draw_params, 4, seed)
    result = merge_many(spec, models, key=jax.random.key(seed))
    weights = [leaf.name for leaf in counted(spec, models[0]).leaves]
    found = joint_objective([{name: model[name] for name in weights} for model in result.models])
    anchored = weight_matching(spec, models, key=KEY)
    assert result.info.objective.dtype == np.float64
    assert (np.diff(result.info.objective) >= 0).all()
    assert result.info.objective[-1] == pytest.approx(found, rel=1e-12)
    assert result.info.objective[-1] > joint_objective([{n: m[n] for n in weights} for m in anchored.models])
    assert result.info.converged
    assert result.info.sweeps == len(result.info.objective) - 1


def test_no_model_can_improve_against_the_mean_of_the_others(networks, draw_params):
    spec = networks["perceptron"]
    aligned = merge_many(spec, drawn(spec, draw_params), key=KEY).models
    for m, model in enumerate(aligned):
        mean = {n: np.mean([x[n] for k, x in enumerate(aligned) if k != m], axis=0) for n in model}
        trace = weight_matching(spec, [mean, model], key=KEY, init=[still(spec)]).info.objective[0]
        assert trace[-1] == pytest.approx(trace[0], rel=1e-6)


def still(spec):
    return {g.name: np.broadcast_to(np.arange(g.size, dtype=np.int32), spec.shape(g.name)) for g in spec.groups}


def test_a_given_start_is_improved_not_replaced(networks, draw_params, draw_permutations):
    spec = networks["perceptron"]
    models, init = drawn(spec, draw_params), [draw_permutations(spec, seed) for seed in range(3)]
    info = merge_many(spec, models, key=KEY, init=init).info
    expected = joint_objective([permute(spec, p, model) for p, model in zip(init, models, strict=True)])
    assert info.objective[0] == pytest.approx(expected, rel=1e-12)
    assert info.objective[-1] > info.objective[0]


def test_a_limit_on_sweeps_is_kept_and_told(networks, draw_params):
    spec = networks["perceptron"]
    info = merge_many(spec, drawn(spec, draw_params), key=KEY, max_sweeps=1).info
    assert (info.sweeps, info.converged) == (1, False)


# the universe


@pytest.mark.parametrize("seed", range(2))
def test_the_universe_is_at_least_as_good_as_merging(write_chain, draw_params, seed):
    spec = write_chain((12, 24, 20, 6))
    models = drawn(spec, draw_params, 3, seed)
    info = universe_matching(spec, models, key=KEY, restarts=2).info
    assert info.start == merge_many(spec, models, key=KEY).info.objective[-1]
    anchored = pair_objectives(weight_matching(spec, models, key=KEY).models)
    pairs = np.triu_indices(3, 1)
    assert info.polished >= info.start
    assert info.polished >= info.runs.max()
    assert info.polished == pytest.approx(info.pairs[pairs].sum(), rel=1e-12)
    assert info.pairs[pairs].min() > anchored[pairs].min()


@pytest.mark.parametrize("init", ["barycentre", "random"])
def test_the_relaxed_objective_never_falls_from_any_start(networks, draw_params, init):
    spec = networks["perceptron"]
    models = drawn(spec, draw_params)
    info = universe_matching(spec, models, key=KEY, init=init, restarts=2).info
    assert (np.diff(info.objective) >= -1e-6 * abs(info.objective).max()).all()
    assert info.objective[-1] > info.objective[0]
    assert info.gap >= 0
    assert info.polished >= max(info.rounded, joint_objective(models))


def test_brute_force_over_three_models_is_never_beaten_and_reached(write_chain, draw_params):
    spec, reached = write_chain((2, 3, 2)), 0
    orders = [{"h1": np.array(p, np.int32)} for p in permutations(range(3))]
    for seed in range(5):
        models = drawn(spec, draw_params, 3, seed)
        moved = [[permute(spec, p, model) for p in orders] for model in models[1:]]
        best = max(joint_objective([models[0], *pair]) for pair in product(*moved))
        found = universe_matching(spec, models, key=KEY, restarts=2).info.polished
        assert found <= best + 1e-6
        reached += found >= best - 1e-6
    assert reached >= 4


def test_without_polish_the_end_is_the_rounded_one(networks, draw_params):
    spec = networks["perceptron"]
    info = universe_matching(spec, drawn(spec, draw_params), key=KEY, init="barycentre", polish=False).info
    assert info.polished == max(info.rounded, info.start)


# measures


def test_a_cycle_error_counts_the_units_that_go_astray(write_chain):
    spec = write_chain((2, 4, 2))
    same, swapped = {"h1": np.arange(4, dtype=np.int32)}, {"h1": np.array([1, 0, 2, 3], np.int32)}
    triangle = {(0, 1): same, (1, 2): same, (0, 2): same}
    assert cycle_error(spec, triangle) == 0
    assert cycle_error(spec, triangle | {(0, 2): swapped}) == 0.5
    assert cycle_error(spec, triangle | {(0, 2): swapped, (1, 2): swapped}) == 0


def test_the_maps_of_a_plan_are_those_between_its_models(networks, draw_params, draw_permutations):
    spec = networks["attention with heads"]
    models, _ = planted(spec, draw_params, draw_permutations, n=3)
    maps = pairwise_maps(spec, merge_many(spec, models, key=KEY).plan)
    for (i, j), p in maps.items():
        moved = permute(spec, p, models[j])
        for name in moved:
            np.testing.assert_array_equal(moved[name], models[i][name])


def metrics(params, x):
    out = jax.nn.relu(x @ params["0/kernel"] + params["0/bias"][None]) @ params["1/kernel"]
    return {"loss": jnp.mean(jnp.square(out)), "accuracy": jnp.mean(out)}


def test_the_barrier_matrix_holds_the_barrier_of_every_pair(write_chain, draw_params):
    models = drawn(write_chain((4, 6, 2)), draw_params)
    x = np.random.default_rng(0).standard_normal((20, 4)).astype(np.float32)
    found = barrier_matrix(metrics, models, (x,), points=5)
    for part in found:
        np.testing.assert_array_equal(part, part.T)
        np.testing.assert_array_equal(part.diagonal(), 0)
    for i, j in combinations(range(3), 2):
        expected = barrier(metrics, models[i], models[j], (x,), points=5)
        assert (found.mid[i, j], found.max[i, j]) == (expected.barrier_mid, expected.barrier_max)


# steps and bad input


@pytest.mark.parametrize("step", [MergeMany(), UniverseMatching(init="barycentre")], ids=["merge_many", "universe"])
def test_the_step_does_what_the_function_does(write_chain, draw_params, step):
    spec = write_chain((5, 8, 3))
    models, function = drawn(spec, draw_params), METHODS["merge_many" if step == MergeMany() else "universe"]
    after = step(MergeState.create(spec, models, key=KEY))
    expected = function(spec, models, key=jax.random.split(KEY)[1], **dataclasses.asdict(step))
    for m in range(3):
        np.testing.assert_array_equal(after.plan.permutations(m)["h1"], expected.plan.permutations(m)["h1"])
    assert type(step)(**dataclasses.asdict(step)) == step


def test_what_does_not_count_moves_but_does_not_decide(method, draw_params):
    axes = {"w": (None, "h"), "v": ("h", None), "counts": ("h",), "alone": ("k",)}
    shapes = {"w": (4, 6), "v": (6, 3), "counts": (6,), "alone": (5,)}
    spec = PermutationSpec.from_axes(shapes, axes, roles={"alone": "statistic"})
    models = [{**m, "counts": np.arange(6)} for m in drawn(spec, draw_params)]
    result = method(spec, models)
    for m in range(3):
        p = result.plan.permutations(m)
        np.testing.assert_array_equal(p["k"], np.arange(5))
        np.testing.assert_array_equal(result.models[m]["counts"], p["h"])


def test_bad_models_are_refused(method, write_chain, draw_params):
    spec = write_chain((5, 8, 3))
    a = draw_params(spec)
    with pytest.raises(ValueError, match="two models or more, not 1"):
        method(spec, [a])
    with pytest.raises(ValueError, match=r"'0/bias' of model 2 holds 8 NaN"):
        method(spec, [a, a, {**a, "0/bias": np.full(8, np.nan, np.float32)}])


def test_bad_hyper_parameters_are_refused(write_chain, draw_params):
    spec = write_chain((5, 8, 3))
    models = drawn(spec, draw_params)
    with pytest.raises(ValueError, match="max_sweeps must be at least 1, not 0"):
        merge_many(spec, models, key=KEY, max_sweeps=0)
    with pytest.raises(ValueError, match="each of the 3 models, not 1"):
        merge_many(spec, models, key=KEY, init=[still(spec)])
    with pytest.raises(ValueError, match=r"no init 'weight' \(nearest: 'weights'\)"):
        universe_matching(spec, models, key=KEY, init="weight")


def test_a_cycle_error_needs_all_pairs_of_three_models(write_chain):
    spec = write_chain((2, 4, 2))
    same = {"h1": np.arange(4, dtype=np.int32)}
    with pytest.raises(ValueError, match=r"the pair \(0, 2\) is missing"):
        cycle_error(spec, {(0, 1): same, (1, 2): same})
    with pytest.raises(ValueError, match="three models or more, not 2"):
        cycle_error(spec, {(0, 1): same})
