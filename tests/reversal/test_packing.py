"""Rows of several documents: what fits where, and that no document sees another."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from permjax.nets.gpt import GPT2Config
from permjax.nets.gpt import build as build_gpt
from permjax.nets.llama import LlamaConfig
from permjax.nets.llama import build as build_llama
from permjax.reversal.layout import next_token, positions, visible
from permjax.reversal.packing import first_fit, pack
from permjax.reversal.reorder import permute_units

pytestmark = pytest.mark.fast

VOCABULARY, T = 50, 16
NETS = {
    "gpt2": build_gpt(GPT2Config(VOCABULARY, n_positions=T, n_embd=16, n_layer=2, n_head=2)),
    "llama": build_llama(
        LlamaConfig(VOCABULARY, 16, 24, num_hidden_layers=2, num_attention_heads=2, max_position_embeddings=T)
    ),
}
APPLY = {name: jax.jit(net.apply) for name, net in NETS.items()}


def documents(seed=0, sizes=(5, 7, 4, 9, 2)):
    rng = np.random.default_rng(seed)
    return [
        {
            "tokens": rng.integers(1, VOCABULARY, n),
            "unit_ids": np.sort(rng.integers(0, 4, n)),
            "weight": rng.random((n, 2)),
            "example_id": 70 + i,
        }
        for i, n in enumerate(sizes)
    ]


@pytest.fixture(scope="module")
def batch():
    return jax.tree.map(jnp.asarray, pack(documents(), T))


def test_each_document_goes_into_the_first_row_with_room():
    assert first_fit([5, 7, 4, 9, 2], 16) == [[0, 1, 2], [3, 4]]
    assert first_fit([3, 3, 3], 3) == [[0], [1], [2]]
    assert first_fit([], 3) == []


def test_packed_rows_hold_every_array_of_every_document(batch):
    for number, document in enumerate(documents()):
        row, place = np.argwhere(np.asarray(batch["example_ids"]) == 70 + number)[0]
        here = np.asarray(batch["doc_ids"][row]) == place
        np.testing.assert_array_equal(batch["tokens"][row, here], document["tokens"])
        np.testing.assert_allclose(batch["weight"][row, here], document["weight"], rtol=1e-6)
        units = np.asarray(batch["unit_ids"][row, here])
        np.testing.assert_array_equal(units - units[0], document["unit_ids"] - document["unit_ids"][0])
    assert batch["doc_ids"][1].tolist() == [0] * 9 + [1] * 2 + [-1] * 5
    assert (batch["unit_ids"][1, 11:] == -1).all()


def test_units_of_packed_documents_can_be_permuted(batch):
    found = permute_units(jax.random.key(0), batch, max_units=T)
    np.testing.assert_array_equal(np.sort(found.batch["tokens"][1, :9]), np.sort(documents()[3]["tokens"]))


def test_a_fixed_number_of_rows_is_filled_with_padding():
    found = pack(documents(), T, rows=3)
    assert found["tokens"].shape == (3, T)
    assert (found["doc_ids"][2] == -1).all()
    assert pack(documents(), T, packed=False)["doc_ids"].max() == 0


@pytest.mark.parametrize("name", NETS)
def test_without_context_the_logits_are_those_of_plain_causal_attention(name, batch):
    net = NETS[name]
    params = net.init(jax.random.key(0))
    plain = APPLY[name](params, batch["tokens"])
    everything = jnp.zeros_like(batch["doc_ids"])
    context = {"positions": positions(everything), "visible": visible(everything)}
    np.testing.assert_allclose(APPLY[name](params, batch["tokens"], **context), plain, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", NETS)
def test_the_logits_of_a_document_do_not_move_when_its_neighbours_are_permuted(name, batch):
    net = NETS[name]
    params = net.init(jax.random.key(0))
    context = {"positions": positions(batch["doc_ids"]), "visible": visible(batch["doc_ids"])}
    mine = np.asarray(batch["doc_ids"]) == 1
    other = jnp.where(
        mine, batch["tokens"], permute_units(jax.random.key(1), batch, (0, 0, 1), max_units=T).batch["tokens"]
    )
    assert (other != batch["tokens"]).any()
    apply = APPLY[name]
    before, after = (np.asarray(apply(params, tokens, **context)) for tokens in (batch["tokens"], other))
    np.testing.assert_array_equal(before[mine], after[mine])
    alone = APPLY[name](params, jnp.asarray(documents()[1]["tokens"])[None])
    np.testing.assert_allclose(before[0, 5:12], alone[0], rtol=1e-4, atol=1e-5)
    without = np.asarray(apply(params, other))
    assert np.abs(without[0, 5:12] - before[0, 5:12]).max() > 1e-3


def test_bidirectional_attention_sees_all_of_its_document_but_what_is_hidden():
    doc_ids = jnp.array([[0, 0, 0, 1, 1, -1]])
    seen = jnp.array([[True, False, True, True, True, True]])
    found = np.asarray(visible(doc_ids, causal=jnp.array([False]), seen=seen)[0])
    assert found[:5, :5].astype(int).tolist() == [
        [1, 0, 1, 0, 0],
        [1, 1, 1, 0, 0],
        [1, 0, 1, 0, 0],
        [0, 0, 0, 1, 1],
        [0, 0, 0, 1, 1],
    ]


def test_no_label_comes_from_another_document(batch):
    found = next_token(batch)
    counted = np.asarray(found["weights"] > 0)
    assert counted.sum() == sum(len(document["tokens"]) - 1 for document in documents())
    doc_ids = np.asarray(batch["doc_ids"])
    np.testing.assert_array_equal(doc_ids[:, :-1][counted[:, :-1]], doc_ids[:, 1:][counted[:, :-1]])


@pytest.mark.parametrize(
    ("change", "arguments", "message"),
    [
        ({}, {"length": 8}, "Document 3 has 9 tokens"),
        ({}, {"length": T, "rows": 1}, "need 2 rows of 16 tokens, but there are 1"),
        ({"unit_ids": np.zeros(2)}, {"length": T}, "Document 0 has 5 tokens, but 2 of 'unit_ids'"),
    ],
)
def test_documents_that_do_not_fit_are_refused(change, arguments, message):
    first, *others = documents()
    with pytest.raises(ValueError, match=message):
        pack([first | change, *others], **arguments)
