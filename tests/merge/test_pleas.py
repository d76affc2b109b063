"""Layer by layer PLeaS is the least squares it says it is: against `numpy.linalg.lstsq` of the augmented problem."""

from functools import partial
from itertools import product

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import zoo

from permjax.merge.initial import contracted_axes, wide_average
from permjax.merge.partial import partial_plan
from permjax.merge.pleas import pleas
from permjax.merge.wide import Wide, mean_units
from permjax.merge.zipping import zip_plan
from permjax.plan import Plan
from permjax.symmetry.capture import capture
from permjax.symmetry.spec import Product
from permjax.symmetry.trace import trace_spec

pytestmark = pytest.mark.usefixtures("ordinary_promotion")

X = zoo.image(120, 5)
MLP = {
    "w1": zoo.shape(5, 8), "b1": zoo.shape(8), "w2": zoo.shape(8, 6), "b2": zoo.shape(6), "w3": zoo.shape(6, 3),
}  # fmt: skip
IMAGES = zoo.image(30, 6, 6, 2)
CNN = {"k1": zoo.shape(3, 3, 2, 6), "c1": zoo.shape(6), "k2": zoo.shape(5, 6, 2, 3), "w": zoo.shape(45, 3)}


def mlp(p, x):
    return jax.nn.relu(jax.nn.relu(x @ p["w1"] + p["b1"]) @ p["w2"] + p["b2"]) @ p["w3"]


def cnn(p, x):
    """Two layouts of convolutions, one with a bias, then flatten and a head without one."""
    convolve = partial(jax.lax.conv_general_dilated, padding="SAME")
    h = jax.nn.relu(convolve(x, p["k1"], (1, 1), dimension_numbers=("NHWC", "HWIO", "NHWC")) + p["c1"])
    h = h.transpose(0, 3, 1, 2)
    h = convolve(h, p["k2"], (2, 2), dimension_numbers=("NCHW", "OIHW", "NCHW"), rhs_dilation=(1, 2))
    return jax.nn.relu(h).reshape(h.shape[0], -1) @ p["w"]


@pytest.fixture(scope="module")
def mlp_setting(drawn):
    """(spec, parents, function, data)."""
    with jax.numpy_rank_promotion("allow"):
        return trace_spec(mlp, MLP, X), [drawn(MLP, 0), drawn(MLP, 1)], mlp, [X[:70], X[70:]]


@pytest.fixture(scope="module")
def cnn_setting(drawn):
    """(spec, parents, function, data)."""
    with jax.numpy_rank_promotion("allow"):
        spec = trace_spec(cnn, CNN, IMAGES, verify=False)
        return spec, [drawn(CNN, 0), drawn(CNN, 1)], cnn, [IMAGES[:16], IMAGES[16:]]


# the layers' problems, posed again with NumPy


def rows_of(array, samples_first=True):
    return np.asarray(array, np.float64).reshape(-1, array.shape[-1])


def windows(x, kernel, out, stride, dilation):
    """What a SAME convolution sees at every position: `[positions, taps * channels]`, channels last."""
    n, *spatial, channels = x.shape
    pads = []
    for size, k, o, s, d in zip(spatial, kernel, out, stride, dilation, strict=True):
        total = max((o - 1) * s + (k - 1) * d + 1 - size, 0)
        pads.append((total // 2, total - total // 2))
    x = np.pad(np.asarray(x, np.float64), ((0, 0), *pads, (0, 0)))
    taps = []
    for tap in product(*map(range, kernel)):
        first = [t * d for t, d in zip(tap, dilation, strict=True)]
        cut = (slice(f, f + (o - 1) * s + 1, s) for f, o, s in zip(first, out, stride, strict=True))
        taps.append(x[(slice(None), *cut)])
    return np.stack(taps, -2).reshape(-1, len(taps) * channels)


GEOMETRY = {"k1": ((3, 3), (1, 1), (1, 1), (0, 1, 2, 3)), "k2": ((2, 3), (2, 2), (1, 2), (2, 3, 1, 0))}
BIASES = {"w1": "b1", "w2": "b2", "k1": "c1"}


def posed(wide, models, apply, data, name, target=None):
    """Inputs and outputs of a layer in wide units, and which model owns each row and column: (X, Y, in, out)."""
    seen = [capture(apply, wide.spec, model, data).leaves[name] for model in models]
    axes = wide.spec.leaf(name).axes
    into, out = (Product(tuple(axes[i] for i in places)) for places in (seen[0].in_axes, seen[0].out_axes))
    biases = [model[BIASES[name]] if name in BIASES else np.zeros(1, np.float32) for model in models]
    every = range(len(models))
    outputs = [io.output + bias for io, bias in zip(seen, biases, strict=True)]
    x = mean_units(wide, into, [io.input for io in seen], every, -1)
    y = mean_units(wide, out, outputs, every, -1) if target is None else target(wide, out, outputs)
    owners = wide.owners(into)
    if name in GEOMETRY:
        kernel, stride, dilation, _ = GEOMETRY[name]
        x = windows(x, kernel, y.shape[1:3], stride, dilation)
        owners = np.tile(owners, (1, int(np.prod(kernel))))
    x = rows_of(x)
    if name in BIASES:
        x, owners = np.append(x, np.ones((len(x), 1)), 1), np.append(owners, np.ones((len(models), 1), bool), 1)
    return x, rows_of(y), owners, wide.owners(out)


def matrix_of(params, name):
    """The weights as `[columns, outputs]`, the bias in the last row."""
    leaf = np.asarray(params[name], np.float64)
    if name in GEOMETRY:
        leaf = leaf.transpose(GEOMETRY[name][3]).reshape(-1, leaf.shape[GEOMETRY[name][3][-1]])
    return np.append(leaf, np.asarray(params[BIASES[name]], np.float64)[None], 0) if name in BIASES else leaf


def objective(x, y, weights, prior, penalty):
    return ((x @ weights - y) ** 2).sum() + (penalty[:, None] * (weights - prior) ** 2).sum()


def best(x, y, into, out, prior, penalty):
    """The minimiser under the mask, one output at a time, by `lstsq` of the augmented problem; of least change."""
    found = np.zeros_like(prior)
    for j in range(y.shape[1]):
        live = (into & out[:, j : j + 1]).any(0)
        a = np.append(x[:, live], np.diag(np.sqrt(penalty[live])), 0)
        b = np.append(y[:, j] - x[:, live] @ prior[live, j], np.zeros(live.sum()))
        found[live, j] = prior[live, j] + np.linalg.lstsq(a, b)[0]
    return found


def assert_solves(setting, plan, ridge, result, target=None):
    spec, models, apply, data = setting
    wide, everything = Wide(spec, plan), jnp.concatenate(data)
    prior = wide_average(wide, models, contracted_axes(apply, models[0], everything))
    for place, name in enumerate(result.info.layers):
        x, y, into, out = posed(wide, models, apply, everything, name, target)
        features = x.shape[1] - (name in BIASES)
        penalty = np.zeros(x.shape[1])
        penalty[:features] = ridge * np.square(x[:, :features]).sum(0).mean()
        w0, w = matrix_of(prior, name), matrix_of(result.models[0], name)
        wanted = best(x, y, into, out, w0, penalty)
        assert not w[~(into[:, :, None] & out[:, None]).any(0)].any()
        scale = (y**2).sum()
        assert abs(objective(x, y, w, w0, penalty) - objective(x, y, wanted, w0, penalty)) <= 1e-6 * scale
        np.testing.assert_allclose(w, wanted, rtol=1e-3, atol=1e-3)
        spread = y.var(0).sum() if name in BIASES else (y**2).mean(0).sum()
        assert result.info.after[place] == pytest.approx(((x @ w - y) ** 2).mean(0).sum() / spread, rel=1e-3, abs=1e-6)
        assert result.info.rows[place] == len(x)
        assert result.info.ridge[place] == ridge


PLANS = {"plain": {"w1:1": 8, "w2:1": 6}, "partial": {"w1:1": 5, "w2:1": 2}, "apart": {"w1:1": 0, "w2:1": 0}}


@pytest.mark.parametrize("name", ["plain", "partial", "apart"])
def test_dense_layers_solve_their_least_squares(mlp_setting, name):
    spec, models, apply, data = mlp_setting
    plan = partial_plan(spec, PLANS[name])
    result = pleas(spec, models, plan, apply=apply, data=data, ridge=1e-2)
    assert result.info.layers == ("w1", "w2", "w3")
    assert_solves(mlp_setting, plan, 1e-2, result)


def test_convolutions_solve_their_least_squares(cnn_setting):
    spec, models, apply, data = cnn_setting
    (first,), (second,) = ([g.name for g in spec.groups if g.size == size] for size in (6, 5))
    plan = partial_plan(spec, {first: 4, second: 3})
    with pytest.warns(UserWarning, match=r"layer 'w': 30 for 63"):
        result = pleas(spec, models, plan, apply=apply, data=data, ridge=1e-2)
    assert set(result.info.layers) == {"k1", "k2", "w"}
    assert_solves(cnn_setting, plan, 1e-2, result)


def test_without_ridge_the_fit_is_plain_least_squares(mlp_setting):
    spec, models, apply, data = mlp_setting
    plan = partial_plan(spec, {"w1:1": 5, "w2:1": 2})
    result = pleas(spec, models, plan, apply=apply, data=data, ridge=0)
    assert_solves(mlp_setting, plan, 0, result)
    assert not result.info.rank_deficient.any()


@pytest.mark.fast
def test_where_data_leave_a_choice_the_least_change_is_made(mlp_setting):
    spec, models, apply, _ = mlp_setting
    plan, few = partial_plan(spec, {"w1:1": 5, "w2:1": 2}), (spec, models, apply, [X[:6]])
    with pytest.warns(UserWarning, match=r"2 of 3 layers have fewer equations than unknowns \(layer 'w2': 6 for 12\)"):
        result = pleas(spec, models, plan, apply=apply, data=few[3], ridge=0)
    assert_solves(few, plan, 0, result)
    assert result.info.rank_deficient.tolist() == [False, True, True]


def test_shared_units_take_the_results_of_the_samples_owner(mlp_setting):
    spec, models, apply, data = mlp_setting
    plan, owners = partial_plan(spec, {"w1:1": 5, "w2:1": 2}), [np.arange(len(x)) % 3 % 2 for x in data]
    result = pleas(spec, models, plan, apply=apply, data=data, ridge=1e-3, targets="owner", owners=owners)

    def target(wide, out, outputs):
        own, who = [mean_units(wide, out, [y], [m], -1) for m, y in enumerate(outputs)], np.concatenate(owners)
        both = wide.owners(out).all(0)
        return jnp.where(both, jnp.where(who[:, None] == 0, own[0], own[1]), own[0] + own[1])

    assert_solves(mlp_setting, plan, 1e-3, result, target)


def test_units_in_which_the_owner_has_no_part_take_the_mean(mlp_setting, drawn):
    spec, models, apply, data = mlp_setting
    three, owners = (spec, [*models, drawn(MLP, 2)], apply, data), [np.arange(len(x)) % 3 for x in data]
    alike = np.arange(6)
    labels = {"w1:1": (np.arange(8),) * 3, "w2:1": (alike, np.array([0, 1, 2, 6, 6, 7]), alike + 2)}
    plan = Plan(labels, {"w1:1": 8, "w2:1": 8})
    result = pleas(spec, three[1], plan, apply=apply, data=data, ridge=1e-2, targets="owner", owners=owners)

    def target(wide, out, outputs):
        own, who = (
            [np.asarray(mean_units(wide, out, [y], [m], -1)) for m, y in enumerate(outputs)],
            np.concatenate(owners),
        )
        found, has = np.zeros_like(own[0]), wide.owners(out)
        for row, unit in np.ndindex(found.shape):
            parts = [own[m][row, unit] for m in range(3) if has[m, unit]]
            found[row, unit] = own[who[row]][row, unit] if has[who[row], unit] else np.mean(parts)
        return found

    assert_solves(three, plan, 1e-2, result, target)


def test_clusters_of_units_are_fitted_like_pairs(mlp_setting):
    spec, models, apply, data = mlp_setting
    plan = zip_plan(spec, models, apply=apply, data=data, widths={"w1:1": 6, "w2:1": 8}, within=0.5)
    result = pleas(spec, models, plan, apply=apply, data=data, ridge=1e-2)
    assert_solves(mlp_setting, plan, 1e-2, result)
    assert (result.info.after <= result.info.before + 1e-9).all()


def test_three_models_are_fitted_together(mlp_setting, drawn):
    spec, models, apply, data = mlp_setting
    three = (spec, [*models, drawn(MLP, 2)], apply, data)
    plan = partial_plan(spec, {"w1:1": 5, "w2:1": 2}, models=3)
    assert_solves(three, plan, 1e-2, pleas(spec, three[1], plan, apply=apply, data=data, ridge=1e-2))


# other inputs than the parents'


def wide_features(params, wide, x):
    """The inputs of all layers of the merged MLP; without norms it is a wider MLP."""
    h1 = jax.nn.relu(x @ params["w1"] + params["b1"])
    return {"w1": x, "w2": h1, "w3": jax.nn.relu(h1 @ params["w2"] + params["b2"])}


def test_sequential_layers_are_fitted_on_what_the_merged_network_makes(mlp_setting):
    spec, models, apply, data = mlp_setting
    plan = partial_plan(spec, {"w1:1": 5, "w2:1": 2})
    wide, result = Wide(spec, plan), pleas(spec, models, plan, apply=apply, data=data, mode="sequential", ridge=1e-2)
    prior = wide_average(wide, models, contracted_axes(apply, models[0], X))
    seen = wide_features(result.models[0], wide, X)
    for name in result.info.layers:
        x, y, into, out = posed(wide, models, apply, X, name)
        x[:, : seen[name].shape[1]] = seen[name]
        penalty = np.zeros(x.shape[1])
        penalty[: seen[name].shape[1]] = 1e-2 * np.square(seen[name]).sum(0).mean()
        w0, w = matrix_of(prior, name), matrix_of(result.models[0], name)
        np.testing.assert_allclose(w, best(x, y, into, out, w0, penalty), rtol=1e-3, atol=1e-3)


def test_separate_fits_of_a_plain_merge_are_regmean(mlp_setting):
    spec, models, apply, data = mlp_setting
    result = pleas(spec, models, partial_plan(spec, {}), apply=apply, data=data, mode="separate", ridge=0)
    inputs = [wide_features(p, None, X) for p in models]
    grams = [np.asarray(x["w3"], np.float64).T @ np.asarray(x["w3"], np.float64) for x in inputs]
    wanted = np.linalg.solve(sum(grams), sum(g @ p["w3"] for g, p in zip(grams, models, strict=True)))
    np.testing.assert_allclose(result.models[0]["w3"], wanted, rtol=1e-3, atol=1e-4)


@pytest.mark.fast
def test_separate_fits_of_shared_outputs_let_every_models_own_units_add_up(mlp_setting):
    """Rows of model m: shared inputs as they are, its own ones twice, as the merged output is the mean of two."""
    spec, models, apply, data = mlp_setting
    plan = partial_plan(spec, {"w1:1": 5, "w2:1": 2})
    result = pleas(spec, models, plan, apply=apply, data=data, mode="separate", ridge=0)
    inputs = [np.asarray(wide_features(p, None, X)["w3"], np.float64) for p in models]
    rows = [np.zeros((len(X), 10)) for _ in models]
    for m, x in enumerate(inputs):
        rows[m][:, plan.labels["w2:1"][m]] = x
        rows[m][:, 2:] *= 2
    targets = [x @ p["w3"] for x, p in zip(inputs, models, strict=True)]
    wanted = np.linalg.lstsq(np.concatenate(rows), np.concatenate(targets))[0]
    np.testing.assert_allclose(result.models[0]["w3"], wanted, rtol=1e-3, atol=1e-4)


# details of the fit


def test_the_ridge_follows_the_samples_or_what_is_held_back(mlp_setting):
    spec, models, apply, _ = mlp_setting
    plan = partial_plan(spec, {"w1:1": 5, "w2:1": 2})
    fit = partial(pleas, spec, models, plan, apply=apply)
    assert (fit(data=[X]).info.ridge == 0.1).all()
    assert (fit(data=[X, X]).info.ridge == 0.01).all()
    chosen = fit(data=[X[i::4] for i in range(4)], ridge="held_back")
    assert set(chosen.info.ridge) <= {1e-4, 1e-3, 1e-2, 1e-1, 1.0}
    assert (chosen.info.rows == 90).all()  # of the last batch only the errors are taken
    with pytest.raises(ValueError, match="'held_back' chooses by batches held back; give two batches of data or more"):
        fit(data=[X], ridge="held_back")


def test_random_positions_of_images_will_do(cnn_setting):
    spec, models, apply, data = cnn_setting
    fit = partial(pleas, spec, models, partial_plan(spec, {}), apply=apply, data=data, keep=["w"], ridge=1e-3)
    every, some = fit(), fit(positions=12, key=jax.random.key(0))
    assert every.info.rows.tolist() == [30 * 36, 30 * 9]
    assert some.info.rows.tolist() == [30 * 12, 30 * 9]
    assert np.abs(some.models[0]["k1"] - every.models[0]["k1"]).max() < 0.1
    same = fit(positions=12, key=jax.random.key(0))
    np.testing.assert_array_equal(some.models[0]["k1"], same.models[0]["k1"])


@pytest.mark.fast
@pytest.mark.parametrize("backend", [np, jnp])
def test_leaves_stay_of_their_kind_and_dtype(mlp_setting, backend):
    spec, models, apply, data = mlp_setting
    half = [{n: backend.asarray(x, jnp.bfloat16 if n == "w2" else None) for n, x in p.items()} for p in models]
    plan = partial_plan(spec, {"w1:1": 5, "w2:1": 2})

    def mixed(p, x):
        return apply({**p, "w2": p["w2"].astype(jnp.float32)}, x)

    result = pleas(spec, half, plan, apply=mixed, data=data)
    for name, leaf in result.models[0].items():
        assert isinstance(leaf, type(half[0][name]))
        assert leaf.dtype == half[0][name].dtype
    reference = pleas(spec, models, plan, apply=apply, data=data)
    np.testing.assert_allclose(result.models[0]["w2"].astype(np.float32), reference.models[0]["w2"], atol=0.02)
