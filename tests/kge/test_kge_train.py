"""Training: what is learned, seeds, best models, resuming, and stopping when it diverges."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from permjax.kge.flows import Nfe1
from permjax.kge.rank import rank_metrics, rank_model
from permjax.kge.train import DivergedError, KgeTraining, train_kge
from permjax.kge.triples import Graph
from permjax.tree import unstack

ENTITIES, GROUPS, JUMPS = 20, 4, (1, 2)
ALL = [
    (i, r, j)
    for r, jump in enumerate(JUMPS)
    for i in range(ENTITIES)
    for j in range(ENTITIES)
    if j % GROUPS - i % GROUPS == jump
]
DRAWN = np.random.default_rng(0).permutation(np.array(ALL, np.int32))
GRAPH = Graph(
    "groups", tuple(map(str, range(ENTITIES))), ("next", "next but one"), DRAWN[40:], DRAWN[:20], DRAWN[20:40]
)
FAMILY = Nfe1(dimension=16)
TRAINING = KgeTraining(gamma=2.0, init_bound=0.8, learning_rate=0.05, epochs=4, batch_size=32, valid_every=2)
MEASURED = ("loss", "valid_mrr")


def assert_same(a, b, **tolerance):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(x, y, **tolerance) if tolerance else np.testing.assert_array_equal(x, y)


def measured(result):
    return {name: result.history[name] for name in MEASURED}


def replaced(**settings):
    return dataclasses.replace(TRAINING, **settings)


@pytest.fixture(scope="module")
def learned():
    """Models of the graph, and their MRR on its test triples."""
    result = train_kge(FAMILY, GRAPH, replaced(epochs=20, valid_every=5), [0, 1])
    return result, [rank_metrics(rank_model(FAMILY, params, GRAPH))["mrr"] for params in unstack(result.params)]


def test_triples_that_were_never_seen_are_learned(learned):
    assert min(learned[1]) > 0.8


def test_permuted_answers_are_ranked_no_better_than_by_chance(learned):
    wrong = np.concatenate([GRAPH.test, GRAPH.test, GRAPH.test])
    wrong[:, 2] = np.random.default_rng(0).permutation(wrong[:, 2])
    wrong = wrong[[tuple(triple) not in set(map(tuple, ALL)) for triple in wrong.tolist()]]
    found = rank_model(FAMILY, unstack(learned[0].params)[0], dataclasses.replace(GRAPH, test=wrong))
    chance = np.mean([(1 / np.arange(1, 1 + count)).mean() for count in found.candidates])
    assert len(wrong) > 20
    assert rank_metrics(found)["mrr"] < 1.1 * chance


def test_the_best_model_by_validation_is_kept(learned):
    result, _ = learned
    for seed, params in enumerate(unstack(result.params)):
        rows = result.history["valid_mrr"][:, seed]
        assert result.best_epoch[seed] == np.nanargmax(rows)
        assert rank_metrics(rank_model(FAMILY, params, GRAPH, "valid"))["mrr"] == pytest.approx(
            np.nanmax(rows), rel=1e-6
        )
        assert result.valid_mrr[seed] == np.nanmax(rows)
    assert np.flatnonzero(~np.isnan(result.history["valid_mrr"][:, 0])).tolist() == [4, 9, 14, 19]
    assert result.triples_per_second > 0
    assert result.seconds > 0


def test_a_model_that_gets_worse_is_not_kept():
    worse = replaced(epochs=3, valid_every=1, decay=30.0)
    result = train_kge(FAMILY, GRAPH, worse, [0])
    stopped = train_kge(FAMILY, GRAPH, dataclasses.replace(worse, valid_every=0), [0])
    assert result.best_epoch[0] < 2
    assert stopped.best_epoch[0] == 2
    assert np.isnan(stopped.valid_mrr).all()
    assert np.abs(result.params["entity"]["mean"]).max() < 0.1 * np.abs(stopped.params["entity"]["mean"]).max()


def test_seeds_together_are_seeds_alone_and_differ_from_one_another():
    together = train_kge(FAMILY, GRAPH, TRAINING, [0, 5], together=True)
    in_turn = train_kge(FAMILY, GRAPH, TRAINING, [0, 5], together=False)
    alone = train_kge(FAMILY, GRAPH, TRAINING, [5])
    assert_same(together.params, in_turn.params, rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(together.history["loss"], in_turn.history["loss"], rtol=1e-4)
    assert_same(unstack(in_turn.params)[1], unstack(alone.params)[0])
    assert not np.any(np.diff(in_turn.params["entity"]["mean"], axis=0) == 0)


@pytest.mark.parametrize("together", [False, True])
def test_a_resumed_run_ends_with_the_bits_of_an_uninterrupted_one(tmp_path, together):
    def interrupt(epoch, values):
        assert set(values) == {*MEASURED, "triples_per_second"}
        if epoch == 2:
            raise KeyboardInterrupt

    whole = train_kge(FAMILY, GRAPH, TRAINING, [0, 1], together=together)
    with pytest.raises(KeyboardInterrupt):
        train_kge(FAMILY, GRAPH, TRAINING, [0, 1], checkpoint_dir=tmp_path, progress=interrupt, together=together)
    seen = []
    again = train_kge(
        FAMILY,
        GRAPH,
        TRAINING,
        [0, 1],
        checkpoint_dir=tmp_path,
        progress=lambda epoch, _: seen.append(epoch),
        together=together,
    )
    assert seen == [2, 3]
    assert_same(again.params, whole.params)
    assert_same(measured(again), measured(whole))
    finished = train_kge(FAMILY, GRAPH, TRAINING, [0, 1], checkpoint_dir=tmp_path, together=together)
    assert_same(finished.params, whole.params)


def test_another_run_is_not_resumed(tmp_path):
    train_kge(FAMILY, GRAPH, replaced(epochs=1), [0], checkpoint_dir=tmp_path)
    with pytest.raises(ValueError, match="another run: its training"):
        train_kge(FAMILY, GRAPH, replaced(epochs=2), [0], checkpoint_dir=tmp_path)
    other = dataclasses.replace(GRAPH, train=GRAPH.train[1:])
    with pytest.raises(ValueError, match="another run: its graph"):
        train_kge(FAMILY, other, replaced(epochs=1), [0], checkpoint_dir=tmp_path)


@dataclasses.dataclass(frozen=True)
class Relabelled(Nfe1):
    """NFE-1 whose initial rows belong to entities of other names."""

    labels: tuple[int, ...] = ()

    def init(self, key, entities, relations, bound=0.1):
        params = super().init(key, entities, relations, bound)
        rows = jnp.argsort(jnp.array(self.labels))
        return {**params, "entity": {part: values[rows] for part, values in params["entity"].items()}}


def test_relabelling_entities_and_their_rows_changes_nothing():
    labels = np.random.default_rng(1).permutation(ENTITIES).astype(np.int32)
    splits = {}
    for name, triples in GRAPH.splits.items():
        splits[name] = np.stack([labels[triples[:, 0]], triples[:, 1], labels[triples[:, 2]]], axis=1)
    other = dataclasses.replace(GRAPH, **splits)
    plain = train_kge(FAMILY, GRAPH, TRAINING, [0])
    moved = train_kge(Relabelled(dimension=16, labels=tuple(labels.tolist())), other, TRAINING, [0])
    np.testing.assert_allclose(moved.history["loss"], plain.history["loss"], rtol=1e-4)
    np.testing.assert_allclose(moved.history["valid_mrr"], plain.history["valid_mrr"], rtol=1e-5)
    back = {part: values[:, labels] for part, values in moved.params["entity"].items()}
    assert_same(back, plain.params["entity"], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("loss", ["ce_all", "k_vs_all", "negatives"])
def test_every_loss_learns_the_training_triples(loss):
    training = replaced(loss=loss, epochs=20, valid_every=0, negatives=16, chunk=8)
    result = train_kge(FAMILY, GRAPH, training, [0])
    found = rank_metrics(rank_model(FAMILY, unstack(result.params)[0], GRAPH, "train"))
    assert found["mrr"] > 0.8
    assert result.history["loss"][-1, 0] < 0.5 * result.history["loss"][0, 0]


def test_a_seed_ends_when_validation_gets_no_better():
    frozen = replaced(learning_rate=0.0, epochs=8, valid_every=1, patience=2)
    result = train_kge(FAMILY, GRAPH, frozen, [0, 1])
    assert (~np.isnan(result.history["loss"])).sum(axis=0).tolist() == [3, 3]
    assert result.best_epoch.tolist() == [0, 0]


def test_a_loss_that_is_no_number_stops_the_run_and_keeps_the_last_good_state(tmp_path):
    rising = replaced(learning_rate=1e-3, decay=1e21, epochs=6, valid_every=1)  # the second epoch is far too quick
    seen = []
    for _ in range(2):  # the second run begins after the epochs that were good
        with pytest.raises(
            DivergedError, match=r"seed 0 .* after epoch \d of 6\. Try a smaller learning_rate"
        ) as caught:
            train_kge(FAMILY, GRAPH, rising, [0], checkpoint_dir=tmp_path, progress=lambda epoch, _: seen.append(epoch))
    assert str(tmp_path) in str(caught.value)
    assert seen == list(range(len(seen)))
    assert len(seen) >= 1


@pytest.mark.parametrize("seeds", [[], [-1]])
def test_seeds_are_from_zero_on(seeds):
    with pytest.raises(ValueError, match="give one per model"):
        train_kge(FAMILY, GRAPH, TRAINING, seeds)
