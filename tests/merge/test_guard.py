"""A guard refuses what breaks a model and nothing else, and what it refuses leaves every bit in its place."""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from permjax.action import permute
from permjax.match.weights import WeightMatching
from permjax.merge.average import Average
from permjax.merge.energy import input_moments
from permjax.merge.guard import GuardRefusedError, accepted, check_change, excesses
from permjax.merge.guard_limits import Limits, calibrate_limits
from permjax.merge.guard_step import Guard
from permjax.merge.guarded import Watch, guarded_apply, guarded_sequence
from permjax.merge.perplexity import padded
from permjax.merge.pleas import Pleas
from permjax.permutation import invert, random_permutations
from permjax.steps import MergeState, chain
from permjax.symmetry.spec import PermutationSpec

pytestmark = pytest.mark.fast

WORDS, WIDTH, HIDDEN = 12, 6, 10
SHAPES = {"table": (WORDS, WIDTH), "up": (WIDTH, HIDDEN), "down": (WORDS, HIDDEN)}
SPEC = PermutationSpec.from_axes(SHAPES, {"up": (None, "h"), "down": (None, "h")})
CALLS = []


def apply(params, tokens):
    """A language model that looks at one word only; it takes note of every trace."""
    CALLS.append(1)
    hidden = jax.nn.relu(jnp.take(params["table"], tokens, axis=0) @ params["up"])
    return jnp.einsum("sth,vh->stv", hidden, params["down"])


@functools.cache
def model(seed=0, dtype=jnp.float32):
    rng = np.random.default_rng(seed)
    return {name: jnp.asarray(rng.standard_normal(shape) / 2, dtype) for name, shape in SHAPES.items()}


@functools.cache
def probe():
    """Two groups: sentences of words below 10, and such of the others."""
    rng = np.random.default_rng(5)
    common, rare = (rng.integers(low, high, (16, 7)).tolist() for low, high in ((0, 10), (10, 12)))
    return {"common": padded(common), "rare": padded(rare)}


@functools.cache
def moments():
    return input_moments(apply, model(), [*probe()["common"], *probe()["rare"]])


def check(after, **how):
    return check_change(apply, model(), after, probe(), **how)


def moved(step, name="down"):
    """A change of one leaf, of random direction."""
    rng = np.random.default_rng(9)
    leaf = model()[name]
    return {**model(), name: leaf + jnp.asarray(step * rng.standard_normal(leaf.shape), leaf.dtype)}


def rank_one(word, size):
    """A change after which one word is foretold far too often, or far too rarely."""
    return {**model(), "down": model()["down"].at[word].add(size)}


def bits(params):
    return {name: np.asarray(leaf).tobytes() for name, leaf in params.items()}


# what is refused


def test_a_change_of_nothing_has_no_signal_and_passes_the_tightest_limits():
    report = check(jax.tree.map(jnp.array, model()), moments=moments(), tasks={"one": lambda _: 3.0})
    assert {kind for kind, _ in report.signals()} == {"energy", "perplexity", "kl", "task"}
    for (kind, _), value in report.signals().items():
        assert float(value) == (1 if kind == "perplexity" else 0)
    assert bool(accepted(report, Limits(energy=0, perplexity=1, kl=0, task=0)))
    assert excesses(report, Limits(energy=0, perplexity=1, kl=0, task=0)) == ()


def test_a_matched_permutation_does_nothing_and_has_no_energy_once_it_is_undone():
    permutations = random_permutations(SPEC, jax.random.key(3))
    after = permute(SPEC, permutations, model())
    report = check(after, moments=moments())
    assert min(float(value) for value in report.energy.values()) > 0.5, "in other coordinates it looks large"
    for group in report.groups.values():
        assert float(group.after) == pytest.approx(float(group.before), rel=1e-5)
        assert abs(float(group.kl)) < 1e-6
    undone = permute(SPEC, invert(SPEC, permutations), after)
    assert [float(value) for value in check(undone, moments=moments()).energy.values()] == [0, 0]


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_weights_that_are_not_finite_never_pass_and_no_forward_pass_is_made_of_them(bad):
    after = {**model(), "up": model()["up"].at[1, 2].set(bad)}
    limits = Limits(perplexity=math.inf)
    CALLS.clear()
    report = check(after, moments=moments(), tasks={"never": lambda _: 1 / 0}, limits=limits)
    assert not bool(accepted(report, limits))
    assert (CALLS, report.energy, report.groups, report.tasks) == ([], {}, {}, {})
    assert str(excesses(report, limits)[0]) == "weights are not finite"


def test_predictions_and_scores_that_are_not_finite_never_pass_even_without_limits():
    free = Limits(perplexity=math.inf)
    overflow = {**model(), "up": model()["up"] * 1e25, "down": model()["down"] * 1e25}
    assert bool(check(overflow, limits=free).finite)
    assert not bool(accepted(check(overflow), free))
    for score in (np.nan, np.inf, -np.inf):
        report = check(moved(0.0), tasks={"facts": lambda params, score=score: 0.5 if params is MODEL else score})
        assert not bool(accepted(report, free)), score
    assert not bool(accepted(check(model(), tasks={"none": lambda _: np.nan}), free))


MODEL = model()


def test_one_exploding_sentence_is_enough():
    """One sentence of the 33 has a word that the change rules out; by the mean over tokens that would hardly show."""
    sentences = np.random.default_rng(2).integers(0, 9, (32, 7)).tolist()
    some = {"text": padded([*sentences, [1, 2, 11, 3, 11, 4, 11]])}
    after = {**model(), "down": model()["down"].at[11].add(-8.0)}
    found = {how: check_change(apply, model(), after, some, convention=how) for how in ("sentence_mean", "token")}
    assert not bool(accepted(found["sentence_mean"], Limits(perplexity=1.5)))
    assert bool(accepted(found["token"], Limits(perplexity=1.5)))
    assert "the perplexity of text is" in str(excesses(found["sentence_mean"], Limits())[0])


def test_the_worst_group_decides():
    report = check(rank_one(11, -4.0))
    common, rare = (float(report.groups[name].after / report.groups[name].before) for name in ("common", "rare"))
    assert common < 1.05 < 1.5 < rare
    assert not bool(accepted(report, Limits(perplexity=1.5)))
    assert bool(accepted(report, Limits(perplexity={"common": 1.05, "rare": math.inf})))
    assert [one.signal for one in excesses(report, Limits())] == [("perplexity", "rare")]


def test_a_lost_share_of_a_score_is_refused_and_a_gained_one_is_not():
    def report(before, after):
        return check(moved(0.0), tasks={"facts": lambda params: before if params is MODEL else after})

    assert bool(accepted(report(0.8, 0.7), Limits(task=0.2)))
    assert not bool(accepted(report(0.8, 0.6), Limits(task=0.2)))
    assert bool(accepted(report(0.8, 0.9), Limits(task=0)))
    assert bool(accepted(report(0.0, 0.1), Limits(task=0)))


def test_many_candidates_are_judged_at_once_as_they_are_one_by_one():
    candidates = [moved(step) for step in (0.0, 0.1, 1.0, np.nan)]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *candidates)
    limits = Limits(energy=0.5, perplexity=1.2)
    judge = jax.jit(jax.vmap(lambda after: check(after, moments=moments())))
    report = judge(stacked)
    assert accepted(report, limits).tolist() == [
        bool(accepted(check(c, moments=moments()), limits)) for c in candidates
    ]
    assert accepted(report, limits).tolist() == [True, True, False, False]
    one = check(candidates[1], moments=moments())
    for signal, value in one.signals().items():
        np.testing.assert_allclose(report.signals()[signal][1], value, rtol=1e-4, atol=1e-6)


# rolling back


def watch(dtype=jnp.float32, **how):
    def apply_wide(params, tokens):
        return apply({name: leaf.astype(jnp.float32) for name, leaf in params.items()}, tokens)

    return Watch(apply if dtype == jnp.float32 else apply_wide, probe(), **how)


def test_what_is_refused_leaves_the_very_same_object_with_every_bit_in_bfloat16():
    params = model(dtype=jnp.bfloat16)
    before = bits(params)

    def breaks(p):
        return {**p, "down": p["down"] * jnp.bfloat16(30)}

    ways = {"rome": breaks, "memit": lambda p: {**p, "up": p["up"].at[0, 0].set(jnp.nan)}}
    found = guarded_apply(watch(jnp.bfloat16), params, ways)
    assert found.params is params
    assert bits(params) == before
    assert (found.accepted, [one.name for one in found.attempts]) == (None, ["rome", "memit"])
    assert all(one.excesses for one in found.attempts)


def test_the_first_way_that_is_accepted_is_taken_and_later_ones_are_not_made():
    ways = {"wild": lambda _: moved(3.0), "tame": lambda _: moved(0.01), "never": lambda _: 1 / 0}
    found = guarded_apply(watch(), model(), ways)
    assert found.accepted == "tame"
    assert bits(found.params) == bits(moved(0.01))
    assert [one.accepted for one in found.attempts] == [False, True]


def test_small_steps_are_refused_once_they_have_come_too_far_together():
    def step(params):
        return {**params, "down": params["down"].at[3].add(-0.25)}

    guard = watch(each=Limits(perplexity=1.2), total=Limits(perplexity=1.4))
    run = guarded_sequence(guard, model(), [{"step": step}] * 12)
    took = run.accepted.count("step")
    assert 2 <= took < 12
    assert run.accepted == ("step",) * took + (None,) * (12 - took), "each by itself is within its limit, all are not"
    refused = run.changes[took][0]
    assert bool(accepted(refused.each, guard.each))
    assert not bool(accepted(refused.total, guard.total))
    unguarded = functools.reduce(lambda params, _: step(params), range(took), model())
    assert bits(run.params) == bits(unguarded)


def test_a_hundred_refusals_leave_memory_and_compiled_programs_as_they_were():
    guard, params = watch(moments=moments()), model()

    def refuse(count):
        edits = [{"wild": lambda p, i=i: {**p, "down": p["down"] * (5.0 + i)}} for i in range(count)]
        run = guarded_sequence(guard, params, edits)
        assert run.params is params
        assert run.accepted == (None,) * count

    refuse(2)
    CALLS.clear()
    before = sum(array.nbytes for array in jax.live_arrays())
    refuse(100)
    assert sum(array.nbytes for array in jax.live_arrays()) <= before
    assert CALLS == [], "nothing is traced, hence nothing compiled, again"


# learning limits


class Drawn(NamedTuple):
    """A report with drawn signals: two perplexities, a divergence and the energies of two leaves."""

    values: np.ndarray
    finite: bool = True

    def signals(self):
        names = [("perplexity", "a"), ("perplexity", "b"), ("kl", "a"), ("energy", "up"), ("energy", "down")]
        return dict(zip(names, self.values, strict=True))


def drawn(rng, count, scale=1.0):
    spread = rng.lognormal(size=(count, 1)) * rng.lognormal(sigma=0.5, size=(count, 5)) * scale
    return [Drawn(np.concatenate([np.exp(0.01 * x[:2]), [1e-3 * x[2]], 0.1 * x[3:]])) for x in spread]


def passes(report, limits):
    return all(value <= limits.of(signal) for signal, value in report.signals().items())


def test_limits_learnt_from_safe_changes_pass_those_and_nearly_all_other_safe_ones():
    refused = []
    for seed in range(20):
        rng = np.random.default_rng(seed)
        safe, held_out = drawn(rng, 100), drawn(rng, 100)
        limits = calibrate_limits(safe, quantile=0.99)
        assert np.mean([passes(report, limits) for report in safe]) >= 0.99
        refused.append(np.mean([not passes(report, limits) for report in held_out]))
        assert not any(passes(report, limits) for report in drawn(rng, 20, scale=1e3))
    assert np.mean(refused) < 0.04


def test_several_signals_do_not_add_up_their_false_alarms():
    rng = np.random.default_rng(0)
    safe = [Drawn(np.concatenate([np.exp(x[:2]), x[2:]])) for x in rng.lognormal(sigma=0.3, size=(200, 5)) / 100]
    limits = calibrate_limits(safe, quantile=0.9)
    assert 0.9 <= np.mean([passes(report, limits) for report in safe]) <= 0.92


def test_slack_lets_so_many_times_the_excess_pass():
    safe = [Drawn(np.full(5, 1 + 0.1 * number)) for number in range(1, 9)]
    plain, wide = (calibrate_limits(safe, slack=slack) for slack in (1.0, 1.5))
    assert wide.energy == pytest.approx(1.5 * plain.energy)
    for group, limit in plain.perplexity.items():
        assert np.log(wide.perplexity[group]) == pytest.approx(1.5 * np.log(limit), rel=1e-4)
    with pytest.raises(ValueError, match=r"from 1 on, not 0\.5"):
        calibrate_limits(safe, slack=0.5)


def test_limits_are_learnt_from_many_reports_at_once_as_from_one_by_one():
    changes = [moved(step) for step in (0.01, 0.03, 0.02)]
    one_by_one = calibrate_limits([check(change, moments=moments()) for change in changes])
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *changes)
    at_once = calibrate_limits([jax.vmap(lambda after: check(after, moments=moments()))(stacked)])
    assert at_once.energy == pytest.approx(one_by_one.energy, rel=1e-4)
    assert at_once.kl == pytest.approx(one_by_one.kl, rel=1e-3)
    assert all(bool(accepted(check(change, moments=moments()), one_by_one)) for change in changes)
    assert not bool(accepted(check(moved(0.3), moments=moments()), one_by_one))


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: calibrate_limits([]), "no reports"),
        (lambda: calibrate_limits([Drawn(np.ones(5))], quantile=1.5), "at most 1, not 1.5"),
        (lambda: calibrate_limits([Drawn(np.array([1, 1, np.nan, 1, 1]))]), "not finite; such a change is not safe"),
        (lambda: calibrate_limits([Drawn(np.ones(5), finite=False)]), "not finite"),
        (lambda: calibrate_limits([check(model()), check_change(apply, model(), model())]), "only one has"),
        (lambda: accepted(check(model()), Limits(kl={"common": 1})), "no limit of kl for 'rare', only for common"),
        (lambda: check({"table": model()["table"]}), "missing from model 1"),
    ],
)
def test_limits_and_reports_that_do_not_fit_are_refused(call, says):
    with pytest.raises(ValueError, match=says):
        call()


# the step


def state(*models, **rest):
    given = {"apply": apply, "eval_data": probe(), "key": jax.random.key(0)}
    return MergeState.create(SPEC, models, **{**given, **rest})


def shuffled(seed=1):
    return permute(SPEC, random_permutations(SPEC, jax.random.key(seed)), model())


def test_a_matched_copy_passes_the_tightest_guard_in_a_chain_and_so_does_its_average():
    for pipeline in (
        chain(WeightMatching(), Guard(limit=1.0001)),
        chain(WeightMatching(), Average(), Guard(limit=1.0001)),
    ):
        after = pipeline(state(model(), shuffled()))
        info = after.infos[-1]
        assert info.accepted.all()
        for values in info.ratio.values():
            np.testing.assert_allclose(values, 1, rtol=1e-5)
    assert len(after.models) == 1


def test_an_average_of_models_that_were_not_aligned_is_refused_or_taken_back():
    a = {**model(), "down": model()["down"] * 4}
    given = state(a, permute(SPEC, random_permutations(SPEC, jax.random.key(1)), a), eval_data=foretold(a))
    with pytest.raises(GuardRefusedError, match=r"refuses the result: the perplexity of own is .* the limit is 1\.2\."):
        chain(Average(), Guard(limit=1.2))(given)
    after = chain(Average(), Guard(limit=1.2, otherwise="return"))(given)
    assert after.models == given.models[:1]
    assert after.models[0] is a
    assert not after.infos[-1].accepted.any()
    assert len(chain(WeightMatching(), Average(), Guard(limit=1.2))(given).models) == 1


def test_a_network_that_pleas_has_made_wider_is_run_by_its_own_function():
    tokens = np.random.default_rng(0).integers(0, WORDS, (30, 6))
    pipeline = chain(WeightMatching(), Pleas(budget=1.5), Guard(limit=1.05))
    after = pipeline(state(model(), shuffled(), data=[jnp.asarray(tokens)]))
    assert after.models[0]["up"].shape[1] > HIDDEN
    np.testing.assert_allclose(after.infos[-1].ratio["common"], 1, rtol=0.02)
    back = Guard(limit=0.5, otherwise="return")(after)
    assert back.models[0] is model()
    assert (back.spec, back.apply) == (SPEC, apply)


def foretold(params):
    """Sentences that a model foretells well: each word is the likeliest after the one before."""
    table = apply(params, jnp.arange(WORDS)[None])[0].argmax(-1).tolist()

    def sentence(word):
        words = [word]
        for _ in range(5):
            words.append(table[words[-1]])
        return words

    return {"own": padded([sentence(word) for word in range(WORDS)])}


def test_each_model_is_compared_with_its_own_one_and_what_is_broken_is_named():
    given = state(model(0), model(1))
    info = Guard(limit=1.0001)(given).infos[-1]
    assert {name: values.tolist() for name, values in info.ratio.items()} == {"common": [1, 1], "rare": [1, 1]}
    assert abs(info.before["common"][0] / info.before["common"][1] - 1) > 0.01

    def spoil(state):
        return MergeState(**{**vars(state), "models": (state.models[0], rank_one(11, -6.0))})

    with pytest.raises(GuardRefusedError, match="refuses model 1: the perplexity of rare"):
        Guard()(spoil(given))
    back = Guard(otherwise="return")(spoil(given))
    assert back.models is given.parents
    assert back.infos[-1].accepted.tolist() == [True, False]


def test_the_loss_of_any_model_can_be_guarded():
    def loss(params, batch):
        return jnp.square(params["up"] - batch).mean()

    given = state(model(), loss=loss, apply=None, eval_data=[model()["up"], model()["up"] + 0.1])
    assert Guard(metric="loss", limit=1.0)(given).infos[-1].accepted.all()

    def spoil(size):
        return MergeState(**{**vars(given), "models": (moved(size, "up"),)})

    assert Guard(metric="loss", limit=1.5)(spoil(0.1)).infos[-1].accepted.all()
    for size in (3.0, 1e3, np.nan):
        with pytest.raises(GuardRefusedError):
            Guard(metric="loss", limit=1.5)(spoil(size))


@pytest.mark.parametrize(
    ("guard", "rest", "says"),
    [
        (Guard(), {"eval_data": None}, "Guard needs `eval_data`"),
        (Guard(), {"eval_data": [np.zeros(3)]}, "batches of Sentences"),
        (Guard(), {"eval_data": {"text": []}}, "batches of Sentences"),
        (Guard(), {"apply": None}, "Guard needs `apply`"),
        (Guard(metric="loss"), {}, "needs `loss`"),
        (Guard(metric="accuracy"), {}, "no metric 'accuracy'; known are perplexity, loss"),
        (Guard(otherwise="shrug"), {}, "no otherwise 'shrug'"),
        (Guard(convention="words"), {}, "no convention 'words'"),
    ],
)
def test_what_a_guard_lacks_is_said(guard, rest, says):
    with pytest.raises(ValueError, match=says):
        guard(state(model(), **rest))


def test_guards_compare_hash_and_print_as_values():
    assert Guard(limit=2) == Guard(limit=2) != Guard()
    assert len({Guard(), Guard(), Guard(metric="loss")}) == 2
    assert "limit=2" in repr(chain(Guard(limit=2)))
