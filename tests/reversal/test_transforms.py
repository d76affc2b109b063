"""Other units and masked objectives: what is cut, what is hidden, and what carries the loss."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from permjax.reversal.bridge import Relation, identity_bridges, with_bridges
from permjax.reversal.denoise import bico, masked_copy, mlm_u
from permjax.reversal.reorder import permute_units
from permjax.reversal.transforms import RECIPES, Recipe, ngram_units, random_units, with_units

pytestmark = pytest.mark.fast

MASK, BOS, ROWS, T = 0, 1, 64, 24


def draw(seed=0):
    """Rows of two documents of 9 and 12 tokens, each after BOS, and padding."""
    rng = np.random.default_rng(seed)
    doc_ids = np.repeat([0, 1, -1], [9, 12, 3])[None].repeat(ROWS, axis=0)
    tokens = rng.integers(5, 100, (ROWS, T))
    tokens[:, [0, 9]] = BOS
    examples = np.arange(2 * ROWS).reshape(ROWS, 2)
    batch = {"tokens": tokens, "doc_ids": doc_ids, "unit_ids": np.broadcast_to(np.arange(T), (ROWS, T))}
    batch |= {"example_ids": examples, "pinned": tokens == BOS}
    return {name: jnp.asarray(leaf, bool if name == "pinned" else jnp.int32) for name, leaf in batch.items()}


def moved_rows(batch):
    """The same documents in other rows."""
    return {name: leaf[::-1] for name, leaf in batch.items()}


def test_runs_of_tokens_begin_anew_in_each_document():
    doc_ids = jnp.array([0, 0, 0, 1, 1, 1, 1, -1])
    assert ngram_units(doc_ids, 2).tolist() == [0, 0, 1, 3, 3, 4, 4, -1]
    assert ngram_units(doc_ids, 1).tolist() == [0, 1, 2, 3, 4, 5, 6, -1]


def test_random_runs_have_all_lengths_alike_and_depend_on_the_example_alone():
    batch, key = draw(), jax.random.key(0)
    run = jax.jit(lambda batch: random_units(key, batch, 3))
    units = run(batch)
    inside = np.asarray(batch["doc_ids"][0]) >= 0
    _, first = np.unique(np.asarray(units[:, :9]) + 1000 * np.arange(ROWS)[:, None], return_counts=True)
    assert set(first) == {1, 2, 3}
    assert (np.diff(np.asarray(units)[:, inside], axis=1) >= 0).all()
    assert (units[:, 8] != units[:, 9]).all()
    lengths = [
        np.argmax(row != row[0]) for row in np.asarray(units[:, :9])
    ]  # of the first run, which nothing cuts short
    np.testing.assert_allclose([lengths.count(n) / ROWS for n in (1, 2, 3)], 1 / 3, atol=0.2)
    other = run(moved_rows(batch))[::-1]
    np.testing.assert_array_equal(np.diff(other[:, :21], axis=1), np.diff(units[:, :21], axis=1))


@pytest.mark.parametrize("name", ["spt", "token_reversal", "ngram3", "random_permutation"])
def test_recipes_give_units_that_can_be_permuted(name):
    batch, key, recipe = draw(), jax.random.key(1), RECIPES[name]
    found = permute_units(key, with_units(key, batch, recipe), recipe.probs, max_units=T)
    np.testing.assert_array_equal(np.sort(found.batch["tokens"], axis=1), np.sort(batch["tokens"], axis=1))
    shares = [(np.asarray(found.orders) == order).mean() for order in range(3)]
    np.testing.assert_allclose(shares, recipe.probs, atol=0.2)


def test_unknown_units_are_refused():
    with pytest.raises(ValueError, match="no units 'syllables'"):
        with_units(jax.random.key(0), draw(), Recipe("syllables", (1.0, 0.0, 0.0)))


@pytest.mark.parametrize("transform", [mlm_u, bico, masked_copy])
def test_what_is_masked_depends_on_the_example_alone(transform):
    batch, key = draw(), jax.random.key(2)
    run = jax.jit(lambda batch: transform(key, batch, MASK))
    found, other = run(batch), run(moved_rows(batch))
    np.testing.assert_array_equal(found["tokens"], other["tokens"][::-1])
    assert (found["tokens"][batch["pinned"].nonzero()] == BOS).all() or transform is masked_copy


def test_masked_tokens_are_foretold_at_their_place_with_the_weight_of_all_orders():
    batch = draw()
    found = jax.jit(lambda batch: mlm_u(jax.random.key(3), batch, MASK))(batch)
    masked = np.asarray(found["tokens"]) == MASK
    np.testing.assert_array_equal(masked, np.asarray(found["weights"]) > 0)
    np.testing.assert_array_equal(found["labels"], batch["tokens"])
    sums = np.asarray(found["weights"])[:, :9].sum(axis=1)
    np.testing.assert_allclose(sums[masked[:, :9].any(axis=1)], 8, rtol=1e-5)
    counts = np.bincount(masked[:, 9:21].sum(axis=1), minlength=12)
    assert (counts > 0).sum() >= 9  # from none to all, alike
    assert not np.asarray(found["causal"]).any()


def test_half_of_the_rows_are_denoised_and_the_others_continued():
    batch = draw()
    found = jax.jit(lambda batch: bico(jax.random.key(4), batch, MASK))(batch)
    causal, masked = np.asarray(found["causal"]), np.asarray(found["tokens"]) == MASK
    assert 0.3 < causal.mean() < 0.7
    assert not masked[causal].any()
    np.testing.assert_array_equal(found["labels"][causal, :8], batch["tokens"][causal, 1:9])
    np.testing.assert_array_equal(found["weights"][~causal] > 0, masked[~causal])
    np.testing.assert_allclose(masked[~causal][:, 1:9].mean(), 0.15, atol=0.06)
    np.testing.assert_array_equal(found["seen"], ~masked)


def test_a_masked_copy_stands_before_its_document_and_has_no_loss():
    batch = draw()
    found = jax.jit(lambda batch: masked_copy(jax.random.key(5), batch, MASK))(batch)
    tokens, original = np.asarray(found["tokens"]), np.asarray(batch["tokens"])
    np.testing.assert_array_equal(tokens[:, 9:18], original[:, :9])
    np.testing.assert_array_equal(tokens[:, 30:42], original[:, 9:21])
    hidden = tokens[:, 18:30] == MASK
    np.testing.assert_array_equal(tokens[:, 18:30][~hidden], original[:, 9:21][~hidden])
    assert 0.3 < hidden.mean() < 0.6
    np.testing.assert_array_equal(found["doc_ids"][0], np.repeat([0, 1, -1], [18, 24, 6]))
    weights = np.asarray(found["weights"])
    np.testing.assert_array_equal(weights[0], np.repeat([0, 1, 0, 1, 0], [8, 9, 12, 12, 7]))
    assert found["positions"][0, :42].tolist() == [*range(18), *range(24)]


def test_bridges_lead_from_an_entity_back_to_it():
    bridges = identity_bridges(["Ann", "Bo"], Relation("husband", "wife"))
    assert bridges[0] == "The wife of Ann's husband is Ann."
    texts = with_bridges(["Ann's husband is Cy."], bridges, repeats=3)
    assert texts == ["Ann's husband is Cy."] * 3 + bridges
    with pytest.raises(ValueError, match="cannot be repeated 0 times"):
        with_bridges([], [], repeats=0)
