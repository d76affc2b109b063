"""How merged networks are scored: named protocols, linear probes, and differences paired over seeds."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int, Shaped
from scipy import special, stats

from permjax.experiments.pleas_tasks import Labelled, Task

Logits: TypeAlias = Float[np.ndarray, "n _"]

PROTOCOLS = {
    "own": "Own heads: each parent's head reads the merged features. Task accuracy is that of a head on its parent's "
    "test set, mean over the parents. Joint accuracy is over all classes on all test images: the largest of the heads' "
    "logits, which are laid side by side as they are, without softmax or calibration.",
    "refitted": "Own heads, refitted: the same with each parent's head fitted by least squares, without labels, to "
    "give its parent's logits from the merged features. The body is not changed.",
    "shared": "Shared head: the heads are merged like every other layer. Task accuracy is the mean over the parents' "
    "test sets, joint accuracy that on all test images together; the two agree where the sets are equally large.",
    "probe": "Linear probe: for each parent's task a linear classifier is trained with labels on the features of its "
    "training set and tested on its test set, mean over the parents. It hides much of the damage that merging does, so "
    "it cannot be compared with the other protocols.",
}
"""What is measured under each protocol, in words; the heads of a task are `own` or `shared`."""


class Accuracy(NamedTuple):
    """Accuracies in percent; see `PROTOCOLS`."""

    task: float
    joint: float


class Scores(NamedTuple):
    """What one seed's run of a method at one budget gives; None where it was not measured.

    Attributes:
        task: mean accuracy on the parents' own tasks, in percent.
        joint: accuracy over all classes, in percent.
        flops: operations for one input, with the block structure.
        dense_params: numbers to store where the blocks are kept as dense arrays.
        seconds: time of the method.
        probe: accuracy of linear probes, in percent.
        residuals: relative residual of every fitted layer, before and after the fit.
    """

    task: float | None = None
    joint: float | None = None
    flops: float | None = None
    dense_params: int | None = None
    seconds: float | None = None
    probe: float | None = None
    residuals: Mapping[str, tuple[float, float]] = {}


# logits


def predictions(
    apply: Callable[..., jax.Array],
    params: Any,
    x: Shaped[np.ndarray, "n ..."],
    batch_size: int = 500,
    *,
    compiled: bool = True,
) -> Float[np.ndarray, "n outputs"]:
    """The outputs of a network for many inputs, on the host; `apply` is compiled, unless it is to run once only."""
    run = jax.jit(apply) if compiled else apply
    parts = [np.asarray(run(params, jnp.asarray(x[i : i + batch_size]))) for i in range(0, len(x), batch_size)]
    return np.concatenate(parts)


def accuracies(task: Task, outputs: Sequence[Logits]) -> Accuracy:
    """Task and joint accuracy of a network on the joint test set of a task, under the protocol of its heads.

    Args:
        task: what is tested.
        outputs: logits [n, classes] for `task.joint_test.x`: those of every parent's head where heads are their own,
            else those of the one head.

    Raises:
        ValueError: there are not as many heads, or their logits have the wrong shape.
    """
    labels, heads = task.joint_test.y, _heads(task)
    wanted, given = [(len(labels), len(head)) for head in heads], [logits.shape for logits in outputs]
    if given != wanted:
        message = f"A network with {task.heads} heads gives logits of shapes {wanted} for this task, not {given}; "
        raise ValueError(message + "give one array for each head, over the joint test set.")
    classes = np.concatenate([np.asarray(head) for head in heads])
    joint = classes[np.argmax(np.concatenate(outputs, axis=1), axis=1)] == labels
    each = outputs if task.heads == "own" else [outputs[0] for _ in task.test]
    return Accuracy(parents_accuracy(task, each), _percent(joint))


def parents_accuracy(task: Task, outputs: Sequence[Logits]) -> float:
    """Mean over the parents of the accuracy on their own test set, in percent.

    Args:
        task: what is tested.
        outputs: for every parent its logits [n, classes] for `task.joint_test.x`.
    """
    own = zip(_parts(task.test, *outputs), task.test, strict=True)
    return float(np.mean([_percent(np.argmax(logits, axis=1) == part.y) for logits, part in own]))


def ensemble(task: Task, outputs: Sequence[Logits], *, softmax: bool = False) -> Accuracy:
    """Accuracies of all parents together: each with its own head, or the mean of their logits where heads are shared.

    Logits are what a merge that keeps everything gives. Probabilities suit parents that are loud where they are wrong,
    as they are on the images of another domain.

    Args:
        task: what is tested.
        outputs: for every parent its logits [n, classes] for `task.joint_test.x`.
        softmax: take the probabilities of every parent in place of its logits.
    """
    each = [special.softmax(logits, axis=1) for logits in outputs] if softmax else outputs
    return accuracies(task, each if task.heads == "own" else [np.mean(np.stack(each), axis=0)])


def by_head(task: Task, logits: Logits) -> list[np.ndarray]:
    """The logits of a network with one head over all classes, taken apart as those of the task's heads."""
    return [logits[:, list(head)] for head in _heads(task)]


def _heads(task: Task) -> tuple[tuple[int, ...], ...]:
    """Return the classes of every head."""
    return task.classes if task.heads == "own" else task.classes[:1]


def _parts(sets: Sequence[Labelled], *arrays: np.ndarray) -> list[np.ndarray]:
    """Return the rows of the sets, laid one after the other: of one array for all, or of one for each."""
    ends = np.cumsum([len(part.y) for part in sets])
    each = arrays if len(arrays) == len(sets) else arrays * len(sets)
    return [array[end - len(part.y) : end] for array, part, end in zip(each, sets, ends, strict=True)]


def _percent(right: np.ndarray) -> float:
    return 100 * float(np.mean(right))


# linear probes


def probe(
    task: Task,
    train: Float[np.ndarray, "n features"],
    test: Float[np.ndarray, "m features"],
    decay: float = 1e-3,
) -> float:
    """Accuracy of linear probes on the features of a network, mean over the parents' tasks, in percent.

    Multinomial regression on standardised features, min_W mean_i cross_entropy(W x_i + b, y_i) + decay/2 |W|^2, one
    for every parent.

    Args:
        task: whose labels are used, of the training sets too.
        train: features of `task.joint_train.x`.
        test: features of `task.joint_test.x`.
        decay: of the weights.
    """
    features = zip(_parts(task.train, train), _parts(task.test, test), task.train, task.test, strict=True)
    right = [_percent(_probed(x, seen.y, other, decay) == asked.y) for x, other, seen, asked in features]
    return float(np.mean(right))


def _probed(
    x: Float[np.ndarray, "n features"],
    y: Int[np.ndarray, " n"],
    other: Float[np.ndarray, "m features"],
    decay: float,
) -> Int[np.ndarray, " m"]:
    from sklearn.linear_model import LogisticRegression  # takes a second to import
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    regression = LogisticRegression(C=1 / (decay * len(y)), max_iter=2000)
    return make_pipeline(StandardScaler(), regression).fit(x.astype(float), y).predict(other.astype(float))


# seeds


class Difference(NamedTuple):
    """A mean difference over seeds and its 95 % interval, which is NaN where there is one seed only."""

    mean: float
    low: float
    high: float
    seeds: int


def paired_difference(values: Sequence[float], others: Sequence[float]) -> Difference:
    """The mean of values - others over seeds, with the interval of Student's t for pairs.

    mean +- t(0.975, n - 1) s / sqrt(n), where s is the standard deviation of the differences.

    Raises:
        ValueError: there are no seeds, or not the same number on both sides.
    """
    if len(values) != len(others) or not values:
        raise ValueError(f"{len(values)} and {len(others)} values cannot be paired; give one of each for every seed.")
    difference = np.subtract(values, others)
    count, mean = len(difference), float(np.mean(difference))
    if count == 1:
        return Difference(mean, np.nan, np.nan, 1)
    half = float(stats.t.ppf(0.975, count - 1) * np.std(difference, ddof=1) / np.sqrt(count))
    return Difference(mean, mean - half, mean + half, count)
