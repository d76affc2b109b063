"""Layer-wise least squares: against float64 lstsq and pinv, under masks, at both ends of the ridge, and bad input."""

import numpy as np
import pytest

from permjax.merge.gram import Gram, dot_gram
from permjax.merge.ridge import choose_ridge, default_ridge, relative_residual, residual, solve

pytestmark = pytest.mark.fast

BLOCKS = [
    (np.array([0, 1, 2, 5, 6]), np.array([0, 3])),
    (np.array([0, 3, 4, 6]), np.array([1])),
    (np.arange(7), np.array([2])),
]


def raises(pattern: str):
    return pytest.raises(ValueError, match=pattern)


def problem(rows=40, seed=0, features=6, outputs=4):
    """X with a constant column, Y and a prior, in float64 holding float32 numbers."""
    rng = np.random.default_rng(seed)
    x = (rng.standard_normal((rows, features)) * 10.0 ** rng.uniform(-1, 1, features) + 0.5).astype(np.float32)
    y = (x @ rng.standard_normal((features, outputs)) + rng.standard_normal((rows, outputs)) + 2).astype(np.float32)
    prior = rng.standard_normal((features + 1, outputs))
    return np.hstack([x, np.ones((rows, 1))]).astype(np.float64), y.astype(np.float64), prior


def gram_of(x, y):
    """By the code under test, from the columns before the constant one."""
    return dot_gram(x[:, :-1].astype(np.float32), y.astype(np.float32), bias=True)


def penalised(x, ridge):
    """Square roots of the penalties of the columns: none for the constant one."""
    scale = (x[:, :-1] ** 2).sum(0).mean()
    return np.sqrt(ridge * scale) * np.r_[np.ones(x.shape[1] - 1), 0]


def augmented(x, y, prior, ridge, blocks):
    """The solution by lstsq of the rows of X with those of the ridge below, block by block."""
    weights, root = np.zeros_like(prior), penalised(x, ridge)
    for columns, outputs in blocks:
        start = prior[np.ix_(columns, outputs)]
        below = np.diag(root[columns])
        rows, right = np.vstack([x[:, columns], below]), np.vstack([y[:, outputs], below @ start])
        weights[np.ix_(columns, outputs)] = start + np.linalg.lstsq(rows, right - rows @ start, rcond=None)[0]
    return weights


def objective(x, y, weights, prior, ridge, blocks):
    """Squared error and ridge, by output."""
    mask = np.zeros_like(prior)
    for columns, outputs in blocks:
        mask[np.ix_(columns, outputs)] = 1
    change = penalised(x, ridge)[:, None] * (weights - mask * prior)
    return ((y - x @ weights) ** 2).sum(0) + (change**2).sum(0)


# the optimum


@pytest.mark.parametrize("blocks", [[(np.arange(7), np.arange(4))], BLOCKS], ids=["whole", "blocks"])
@pytest.mark.parametrize("ridge", [0.0, 1e-6, 1e-2, 1.0])
def test_the_solution_is_that_of_the_augmented_system(ridge, blocks):
    x, y, prior = problem()
    fit = solve(gram_of(x, y), prior, ridge=ridge, blocks=blocks)
    exact = augmented(x, y, prior, ridge, blocks)
    np.testing.assert_allclose(fit.weights, exact, rtol=1e-6, atol=1e-9)
    np.testing.assert_allclose(
        objective(x, y, fit.weights, prior, ridge, blocks), objective(x, y, exact, prior, ridge, blocks), rtol=1e-6
    )
    assert not fit.rank_deficient
    assert fit.ridge == ridge


def test_all_columns_for_all_outputs_is_the_default():
    x, y, prior = problem()
    one, two = (solve(gram_of(x, y), prior, ridge=0.1, blocks=b) for b in (None, [(np.arange(7), np.arange(4))]))
    np.testing.assert_array_equal(one.weights, two.weights)


def test_weights_outside_the_blocks_are_exactly_zero():
    x, y, prior = problem()
    weights = solve(gram_of(x, y), prior, ridge=1e-2, blocks=BLOCKS).weights
    allowed = np.zeros(weights.shape, bool)
    for columns, outputs in BLOCKS:
        allowed[np.ix_(columns, outputs)] = True
    assert (weights[~allowed] == 0).all()
    assert (weights[allowed] != 0).all()


def test_an_output_without_columns_is_zero():
    x, y, prior = problem()
    blocks = [(np.arange(7), np.arange(3)), (np.zeros(0, int), np.array([3]))]
    assert (solve(gram_of(x, y), prior, ridge=1e-2, blocks=blocks).weights[:, 3] == 0).all()


def test_without_a_bias_all_columns_are_penalised():
    x, y, prior = problem()
    fit = solve(dot_gram(x.astype(np.float32), y.astype(np.float32), bias=False), prior, ridge=0.3)
    scale = 0.3 * (x**2).sum(0).mean()
    exact = prior + np.linalg.solve(x.T @ x + scale * np.eye(7), x.T @ (y - x @ prior))
    np.testing.assert_allclose(fit.weights, exact, rtol=1e-6)


@pytest.mark.parametrize("condition", [1e2, 1e4, 1e5])
def test_float32_activations_of_any_condition_give_the_optimum(condition):
    rng = np.random.default_rng(0)
    left, right = (np.linalg.qr(rng.standard_normal(shape))[0] for shape in ((400, 24), (24, 24)))
    x = ((left * np.geomspace(1, 1 / condition, 24)) @ right.T).astype(np.float32)
    y = (x @ (rng.standard_normal((24, 5)) * np.sqrt(condition)) + 0.01 * rng.standard_normal((400, 5))).astype(
        np.float32
    )
    weights = solve(dot_gram(x, y, bias=False), np.zeros((24, 5)), ridge=0.0).weights
    wide, out = x.astype(np.float64), y.astype(np.float64)
    best = ((out - wide @ np.linalg.lstsq(wide, out, rcond=None)[0]) ** 2).sum(0)
    assert (((out - wide @ weights) ** 2).sum(0) <= 1.001 * best).all()


# too little data


def few_rows():
    return problem(rows=4)


def copied_column():
    x, y, prior = problem()
    x[:, 3] = x[:, 1]
    return x, y, prior


def dead_column():
    x, y, prior = problem()
    x[:, 2] = 0
    return x, y, prior


@pytest.mark.parametrize("make", [few_rows, copied_column, dead_column])
@pytest.mark.parametrize("blocks", [[(np.arange(7), np.arange(4))], BLOCKS], ids=["whole", "blocks"])
def test_without_a_ridge_the_least_change_that_fits_is_taken(make, blocks):
    x, y, prior = make()
    fit = solve(gram_of(x, y), prior, ridge=0.0, blocks=blocks)
    for columns, outputs in blocks:
        start, part = prior[np.ix_(columns, outputs)], x[:, columns]
        exact = start + np.linalg.pinv(part) @ (y[:, outputs] - part @ start)
        np.testing.assert_allclose(fit.weights[np.ix_(columns, outputs)], exact, rtol=1e-6, atol=1e-6)
    assert fit.rank_deficient


def test_a_sum_of_columns_but_for_rounding_leaves_a_choice():
    x, y, prior = problem(rows=200)
    x[:, 3] = x[:, :3].sum(1) * (1 + 2e-7 * np.random.default_rng(1).standard_normal(200))
    fit = solve(Gram(x.T @ x, x.T @ y, (y * y).sum(0), 200, 200, True), prior, ridge=0.0)
    assert fit.rank_deficient
    assert np.abs(fit.weights - prior).max() < 20
    others = np.delete(x, 3, 1)
    best = ((y - others @ np.linalg.lstsq(others, y, rcond=None)[0]) ** 2).sum(0)
    np.testing.assert_allclose(((y - x @ fit.weights) ** 2).sum(0), best, rtol=1e-6)


def test_columns_of_very_different_scale_are_not_taken_for_copies():
    rng = np.random.default_rng(0)
    x = (rng.standard_normal((50, 4)) * [1e-6, 1, 1e4, 1]).astype(np.float32)
    truth = rng.standard_normal((4, 2)) / np.array([[1e-6], [1], [1e4], [1]])
    wide = x.astype(np.float64)
    gram = Gram(wide.T @ wide, wide.T @ (wide @ truth), ((wide @ truth) ** 2).sum(0), 50, 50, False)
    fit = solve(gram, np.zeros((4, 2)), ridge=0.0)
    np.testing.assert_allclose(fit.weights, truth, rtol=1e-6)
    assert not fit.rank_deficient


def test_dead_inputs_keep_their_prior():
    x, y, prior = dead_column()
    for ridge in (0.0, 1e-2):
        np.testing.assert_allclose(solve(gram_of(x, y), prior, ridge=ridge).weights[2], prior[2], rtol=1e-12)


def test_inputs_that_are_all_dead_keep_the_prior_and_fit_the_bias():
    x, y, prior = problem()
    x[:, :-1] = 0
    fit = solve(gram_of(x, y), prior, ridge=1e-2)
    np.testing.assert_allclose(fit.weights[:-1], prior[:-1])
    np.testing.assert_allclose(fit.weights[-1], y.mean(0), rtol=1e-6)


def test_few_rows_with_a_ridge_are_no_special_case():
    x, y, prior = few_rows()
    fit = solve(gram_of(x, y), prior, ridge=1e-3, blocks=BLOCKS)
    np.testing.assert_allclose(fit.weights, augmented(x, y, prior, 1e-3, BLOCKS), rtol=1e-6, atol=1e-9)
    assert not fit.rank_deficient


# both ends of the ridge


def test_a_very_large_ridge_gives_the_prior():
    x, y, prior = problem()
    weights = solve(gram_of(x, y), prior, ridge=1e12).weights
    np.testing.assert_allclose(weights[:-1], prior[:-1], atol=1e-9)
    np.testing.assert_allclose(weights[-1], (y - x[:, :-1] @ prior[:-1]).mean(0), rtol=1e-6)


def test_a_prior_that_fits_stays_at_any_ridge():
    x, _, prior = problem()
    wide = Gram(x.T @ x, x.T @ (x @ prior), ((x @ prior) ** 2).sum(0), len(x), len(x), True)
    for ridge in (0.0, 1e-2, 1.0):
        fit = solve(wide, prior, ridge=ridge)
        np.testing.assert_allclose(fit.weights, prior, rtol=1e-9)
        assert fit.before < 1e-12


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("rows", [3, 7, 30])
def test_the_error_never_rises_above_that_of_the_prior(seed, rows):
    x, y, prior = problem(rows, seed)
    for ridge in (0.0, 1e-3, 1.0):
        fit = solve(gram_of(x, y), prior, ridge=ridge, blocks=BLOCKS)
        assert fit.after <= fit.before * (1 + 1e-9)


def test_the_error_falls_with_the_ridge():
    x, y, prior = problem()
    errors = [solve(gram_of(x, y), prior, ridge=ridge).after for ridge in (0.0, 1e-3, 1e-1, 10.0)]
    assert errors == sorted(errors)
    assert errors[0] < 0.9 * errors[-1]


# residuals


def test_the_residual_is_the_mean_squared_error():
    x, y, prior = problem()
    found = residual(gram_of(x, y), prior)
    np.testing.assert_allclose(found, ((y - x @ prior) ** 2).mean(0), rtol=1e-9)
    spread = y.var(0).sum()
    np.testing.assert_allclose(relative_residual(gram_of(x, y), prior), found.sum() / spread, rtol=1e-9)
    mean = np.vstack([np.zeros((6, 4)), y.mean(0)])
    np.testing.assert_allclose(relative_residual(gram_of(x, y), mean), 1, rtol=1e-9)


def test_without_a_bias_the_residual_is_relative_to_the_second_moment():
    x, y, _ = problem()
    gram = dot_gram(x.astype(np.float32), y.astype(np.float32), bias=False)
    np.testing.assert_allclose(relative_residual(gram, np.zeros((7, 4))), 1, rtol=1e-12)


def test_residuals_are_never_negative():
    x, _, prior = problem()
    for seed in range(20):
        weights = prior * 10.0 ** np.random.default_rng(seed).uniform(-3, 3)
        gram = Gram(x.T @ x, x.T @ (x @ weights), ((x @ weights) ** 2).sum(0), len(x), len(x), True)
        assert (residual(gram, weights) >= 0).all()


def test_outputs_that_are_always_zero_have_a_relative_residual():
    x, y, prior = problem()
    gram = gram_of(x, 0 * y)
    assert relative_residual(gram, 0 * prior) == 0
    assert relative_residual(gram, prior) == np.inf


def test_constant_outputs_that_are_fitted_have_a_small_relative_residual():
    x, y, prior = problem()
    gram = gram_of(x, 0 * y + 3)
    assert solve(gram, prior, ridge=0.0).after < 1e-2


# groups


@pytest.mark.parametrize("ridge", [0.0, 1e-2])
def test_groups_are_solved_each_for_itself(ridge):
    parts = [problem(seed=seed) for seed in range(3)] + [few_rows()]
    grams = [gram_of(x, y) for x, y, _ in parts]
    fields = [np.stack([np.asarray(getattr(g, name)) for g in grams]) for name in ("inputs", "cross", "targets")]
    fit = solve(Gram(*fields, 40, 40, True), np.stack([p for *_, p in parts]), ridge=ridge, blocks=BLOCKS)
    for i, (gram, (_, _, prior)) in enumerate(zip(grams, parts, strict=True)):
        np.testing.assert_array_equal(fit.weights[i], solve(gram, prior, ridge=ridge, blocks=BLOCKS).weights)
    assert fit.rank_deficient == (ridge == 0)


# the ridge


def test_the_default_ridge_leans_on_the_prior_when_samples_are_few():
    assert (default_ridge(199), default_ridge(200)) == (1e-1, 1e-2)


def test_the_ridge_is_chosen_by_what_was_held_back():
    x, y, _ = problem(rows=2000)
    best = np.linalg.lstsq(x, y, rcond=None)[0]
    few, held = gram_of(x[:8], y[:8]), gram_of(x[1000:], y[1000:])
    assert choose_ridge(few, held, best) == 1.0
    many = gram_of(x[:1000], y[:1000])
    assert choose_ridge(many, held, best + 10, candidates=(1e-4, 1.0)) == 1e-4


def test_the_chosen_ridge_minimises_the_held_back_residual():
    x, y, prior = problem(rows=60)
    train, held = gram_of(x[:12], y[:12]), gram_of(x[12:], y[12:])
    errors = {c: residual(held, solve(train, prior, ridge=c, blocks=BLOCKS).weights).sum() for c in (1e-4, 1e-2, 1.0)}
    assert choose_ridge(train, held, prior, blocks=BLOCKS, candidates=tuple(errors)) == min(errors, key=errors.get)


# bad input


def test_bad_input_is_refused():
    x, y, prior = problem()
    gram = gram_of(x, y)
    for ridge in (-1.0, float("nan"), float("inf")):
        with raises("ridge must be a finite number"):
            solve(gram, prior, ridge=ridge)
    with raises(r"prior weights have shape \(6, 4\), but X\^T Y of the layer \(7, 4\)"):
        solve(gram, prior[:-1], ridge=0.0)
    with raises("prior weights are not all finite"):
        solve(gram, prior * np.nan, ridge=0.0)
    with raises("seen no rows"):
        solve(Gram.empty(7, 4, bias=True), prior, ridge=0.0)
    with raises("seen no rows"):
        relative_residual(Gram.empty(7, 4, bias=True), prior)
    with raises("one or more candidates"):
        choose_ridge(gram, gram, prior, candidates=())


@pytest.mark.parametrize("outputs", [[0, 1, 2], [0, 1, 2, 3, 3], [0, 1, 2, 4]])
def test_blocks_must_hold_every_output_once(outputs):
    x, y, prior = problem()
    with raises(r"each of the outputs 0\.\.3 once"):
        solve(gram_of(x, y), prior, ridge=0.0, blocks=[(np.arange(7), np.array(outputs))])


@pytest.mark.parametrize("columns", [[0, 0], [7], [-1]])
def test_columns_of_a_block_must_exist_once(columns):
    x, y, prior = problem()
    with raises("columns twice or outside"):
        solve(gram_of(x, y), prior, ridge=0.0, blocks=[(np.array(columns), np.arange(4))])
