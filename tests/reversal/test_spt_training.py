"""The training loop: what a step is given, exact resume, pieces and devices, and that small models learn."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh

from permjax.reversal.corpus import Prompt, chain, names, token_documents
from permjax.reversal.evaluate import accuracies
from permjax.reversal.methods import METHODS, corpus_for, prepare
from permjax.reversal.rules import RuleSegmenter
from permjax.reversal.segment import NGramSegmenter
from permjax.reversal.training import ReversalTraining, rows_of, small_gpt, train
from permjax.reversal.vocabulary import EOS, MASK, TAGS

CORPUS = names(6, 5, pool=9, fillers=1, tellings=1)
WORDS = CORPUS.vocabulary()
DOCUMENTS = token_documents(CORPUS, WORDS)
ROWS = rows_of(DOCUMENTS)
LENGTH = ROWS["tokens"].shape[1]
NET = small_gpt(len(WORDS), LENGTH, width=16, layers=1, heads=2)
CONFIG = ReversalTraining(steps=6, batch_size=8, warmup_steps=2, every=3)
SPT = METHODS["spt"]


def batch_of(rows):
    return {name: jnp.asarray(leaf) for name, leaf in rows.items()}


def documents_of(batch):
    """The tokens of each document by its example."""
    found = {}
    for row, (tokens, doc_ids) in enumerate(zip(batch["tokens"], batch["doc_ids"], strict=True)):
        for document in range(int(doc_ids.max()) + 1):
            found[int(batch["example_ids"][row, document])] = np.asarray(tokens)[np.asarray(doc_ids) == document]
    return found


def distance(a, b):
    leaves = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return max(float(jnp.abs(x - y).max()) for x, y in leaves)


@pytest.fixture(scope="module")
def trained():
    return train(NET, ROWS, SPT, CONFIG, 0)


@pytest.mark.fast
def test_documents_are_the_same_whether_rows_are_packed_or_not():
    key = jax.random.key(5)
    found = [
        documents_of(jax.jit(prepare, static_argnums=0)(SPT, key, batch_of(rows))[0])
        for rows in (ROWS, rows_of(DOCUMENTS, 3 * LENGTH, packed=True))
    ]
    assert found[0].keys() == found[1].keys() == set(range(len(DOCUMENTS)))
    for number, document in enumerate(DOCUMENTS):
        np.testing.assert_array_equal(found[0][number], found[1][number])
        assert sorted(found[0][number][1:]) == sorted(document["tokens"][1:])
        assert found[0][number][0] in TAGS
        assert found[0][number][-1] == EOS


@pytest.mark.fast
def test_orders_are_counted_and_are_those_of_the_tags():
    batch, counts = prepare(SPT, jax.random.key(0), batch_of(ROWS))
    assert counts.tolist() == [int((batch["tokens"][:, 0] == tag).sum()) for tag in TAGS]
    assert sum(counts.tolist()) == len(DOCUMENTS)
    assert min(counts.tolist()) > 0
    batch, counts = prepare(METHODS["ntp"], jax.random.key(0), batch_of(ROWS))
    assert counts.tolist() == [len(DOCUMENTS), 0, 0]
    np.testing.assert_array_equal(batch["tokens"], ROWS["tokens"])


@pytest.mark.fast
def test_every_method_gives_the_loop_tokens_labels_and_weights():
    for name, method in METHODS.items():
        rows = {leaf: values[:4] for leaf, values in ROWS.items()}
        batch, _ = jax.eval_shape(lambda key, rows, method=method: prepare(method, key, rows), jax.random.key(0), rows)
        shape = (4, LENGTH * (2 if name == "masked_ft" else 1))
        assert {batch[leaf].shape for leaf in ("tokens", "labels", "weights", "positions", "doc_ids")} == {shape}


@pytest.mark.fast
def test_methods_are_trained_on_their_own_units_and_texts():
    assert corpus_for(SPT, CORPUS) == CORPUS
    assert corpus_for(METHODS["spt_rules"], CORPUS).documents[0] == RuleSegmenter()(CORPUS.texts[0])
    cut = corpus_for(METHODS["spt_lm"], CORPUS, {"lm": NGramSegmenter(2)})
    assert cut.documents[0] == NGramSegmenter(2)(CORPUS.texts[0])
    assert len(corpus_for(METHODS["identity_bridge"], CORPUS).documents) == len(CORPUS.documents) + 5
    assert [METHODS[name].form for name in ("spt", "bico", "mlm_u", "masked_ft")] == [
        "causal",
        "causal",
        "masked",
        "copy",
    ]


def test_a_run_that_was_stopped_ends_with_the_bits_of_one_that_was_not(tmp_path, trained):
    def stop(done, _params):
        if done == 6:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(NET, ROWS, SPT, CONFIG, 0, checkpoint_dir=tmp_path, watch=stop)
    seen = []
    resumed = train(NET, ROWS, SPT, CONFIG, 0, checkpoint_dir=tmp_path, watch=lambda done, _params: seen.append(done))
    assert seen == [6]
    assert distance(resumed, trained) == 0
    with pytest.raises(ValueError, match="another run"):
        train(NET, ROWS, METHODS["ntp"], CONFIG, 0, checkpoint_dir=tmp_path)


def test_several_devices_change_nothing_but_rounding(trained):
    mesh = Mesh(np.array(jax.devices()[:2]), ("data",), axis_types=(AxisType.Auto,))
    shared = train(NET, ROWS, SPT, CONFIG, 0, mesh=mesh)
    np.testing.assert_allclose(shared.losses, trained.losses, rtol=1e-5)
    assert shared.orders.tolist() == trained.orders.tolist()


def test_pieces_of_a_batch_change_nothing_but_rounding_and_half_precision_a_little():
    whole, pieces, half = (
        train(NET, ROWS, METHODS["bico"], dataclasses.replace(CONFIG, **changes), 0)
        for changes in ({}, {"accumulate": 2}, {"bfloat16": True})
    )
    np.testing.assert_allclose(pieces.losses, whole.losses, rtol=1e-5)
    assert {leaf.dtype for leaf in jax.tree.leaves(half.params)} == {np.dtype("float32")}
    np.testing.assert_allclose(half.losses, whole.losses, rtol=0.02)
    assert not np.array_equal(half.losses, whole.losses)


@pytest.mark.parametrize("name", ["bico", "masked_ft"])
def test_masked_objectives_learn(name):
    learned = train(NET, ROWS, METHODS[name], dataclasses.replace(CONFIG, steps=60, every=60, learning_rate=1e-2), 0)
    assert learned.orders.tolist() == [0, 0, 0]
    assert learned.losses[-10:].mean() < 0.8 * learned.losses[:10].mean()


def test_a_model_that_fills_masks_answers_what_it_was_told():
    corpus = chain(0, 4, pool=9, tellings=1)
    words = corpus.vocabulary()
    rows = rows_of(token_documents(corpus, words))
    net = small_gpt(len(words), rows["tokens"].shape[1], width=64, layers=2, heads=2)
    config = ReversalTraining(steps=500, batch_size=24, warmup_steps=20, every=500)
    prompts = [Prompt("told", "".join(units[:-1]), units[-1].strip()) for units in corpus.documents]
    params = train(net, rows, METHODS["mlm_u"], config, 0).params
    assert accuracies(net, params, prompts, words, "masked")["told"] >= 80


@pytest.mark.fast
def test_batches_that_cannot_be_are_refused():
    with pytest.raises(ValueError, match=f"choose one in 1..{len(DOCUMENTS)}"):
        train(NET, ROWS, SPT, dataclasses.replace(CONFIG, batch_size=1000), 0)
    with pytest.raises(ValueError, match="cannot be cut into 3 pieces"):
        train(NET, ROWS, SPT, dataclasses.replace(CONFIG, accumulate=3), 0)


@pytest.mark.fast
def test_masks_and_tags_are_words_of_every_vocabulary():
    assert [WORDS.words[number] for number in (MASK, *TAGS)] == ["<mask>", "<original>", "<reversed>", "<random>"]
