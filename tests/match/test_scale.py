"""Weight matching of models that are large, of half precision, or in files: no wider copies, nothing done twice."""

import tracemalloc

import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from permjax.action import permute
from permjax.io.checkpoint import open_checkpoint
from permjax.match import problem as problems
from permjax.match import weights
from permjax.match.weights import weight_matching
from permjax.symmetry.blocks import unfold
from permjax.symmetry.spec import PermutationSpec

pytestmark = pytest.mark.fast


def match(spec, *models, **hyper):
    return weight_matching(spec, models, key=jax.random.key(0), **hyper)


def assert_same_permutations(one, two):
    for group in one:
        np.testing.assert_array_equal(one[group], two[group], err_msg=group)


@pytest.mark.parametrize("seed", range(3))
def test_half_precision_decides_like_its_float32_copy(network, draw_params, seed):
    half = [
        {name: leaf.astype(ml_dtypes.bfloat16) for name, leaf in draw_params(network, s).items()}
        for s in (seed, seed + 100)
    ]
    single = [{name: leaf.astype(np.float32) for name, leaf in model.items()} for model in half]
    one, two = match(network, *half), match(network, *single)
    assert_same_permutations(one.plan.permutations(1), two.plan.permutations(1))
    np.testing.assert_allclose(one.info.objective, two.info.objective, rtol=1e-12)


def test_leaves_in_a_file_are_matched_like_arrays(networks, plant, tmp_path):
    spec = networks["grouped queries"]
    a, b, truth = plant(spec, 1, noise=0.1)
    for name, model in (("a", a), ("b", b)):
        save_file(model, tmp_path / f"{name}.safetensors")
    lazy = [dict(open_checkpoint(tmp_path / f"{name}.safetensors")) for name in "ab"]
    result = match(spec, *lazy)
    assert_same_permutations(result.plan.permutations(1), truth)
    expected = match(spec, a, b)
    np.testing.assert_array_equal(result.info.objective, expected.info.objective)
    for name, leaf in expected.models[1].items():
        np.testing.assert_array_equal(result.models[1][name], leaf)


def test_matching_needs_little_more_memory_than_its_result(draw_params):
    spec = transformer(width=512, hidden=1024, layers=6, words=8192)
    a = {name: leaf.astype(ml_dtypes.bfloat16) for name, leaf in draw_params(spec).items()}
    order = {g.name: np.random.default_rng(0).permutation(g.size) for g in spec.groups}
    b = permute(spec, order, a)
    tracemalloc.start()
    result = match(spec, a, b)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert result.info.l2_after[0] == 0
    model = sum(leaf.nbytes for leaf in a.values())
    assert peak < 1.3 * model + sum(4 * g.size**2 for g in spec.groups)


def transformer(width: int, hidden: int, layers: int, words: int) -> PermutationSpec:
    """An embedding and the hidden layers behind it."""
    shapes: dict = {"embed": (words, width)}
    axes: dict = {"embed": (None, "res")}
    for i in range(layers):
        shapes |= {f"{i}/up": (width, hidden), f"{i}/down": (hidden, width)}
        axes |= {f"{i}/up": ("res", f"ff{i}"), f"{i}/down": (f"ff{i}", "res")}
    return PermutationSpec.from_axes(shapes, axes)


def test_gram_matrices_that_nothing_can_change_are_computed_once(write_chain, draw_params, monkeypatch):
    spec, seen = write_chain((5, 7, 6, 3)), []
    a, b = draw_params(spec, 1), draw_params(spec, 2)

    def gram(*args):
        seen.append(args[0].shape)
        return problems.HOST.gram(*args)

    monkeypatch.setattr(weights, "HOST", problems.HOST._replace(gram=gram))
    info = match(spec, a, b, restarts=4).info
    assert info.solves[0] > 8
    assert seen.count((5, 7)) == seen.count((6, 3)) == 1
    assert seen.count((7, 6)) > 2


def test_a_device_computes_what_the_host_does(networks, draw_params, draw_permutations):
    spec, (host, device) = networks["grouped queries"], (problems.HOST, problems.DEVICE)
    (block,) = unfold(spec, ("q",))
    rows = block.rows(draw_permutations(spec))
    leaves = [draw_params(spec, seed)["q"].astype(ml_dtypes.bfloat16) for seed in (1, 2)]
    a, b = (host.view(block.layout, leaf) for leaf in leaves)
    x, y = (device.view(block.layout, jax.numpy.asarray(leaf)) for leaf in leaves)
    b, y = host.gather(block.layout.outer, rows, b), device.gather(block.layout.outer, rows, y)
    np.testing.assert_array_equal(b, y)
    assert device.inner(x, y) == pytest.approx(host.inner(a, b), rel=1e-12)
    assert device.gap(x, y) == pytest.approx(host.gap(a, b), rel=1e-12)
    np.testing.assert_allclose(device.gram(x, y, (), (1, 2)), host.gram(a, b, (), (1, 2)), rtol=1e-5, atol=1e-5)
