"""Single rules at their edges: each program is a hidden layer of 8 units with something done to it in the middle."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import zoo
from jax import lax

from permjax.symmetry.capture import capture
from permjax.symmetry.trace import trace_spec
from permjax.symmetry.verify import SpecError, verify

pytestmark = [pytest.mark.fast, pytest.mark.usefixtures("ordinary_promotion")]

DENSE = {"w1": zoo.shape(4, 8), "w2": zoo.shape(8, 3)}
X = zoo.image(2, 4)
KEY = jax.random.key(3)


def around(middle):
    return lambda p, x: middle(jnp.tanh(x @ p["w1"])) @ p["w2"]


def sizes(middle):
    return [g.size for g in trace_spec(around(middle), DENSE, X, verify=False).groups]


def take(h, index):
    return h + jnp.take_along_axis(h, index[:, None], -1)


def scale(h, positions):
    return h * positions.astype(h.dtype)[:, None]


def from_first_column(h):
    numbers = lax.GatherDimensionNumbers(offset_dims=(0,), collapsed_slice_dims=(1,), start_index_map=(0,))
    return h + lax.gather(h, jnp.zeros((1,), jnp.int32), numbers, slice_sizes=(2, 1))[:, None]


def onto_first_column(h):
    numbers = lax.ScatterDimensionNumbers(
        update_window_dims=(0,), inserted_window_dims=(1,), scatter_dims_to_operand_dims=(0,)
    )
    return lax.scatter_add(h, jnp.zeros((1,), jnp.int32), jnp.ones((2,), h.dtype), numbers)


def each_unit(h, start, total):
    return total + start.astype(h.dtype) * lax.dynamic_slice(h, (np.uint32(0), start), (2, 1))


def scanned(h):
    def step(carry, _):
        return (carry[0] + np.uint32(1), each_unit(h, *carry)), None

    return h * lax.scan(step, (jnp.uint32(0), jnp.zeros((2, 1), h.dtype)), None, length=8)[0][1]


def while_scanned(h):
    def step(carry):
        return carry[0] + np.uint32(1), each_unit(h, *carry)

    return h * lax.while_loop(lambda c: c[0] < 8, step, (jnp.uint32(0), jnp.zeros((2, 1), h.dtype)))[1]


def shifted_in_a_loop(h):
    def step(i, total):
        return total + jnp.take_along_axis(h, jnp.minimum(jnp.argmax(h, -1) + i, 7)[:, None], -1)

    return h + lax.fori_loop(0, 8, step, jnp.zeros((2, 1), h.dtype))


def as_booleans(h):
    truth = jnp.arange(8).astype(bool)
    return h @ (truth[:, None] == truth[None]).astype(h.dtype)


@pytest.mark.parametrize(
    "middle",
    [
        scanned,
        while_scanned,
        shifted_in_a_loop,
        as_booleans,
        from_first_column,
        onto_first_column,
        lambda h: take(h, jnp.argmax(h > 0, -1)),
        lambda h: take(h, jnp.argmax(jnp.round(h).astype(int), -1)),
        lambda h: h + h[0][lax.top_k((h[0] > 0).astype(jnp.int32), 3)[1]].sum(),
        lambda h: h + lax.sort(((h > 0).astype(int), h), num_keys=1)[1][:, :1],
        lambda h: scale(h, lax.dynamic_slice(jnp.argmax(h, -1) + 8, (jnp.argmax(h.sum(1)),), (1,))),
        lambda h: scale(h, (jnp.argmax(h, -1) + 8)[jnp.array([1, 0])]),
        lambda h: scale(h, lax.sort((h.sum(1), jnp.argmax(h, -1) + 8), num_keys=1)[1]),
        lambda h: scale(h, lax.tile((jnp.argmax(h, -1) + 8)[None], (2, 1))[0]),
    ],
)
def test_what_depends_on_the_place_of_a_unit_pins_it(middle):
    assert sizes(middle) == []


@pytest.mark.parametrize(
    "middle",
    [
        lambda h: jnp.concatenate([h, lax.slice(h, (0, 3), (2, 3), (1, 2))], -1),
        lambda h: h + h[:0].reshape(0, 4, 2).sum() + jnp.zeros((0, 3)).reshape(0, 5).sum(),
        lambda h: lax.associative_scan(jnp.add, h, axis=0),
        lambda h: lax.composite(lambda z: z * 2, name="my.double")(h),
        lambda h: h * jax.random.bernoulli(KEY, 0.5, (2, 1)),
        lambda h: jnp.polyval(jnp.array([1.0, 2.0, 3.0]), h) + jnp.hypot(h, h),
        lambda h: h.at[:, :].subtract(1.0),
        lambda h: lax.bitcast_convert_type(lax.bitcast_convert_type(h, jnp.int32), jnp.float32),
        lambda h: h + h[0][jnp.lexsort(((h[0] > 0).astype(int), h[0]))][0],
    ],
)
def test_unusual_primitives_leave_units_free(middle):
    assert sizes(middle) == [8]


@pytest.mark.parametrize(
    "middle",
    [
        lambda h: h + lax.associative_scan(jnp.add, h, axis=1),
        lambda h: h + lax.bitcast_convert_type(h, jnp.uint16).sum(-1).astype(h.dtype),
        lambda h: h + sum(lax.reduce_window((h, h), (0.0, 0.0), both, (1, 2), (1, 1), "SAME")),
        lambda h: h * jax.random.bernoulli(KEY, 0.5, (2, 8)),
    ],
)
def test_primitives_of_odd_arity_or_shape_are_sound(middle):
    assert sizes(middle) == []


def both(a, b):
    return a[0] + b[0], a[1] + b[1]


def test_a_group_is_never_per_itself():
    def shuffled(h):
        return h.reshape(2, 2, 2, 2).transpose(0, 2, 1, 3).reshape(2, 8) + h

    spec = trace_spec(around(shuffled), DENSE, X)
    assert sorted(g.size for g in spec.groups) == [2, 2]
    assert all(g.name not in g.per for g in spec.groups)


def test_verification_moves_every_unit():
    spec = trace_spec(around(lambda h: h), DENSE, X, verify=False)
    for seed in range(8):
        with pytest.raises(SpecError, match="w1:1"):
            verify(around(lambda h: h + h[:, :1]), DENSE, spec, X, seed=seed)


def test_verification_sees_outputs_that_stop_being_finite():
    def logarithm(p, x):
        return jnp.log(p["w1"]).sum() + jnp.log(p["s"] - 1)[0] + x.sum()

    params = {"w1": zoo.shape(4), "s": zoo.shape(8)}
    spec = trace_spec(lambda p, x: (p["w1"].sum() + p["s"].sum()) * x, params, X, verify=False)
    assert any(np.isinf(_error(logarithm, params, spec, seed)) for seed in range(4))


def _error(apply, params, spec, seed):
    try:
        return verify(apply, params, spec, X, seed=seed).verification.float64
    except SpecError as error:
        return np.inf if "inf" in str(error) else 0.0


def test_complex_outputs_are_compared_in_both_parts():
    def imaginary(p, x):
        return 1j * (jnp.tanh(x @ p["w1"]) * jnp.arange(8.0)).sum() + 0 * p["w2"].sum()

    spec = trace_spec(around(lambda h: h), DENSE, X, verify=False)
    with pytest.raises(SpecError, match="w1:1"):
        verify(imaginary, DENSE, spec, X)


@pytest.mark.parametrize(
    "extra",
    [{"scale": 2.0}, {"scale": jax.ShapeDtypeStruct((), jnp.complex64)}, {"scale": jnp.array(True)}, {"scale": 3}],
)
def test_leaves_may_be_python_scalars_complex_or_booleans(extra):
    params = {"w1": jnp.ones((4, 8)), "w2": jnp.ones((8, 3)), **extra}
    spec = trace_spec(lambda p, x: jnp.tanh(x @ p["w1"]) * p["scale"] @ p["w2"], params, X)
    assert [g.size for g in spec.groups] == [8]


def test_random_keys_may_be_leaves_and_inputs():
    def noisy(p, x, key):
        return jnp.tanh(x @ p["w1"]) @ p["w2"] + jax.random.normal(key, (2, 3)) + jax.random.normal(p["key"], (2, 3))

    params = {"w1": jnp.ones((4, 8)), "w2": jnp.ones((8, 3)), "key": KEY}
    for key in (KEY, jax.eval_shape(lambda: KEY)):
        assert [g.size for g in trace_spec(noisy, params, X, key).groups] == [8]


def test_numpy_integers_that_a_function_has_met_in_32_bits_do_not_stop_verification():
    index = np.array([0, 1, 1])

    def picked(p, x):
        return jnp.take(jnp.tanh(x @ p["w1"]) @ p["w2"], index, axis=1)

    params = {"w1": jnp.ones((4, 8)), "w2": jnp.ones((8, 3))}
    closed = jax.make_jaxpr(picked)(params, X)
    spec = trace_spec(picked, params, X)
    assert spec.verification.float64 <= spec.verification.tolerance
    assert jax.jit(picked)(params, X).dtype == closed.out_avals[0].dtype


def test_capture_takes_fixed_indices_and_empty_batches():
    def members(p, x):
        return jax.vmap(lambda one, two: jnp.tanh(x @ one) @ two)(p["w1"], p["w2"])

    shapes = {"w1": jnp.ones((5, 4, 8)), "w2": jnp.ones((5, 8, 3))}
    for batch in (2, 0):
        x = jnp.ones((batch, 4))
        found = capture(members, trace_spec(members, shapes, X, verify=False), shapes, x)
        assert found.groups["w1:2"]["w1"].shape == (batch, 5, 8)
