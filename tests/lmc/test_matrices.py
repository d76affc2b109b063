"""Which leaves are matrices, how they are flattened, and that they can be put back."""

import jax.numpy as jnp
import numpy as np
import pytest

from permjax.lmc.matrices import decompose, layouts, matrices, part, rank, with_matrices
from permjax.symmetry.spec import Group, Leaf, Of, PermutationSpec

pytestmark = pytest.mark.fast

AXES = {
    "dense": (None, "h"),
    "bias": ("h",),
    "mean": ("h", None),
    "HWIO": (None, None, "h", "c"),
    "stem HWIO": (None, None, None, "c"),
    "OIHW": ("c", "h", None, None),
    "position": (None, None, "h"),
}
SIZES = {"h": 4, "c": 5}
SPEC = PermutationSpec.from_axes(
    {name: tuple(SIZES.get(g, 3) for g in axes) for name, axes in AXES.items()}, AXES, roles={"mean": "statistic"}
)
RNG = np.random.default_rng(0)
MODEL = {leaf.name: RNG.standard_normal(leaf.shape).astype(np.float32) for leaf in SPEC.leaves}


def heads(layers: int | None = None) -> PermutationSpec:
    """Projections of attention as Flax stores them: [width, heads, places], with layers before them or not."""
    index = () if layers is None else (Group("layer", layers),)
    head, place = Group("head", 2, tuple(g.name for g in index)), Group("place", 3, (*(g.name for g in index), "head"))
    stream = Group("stream", 5)
    front = tuple(Of(g.name) for g in index)
    axes = {
        "query": (*front, Of("stream"), Of("head"), Of("place")),
        "out": (*front, Of("head"), Of("place"), Of("stream")),
        "bias": (*front, Of("head"), Of("place")),
    }
    sizes = {g.name: g.size for g in (*index, head, place, stream)}
    leaves = tuple(Leaf(name, tuple(sizes[a.group] for a in found), found) for name, found in axes.items())
    return PermutationSpec((head, place, stream), leaves, index)


def test_convolutions_keep_their_output_units_as_rows_in_either_order_and_vectors_and_statistics_are_left_out():
    shapes = {name: w.shape for name, w in matrices(SPEC, MODEL).items()}
    expected = {"dense": (4, 3), "HWIO": (5, 36), "stem HWIO": (5, 27), "OIHW": (5, 36), "position": (4, 9)}
    assert shapes == expected
    flat = matrices(SPEC, MODEL, "*IO*")
    np.testing.assert_array_equal(flat["HWIO"][2].reshape(3, 3, 4), MODEL["HWIO"][:, :, :, 2])


def test_the_axes_of_heads_are_one_side_of_a_projection_and_its_bias_is_a_vector(draw_params):
    spec = heads()
    model = draw_params(spec)
    found = matrices(spec, model)
    assert {name: sorted(w.shape) for name, w in found.items()} == {"query": [5, 6], "out": [5, 6]}
    sides = {layout.leaf: {layout.rows, layout.columns} for layout in layouts(spec, model)}
    assert sides == {"query": {(0,), (1, 2)}, "out": {(0, 1), (2,)}}


def test_an_axis_of_layers_gives_a_matrix_for_every_layer(draw_params):
    spec = heads(layers=3)
    model = draw_params(spec)
    found = matrices(spec, model)
    assert [*found] == [f"{name}[{i}]" for name in ("out", "query") for i in range(3)]
    np.testing.assert_array_equal(found["query[1]"].ravel(), model["query"][1].reshape(5, 6).T.ravel())


@pytest.mark.parametrize("layers", [None, 3])
def test_matrices_can_be_put_back(draw_params, layers):
    spec = heads(layers)
    model = draw_params(spec)
    doubled = with_matrices(spec, model, {name: 2 * w for name, w in matrices(spec, model).items()})
    np.testing.assert_array_equal(doubled["query"], 2 * model["query"])
    np.testing.assert_array_equal(doubled["out"], 2 * model["out"])
    assert doubled["bias"] is model["bias"]


def test_leaves_keep_their_dtype_and_place_while_matrices_are_float32_or_wider():
    model = MODEL | {"dense": jnp.ones((3, 4), jnp.bfloat16), "HWIO": MODEL["HWIO"].astype(np.float64)}
    found = matrices(SPEC, model)
    assert found["dense"].dtype == np.float32
    assert found["HWIO"].dtype == np.float64
    back = with_matrices(SPEC, model, found)
    assert isinstance(back["dense"], type(model["dense"]))
    assert back["dense"].dtype == jnp.bfloat16
    assert isinstance(back["HWIO"], np.ndarray)


def test_the_parts_of_a_decomposition_add_up_to_the_matrix_and_the_rank_is_the_numerical_one():
    w = RNG.standard_normal((7, 3)) @ RNG.standard_normal((3, 9))
    found = decompose(w)
    np.testing.assert_allclose(part(found, 0, 2) + part(found, 2, None), w, atol=1e-13)
    assert rank(found) == 3
    assert rank(decompose(np.zeros((4, 6)))) == 0


def test_models_that_do_not_fit_or_have_no_matrix_are_refused():
    with pytest.raises(ValueError, match="No leaf that matches 'b\\*' is a weight matrix"):
        matrices(SPEC, MODEL, "b*")
    with pytest.raises(ValueError, match="Leaf 'dense' of the model holds 12 NaN"):
        matrices(SPEC, MODEL | {"dense": np.full((3, 4), np.nan, np.float32)})
    with pytest.raises(ValueError, match="lacks the leaf 'dense'"):
        matrices(SPEC, {name: leaf for name, leaf in MODEL.items() if name != "dense"})
