"""Weight matching: planted orders come back, the objective never falls, and nothing else decides."""

import dataclasses
from itertools import permutations

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from scipy.optimize import linear_sum_assignment

from permjax.action import permute
from permjax.match import problem as problems
from permjax.match import weights
from permjax.match.weights import WeightMatching, weight_matching
from permjax.permutation import identity
from permjax.steps import MergeState
from permjax.symmetry.spec import Of, PermutationSpec

pytestmark = pytest.mark.fast
KEY = jax.random.key(0)


def match(spec, *models, **hyper):
    return weight_matching(spec, models, key=hyper.pop("key", KEY), **hyper)


def assert_same_permutations(one, two):
    for group in one:
        np.testing.assert_array_equal(one[group], two[group], err_msg=group)


# laws


@pytest.mark.parametrize("seed", range(3))
def test_a_planted_order_is_recovered_exactly(network, plant, seed):
    a, b, truth = plant(network, seed)
    result = match(network, a, b)
    assert_same_permutations(result.plan.permutations(1), truth)
    assert result.info.l2_after[0] == 0
    assert result.info.converged.all()
    for name, leaf in result.models[1].items():
        np.testing.assert_array_equal(leaf, a[name])


def test_a_planted_order_is_recovered_in_every_symmetry_of_the_zoo(zoo_spec, plant):
    a, b, truth = plant(zoo_spec, 4)
    assert_same_permutations(match(zoo_spec, a, b).plan.permutations(1), truth)


def test_a_planted_order_is_recovered_under_noise(network, plant):
    a, b, truth = plant(network, 1, noise=0.2)
    assert_same_permutations(match(network, a, b).plan.permutations(1), truth)


@pytest.mark.parametrize("seed", range(5))
def test_the_objective_never_falls_and_is_that_of_the_result(network, draw_params, objective, seed):
    a, b = draw_params(network, seed), draw_params(network, seed + 100)
    result = match(network, a, b, key=jax.random.key(seed), restarts=2)
    assert result.info.objective.dtype == np.float64
    assert (np.diff(result.info.objective) >= 0).all()
    assert result.info.objective[0, -1] == pytest.approx(objective(network, a, result.models[1]), rel=1e-12)
    assert result.info.converged.all()


def test_the_result_is_the_permuted_model(network, draw_params):
    a, b = draw_params(network, 1), draw_params(network, 2)
    result = match(network, a, b)
    again = permute(network, result.plan.permutations(1), b)
    for name in b:
        np.testing.assert_array_equal(result.models[1][name], again[name])
    assert result.models[0] is a
    assert_same_permutations(result.plan.permutations(0), identity(network))


def test_equal_models_stay_as_they_are(network, draw_params):
    a = draw_params(network)
    assert_same_permutations(match(network, a, a).plan.permutations(1), identity(network))


def test_units_without_weights_stay_where_they_are(write_chain, draw_params):
    spec = write_chain((5, 8, 3))
    a = draw_params(spec)
    dead = {name: leaf.copy() for name, leaf in a.items()}
    dead["0/kernel"][:, 2:6] = dead["0/bias"][2:6] = dead["1/kernel"][2:6] = 0
    assert_same_permutations(match(spec, dead, dead).plan.permutations(1), identity(spec))
    nothing = {name: np.zeros_like(leaf) for name, leaf in a.items()}
    assert_same_permutations(match(spec, nothing, nothing).plan.permutations(1), identity(spec))


def test_small_units_are_recovered_beside_large_ones(write_chain, draw_params):
    spec = write_chain((6, 30, 4))
    a = draw_params(spec)
    a["0/kernel"][:, 3:8] *= 1e-4
    a["1/kernel"][3:8] *= 1e-4
    a["0/bias"][3:8] = 0
    order = np.arange(30, dtype=np.int32)
    order[3:8] = [5, 3, 4, 7, 6]
    result = match(spec, a, permute(spec, {"h1": order}, a))
    assert result.info.l2_after[0] == 0


def test_a_common_reordering_of_both_models_carries_over(network, plant, draw_permutations):
    a, b, _ = plant(network, 2, noise=0.5)
    shuffle = draw_permutations(network, 3)
    expected = permute(network, shuffle, match(network, a, b).models[1])
    both = match(network, permute(network, shuffle, a), permute(network, shuffle, b))
    for name in b:
        np.testing.assert_array_equal(both.models[1][name], expected[name])


def test_the_order_in_which_the_other_model_comes_does_not_matter(write_chain, draw_params, draw_permutations):
    spec = write_chain((6, 12, 9, 4))
    a, b, shuffle = draw_params(spec, 1), draw_params(spec, 2), draw_permutations(spec, 3)
    plain, shuffled = match(spec, a, b), match(spec, a, permute(spec, shuffle, b))
    for name in b:
        np.testing.assert_array_equal(plain.models[1][name], shuffled.models[1][name])


def test_the_same_key_gives_the_same_result(network, draw_params):
    a, b = draw_params(network, 1), draw_params(network, 2)
    one, two = (match(network, a, b, restarts=3) for _ in range(2))
    assert_same_permutations(one.plan.permutations(1), two.plan.permutations(1))


# oracles


def best_gain(spec: PermutationSpec, a, b, group: str) -> float:
    """What the best new order of one plain group would add, by dense Gram matrices in float64."""
    cost = np.zeros((spec.group(group).size,) * 2)
    for name, axis, _ in spec.members(group):
        x, y = (np.moveaxis(np.asarray(m[name], np.float64), axis, 0).reshape(len(cost), -1) for m in (a, b))
        cost += x @ y.T * (spec.leaf(name).role == "weight")
    i, j = linear_sum_assignment(cost, maximize=True)
    return cost[i, j].sum() - cost.trace()


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("name", ["perceptron", "residual convolutions"])
def test_no_single_group_can_improve_the_result(networks, name, draw_params, seed):
    spec = networks[name]
    a, b = draw_params(spec, seed), draw_params(spec, seed + 100)
    result = match(spec, a, b, key=jax.random.key(seed))
    for group in spec.groups:
        assert best_gain(spec, a, result.models[1], group.name) < 1e-3


@pytest.mark.parametrize("seed", range(5))
def test_skipping_changes_nothing_but_the_work(network, draw_params, seed, monkeypatch):
    a, b = draw_params(network, seed), draw_params(network, seed + 100)
    with_skips = match(network, a, b)
    known = problems.structure

    def forgetful(spec, leaves):
        found = known(spec, leaves)
        return found._replace(near={g: frozenset(found.terms) for g in found.terms})

    monkeypatch.setattr(problems, "structure", forgetful)
    without = match(network, a, b)
    assert_same_permutations(with_skips.plan.permutations(1), without.plan.permutations(1))
    assert with_skips.info.solves[0] <= without.info.solves[0]


def test_brute_force_is_never_beaten_and_mostly_reached(write_chain, draw_params):
    spec, reached = write_chain((2, 4, 4, 2)), 0
    orders = [list(p) for p in permutations(range(4))]
    for seed in range(20):
        a, b = draw_params(spec, seed), draw_params(spec, seed + 100)
        first = a["0/kernel"].T @ b["0/kernel"] + np.outer(a["0/bias"], b["0/bias"])
        outer = [sum(first[i, j] for i, j in enumerate(p)) for p in orders]
        last = a["2/kernel"] @ b["2/kernel"].T + np.outer(a["1/bias"], b["1/bias"])
        inner = [sum(last[i, j] for i, j in enumerate(q)) for q in orders]
        best = max(
            x + y + (a["1/kernel"] * b["1/kernel"][p][:, q]).sum()
            for p, x in zip(orders, outer, strict=True)
            for q, y in zip(orders, inner, strict=True)
        )
        found = match(spec, a, b, restarts=5).info.objective[0, -1] - float(a["2/bias"] @ b["2/bias"])
        assert found <= best + 1e-4
        reached += found >= best - 1e-4
    assert reached >= 16


def test_optax_attains_what_scipy_attains(write_chain, draw_params):
    spec = write_chain((5, 6, 6, 2))
    a, b = draw_params(spec, 1), draw_params(spec, 2)
    one, two = (match(spec, a, b, solver=solver).info.objective[0, -1] for solver in ("scipy", "optax"))
    assert one == pytest.approx(two, rel=1e-6)


@pytest.mark.parametrize(("name", "dtype"), [("recurrent", np.float32), ("perceptron", ml_dtypes.bfloat16)])
def test_the_work_on_a_device_gives_the_same_result(networks, name, dtype, draw_params, monkeypatch):
    spec = networks[name]
    a, b = ({n: leaf.astype(dtype) for n, leaf in draw_params(spec, seed).items()} for seed in (1, 2))
    host = match(spec, a, b, restarts=2)
    monkeypatch.setattr(weights, "are_local", lambda _: False)
    device = match(spec, a, b, restarts=2)
    assert_same_permutations(host.plan.permutations(1), device.plan.permutations(1))
    np.testing.assert_allclose(host.info.objective, device.info.objective, rtol=1e-12)
    assert all(isinstance(leaf, jax.Array) for leaf in device.models[1].values())


# what counts


def test_statistics_and_frozen_leaves_do_not_decide(networks, draw_params, objective):
    spec = networks["residual convolutions"]
    a, b = draw_params(spec, 1), draw_params(spec, 2)
    loud = {**b, "b0/mean": 1e6 * b["b0/mean"]}
    one, two = match(spec, a, b), match(spec, a, loud)
    assert_same_permutations(one.plan.permutations(1), two.plan.permutations(1))
    np.testing.assert_array_equal(one.info.objective, two.info.objective)
    np.testing.assert_array_equal(two.models[1]["b0/mean"], loud["b0/mean"][two.plan.permutations(1)["b0"]])
    frozen = PermutationSpec.from_axes(
        {"in": (3, 4), "out": (4, 3)}, {"in": (None, "h"), "out": ("h", None)}, roles={"in": "frozen"}
    )
    a, b = draw_params(frozen, 1), draw_params(frozen, 2)
    same = {**b, "in": 100 * a["in"]}
    assert_same_permutations(match(frozen, a, b).plan.permutations(1), match(frozen, a, same).plan.permutations(1))


def test_integer_leaves_move_but_do_not_decide(draw_params):
    spec = PermutationSpec.from_axes({"w": (3, 4), "mask": (4,)}, {"w": (None, "h"), "mask": ("h",)})
    a = {"w": draw_params(spec)["w"], "mask": np.array([1000, 0, 0, 0])}
    b = permute(spec, {"h": np.array([3, 1, 0, 2])}, {**a, "mask": np.arange(4)})
    np.testing.assert_array_equal(match(spec, a, b).models[1]["mask"], np.arange(4))


def test_a_group_that_stands_in_statistics_only_stays(draw_params):
    spec = PermutationSpec.from_axes(
        {"m": (4,), "w": (2, 3)}, {"m": ("h",), "w": (None, "g")}, roles={"m": "statistic"}
    )
    found = match(spec, draw_params(spec, 1), draw_params(spec, 2)).plan.permutations(1)
    np.testing.assert_array_equal(found["h"], np.arange(4))


def test_distances_are_over_weights(networks, draw_params):
    spec = networks["residual convolutions"]
    a, b = draw_params(spec, 1), draw_params(spec, 2)
    result = match(spec, a, b)
    for found, model in ((result.info.l2_before, b), (result.info.l2_after, result.models[1])):
        expected = sum(((a[n].astype(np.float64) - model[n]) ** 2).sum() for n in a if n != "b0/mean") ** 0.5
        assert found[0] == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float64])
def test_other_precisions_are_matched_and_kept(networks, plant, dtype):
    spec = networks["attention with heads"]
    a, b, truth = plant(spec)
    a, b = ({name: leaf.astype(dtype) for name, leaf in m.items()} for m in (a, b))
    result = match(spec, a, b)
    assert_same_permutations(result.plan.permutations(1), truth)
    assert all(leaf.dtype == dtype for leaf in result.models[1].values())


def test_square_maps_inside_heads_are_matched(draw_params, plant, objective):
    axes = {"square": ("head", "in", "in"), "map": ("head", "in", None)}
    spec = PermutationSpec.from_axes({"square": (3, 4, 4), "map": (3, 4, 5)}, axes, per={"in": ("head",)})
    a, b, truth = plant(spec, 1, noise=0.1)
    assert_same_permutations(match(spec, a, b).plan.permutations(1), truth)
    result = match(spec, a, draw_params(spec, 9))
    assert (np.diff(result.info.objective) >= 0).all()
    assert result.info.objective[0, -1] == pytest.approx(objective(spec, a, result.models[1]), rel=1e-12)


def test_jax_leaves_come_back_as_jax_leaves(networks, plant):
    spec = networks["attention with heads"]
    a, b, truth = plant(spec)
    result = match(spec, *({name: jnp.asarray(leaf) for name, leaf in m.items()} for m in (a, b)))
    assert_same_permutations(result.plan.permutations(1), truth)
    assert all(isinstance(leaf, jax.Array) for leaf in result.models[1].values())


def test_models_keep_their_structure(write_chain, draw_params):
    spec = PermutationSpec.from_axes(
        {"params/0/w": (2, 4), "params/1/w": (4, 2)}, {"params/0/w": (None, "h"), "params/1/w": ("h", None)}
    )
    flat = [draw_params(spec, seed) for seed in (1, 2)]
    nested = [{"params": ({"w": m["params/0/w"]}, {"w": m["params/1/w"]})} for m in flat]
    result = match(spec, *nested)
    assert jax.tree.structure(result.models[1]) == jax.tree.structure(nested[1])
    expected = match(spec, *flat).models[1]["params/1/w"]
    np.testing.assert_array_equal(result.models[1]["params"][1]["w"], expected)


# several models, starts and restarts


def test_every_other_model_is_aligned_to_the_first(networks, plant):
    spec = networks["perceptron"]
    a, b, truth_b = plant(spec, 1)
    result = match(spec, a, b, permute(spec, truth_b, b), b)
    assert result.plan.models == 4
    assert_same_permutations(result.plan.permutations(1), truth_b)
    assert_same_permutations(result.plan.permutations(2), identity(spec))
    assert_same_permutations(result.plan.permutations(3), truth_b)
    assert {len(field) for field in result.info} == {3}


def test_a_given_start_is_improved_not_replaced(networks, draw_params, draw_permutations, objective):
    spec = networks["perceptron"]
    a, b, init = draw_params(spec, 1), draw_params(spec, 2), draw_permutations(spec, 5)
    info = match(spec, a, b, init=[init]).info
    assert info.objective[0, 0] == pytest.approx(objective(spec, a, permute(spec, init, b)), rel=1e-12)
    found = match(spec, a, b).plan.permutations(1)
    again = match(spec, a, b, init=[found])
    assert_same_permutations(again.plan.permutations(1), found)
    assert again.info.sweeps[0] == 1


def test_restarts_never_make_it_worse(write_recurrent, draw_params):
    spec = write_recurrent(12)
    a, b = draw_params(spec, 1), draw_params(spec, 2)
    values = [match(spec, a, b, restarts=n).info.objective[0, -1] for n in (1, 2, 5, 20)]
    assert values == sorted(values)
    assert values[-1] > values[0]


def test_a_limit_on_sweeps_is_kept_and_told(write_recurrent, draw_params):
    spec = write_recurrent(10)
    info = match(spec, draw_params(spec, 1), draw_params(spec, 2), max_sweeps=1).info
    assert info.sweeps[0] == 1
    assert not info.converged[0]


def test_the_step_does_what_the_function_does(networks, draw_params):
    spec = networks["perceptron"]
    models = [draw_params(spec, seed) for seed in (1, 2)]
    state = MergeState.create(spec, models, key=KEY)
    after = WeightMatching(restarts=2)(state)
    _, key = state.split()
    expected = match(spec, *models, key=key, restarts=2)
    assert_same_permutations(after.plan.permutations(1), expected.plan.permutations(1))
    np.testing.assert_array_equal(after.infos[0].objective, expected.info.objective)
    assert WeightMatching(**dataclasses.asdict(WeightMatching(restarts=2))) == WeightMatching(restarts=2)


# bad input


def test_bad_models_are_refused_by_name(networks, draw_params):
    spec = networks["perceptron"]
    a = draw_params(spec)
    for bad, message in (
        ({**a, "1/kernel": np.full_like(a["1/kernel"], np.nan)}, r"'1/kernel' of model 1 holds 108 NaN"),
        ({**a, "1/bias": np.zeros(8, np.float32)}, r"'1/bias' has shape \(9,\) in model 0 but \(8,\) in model 1"),
        ({**a, "1/bias": np.zeros(9)}, r"'1/bias' has dtype float32 in model 0 but float64"),
        ({n: leaf for n, leaf in a.items() if n != "0/bias"}, r"'0/bias' of model 0 is missing from model 1"),
        ({**a, "extra": np.zeros(1)}, r"'extra' of model 1 is not in model 0"),
    ):
        with pytest.raises(ValueError, match=message) as caught:
            match(spec, a, bad)
        assert "\n" not in str(caught.value)


def test_models_that_are_not_the_specs_are_refused(networks, draw_params):
    spec = networks["perceptron"]
    a = {**draw_params(spec), "0/kernel": np.zeros((6, 11), np.float32)}
    with pytest.raises(ValueError, match=r"'0/kernel', axis 1: model 0 has size 11, the spec expects 12"):
        match(spec, a, a)


def test_one_model_is_not_enough(networks, draw_params):
    with pytest.raises(ValueError, match="two models or more, not 1"):
        match(networks["perceptron"], draw_params(networks["perceptron"]))


@pytest.mark.parametrize(
    ("hyper", "message"),
    [
        ({"restarts": 0}, "at least 1"),
        ({"max_sweeps": 0}, "at least 1"),
        ({"solver": "magic"}, "no solver 'magic'"),
        ({"init": []}, "each of the 1 models after the anchor, not 0"),
        ({"init": [{"h1": np.zeros(12, np.int32), "h2": np.arange(9)}]}, "group 'h1' is no bijection"),
    ],
)
def test_bad_hyper_parameters_are_refused(networks, draw_params, hyper, message):
    spec = networks["perceptron"]
    with pytest.raises(ValueError, match=message):
        match(spec, draw_params(spec, 1), draw_params(spec, 2), **hyper)


def test_a_group_without_its_outer_group_is_refused(draw_params):
    spec = PermutationSpec.from_axes(
        {"w": (3, 4), "v": (2, 4)}, {"w": ("h", "d"), "v": (None, Of("d"))}, per={"d": ("h",)}
    )
    with pytest.raises(ValueError, match="'d' is per 'h', which does not stand beside it in leaf 'v'"):
        match(spec, draw_params(spec, 1), draw_params(spec, 2))
