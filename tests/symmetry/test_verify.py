"""Verification accepts symmetries and rejects everything that merely looks like one."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import zoo

from permjax import tree
from permjax.symmetry.spec import Fixed, Group, Leaf, Of, PermutationSpec, Product
from permjax.symmetry.trace import trace_spec
from permjax.symmetry.verify import SpecError, equivalence_error, verify

pytestmark = [pytest.mark.fast, pytest.mark.usefixtures("ordinary_promotion")]


def shapes(params):
    return {name: tuple(leaf.shape) for name, leaf in tree.flatten(params).items()}


def change(error):
    """The largest relative change that the message reports."""
    return float(str(error.value).rsplit("change it by ", 1)[1].split(". ")[0])


def test_a_rotary_plane_swap_is_rejected():
    case = zoo.llama_case(queries=1)
    plane = Product((Fixed(2), Fixed(2), Of("plane")))
    hand = PermutationSpec.from_axes(shapes(case.params), {"q": (plane, None), "k": (plane, None)}, sizes={"plane": 2})
    with pytest.raises(SpecError, match="plane") as error:
        verify(case.apply, case.params, hand, *case.inputs)
    assert change(error) > 1e-2


def test_a_query_head_swap_across_kv_groups_is_rejected():
    case = zoo.llama_case(rotate=None)
    heads = Product((Of("heads"), Fixed(4)))
    hand = PermutationSpec.from_axes(shapes(case.params), {"q": (heads, None), "o": (None, heads)}, sizes={"heads": 8})
    with pytest.raises(SpecError, match="heads") as error:
        verify(case.apply, case.params, hand, *case.inputs)
    assert change(error) > 1e-2


def test_a_mistyped_hand_spec_is_rejected_by_name():
    case = zoo.mlp()
    good = trace_spec(case.apply, case.params, *case.inputs, verify=False)
    axes = {leaf.name: leaf.axes for leaf in good.leaves}
    axes["params/Dense_1/kernel"] = (None, axes["params/Dense_1/kernel"][1])
    hand = PermutationSpec.from_axes(shapes(case.params), axes)
    with pytest.raises(SpecError, match="'params/Dense_0/kernel:1'") as error:
        verify(case.apply, case.params, hand, *case.inputs)
    assert change(error) > 1e-2
    assert "Dense_1/kernel:1'" not in str(error.value)


@pytest.mark.parametrize("name", zoo.COUNTER_EXAMPLES)
def test_the_counter_examples_are_rejected_as_per(name):
    apply, sizes, axes = zoo.COUNTER_EXAMPLES[name]
    if name == "reversed":
        axes = {k: tuple(Fixed(3) if a == "H" else a for a in v) for k, v in axes.items()}
    hand = _per(sizes, axes, name)
    params = {k: zoo.shape(*s) for k, s in sizes.items()}
    with pytest.raises(SpecError, match="D") as error:
        verify(apply, params, hand, zoo.image(2, 4))
    assert change(error) > 1e-2


def _per(sizes, axes, name):
    if name != "reversed":
        return PermutationSpec.from_axes(sizes, axes, per={"D": ("H",)})
    leaves = {
        "w": (Of("layer"), Fixed(4), Of("D")),
        "o": (Of("layer"), Of("D"), Fixed(4)),
    }
    found = tuple(Leaf(k, sizes[k], leaves[k]) for k in sizes)
    return PermutationSpec((Group("D", 5, ("layer",)),), found, (Group("layer", 3),))


def test_a_group_without_effect_is_marked_unverified():
    def apply(p, x):
        return x @ p["w"] + p["b"].sum()

    params = {"w": zoo.shape(4, 3), "b": zoo.shape(5)}
    spec = trace_spec(apply, params, jnp.ones((2, 4)))
    assert spec.unverified == ("b:0",)
    assert "not verified" in spec.explain()


def test_the_equivalence_error_of_a_trained_precision_model_is_small():
    case = zoo.mlp()
    params = jax.tree.map(
        lambda a: jnp.asarray(np.random.default_rng(0).normal(size=a.shape), jnp.float32), case.params
    )
    spec = trace_spec(case.apply, case.params, *case.inputs)
    assert equivalence_error(case.apply, params, spec, jax.random.key(1), *case.inputs) < 1e-5
