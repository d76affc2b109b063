"""Permutation in other people's pipelines, with stand-ins for them."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from permjax.reversal.host import draw_order, generator, permute_document
from permjax.reversal.interfaces import IGNORED_LABEL, GrainPermutation, PermutingCollator, add_units, wrap_step
from permjax.reversal.layout import next_token
from permjax.reversal.reorder import permute_units
from permjax.reversal.segment import WordSegmenter

pytestmark = pytest.mark.fast

BOS, EOS, TAGS = 1, 2, (3, 4, 5)


def encode(text):
    """Words and signs as tokens, a space before a word going with it; the number of a token is its length and place."""
    found = list(re.finditer(r"\s?\w+|\S", text))
    return [10 + i for i in range(len(found))], [match.span() for match in found]


def row(number=0, text="Ann is the mother of Bo."):
    return add_units(WordSegmenter(), encode)({"text": text}) | {"example_id": number}


def element():
    return {
        "tokens": np.arange(9),
        "unit_ids": np.array([0, 1, 1, 2, 3, 3, 3, 4, 5]),
        "pinned": np.arange(9) % 8 == 0,
        "loss": np.arange(18).reshape(9, 2),
        "name": "a document",
    }


def test_documents_on_the_host_keep_the_laws_of_the_device():
    for seed in range(20):
        given = element()
        found = permute_document(generator(0, seed), given)
        tokens = found.document["tokens"]
        assert sorted(tokens) == list(range(9))
        assert (tokens[0], tokens[8]) == (0, 8)
        assert list(tokens).index(2) == list(tokens).index(1) + 1
        np.testing.assert_array_equal(found.document["loss"], given["loss"][tokens])
        assert found.document["name"] == "a document"
        if found.order < 2:
            order = [[0, 1, 2, 3, 4, 5, 6, 7, 8], [0, 7, 4, 5, 6, 3, 1, 2, 8]][found.order]
            assert tokens.tolist() == order


def test_orders_on_the_host_have_their_probabilities():
    rng = generator(1)
    counts = np.bincount([draw_order(rng, (0.5, 0.2, 0.3)) for _ in range(4000)], minlength=3)
    np.testing.assert_allclose(counts / 4000, (0.5, 0.2, 0.3), atol=0.03)


def test_a_random_map_of_grain_is_repeated_by_its_generator():
    transform = GrainPermutation((0.0, 0.0, 1.0))
    first, again = (call(element(), np.random.default_rng(3)) for call in (transform, transform.random_map))
    np.testing.assert_array_equal(first["tokens"], again["tokens"])
    others = {tuple(transform.random_map(element(), np.random.default_rng(n))["tokens"]) for n in range(10)}
    assert len(others) > 3


def test_a_map_of_datasets_adds_the_units_of_tokens():
    found = row()
    assert found["input_ids"] == [*range(10, 17)]
    assert found["unit_ids"] == [0, 1, 2, 3, 4, 5, 5]
    assert found["snapped"] == 0


def test_a_collator_gives_rows_that_trainers_shift():
    collate = PermutingCollator(12, (0.0, 1.0, 0.0), tags=TAGS, bos=BOS, eos=EOS)
    batch = collate([row(), row(1, "Bo ran.")])
    assert batch["input_ids"][0].tolist() == [BOS, TAGS[1], 15, 16, 14, 13, 12, 11, 10, EOS, 0, 0]
    assert batch["labels"][1].tolist() == [BOS, TAGS[1], 11, 12, 10, EOS, *[IGNORED_LABEL] * 6]
    assert batch["attention_mask"].sum(axis=1).tolist() == [10, 6]
    assert {values.dtype for values in batch.values()} == {np.dtype(np.int32)}


def test_a_collator_depends_on_the_seed_the_epoch_and_the_example_alone():
    def orders(rows, **settings):
        return PermutingCollator(8, **settings)(rows)["input_ids"]

    rows = [row(n) for n in range(12)]
    np.testing.assert_array_equal(orders(rows), orders(rows[::-1])[::-1])
    for change in ({"epoch": 1}, {"seed": 1}):
        assert (orders(rows) != orders(rows, **change)).any()
    unnamed = [{key: value for key, value in r.items() if key != "example_id"} for r in rows]
    assert len({tuple(r) for r in orders(unnamed).tolist()}) == 1


def test_a_collator_cuts_long_texts_before_they_are_permuted():
    batch = PermutingCollator(5, (0.0, 1.0, 0.0), eos=EOS)([row()])
    assert batch["input_ids"].tolist() == [[13, 12, 11, 10, EOS]]


def test_a_wrapped_step_permutes_on_the_device_with_other_orders_in_each_epoch():
    t, key = 12, jax.random.key(0)
    batch = {"tokens": jnp.arange(t), "doc_ids": jnp.zeros(t, jnp.int32), "unit_ids": jnp.arange(t) // 2}
    batch |= {"example_ids": jnp.array([4])}
    step = jax.jit(wrap_step(lambda state, batch, scale: (state + scale, batch), key, max_units=6, prepare=next_token))
    seen = set()
    for epoch in range(8):
        state, found = step(1, batch, epoch, 2)
        expected = permute_units(jax.random.fold_in(key, epoch), batch, max_units=6).batch["tokens"]
        np.testing.assert_array_equal(found["tokens"], expected)
        np.testing.assert_array_equal(found["labels"][:-1], expected[1:])
        seen.add(tuple(found["tokens"].tolist()))
    assert state == 3
    assert len(seen) > 2


@pytest.mark.parametrize(
    "make", [lambda p: PermutingCollator(4, p), lambda p: wrap_step(print, jax.random.key(0), p, max_units=1)]
)
def test_wrong_probabilities_are_refused_at_once(make):
    with pytest.raises(ValueError, match="sum to one"):
        make((0.5, 0.5, 0.5))
