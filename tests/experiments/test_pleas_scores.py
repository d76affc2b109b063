"""Scores: protocols against counting by hand, probes that find what is there, and paired intervals."""

import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from permjax.data.digits import digits
from permjax.experiments.pleas_scores import (
    PROTOCOLS,
    accuracies,
    by_head,
    ensemble,
    paired_difference,
    parents_accuracy,
    predictions,
    probe,
)
from permjax.experiments.pleas_tasks import make_task

DATA = digits()
OWN, SHARED, DOMAINS = (make_task(DATA, scenario) for scenario in ("classes", "halves", "domains"))


def logits(task, classes, seed=0):
    rng = np.random.default_rng(seed)
    return rng.standard_normal((len(task.joint_test.y), classes), np.float32)


def perfect(task, classes):
    return np.eye(classes, dtype=np.float32)[task.joint_test.y % classes]


def test_own_heads_are_scored_as_counted_by_hand():
    a, b = logits(OWN, 5, 0), logits(OWN, 5, 1)
    found = accuracies(OWN, [a, b])
    n = len(OWN.test[0].y)
    first = np.mean([row.argmax() == y for row, y in zip(a[:n], OWN.test[0].y, strict=True)])
    second = np.mean([row.argmax() == y for row, y in zip(b[n:], OWN.test[1].y, strict=True)])
    both = [(p.argmax() if p.max() > q.max() else 5 + q.argmax()) for p, q in zip(a, b, strict=True)]
    assert found.task == pytest.approx(50 * (first + second))
    assert found.joint == pytest.approx(100 * np.mean(np.array(both) == OWN.joint_test.y))


def test_logits_are_laid_side_by_side_as_they_are():
    a, b = perfect(OWN, 5), perfect(OWN, 5)
    n = len(OWN.test[0].y)
    a[n:] = b[:n] = 0
    assert accuracies(OWN, [a, b]) == (100, 100)
    loud = accuracies(OWN, [a, b + 10])  # the same decisions of each head, but the second one is always louder
    assert loud.task == 100
    assert loud.joint == pytest.approx(100 * (len(OWN.joint_test.y) - n) / len(OWN.joint_test.y))


def test_a_shared_head_has_equal_accuracies_where_the_test_sets_are_equally_large():
    same = accuracies(DOMAINS, [logits(DOMAINS, 10)])
    assert same.task == pytest.approx(same.joint)
    halves = accuracies(SHARED, [perfect(SHARED, 10)])
    assert halves == (100, 100)


def test_an_ensemble_is_both_heads_or_the_mean_of_the_logits():
    pair = [logits(OWN, 5, 0), logits(OWN, 5, 1)]
    assert ensemble(OWN, pair) == accuracies(OWN, pair)
    pair = [logits(DOMAINS, 10, 0), logits(DOMAINS, 10, 1)]
    assert ensemble(DOMAINS, pair) == accuracies(DOMAINS, [(pair[0] + pair[1]) / 2])


def test_probabilities_hush_a_parent_that_is_loud_but_unsure():
    right = perfect(DOMAINS, 10)
    pair = [5 * right, 100 * (1 - right)]  # the second one likes all wrong classes alike
    assert ensemble(DOMAINS, pair).joint == 0
    assert ensemble(DOMAINS, pair, softmax=True).joint == 100
    pair = [logits(OWN, 5, 0), logits(OWN, 5, 1)]
    assert ensemble(OWN, pair, softmax=True).task == ensemble(OWN, pair).task


@pytest.mark.parametrize("task", [OWN, SHARED, DOMAINS])
def test_parents_are_tested_on_their_own_images_only(task):
    classes = len(task.classes[0])
    right, n = perfect(task, classes), len(task.test[0].y)
    a, b = right.copy(), right.copy()
    a[n:] = b[:n] = -right[n:].max()
    assert parents_accuracy(task, [a, b]) == 100
    assert parents_accuracy(task, [b, a]) < 60


def test_one_network_over_all_classes_is_taken_apart_by_head():
    whole = np.eye(10, dtype=np.float32)[OWN.joint_test.y]
    wrong = whole[:, ::-1].copy()
    assert accuracies(OWN, by_head(OWN, whole)) == (100, 100)
    assert accuracies(OWN, by_head(OWN, wrong)).joint == 0
    assert [head.shape[1] for head in by_head(OWN, whole)] == [5, 5]
    assert [head.shape[1] for head in by_head(SHARED, perfect(SHARED, 10))] == [10]


def test_logits_of_the_wrong_number_or_shape_are_refused():
    with pytest.raises(ValueError, match="own heads gives logits of shapes"):
        accuracies(OWN, [logits(OWN, 10)])
    with pytest.raises(ValueError, match=r"shared heads.*not \[\(5, 10\)\]"):
        accuracies(SHARED, [logits(SHARED, 10)[:5]])


def test_predictions_do_not_depend_on_the_batch():
    weights = jnp.asarray(np.random.default_rng(0).standard_normal((64, 3), np.float32))

    def apply(params, x):
        return x.reshape(x.shape[0], -1) @ params

    whole = predictions(apply, weights, DATA.x_test, batch_size=1000)
    assert whole.shape == (len(DATA.x_test), 3)
    np.testing.assert_allclose(predictions(apply, weights, DATA.x_test, batch_size=77), whole, rtol=1e-5, atol=1e-5)


def test_probes_find_a_linear_task_whatever_the_scale_and_chance_where_there_is_none():
    rng = np.random.default_rng(0)
    scale = np.float32(10.0) ** rng.integers(-3, 4, 64).astype(np.float32)
    train, test = (part.x.reshape(-1, 64) * scale for part in (OWN.joint_train, OWN.joint_test))
    assert probe(OWN, train, test) > 95
    assert probe(OWN, train, rng.permutation(test)) < 40
    assert probe(SHARED, SHARED.joint_train.x.reshape(-1, 64), SHARED.joint_test.x.reshape(-1, 64)) > 90


def test_more_decay_gives_a_smoother_probe():
    train, test = (part.x.reshape(-1, 64) for part in (OWN.joint_train, OWN.joint_test))
    assert probe(OWN, train, test, decay=1e4) < probe(OWN, train, test, decay=1e-3)


def test_the_paired_interval_is_that_of_student():
    a, b = [82.0, 84.5, 83.1, 80.2], [62.0, 66.0, 61.5, 63.3]
    found = paired_difference(a, b)
    wanted = stats.ttest_rel(a, b).confidence_interval(0.95)
    assert found.mean == pytest.approx(np.mean(a) - np.mean(b))
    assert (found.low, found.high) == pytest.approx((wanted.low, wanted.high))
    assert found.seeds == 4


def test_one_seed_has_no_interval_and_unlike_seeds_are_refused():
    found = paired_difference([3.0], [1.0])
    assert found.mean == 2
    assert np.isnan(found.low)
    assert np.isnan(found.high)
    with pytest.raises(ValueError, match="2 and 1 values cannot be paired"):
        paired_difference([1.0, 2.0], [1.0])


def test_every_kind_of_head_has_a_protocol():
    assert {OWN.heads, SHARED.heads, "probe"} <= PROTOCOLS.keys()
