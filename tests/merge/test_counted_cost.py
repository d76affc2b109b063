"""What a merged network is said to cost against what its compiled program does and its leaves hold."""

import re
from math import prod

import jax
import numpy as np
import pytest
import zoo

from permjax import tree
from permjax.merge.block_apply import block_apply
from permjax.merge.budget import cost
from permjax.merge.initial import contracted_axes, wide_average
from permjax.merge.wide import Wide
from permjax.symmetry.trace import trace_spec
from permjax.symmetry.work import contractions

pytestmark = pytest.mark.usefixtures("ordinary_promotion")

VIT = {"model_type": "vit", "input_shape": [8, 8, 3], "patch": 4, "width": 24, "depth": 1, "heads": 4, "mlp": 48}
NETS = {
    "mlp": zoo.mlp,
    "resnet with batch norm": zoo.small_resnet,
    "vit": lambda: zoo.of_net(VIT, zoo.image(2, 8, 8, 3), []),
}

_DEFINED = re.compile(r"(%[\w.-]+) = \w+\[([\d,]*)\]")
_PRODUCT = re.compile(r"= \w+\[([\d,]*)\]\S* (dot|convolution)\((%[\w.-]+), (%[\w.-]+)\)(.*)")


def counted_flops(hlo: str) -> int:
    """Two for every multiply-add of the dots and convolutions of a compiled program.

    An output position of a convolution counts taps x C_in / groups products, also where the window leaves the image.
    """
    shapes = {name: _sizes(dims) for name, dims in _DEFINED.findall(hlo)}
    total = 0
    for dims, kind, left, right, rest in _PRODUCT.findall(hlo):
        if kind == "dot":
            contracted = re.search(r"lhs_contracting_dims={([\d,]*)}", rest)
            length = prod(shapes[left][i] for i in _sizes(contracted[1]))
        else:
            kernel = re.search(r"dim_labels=\w+_(\w+)->", rest)[1]
            length = prod(n for n, label in zip(shapes[right], kernel, strict=True) if label != "o")
        total += 2 * prod(_sizes(dims)) * length
    return total


def _sizes(text: str) -> list[int]:
    return [int(part) for part in text.split(",") if part]


def test_the_count_knows_dots_and_convolutions():
    def apply(w, k, x):
        convolved = jax.lax.conv_general_dilated(
            x, k, (2, 2), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"), feature_group_count=2
        )
        return convolved.reshape(5, -1) @ w

    shapes = [zoo.shape(*s) for s in ((4 * 4 * 6, 7), (3, 3, 2, 6), (5, 8, 8, 4))]
    hlo = jax.jit(apply).lower(*shapes).compile().as_text()
    assert counted_flops(hlo) == 2 * (5 * 4 * 4 * 6 * 9 * 2 + 5 * 96 * 7)


@pytest.fixture(scope="module", params=NETS)
def net(request):
    with jax.numpy_rank_promotion("allow"):
        case = NETS[request.param]()
        return case, trace_spec(case.apply, case.params, *case.inputs, verify=False)


@pytest.mark.parametrize("ratio", [0, 0.3, 1])
def test_flops_are_those_of_the_compiled_program(net, plan_of, ratio):
    case, spec = net
    plan = plan_of(spec, ratio)
    shapes = Wide(spec, plan).wide_spec
    wide = tree.map_named(lambda name, leaf: jax.ShapeDtypeStruct(shapes.leaf(name).shape, leaf.dtype), case.params)
    found = cost(contractions(case.apply, spec, case.params, *case.inputs), spec, plan)
    compiled = jax.jit(block_apply(spec, plan, case.apply)).lower(wide, *case.inputs).compile()
    assert found.flops == pytest.approx(counted_flops(compiled.as_text()), rel=0.02)
    parent = jax.jit(case.apply).lower(case.params, *case.inputs).compile()
    assert found.parent_flops == pytest.approx(counted_flops(parent.as_text()), rel=0.02)


@pytest.mark.parametrize("ratio", [0, 0.3, 1])
def test_parameters_are_those_that_are_stored_and_those_that_are_not_zero(net, plan_of, drawn, ratio):
    case, spec = net
    plan, parents = plan_of(spec, ratio), [drawn(case.params, seed) for seed in (0, 1)]
    found = cost((), spec, plan)
    wide = wide_average(Wide(spec, plan), parents, contracted_axes(case.apply, case.params, *case.inputs))
    leaves = jax.tree.leaves(wide)
    assert sum(leaf.size for leaf in leaves) == found.dense_params
    assert sum(np.count_nonzero(leaf) for leaf in leaves) == found.params
    assert sum(leaf.size for leaf in jax.tree.leaves(parents[0])) == found.parent_params
