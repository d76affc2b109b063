"""Laws that hold for every method of merging, and those that tell them apart."""

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from permjax.lora.elementwise import Dare
from permjax.lora.merge import merge_loras
from permjax.lora.methods import METHODS, lora_method
from permjax.lora.pool import Factors, Pool

IN, OUT, RANK, ADAPTERS = 24, 20, 4, 3
ALL = [name for name in METHODS if "lego" not in name]
FACTORWISE = ("linear", "ties", "dare", "magnitude")
UPDATEWISE = [name for name in ALL if name not in (*FACTORWISE, "aligned_linear")]
WHOLE = {
    name: {field: 1.0 for field in ("density", "dare_density") if field in METHODS[name].__dataclass_fields__}
    for name in ALL
}
EQUAL = {"task_arithmetic": 1.2, "linear": 3, "aligned_linear": 3, "dare": 3, "magnitude": 3, "ctm": 0.75}
ALONE = {"task_arithmetic": 0.4, "ctm": 0.75}


def delta(one):
    return np.asarray(one.b, np.float64) @ np.asarray(one.a, np.float64)


def distance(x, y):
    return np.linalg.norm(x - y) / np.linalg.norm(y)


def factors(rng, rank=RANK):
    return Factors(rng.standard_normal((rank, IN)).astype(np.float32), rng.standard_normal((OUT, rank)).astype("f"))


def permuted(rng, one):
    order = rng.permutation(len(one.a))
    return Factors(one.a[order], one.b[:, order])


def regauged(rng, one):
    scale = (np.exp(rng.normal(0, 0.7, len(one.a))) * rng.choice([-1, 1], len(one.a))).astype(np.float32)
    return Factors(one.a * scale[:, None], one.b / scale)


def doubled(one):
    """Every piece a copy of the first."""
    return Factors(np.tile(one.a[:1], (RANK, 1)), np.tile(one.b[:, :1], (1, RANK)))


def short(one):
    """Two ranks less than it has rows."""
    return Factors(np.concatenate([one.a[:2], one.a[:2]]), one.b)


def silent(one):
    return Factors(one.a, np.zeros_like(one.b))


@cache
def family():
    """The same three adapters in many forms, one module for each, all of one shape."""
    rng = np.random.default_rng(0)
    adapters = []
    for number in range(ADAPTERS):
        one = factors(rng)
        adapters.append(
            {
                "plain": one,
                "permuted": permuted(rng, one),
                "regauged": regauged(rng, one),
                "doubled": doubled(one),
                "short": short(one),
                "silent": silent(one),
                "one silent": silent(one) if number == 1 else one,
                "negated": Factors(one.a, -one.b) if number == 1 else one,
                "one for all": adapters[0]["one for all"] if adapters else one,
            }
        )
    return adapters


def inputs_for(adapters, chosen):
    if not chosen.needs_inputs:
        return None
    rng = np.random.default_rng(1)
    rows = rng.standard_normal((len(adapters), 40, IN)).astype(np.float32)
    return {name: rows for one in adapters for name in one}


@cache
def merged(name, weights=None, **hyper):
    chosen = lora_method(name, **hyper)
    return merge_loras(family(), chosen, weights=weights, inputs=inputs_for(family(), chosen))


def isotropic(x):
    u, s, vt = np.linalg.svd(x)
    return u[:, :RANK] @ vt[:RANK] * np.mean(s[:RANK])


@pytest.mark.parametrize("name", ALL)
def test_degenerate_modules_give_finite_updates_of_the_right_shape(name):
    for module, one in merged(name).items():
        rank = RANK * ADAPTERS if name == "concat" else RANK
        assert one.a.shape == (rank, IN), module
        assert one.b.shape == (OUT, rank), module
        assert one.a.dtype == one.b.dtype == np.float32, module
        assert np.isfinite(one.a).all(), module
        assert np.isfinite(one.b).all(), module
    assert not np.any(delta(merged(name)["silent"]))


@pytest.mark.parametrize("name", ALL)
def test_ranks_that_exceed_all_pieces_are_zeros_and_a_missing_module_adds_nothing(name):
    rng, chosen = np.random.default_rng(2), lora_method(name)
    adapters = [{"m": factors(rng)}, {}, {"m": factors(rng, 3)}]
    found = merge_loras(adapters, chosen, rank=9, inputs=inputs_for(adapters, chosen))["m"]
    assert found.a.shape == (9, IN)
    assert found.b.shape == (OUT, 9)
    assert np.isfinite(found.a).all()
    assert np.isfinite(found.b).all()
    if name in ("concat", "truncate"):
        exact = (delta(adapters[0]["m"]) + delta(adapters[2]["m"])) / 3
        assert distance(delta(found), exact) < 1e-5


@pytest.mark.fast
@pytest.mark.parametrize("name", ALL)
def test_one_adapter_gives_that_adapter_times_what_the_method_states(name):
    one, chosen = {"m": family()[0]["plain"]}, lora_method(name, **WHOLE[name])
    expected = delta(one["m"]) if name != "iso_c" else isotropic(delta(one["m"]))
    found = merge_loras([one], chosen, inputs=inputs_for([one], chosen))["m"]
    assert distance(delta(found), ALONE.get(name, 1) * expected) < 1e-5


@pytest.mark.fast
@pytest.mark.parametrize("name", ALL)
def test_equal_adapters_give_that_adapter_times_what_the_method_states(name):
    one = delta(family()[0]["one for all"])
    expected = one if name != "iso_c" else 3 * isotropic(one)
    found = merged(name, **WHOLE[name])["one for all"]
    assert distance(delta(found), EQUAL.get(name, 1) * expected) < 1e-5


@pytest.mark.fast
@pytest.mark.parametrize("name", [name for name in (*UPDATEWISE, "aligned_linear") if name != "dare_svd"])
def test_rank_permutations_leave_methods_of_the_updates_as_they_are(name):
    found = merged(name)
    assert distance(delta(found["permuted"]), delta(found["plain"])) < 1e-5


@pytest.mark.fast
@pytest.mark.parametrize("name", ["linear", "ties", "magnitude"])
def test_rank_permutations_change_methods_of_the_factors(name):
    found = merged(name)
    assert distance(delta(found["permuted"]), delta(found["plain"])) > 0.05


@pytest.mark.fast
def test_rank_permutations_change_dare_beyond_its_own_chance():
    weights, dare = jnp.full(3, 1 / 3), Dare(density=0.99)

    def draw(case, seed):
        parts = [one[case] for one in family()]
        a, b = jnp.concatenate([one.a for one in parts]), jnp.concatenate([one.b for one in parts], 1)
        return delta(dare(Pool(a, b, (RANK,) * ADAPTERS), weights, RANK, jax.random.key(seed)))

    changed, chance = distance(draw("permuted", 0), draw("plain", 0)), distance(draw("plain", 1), draw("plain", 0))
    assert changed > max(0.05, 2 * chance)


@pytest.mark.fast
@pytest.mark.parametrize("name", [name for name in (*UPDATEWISE, "aligned_linear") if name != "dare_svd"])
def test_signs_and_scales_moved_between_the_factors_change_nothing(name):
    found = merged(name, basis="updates") if name == "core_space" else merged(name)
    assert distance(delta(found["regauged"]), delta(found["plain"])) < 2e-5


@pytest.mark.fast
@pytest.mark.parametrize("name", [*FACTORWISE, "core_space"])
def test_signs_and_scales_moved_between_the_factors_change_the_methods_that_say_so(name):
    found = merged(name)
    assert distance(delta(found["regauged"]), delta(found["plain"])) > 0.05


@pytest.mark.parametrize(
    "name", [name for name in (*UPDATEWISE, "aligned_linear") if name not in ("ties_svd", "dare_svd")]
)
def test_a_negative_weight_is_the_negated_adapter(name):
    found, other = merged(name, (0.5, -0.3, 0.8))["plain"], merged(name, (0.5, 0.3, 0.8))["negated"]
    assert distance(delta(found), delta(other)) < 1e-5


@pytest.mark.fast
def test_ties_of_updates_elects_signs_before_weights_as_peft_does():
    found, other = merged("ties_svd", (0.5, -0.3, 0.8))["plain"], merged("ties_svd", (0.5, 0.3, 0.8))["negated"]
    assert distance(delta(found), delta(other)) > 0.05


@pytest.mark.fast
@pytest.mark.parametrize("name", ALL)
def test_the_same_key_gives_the_same_bytes_and_another_key_matters_only_where_chance_does(name):
    chosen, rows = lora_method(name), inputs_for(family(), lora_method(name))

    def draw(seed):
        found = merge_loras(family(), chosen, inputs=rows, key=jax.random.key(seed))["plain"]
        return np.asarray(found.a).tobytes() + np.asarray(found.b).tobytes()

    assert draw(0) == draw(0)
    assert (draw(1) != draw(0)) == (name in ("dare", "dare_svd"))


@pytest.mark.fast
def test_a_merge_can_be_a_part_of_a_compiled_function():
    adapters = [{"m": one["plain"]} for one in family()]
    inside = jax.jit(lambda adapters, weights: merge_loras(adapters, lora_method("tsv"), weights=weights)["m"][:2])
    a, b = inside(adapters, jnp.full(ADAPTERS, 1 / 3))
    np.testing.assert_allclose(b @ a, delta(merged("tsv")["plain"]), atol=1e-4)


@pytest.mark.fast
def test_the_error_of_a_truncation_is_the_tail_of_the_singular_values():
    exact = sum(delta(one["plain"]) for one in family()) / ADAPTERS
    values = np.linalg.svd(exact, compute_uv=False)
    for rank in (1, RANK, 11):
        found = merge_loras([{"m": one["plain"]} for one in family()], lora_method("truncate"), rank=rank)["m"]
        error, tail = np.linalg.norm(delta(found) - exact), np.linalg.norm(values[rank:])
        assert abs(error - tail) < 1e-5 * np.linalg.norm(values)


@pytest.mark.fast
def test_concatenation_refuses_a_smaller_rank_and_names_the_way_out():
    with pytest.raises(ValueError, match=r"concatenated have rank 12, but rank 5 was asked for; `truncate`"):
        merge_loras(family(), lora_method("concat"), rank=5)


@pytest.mark.fast
def test_an_unknown_method_or_hyper_parameter_is_refused_with_what_there_is():
    with pytest.raises(ValueError, match=r"no method 'truncat' \(nearest: 'truncate'\); there are lora_lego"):
        lora_method("truncat")
    with pytest.raises(
        ValueError, match=r"'ties' has no hyper-parameter 'densty' \(nearest: 'density'\); it has density, m"
    ):
        lora_method("ties", densty=0.1)
    with pytest.raises(ValueError, match="'concat' has no hyper-parameter 'rank'; it has none"):
        lora_method("concat", rank=3)


@pytest.mark.fast
@pytest.mark.parametrize(
    ("name", "hyper", "message"),
    [
        ("ties", {"density": 0.0}, "density must be above 0 and at most 1, not 0.0"),
        ("ctm", {"dare_density": 1.5}, "dare_density must be above 0"),
        ("ctm", {"beta": 2.0}, r"beta must be in \[0, 1\]"),
        ("dare", {"combine": "svd"}, "combine must be one of linear, ties, not 'svd'"),
        ("ties_svd", {"majority": "mean"}, "majority must be one of total, frequency"),
        ("core_space", {"basis": "a"}, "basis must be one of factors, updates"),
        ("knots", {"rule": "tsv"}, "rule must be one of ties, task_arithmetic"),
        ("regmean", {"ridge": 0.0}, "ridge must be positive"),
    ],
)
def test_values_that_do_not_fit_are_refused(name, hyper, message):
    with pytest.raises(ValueError, match=message):
        lora_method(name, **hyper)
