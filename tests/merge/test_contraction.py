"""One contraction of a merged network: canonical forms, blocks, and what each view gets, in every layout."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from permjax import tree
from permjax.merge.contraction import Contraction, contraction
from permjax.merge.initial import contracted_axes, wide_average
from permjax.merge.partial import partial_plan
from permjax.merge.wide import Wide
from permjax.plan import Plan
from permjax.symmetry.program import steps, survey
from permjax.symmetry.spec import Fixed, Group, Leaf, Of, PermutationSpec, Product

pytestmark = pytest.mark.fast

A, B, E = (Of(name) for name in "abe")


class Layout(NamedTuple):
    """A function with the one leaf `w`, its input's axes and its leaf's."""

    apply: object
    inputs: tuple
    axes: tuple


def convolve(numbers, groups=1, **options):
    def apply(p, x):
        return jax.lax.conv_general_dilated(
            x, p["w"], options.get("strides", (1, 1)), options.get("padding", "SAME"), dimension_numbers=numbers,
            rhs_dilation=options.get("dilation"), feature_group_count=groups,
        )  # fmt: skip

    return apply


SIZES = {"a": 4, "b": 6, "e": 3, "i": 2}
SPEC = PermutationSpec(tuple(Group(*item) for item in SIZES.items()), ())
F3 = Fixed(3)
LAYOUTS = {
    "rows times columns": Layout(lambda p, x: x @ p["w"], (Fixed(5), A), (A, B)),
    "torch": Layout(lambda p, x: x @ p["w"].T, (Fixed(5), A), (B, A)),
    "leaf first": Layout(lambda p, x: p["w"] @ x, (A, Fixed(5)), (B, A)),
    "vector": Layout(lambda p, x: x @ p["w"], (A,), (A, B)),
    "heads out": Layout(lambda p, x: jnp.einsum("bta,ahd->bthd", x, p["w"]), (Fixed(5), F3, A), (A, B, F3)),
    "heads in": Layout(lambda p, x: jnp.einsum("bhd,hdo->bo", x, p["w"]), (Fixed(5), A, F3), (A, F3, B)),
    "heads in, scattered": Layout(lambda p, x: jnp.einsum("hbd,odh->ob", x, p["w"]), (A, Fixed(5), F3), (B, F3, A)),
    "experts": Layout(lambda p, x: jnp.einsum("ebi,eio->ebo", x, p["w"]), (E, Fixed(5), F3), (E, F3, Fixed(4))),
    "experts, leaf first": Layout(lambda p, x: jnp.einsum("oie,bei->eob", p["w"], x), (Fixed(5), E, F3), (F3, F3, E)),
    "convolution": Layout(convolve(("NHWC", "HWIO", "NHWC")), (F3, Fixed(5), Fixed(5), A), (F3, F3, A, B)),
    "convolution, torch": Layout(
        convolve(("NCHW", "OIHW", "NCHW"), strides=(2, 1), padding=[(1, 0), (2, 1)], dilation=(1, 2)),
        (F3, A, Fixed(5), Fixed(6)),
        (B, A, F3, Fixed(2)),
    ),
    "depthwise": Layout(
        convolve(("NHWC", "HWIO", "NHWC"), groups=4), (F3, Fixed(5), Fixed(5), A), (F3, F3, Fixed(1), A)
    ),
    "grouped": Layout(
        convolve(("NHWC", "HWIO", "NHWC"), groups=3),
        (F3, Fixed(5), Fixed(5), Product((E, Fixed(2)))),
        (F3, F3, Fixed(2), Product((E, Fixed(4)))),
    ),
}  # fmt: skip


def spec_of(layout: Layout) -> PermutationSpec:
    leaf = Leaf("w", tuple(SPEC.size(axis) for axis in layout.axes), layout.axes)
    return PermutationSpec(SPEC.groups, (leaf,))


def drawn(shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def example(layout: Layout, seed=0):
    """The leaf and the input of one model."""
    spec = spec_of(layout)
    return drawn(spec.leaf("w").shape, seed), drawn([spec.size(axis) for axis in layout.inputs], seed + 50)


def use_of(layout: Layout, weight, x):
    return next(steps(layout.apply, {"w": weight}, x, fetch=lambda _: weight))


def plans(spec):
    """Merged plainly, partly, not at all, and in clusters; each over two models."""
    widths = {"a": 6, "b": 8, "e": 4, "i": 2}
    rng = np.random.default_rng(7)
    labels = {g: tuple(rng.integers(0, w, SIZES[g]) for _ in (0, 1)) for g, w in widths.items()}
    halves = [partial_plan(spec, ratios=dict.fromkeys("abe", ratio)) for ratio in (0.0, 0.5, 1.0)]
    return [*halves, Plan(labels, widths)]


def averaged(wide: Wide, layout: Layout, weights):
    """Wide weights with zeros between what no model has in common."""
    x = drawn([wide.spec.size(axis) for axis in layout.inputs])
    summed = contracted_axes(layout.apply, {"w": weights[0]}, x)
    return wide_average(wide, [{"w": w} for w in weights], summed)["w"]


@pytest.mark.parametrize("name", LAYOUTS)
def test_the_canonical_way_round_is_the_equation(name):
    layout = LAYOUTS[name]
    spec, (weight, x) = spec_of(layout), example(layout)
    use = use_of(layout, weight, x)
    c = contraction(Wide(spec, partial_plan(spec, {})), use)
    y = c.multiply(c.inputs([use.other], (0,)), weight)
    np.testing.assert_allclose(c.result(y, 0), layout.apply({"w": weight}, x), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(c.output(layout.apply({"w": weight}, x)), y, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", LAYOUTS)
def test_weights_are_stored_as_they_are_read(name):
    layout = LAYOUTS[name]
    spec, (weight, x) = spec_of(layout), example(layout)
    for plan in plans(spec):
        wide = Wide(spec, plan)
        c = contraction(wide, use_of(layout, weight, x))
        leaf = np.random.default_rng(1).standard_normal(wide.wide_spec.leaf("w").shape)
        canonical = np.asarray(c.weight(leaf))
        np.testing.assert_allclose(c.stored(canonical, np.zeros_like(leaf)), leaf, rtol=1e-6)


def dense(c: Contraction, x, weight):
    """The canonical output of all entries, zero blocks included."""
    weight = c.weight(weight)
    if c.window is None:
        return jnp.einsum("b...i,bio->b...o" if c.batch else "...i,io->...o", x, weight)
    w = c.window
    numbers = jax.lax.conv_dimension_numbers(x.shape, weight.shape, ("NHWC", "HWIO", "NHWC"))
    return jax.lax.conv_general_dilated(
        x, weight, w.strides, w.padding, w.base, w.dilation, numbers, feature_group_count=c.groups
    )


@pytest.mark.parametrize("name", LAYOUTS)
def test_blocks_leave_nothing_out_and_views_see_their_own(name):
    layout = LAYOUTS[name]
    spec = spec_of(layout)
    (one, x), (two, z) = (example(layout, seed) for seed in (0, 1))
    uses = [use_of(layout, one, x), use_of(layout, two, z)]
    shape = jax.eval_shape(lambda: layout.apply({"w": one}, x)).shape
    for plan in plans(spec)[1::2]:
        wide = Wide(spec, plan)
        c = contraction(wide, uses[0])

        @jax.jit
        def both(others, leaf, c=c, wide=wide):
            inputs = c.inputs(others, wide.views)
            return c.multiply(inputs, leaf), dense(c, inputs, leaf)

        y, expected = both([use.other for use in uses], averaged(wide, layout, [one, two]))
        np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-4)
        assert all(jax.eval_shape(lambda y, m=m, c=c: c.result(y, m), y).shape == shape for m in wide.views)


@pytest.mark.parametrize("name", LAYOUTS)
def test_models_kept_apart_get_what_each_of_them_computes(name):
    layout = LAYOUTS[name]
    spec = spec_of(layout)
    (one, x), (two, z) = (example(layout, seed) for seed in (0, 1))
    wide = Wide(spec, partial_plan(spec, ratios=dict.fromkeys("abe", 1)))
    c = contraction(wide, use_of(layout, one, x))
    pairs = ((one, x), (two, z))

    @jax.jit
    def views(others, leaf):
        y = c.multiply(c.inputs(others, (0, 1)), leaf)
        return [c.result(y, m) for m in (0, 1)]

    found = views([use_of(layout, *pair).other for pair in pairs], averaged(wide, layout, [one, two]))
    for y, (weight, v) in zip(found, pairs, strict=True):
        np.testing.assert_allclose(y, layout.apply({"w": weight}, v), rtol=1e-4, atol=1e-5)


def test_blocks_take_only_the_inputs_that_their_owners_have():
    layout = LAYOUTS["rows times columns"]
    spec, (weight, x) = spec_of(layout), example(layout)
    c = contraction(Wide(spec, partial_plan(spec, {"a": 1, "b": 4})), use_of(layout, weight, x))
    assert [(p.owners, p.columns.tolist(), p.outputs.tolist()) for p in c.pieces] == [
        ((True, True), [0, 1, 2, 3, 4, 5, 6], [0, 1, 2, 3]),
        ((True, False), [0, 1, 2, 3], [4, 5]),
        ((False, True), [0, 4, 5, 6], [6, 7]),
    ]
    assert c.out_size == 8


def test_work_is_that_of_the_blocks():
    layout = LAYOUTS["rows times columns"]
    spec, (weight, x) = spec_of(layout), example(layout)
    wide = Wide(spec, partial_plan(spec, {"a": 1, "b": 4}))
    c = contraction(wide, use_of(layout, weight, x))
    found = jax.make_jaxpr(c.multiply)(jnp.ones((5, 7)), jnp.ones((7, 8)))
    dots = [eqn for eqn in found.eqns if eqn.primitive.name == "dot_general"]
    sizes = sorted(eqn.invars[1].aval.size for eqn in dots)
    assert sizes == [4 * 2, 4 * 2, 7 * 4]


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_dtypes_and_precision_are_those_of_the_equation(dtype):
    layout = Layout(
        lambda p, x: jnp.dot(x, p["w"], precision="highest", preferred_element_type=jnp.float32), (Fixed(5), A), (A, B)
    )
    spec, (weight, x) = spec_of(layout), example(layout)
    use = use_of(layout, weight.astype(dtype), x.astype(dtype))
    c = contraction(Wide(spec, partial_plan(spec, ratios={"a": 0.5, "b": 0.5})), use)
    wide_weight = jnp.ones((6, 9), dtype)
    found = jax.make_jaxpr(c.multiply)(c.inputs([use.other] * 2, (0, 1)), wide_weight)
    assert found.out_avals[0].dtype == jnp.float32
    dots = [eqn for eqn in found.eqns if eqn.primitive.name == "dot_general"]
    assert {eqn.params["precision"] for eqn in dots} == {use.eqn.params["precision"]}


# what cannot be done


def refused(layout: Layout, ratios, message: str):
    spec, (weight, x) = spec_of(layout), example(layout)
    wide = Wide(spec, partial_plan(spec, ratios=ratios))
    with pytest.raises(ValueError, match=message):
        contraction(wide, use_of(layout, weight, x))


def test_matrices_by_unit_are_not_widened_together_with_their_units():
    message = "leaf 'w' holds a separate matrix for every unit of a group that is widened.*ratio 0"
    refused(Layout(lambda p, x: jnp.einsum("ebi,eio->ebo", x, p["w"]), (E, Fixed(5), A), (E, A, B)),
            {"e": 0.5, "a": 0.5}, message)  # fmt: skip
    refused(Layout(lambda p, x: jnp.einsum("ebi,eio->ebo", x, p["w"]), (E, Fixed(5), A), (E, A, B)),
            {"e": 0.5, "b": 0.5}, message)  # fmt: skip


def test_groups_of_a_convolution_must_be_units():
    layout = Layout(
        convolve(("NHWC", "HWIO", "NHWC"), groups=2), (F3, Fixed(5), Fixed(5), Fixed(4)), (F3, F3, Fixed(2), B)
    )
    refused(layout, {"b": 0.5}, "leaf 'w' is a convolution in 2 groups that are no units of its own")


def test_leaves_that_are_images_are_refused():
    layout = Layout(
        lambda p, x: jax.lax.conv_general_dilated(
            p["w"], x, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        ),
        (F3, F3, A, Fixed(2)),
        (F3, Fixed(5), Fixed(5), A),
    )
    refused(layout, {}, "leaf 'w' stands where an image should")


def test_uses_of_a_survey_will_do():
    layout = LAYOUTS["convolution"]
    spec, (weight, x) = spec_of(layout), example(layout)
    (use,) = survey(layout.apply, tree.unflatten({"w": 0}, {"w": weight}), x).uses
    c = contraction(Wide(spec, partial_plan(spec, {})), use)
    assert c.window is not None
    assert c.window.shape == (3, 3)
    assert c.window.padding == ((1, 1), (1, 1))
