"""Orthogonal residual alignment: recovery, monotony, and refusal of what is no symmetry."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from permjax.action import permute
from permjax.match.residual import ResidualMatching, random_rotation, residual_matching, rotate
from permjax.match.weights import weight_matching
from permjax.nets.folding import fold_norms
from permjax.nets.registry import build, config_from_dict
from permjax.permutation import random_permutations
from permjax.steps import MergeState
from permjax.symmetry.spec import Of, PermutationSpec, Product
from permjax.symmetry.trace import trace_spec

pytestmark = pytest.mark.fast

CONFIGS = {
    "gpt2": {"model_type": "gpt2", "vocab_size": 20, "n_positions": 8, "n_embd": 16, "n_layer": 1, "n_head": 2},
    "llama": {
        "model_type": "llama", "vocab_size": 20, "max_position_embeddings": 8, "hidden_size": 16,
        "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 2,
    },
}  # fmt: skip
FIXED = {"gpt2": "ones", "llama": "none"}


class Case:
    """A model with folded norms in float64, its function and its symmetry."""

    def __init__(self, name: str):
        self.fixed = FIXED[name]
        rng = np.random.default_rng(0)
        with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
            self.net = build(config_from_dict(CONFIGS[name]))
            like = jax.eval_shape(self.net.init, jax.random.key(0))
            self.raw = {n: rng.standard_normal(x.shape) * (0.4 if x.ndim > 1 else 1.0) for n, x in like.items()}
            self.folded, self.params = fold_norms(self.net, self.raw)
            self.inputs = self.net.example_inputs(2)
            like = {n: jax.ShapeDtypeStruct(x.shape, np.float32) for n, x in self.params.items()}
            self.spec = trace_spec(self.folded.apply, like, *self.inputs, verify=False)
        self.group = max(self.spec.groups, key=lambda g: len(self.spec.members(g.name))).name

    def apply(self, params, tokens):
        with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
            return self.folded.apply(params, tokens)

    def moved(self, noise=0.0, seed=1, turned=True):
        """A permuted, turned and disturbed copy."""
        rng, key = np.random.default_rng(seed), jax.random.key(seed)
        shuffle = {g: np.asarray(p) for g, p in random_permutations(self.spec, key).items()}
        near = {
            n: x + noise * x.std() * rng.standard_normal(x.shape) if np.ptp(x) else x for n, x in self.params.items()
        }
        turn = random_rotation(key, 16, self.fixed) if turned else np.eye(16)
        return permute(self.spec, shuffle, rotate(self.spec, self.group, turn, near))

    @functools.cache  # noqa: B019
    def aligned(self, noise=0.0, turned=True):
        """A copy and what becomes of it."""
        copy = self.moved(noise, turned=turned)
        return copy, self.align(copy)

    def align(self, model, **options):
        options = {"fixed": self.fixed, **options}
        key = jax.random.key(0)
        models = [self.params, model]
        return residual_matching(self.spec, models, key=key, apply=self.apply, inputs=self.inputs, **options)


@pytest.fixture(scope="module")
def cases():
    return {name: Case(name) for name in CONFIGS}


@pytest.fixture(params=CONFIGS)
def case(cases, request):
    return cases[request.param]


@pytest.mark.parametrize("turned", [True, False])
def test_a_planted_rotation_and_permutation_are_undone_exactly(case, turned):
    copy, result = case.aligned(turned=turned)
    for name, leaf in case.params.items():
        np.testing.assert_allclose(result.models[1][name], leaf, atol=1e-11)
    assert result.info.converged.all()
    assert result.info.l2_after[0] < 1e-10 < result.info.l2_before[0]
    plain = weight_matching(case.spec, [case.params, copy], key=jax.random.key(0))
    assert (plain.info.l2_after[0] > 1) == turned  # permutations alone undo permutations alone


def test_no_half_of_a_round_lowers_the_objective(case):
    for noise in (0.0, 0.5, 1.0):
        info = case.aligned(noise)[1].info
        steps = np.diff(info.objective[0])
        assert (steps >= -1e-12 * info.objective[0, -1]).all()
        assert len(info.objective[0]) == 2 * info.rounds[0] + 1
        assert steps[0] > 0


def test_the_objective_is_the_inner_product_of_what_is_returned(case):
    result = case.aligned(0.5)[1]
    inner = sum(float((case.params[n] * result.models[1][n]).sum()) for n in case.params)
    assert result.info.objective[0, -1] == pytest.approx(inner, rel=1e-12)


def test_plan_and_rotations_together_make_the_models(case):
    copy, result = case.aligned(0.5)
    permutations = result.plan.permutations(1)
    np.testing.assert_array_equal(permutations[case.group], np.arange(16))
    again = permute(case.spec, permutations, rotate(case.spec, case.group, result.rotations[1], copy))
    for name, leaf in result.models[1].items():
        np.testing.assert_allclose(again[name], leaf, atol=1e-13)
    np.testing.assert_array_equal(result.rotations[0], np.eye(16))
    assert result.models[0] is case.params


def test_rotations_are_orthogonal_and_keep_what_is_fixed(case):
    turn = case.aligned(0.5)[1].rotations[1]
    np.testing.assert_allclose(turn @ turn.T, np.eye(16), atol=1e-12)
    moved = np.abs(turn @ np.ones(16) - 1).max()
    assert moved < 1e-12 if case.fixed == "ones" else moved > 0.1


def test_it_comes_nearer_than_permutations_alone_where_models_are_turned(case):
    copy, result = case.aligned(1.0)
    plain = weight_matching(case.spec, [case.params, copy], key=jax.random.key(0))
    assert result.info.l2_after[0] < 0.9 * plain.info.l2_after[0]


def test_a_rotation_changes_no_output_of_folded_models(case):
    with jax.enable_x64(True):
        turned = rotate(case.spec, case.group, random_rotation(jax.random.key(3), 16, case.fixed), case.params)
        before, after = (case.apply(jax.tree.map(jnp.asarray, p), *case.inputs) for p in (case.params, turned))
        assert float(jnp.abs(before - after).max() / jnp.abs(before).max()) < 1e-12
    assert np.abs(turned["lm_head.weight"] - case.params["lm_head.weight"]).max() > 0.1


def test_unfolded_norms_and_the_wrong_kind_of_norm_are_refused(cases):
    case = cases["gpt2"]
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        spec = trace_spec(case.net.apply, {n: np.float32(x) for n, x in case.raw.items()}, *case.inputs, verify=False)
        with pytest.raises(ValueError, match=r"no symmetry of these models: fold the gains .* \(permjax.nets.folding"):
            residual_matching(
                spec, [case.raw, case.raw], key=jax.random.key(0), apply=case.net.apply, inputs=case.inputs,
                fixed="ones",
            )  # fmt: skip
    with pytest.raises(ValueError, match="set `fixed` to 'ones' for LayerNorm"):
        case.align(case.params, fixed="none")


def test_bad_groups_and_numbers_are_named(cases):
    case = cases["llama"]
    heads = next(g.name for g in case.spec.groups if any(g.name in h.per for h in case.spec.groups))
    inner = next(g.name for g in case.spec.groups if g.per)
    with pytest.raises(ValueError, match=r"cannot be turned, as it indexes"):
        case.align(case.params, group=heads)
    with pytest.raises(ValueError, match="cannot be turned, as it is per"):
        case.align(case.params, group=inner)
    with pytest.raises(ValueError, match="no symmetry of these models"):
        case.align(case.params, group=next(g.name for g in case.spec.groups if "down_proj" in g.name))
    with pytest.raises(ValueError, match="iterations must be at least 1"):
        case.align(case.params, iterations=0)
    with pytest.raises(KeyError, match="there is no group 'stream'"):
        case.align(case.params, group="stream")


def test_a_run_that_is_cut_short_says_so(case):
    info = case.align(case.moved(noise=1.0), iterations=1).info
    assert not info.converged[0]
    assert info.rounds[0] == 1


def linear():
    """A stream on parts of axes and twice in one leaf, without norms: `x -> out (1 + loop) in x`."""
    both = Product((Of("stream"), Of("other")))
    axes = {"in": ("stream", None), "loop": ("stream", "stream"), "wide": (both,), "out": (None, "stream")}
    shapes = {"in": (6, 5), "loop": (6, 6), "wide": (18,), "out": (4, 6)}
    return PermutationSpec.from_axes(shapes, axes, sizes={"other": 3})


def linear_apply(params, x):
    stream = params["in"] @ x
    wide = params["wide"].reshape(6, 3)
    return params["out"] @ (stream + params["loop"] @ stream), jnp.sum(jnp.abs(wide.T @ stream))


def test_products_and_leaves_with_the_group_twice_are_turned_too():
    spec, rng = linear(), np.random.default_rng(0)
    a = {leaf.name: rng.standard_normal(leaf.shape) for leaf in spec.leaves}
    turn = random_rotation(jax.random.key(1), 6)
    b = rotate(spec, "stream", turn, a)
    np.testing.assert_allclose(b["loop"], turn @ a["loop"] @ turn.T, atol=1e-12)
    np.testing.assert_allclose(b["wide"].reshape(6, 3), turn @ a["wide"].reshape(6, 3), atol=1e-12)
    inputs = (rng.standard_normal(5),)
    key = jax.random.key(0)
    result = residual_matching(spec, [a, b], key=key, apply=linear_apply, inputs=inputs, group="stream")
    np.testing.assert_allclose(result.rotations[1] @ turn, np.eye(6), atol=5e-3)  # linearised: nearer every round
    assert (np.diff(result.info.objective[0]) >= -1e-9).all()


def test_without_a_leaf_of_its_own_the_stream_starts_from_weight_matching():
    axes = {"up": ("h", "stream"), "down": ("stream", "h"), "in": ("h", None)}
    spec = PermutationSpec.from_axes({"up": (7, 6), "down": (6, 7), "in": (7, 5)}, axes)
    rng = np.random.default_rng(0)
    a = {leaf.name: rng.standard_normal(leaf.shape) for leaf in spec.leaves}
    b = permute(spec, {"h": rng.permutation(7), "stream": rng.permutation(6)}, a)

    def apply(params, x):
        return params["in"].T @ params["up"] @ params["down"] @ params["in"] @ x

    options = {"key": jax.random.key(0), "apply": apply, "inputs": (rng.standard_normal(5),), "group": "stream"}
    result = residual_matching(spec, [a, b], **options)
    for name in a:
        np.testing.assert_allclose(result.models[1][name], a[name], atol=1e-10)


def test_the_step_gives_the_models_of_the_function(cases):
    case = cases["llama"]
    models = [{n: jnp.asarray(x, jnp.float32) for n, x in m.items()} for m in (case.params, case.moved())]
    state = MergeState.create(case.spec, models, key=jax.random.key(0), apply=case.apply, data=[case.inputs])
    after = ResidualMatching()(state)
    assert isinstance(after.models[1]["lm_head.weight"], jax.Array)
    for name, leaf in models[0].items():
        np.testing.assert_allclose(after.models[1][name], leaf, atol=1e-4)
    assert after.infos[-1].group == case.group
