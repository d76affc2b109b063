"""Partial plans: which units share a label, in which order the wide units stand, and how plans compose."""

from itertools import combinations, permutations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from permjax.merge.partial import composed, constrained_assignment, constrained_plan, merged_units, partial_plan
from permjax.permutation import identity
from permjax.plan import Plan
from permjax.symmetry.spec import PermutationSpec

pytestmark = pytest.mark.fast

WIDE = PermutationSpec.from_axes({"w": (3, 6), "v": (6, 2)}, {"w": (None, "g"), "v": ("g", None)})
HEADS = "attention, fused and split"


def raises(pattern: str):
    return pytest.raises(ValueError, match=pattern)


def random_square(n: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((n, n))


# labels


def test_the_best_units_are_shared_in_anchor_order_and_the_rest_follows_model_by_model():
    plan = partial_plan(WIDE, {"g": 2}, scores={"g": [0, 5, 1, 9, 1, 2]}, models=3)
    assert [labels.tolist() for labels in plan.labels["g"]] == [
        [2, 0, 3, 1, 4, 5],
        [6, 0, 7, 1, 8, 9],
        [10, 0, 11, 1, 12, 13],
    ]
    assert plan.widths == {"g": 2 + 3 * 4}


def test_ties_go_by_index_and_so_do_groups_without_scores():
    plan = partial_plan(WIDE, {"g": 3}, scores={"g": np.ones(6)})
    assert plan.labels["g"][1].tolist() == [0, 1, 2, 6, 7, 8]
    for a, b in zip(plan.labels["g"], partial_plan(WIDE, {"g": 3}).labels["g"], strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("ratio", [0, 0.1, 1 / 3, 0.5, 0.9, 1])
def test_a_ratio_keeps_that_share_of_every_model_separate(ratio):
    k = merged_units(WIDE, {"g": ratio})["g"]
    assert abs(k - (1 - ratio) * 6) <= 0.5
    plan = partial_plan(WIDE, ratios={"g": ratio}, scores={"g": np.arange(6)})
    assert plan.widths["g"] == 2 * 6 - k
    shared = set(plan.labels["g"][0]) & set(plan.labels["g"][1])
    assert shared == set(range(k))


def test_nothing_kept_is_the_plain_merge_and_everything_kept_shares_nothing(zoo_spec):
    plain = partial_plan(zoo_spec, {})
    for group in zoo_spec.groups:
        for labels in plain.labels[group.name]:
            np.testing.assert_array_equal(labels, identity(zoo_spec)[group.name])
    apart = partial_plan(zoo_spec, ratios={g.name: 1.0 for g in zoo_spec.groups if not g.per})
    for group in zoo_spec.groups:
        a, b = apart.labels[group.name]
        assert apart.widths[group.name] == group.size * (1 if group.per else 2)
        if not group.per:
            np.testing.assert_array_equal(np.concatenate([a, b]), np.arange(2 * group.size))


def test_heads_are_widened_as_blocks_and_what_is_inside_stays(zoo):
    plan = partial_plan(zoo[HEADS], {"head": 1}, scores={"head": [0, 0, 1]})
    assert plan.widths == {"head": 5, "qk": 4, "vo": 2, "res": 3}
    assert plan.labels["head"][1].tolist() == [3, 4, 0]
    assert plan.labels["qk"][1].tolist() == [[0, 1, 2, 3]] * 3


# constrained assignment


@pytest.mark.parametrize("n", [1, 3, 5])
def test_constrained_assignment_is_the_best_of_all_choices(n):
    for k in range(n + 1):
        scores = random_square(n, k)
        rows, columns = constrained_assignment(scores, k)
        assert len(rows) == len(set(rows)) == len(set(columns)) == k
        assert rows.tolist() == sorted(rows)
        best = max(
            sum(scores[i, j] for i, j in zip(chosen, order, strict=True))
            for chosen in combinations(range(n), k)
            for order in permutations(range(n), k)
        )
        assert scores[rows, columns].sum() == pytest.approx(best)


@given(n=st.integers(1, 12), seed=st.integers(0, 2**16), data=st.data())
def test_choosing_pairs_together_is_never_worse_than_choosing_them_after_a_full_assignment(n, seed, data):
    k = data.draw(st.integers(0, n))
    scores = random_square(n, seed)
    rows, columns = constrained_assignment(scores, n)
    after_full = np.sort(scores[rows, columns])[::-1][:k].sum()
    together = scores[constrained_assignment(scores, k)].sum()
    assert together >= after_full - 1e-9
    if k == n:
        assert together == pytest.approx(after_full)


def test_choosing_pairs_together_can_be_better():
    scores = np.array([[3.0, 4.0], [0.0, 3.0]])  # the full assignment takes the diagonal
    assert scores[constrained_assignment(scores, 1)].sum() == 4
    assert constrained_assignment(scores, 2)[1].tolist() == [0, 1]


def test_scores_of_any_scale_and_sign_are_told_apart():
    for scale in (1e-30, -1.0, 1e30):
        scores = scale * np.array([[1.0, 2.0], [3.0, 5.0]])
        best = max((scores[i, j], i, j) for i in range(2) for j in range(2))
        rows, columns = constrained_assignment(scores, 1)
        assert (rows[0], columns[0]) == best[1:]


def test_re_paired_units_share_a_label():
    kernel = np.array([[3.0, 4.0], [0.0, 3.0]])
    spec = PermutationSpec.from_axes({"w": (3, 2)}, {"w": (None, "g")})
    plan = constrained_plan(spec, {"g": 1}, kernels={"g": kernel})
    assert [a.tolist() for a in plan.labels["g"]] == [[0, 1], [2, 0]]
    assert plan.widths == {"g": 3}


def test_without_a_gain_units_keep_their_partners(zoo):
    for kernel in (np.zeros((6, 6)), np.ones((6, 6)), np.eye(6)):
        plan = constrained_plan(WIDE, {"g": 4}, kernels={"g": kernel})
        expected = partial_plan(WIDE, {"g": 4}, scores={"g": kernel.diagonal()})
        for a, b in zip(plan.labels["g"], expected.labels["g"], strict=True):
            np.testing.assert_array_equal(a, b)
    assert constrained_plan(zoo[HEADS], {"head": 2}, kernels={}).widths["head"] == 4


# composition


def scattered(plan: Plan, group: str, model: int, values: np.ndarray) -> np.ndarray:
    """Place values `[*per, n]` of one model on the wide units, outer groups first."""
    result = np.full((*(plan.widths[h] for h in plan.per[group] if h in plan.widths), plan.widths[group]), -1)
    for where in np.ndindex(values.shape):
        per = plan.per[group]
        outer = [(*(where[per.index(o)] for o in plan.per[h]), where[i]) for i, h in enumerate(per)]
        at = [plan.labels[h][model][place] for h, place in zip(per, outer, strict=True)]
        result[(*at, plan.labels[group][model][where])] = values[where]
    return result


@pytest.mark.parametrize(
    "name", ["mlp", HEADS, "dependent axis before its outer axis", "outer groups in another order"]
)
def test_a_composed_plan_first_gathers_and_then_scatters(zoo, draw_permutations, name):
    spec = zoo[name]
    aligning = [draw_permutations(spec, 1), draw_permutations(spec, 2)]
    first = Plan.from_permutations(spec, aligning)
    second = partial_plan(spec, ratios={g.name: 0.5 for g in spec.groups if not g.per})
    whole = composed(spec, first, second)
    assert dict(whole.widths) == dict(second.widths)
    for group in spec.groups:
        values = np.arange(np.prod(spec.shape(group.name))).reshape(spec.shape(group.name))
        for m, p in enumerate(aligning):
            target, places = np.indices(values.shape), (*group.per, group.name)
            source = [p[h][tuple(target[places.index(o)] for o in (*spec.group(h).per, h))] for h in places]
            gathered = values[tuple(source)]
            expected = scattered(second, group.name, m, gathered)
            np.testing.assert_array_equal(scattered(whole, group.name, m, values), expected)


def test_composing_with_the_plain_merge_changes_nothing(zoo_spec, draw_permutations):
    first = Plan.from_permutations(zoo_spec, [draw_permutations(zoo_spec, seed) for seed in range(3)])
    whole = composed(zoo_spec, first, partial_plan(zoo_spec, {}, models=3))
    for group, rows in whole.labels.items():
        for a, b in zip(rows, first.labels[group], strict=True):
            np.testing.assert_array_equal(a, b)


# bad input


def test_bad_requests_are_refused(zoo):
    heads = zoo[HEADS]
    for make, message in (
        (lambda: partial_plan(heads, ratios={"qk": 0.5}), "'qk' is per 'head' and cannot be widened"),
        (lambda: partial_plan(heads, {"vo": 1}), "'vo' is per 'head' and cannot be widened"),
        (lambda: partial_plan(heads, {"heads": 1}), "no group 'heads' \\(nearest: 'head'\\)"),
        (lambda: partial_plan(heads, ratios={"re": 1}), "no group 're' \\(nearest: 'res'\\)"),
        (lambda: partial_plan(WIDE, {"g": 7}), "'g' has 6 units, of which 7 cannot be merged"),
        (lambda: partial_plan(WIDE, ratios={"g": 1.5}), "'g': the kept-separate ratio is 1.5"),
        (lambda: partial_plan(WIDE, ratios={"g": float("nan")}), "'g': the kept-separate ratio is nan"),
        (lambda: partial_plan(WIDE), "give either"),
        (lambda: partial_plan(WIDE, {}, ratios={}), "give either"),
        (lambda: partial_plan(WIDE, {}, models=1), "two models or more, not 1"),
        (lambda: partial_plan(WIDE, {"g": 2}, scores={"g": [1, 2]}), "scores of group 'g' .* shape \\(6,\\)"),
        (lambda: partial_plan(WIDE, {"g": 2}, scores={"g": [np.nan] * 6}), "scores of group 'g' .* with 6 that"),
        (lambda: constrained_plan(WIDE, {"g": 2}, kernels={"g": np.ones(6)}), "shape \\(6, 6\\)"),
        (lambda: constrained_assignment(np.eye(3), 4), "4 pairs cannot be chosen among 3"),
    ):
        with raises(message):
            make()


def test_only_a_one_to_one_plan_over_as_many_models_can_come_first():
    partial = partial_plan(WIDE, {"g": 2})
    with raises("not one to one for model 0"):
        composed(WIDE, partial, partial)
    with raises("maps 3 models, the second 2"):
        composed(WIDE, Plan.from_permutations(WIDE, [identity(WIDE)] * 3), partial)
