"""Parents: which starts they have, what they learn, and that an interrupted training goes on."""

from dataclasses import replace

import jax
import numpy as np
import pytest

from permjax import tree
from permjax.data.digits import digits
from permjax.experiments.networks import NetworksConfig
from permjax.experiments.pleas_parents import train_joint, train_parents
from permjax.experiments.pleas_scores import accuracies, by_head, ensemble, parents_accuracy, predictions
from permjax.experiments.pleas_tasks import make_task
from permjax.nets.mlp import MLPConfig
from permjax.train import TrainConfig

SMALL = NetworksConfig(
    model=MLPConfig(input_shape=(8, 8), hidden=(24, 16)), train=TrainConfig(epochs=6, batch_size=50, learning_rate=5e-3)
)


class Counting:
    """Counts what a progress bar would show."""

    def __init__(self):
        self.stages = []

    def start(self, name, total):
        self.stages.append([name, total, 0])

    def step(self, n=1, **_):
        self.stages[-1][2] += n

    def done(self):
        pass


def first_kernel(model):
    return tree.flatten(model)["params/Dense_0/kernel"]


@pytest.fixture(scope="module")
def split(tmp_path_factory):
    task, out = make_task(digits(), "classes"), tmp_path_factory.mktemp("run")
    progress = Counting()
    return task, train_parents(SMALL, task, [0, 1], out, progress), out, progress


def test_parents_of_every_seed_have_heads_of_their_own_classes_and_know_their_task(split):
    task, trained, *_ = split
    assert len(trained.models) == 2
    assert trained.net.config.classes == 5
    for models in trained.models:
        logits = [predictions(trained.net.apply, model, task.joint_test.x) for model in models]
        assert parents_accuracy(task, logits) > 90
        assert ensemble(task, logits).joint < ensemble(task, logits).task


def test_no_two_parents_start_from_the_same_weights(split, tmp_path):
    task, *_ = split
    config = replace(SMALL, train=replace(SMALL.train, epochs=1, learning_rate=0.0))
    trained = train_parents(config, task, [0, 1], tmp_path, Counting())
    kernels = [first_kernel(model) for models in trained.models for model in models]
    for i in range(4):
        starts = trained.net.init(jax.random.fold_in(jax.random.key(i), 0))
        np.testing.assert_array_equal(kernels[i], first_kernel(starts))
        assert all(np.abs(kernels[i] - kernels[j]).max() > 0.1 for j in range(i))


def test_a_finished_training_is_not_done_again(split):
    task, trained, out, _ = split
    progress = Counting()
    again = train_parents(SMALL, task, [0, 1], out, progress)
    assert sum(seen for *_, seen in progress.stages) == 0
    jax.tree.map(np.testing.assert_array_equal, again.models, trained.models)


def test_progress_reaches_its_totals(split):
    stages = split[3].stages
    assert [name for name, *_ in stages] == ["training parent 0", "training parent 1"]
    assert all(total == seen for _, total, seen in stages)


def test_the_network_trained_on_everything_is_scored_like_a_merge(split, tmp_path):
    task, *_ = split
    trained = train_joint(SMALL, task, [0], tmp_path, Counting())
    assert trained.net.config.classes == 10
    logits = predictions(trained.net.apply, trained.models[0], task.joint_test.x)
    found = accuracies(task, by_head(task, logits))
    assert found.joint == pytest.approx(100 * np.mean(logits.argmax(1) == task.joint_test.y))
    assert 85 < found.joint < found.task


def test_parents_under_domain_shift_know_their_own_domain_only(tmp_path):
    task = make_task(digits(), "domains")
    trained = train_parents(SMALL, task, [0], tmp_path, Counting())
    assert trained.net.config.classes == 10
    a, b = (predictions(trained.net.apply, model, task.joint_test.x) for model in trained.models[0])
    assert parents_accuracy(task, [a, b]) > 80
    assert parents_accuracy(task, [b, a]) < 30


def test_parents_with_bases_start_from_them_but_for_the_head(tmp_path):
    task = make_task(digits(), "bases")
    still = replace(SMALL, train=replace(SMALL.train, epochs=1, learning_rate=0.0))
    trained = train_parents(still, task, [1], tmp_path, Counting(), base=SMALL.train)
    first = replace(task, train=task.bases, classes=((*range(10),),) * 2, bases=())
    alone = train_parents(SMALL, first, [1], tmp_path / "bases", Counting())
    for model, base in zip(trained.models[0], alone.models[0], strict=True):
        np.testing.assert_array_equal(first_kernel(model), first_kernel(base))
        assert tree.flatten(model)["params/Dense_2/kernel"].shape == (16, 5)
