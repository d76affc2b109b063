"""Laws of permuting units: what moves, what stays, and what an order depends on."""

import math
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from permjax.reversal.layout import next_token, pin, pin_final, positions
from permjax.reversal.reorder import (
    ORIGINAL,
    RANDOM,
    REVERSED,
    THIRDS,
    _sorted,
    inverse,
    order_edges,
    permute_units,
    reorder,
)

pytestmark = pytest.mark.fast

T, MAX_UNITS, DOCUMENTS = 48, 28, 5
BOS, EOS, TAGS = 1, 2, (3, 4, 5)


def draw_batch(seed, rows=4, t=T):
    """Rows of documents [BOS, tag, units of 1 to 4 tokens, EOS] and padding; every other token is its own."""
    rng = np.random.default_rng(seed)
    doc_ids, unit_ids = (np.full((rows, t), -1, np.int32) for _ in range(2))
    tokens = np.zeros((rows, t), np.int32)
    for row in range(rows):
        at = unit = 0
        for document in range(int(rng.integers(2, DOCUMENTS + 1))):
            sizes = rng.integers(1, 5, size=rng.integers(0, 6))
            length = 3 + sizes.sum()
            if at + length > t:
                break
            here = slice(at, at + length)
            doc_ids[row, here] = document
            unit_ids[row, here] = unit + np.repeat(np.arange(len(sizes) + 3), [1, 1, *sizes, 1])
            tokens[row, here] = np.arange(here.start, here.stop) + 100 * (row + 1)
            tokens[row, [at, at + 1, at + length - 1]] = BOS, TAGS[0], EOS
            at, unit = at + length, unit + len(sizes) + 3
    examples = rng.permutation(1000)[: rows * DOCUMENTS].reshape(rows, DOCUMENTS).astype(np.int32)
    batch = {"tokens": tokens, "doc_ids": doc_ids, "unit_ids": unit_ids, "example_ids": examples}
    batch["loss_mask"] = rng.random((rows, t)) < 2  # all of it
    batch["extra"] = rng.standard_normal((rows, t, 2)).astype(np.float32)
    return pin(jax.tree.map(jnp.asarray, batch), (BOS, EOS))


def permuted(key, batch, probs=THIRDS):
    return permute_units(key, batch, probs, max_units=MAX_UNITS, tag_ids=TAGS)


@pytest.fixture(scope="module", params=range(3))
def moved(request):
    batch = draw_batch(request.param)
    return batch, permuted(jax.random.key(request.param), batch)


def test_every_document_keeps_its_tokens_and_its_span(moved):
    batch, found = moved
    np.testing.assert_array_equal(found.batch["doc_ids"], batch["doc_ids"])
    origin = np.take_along_axis(np.asarray(batch["doc_ids"]), np.asarray(found.index), axis=1)
    np.testing.assert_array_equal(origin, batch["doc_ids"])
    np.testing.assert_array_equal(np.sort(found.index, axis=1), np.broadcast_to(np.arange(T), found.index.shape))


def test_pinned_tokens_and_padding_keep_their_places(moved):
    batch, found = moved
    stays = np.asarray(batch["pinned"] | (batch["doc_ids"] < 0) | (batch["tokens"] == TAGS[0]))
    places = np.broadcast_to(np.arange(T), stays.shape)
    np.testing.assert_array_equal(np.asarray(found.index)[stays], places[stays])
    assert stays.any()
    assert (np.asarray(found.index) != places).any()


def test_tokens_keep_their_order_in_their_unit_and_units_stay_whole(moved):
    batch, found = moved
    units, index = np.asarray(batch["unit_ids"]), np.asarray(found.index)
    for row in range(len(units)):
        for unit in set(units[row]) - {-1}:
            at = np.flatnonzero(units[row, index[row]] == unit)
            np.testing.assert_array_equal(index[row, at], np.flatnonzero(units[row] == unit))
            np.testing.assert_array_equal(at, np.arange(at[0], at[0] + len(at)))


def test_the_inverse_brings_every_array_back(moved):
    batch, found = moved
    back = reorder(reorder(batch, found.index), inverse(found.index))
    jax.tree.map(np.testing.assert_array_equal, back, batch)


def test_tags_name_the_order_of_their_document(moved):
    batch, found = moved
    orders, rows = np.asarray(found.orders), np.asarray(batch["doc_ids"])
    for row, place in np.argwhere(np.asarray(batch["tokens"]) == TAGS[0]):
        assert found.batch["tokens"][row, place] == TAGS[orders[row, rows[row, place]]]
    np.testing.assert_array_equal((orders >= 0).sum(axis=1), rows.max(axis=1) + 1)


def test_a_jitted_permutation_over_four_devices_is_the_eager_one():
    batch, key = draw_batch(4), jax.random.key(4)
    mesh = jax.make_mesh((4,), ("rows",), axis_types=(AxisType.Auto,))
    found = jax.jit(permuted)(key, jax.device_put(batch, NamedSharding(mesh, PartitionSpec("rows"))))
    assert len(found.index.sharding.device_set) == 4
    jax.tree.map(np.testing.assert_array_equal, found, permuted(key, batch))


def test_reversing_twice_is_the_identity():
    batch = draw_batch(5)
    once = permuted(jax.random.key(0), batch, (0, 1, 0))
    assert (once.index != jnp.arange(T)[None]).any()
    twice = permuted(jax.random.key(1), once.batch, (0, 1, 0))
    back = twice.batch | {"tokens": jnp.where(twice.batch["tokens"] == TAGS[1], TAGS[0], twice.batch["tokens"])}
    jax.tree.map(np.testing.assert_array_equal, back, batch)


def test_the_original_order_alone_changes_no_bit():
    batch = draw_batch(6)
    found = permuted(jax.random.key(6), batch, (1, 0, 0))
    jax.tree.map(np.testing.assert_array_equal, found.batch, batch)
    assert set(np.unique(found.orders)) <= {-1, ORIGINAL}


def one_document(units, sizes=None, example=0, before=0, t=24):
    sizes = [1] * units if sizes is None else sizes
    doc_ids, unit_ids = (np.full(t, -1, np.int32) for _ in range(2))
    ids = np.repeat(np.arange(units), sizes)
    here = slice(before, before + len(ids))
    doc_ids[:before] = 0
    unit_ids[:before] = np.arange(before) + 100
    doc_ids[here] = 1 if before else 0
    unit_ids[here] = ids + 10
    examples = [555, example] if before else [example, 555]
    tokens = np.where(doc_ids == (1 if before else 0), np.arange(t) - before, 99)
    return jax.tree.map(
        jnp.asarray,
        {"tokens": tokens, "doc_ids": doc_ids, "unit_ids": unit_ids, "example_ids": np.array(examples, np.int32)},
    )


def test_the_order_of_an_example_does_not_depend_on_its_row_its_place_or_its_neighbours():
    sizes, key = [2, 1, 3, 1, 2, 4], jax.random.key(7)
    rows = [one_document(6, sizes, example, before) for example in range(8) for before in (0, 3, 8)]
    batch = jax.tree.map(lambda *leaves: jnp.stack(leaves), *rows)
    found = permute_units(key, batch, (0.2, 0.2, 0.6), max_units=20).batch["tokens"]
    texts = [list(row[row < 99]) for row in np.asarray(found)]
    for alone, second, third in zip(texts[::3], texts[1::3], texts[2::3], strict=True):
        assert alone == second == third
    assert len({tuple(text) for text in texts}) > 3
    by_token = jnp.take_along_axis(batch["example_ids"], jnp.maximum(batch["doc_ids"], 0), axis=1)
    again = permute_units(key, {**batch, "example_ids": by_token}, (0.2, 0.2, 0.6), max_units=20)
    np.testing.assert_array_equal(again.batch["tokens"], found)


@pytest.mark.parametrize("units", [2, 3, 4])
def test_all_orders_of_units_are_equally_likely(units):
    draws = 4000
    row = one_document(units, t=5)
    batch = jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (draws, *leaf.shape)), row)
    batch["example_ids"] = jnp.arange(2 * draws, dtype=jnp.int32).reshape(draws, 2)
    found = permute_units(jax.random.key(units), batch, (0, 0, 1), max_units=5).index
    counts = Counter(map(tuple, np.asarray(found)[:, :units].tolist()))
    expected = draws / math.factorial(units)
    assert len(counts) == math.factorial(units)
    freedom = math.factorial(units) - 1
    statistic = sum((count - expected) ** 2 / expected for count in counts.values())
    assert statistic < freedom + 4 * math.sqrt(2 * freedom) + 4


def test_orders_come_with_their_probabilities():
    draws, probs = 4000, (0.5, 0.2, 0.3)
    row = one_document(2, t=5)
    batch = jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (draws, *leaf.shape)), row)
    batch["example_ids"] = jnp.arange(2 * draws, dtype=jnp.int32).reshape(draws, 2)
    orders = permute_units(jax.random.key(0), batch, probs, max_units=5).orders[:, 0]
    shares = [float((orders == order).mean()) for order in (ORIGINAL, REVERSED, RANDOM)]
    np.testing.assert_allclose(shares, probs, atol=0.04)


def short_row(sizes, mask, pinned=()):
    """One document in a row of six places."""
    batch = one_document(len(sizes), sizes, t=6) | {"loss_mask": jnp.array(mask, bool)}
    return batch | {"pinned": jnp.isin(jnp.arange(6), jnp.array(pinned, int))}


def permuted_row(batch, probs):
    return permute_units(jax.random.key(3), batch, probs, max_units=6).batch


def test_labels_follow_the_new_order_and_positions_count_on():
    found = next_token(permuted_row(short_row([1, 2, 1], [1] * 6), (0, 1, 0)))
    assert found["tokens"].tolist() == [3, 1, 2, 0, 99, 99]
    assert found["labels"].tolist()[:3] == [1, 2, 0]
    assert found["weights"].tolist() == [1, 1, 1, 0, 0, 0]
    assert found["positions"].tolist() == [0, 1, 2, 3, 0, 0]
    assert positions(jnp.array([0, 0, 1, 1, 1, -1])).tolist() == [0, 1, 0, 1, 2, 0]


def test_the_loss_mask_travels_with_its_tokens():
    found = permuted_row(short_row([2, 1, 2], [1, 1, 0, 1, 1, 0]), (0, 0, 1))
    np.testing.assert_array_equal(found["loss_mask"], (found["tokens"] != 2) & (found["tokens"] < 99))


def test_an_answer_may_not_cross_the_border_of_its_prompt():
    sizes, mask = [2, 1, 2, 1], [0, 0, 0, 1, 1, 1]
    with pytest.raises(ValueError, match="answer after its prompt"):
        permuted_row(short_row(sizes, mask), (0, 1, 0))
    found = permuted_row(short_row(sizes, mask, pinned=(0, 1, 2)), (0, 1, 0))
    assert found["tokens"].tolist() == [0, 1, 2, 5, 3, 4]


def test_only_final_punctuation_is_pinned():
    stop = 9
    batch = {"tokens": jnp.array([1, 9, 5, 9, 9, 2, 1, 9, 5, 2, 1, 9, 2, 0])}
    batch |= {"doc_ids": jnp.array([0] * 6 + [1] * 4 + [2] * 3 + [-1])}
    found = pin_final(pin(batch, (BOS, EOS)), (stop,))["pinned"]
    assert jnp.flatnonzero(found).tolist() == [0, 3, 4, 5, 6, 9, 10, 11, 12]


# bad input


@pytest.mark.parametrize("probs", [(0.5, 0.5), (0.5, 0.4, 0.2), (1.5, -0.5, 0.0), (float("nan"), 0.5, 0.5)])
def test_probabilities_that_are_none_are_refused(probs):
    with pytest.raises(ValueError, match="sum to one"):
        order_edges(probs)


def test_too_many_units_are_refused_where_they_can_be_counted_and_reported_where_not():
    row = one_document(5, before=8, t=16)
    batch = jax.tree.map(lambda leaf: leaf[None], row)
    with pytest.raises(ValueError, match="1 of 1 rows have more than 10 units, up to 13; raise 'max_units'"):
        permute_units(jax.random.key(0), batch, max_units=10)
    found = jax.jit(lambda batch: permute_units(jax.random.key(0), batch, (0, 1, 0), max_units=10))(batch)
    assert found.surplus.tolist() == [3]
    assert found.orders.tolist() == [[REVERSED, ORIGINAL]]
    assert found.index[0].tolist() == [*range(7, -1, -1), *range(8, 16)]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"unit_ids": None}, "has no 'unit_ids'"),
        ({"unit_ids": [0, 0, 1, 0]}, "unit of row 0 is in pieces"),
        ({"unit_ids": [0, -1, 1, 1]}, "in no unit"),
        ({"doc_ids": [0, 1, 0, 0]}, "not numbered 0, 1, 2"),
        ({"example_ids": []}, "names 0; name the example"),
        ({"pinned": [True]}, "'pinned' has shape"),
    ],
)
def test_batches_that_are_no_tiling_are_refused(change, message):
    batch = {"tokens": [1, 2, 3, 4], "doc_ids": [0] * 4, "unit_ids": [0, 1, 2, 3], "example_ids": [0]} | change
    batch = {name: np.array(value) for name, value in batch.items() if value is not None}
    with pytest.raises(ValueError, match=message):
        permute_units(jax.random.key(0), batch, max_units=4)


@pytest.mark.parametrize("max_units", [0, 1 << 16])
def test_a_maximum_of_units_out_of_bounds_is_refused(max_units):
    with pytest.raises(ValueError, match="'max_units' is"):
        permute_units(jax.random.key(0), one_document(2), max_units=max_units)


@pytest.mark.parametrize("units", [1, 1000, 3000])  # two digits, and three
def test_units_are_sorted_by_block_key_and_place(units):
    rng = np.random.default_rng(units)
    block = np.sort(rng.integers(1, units // 20 + 2, units)).astype(np.uint32)
    keys = rng.integers(0, 2**32, units, dtype=np.uint32)
    keys[rng.random(units) < 0.3] = 2**32 - 1
    np.testing.assert_array_equal(jax.jit(_sorted)(block, keys), np.lexsort((keys, block)))


def test_tags_that_are_not_three_are_refused():
    with pytest.raises(ValueError, match="three different tokens"):
        permute_units(jax.random.key(0), one_document(2), max_units=4, tag_ids=(3, 3, 4))
