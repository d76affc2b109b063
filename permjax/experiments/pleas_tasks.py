"""Tasks for merging: what two parents learn, and what they are tested on."""

from dataclasses import dataclass
from functools import cached_property
from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Float, Int, Shaped

from permjax.data.dataset import Dataset

Scenario = Literal["classes", "halves", "domains", "bases"]
Heads = Literal["own", "shared"]

SCENARIOS: dict[Scenario, str] = {
    "classes": "different label spaces: the first parent learns the first half of the classes, the second the others",
    "halves": "one label space: each parent learns all classes from its own half of the training images",
    "domains": "one label space under domain shift: the second parent sees its half of the images inverted and rotated "
    "by 90 degrees, and is tested on such images",
    "bases": "two bases, each fine-tuned: every parent is trained on all classes of its own half of the training "
    "images first, and then on its own half of the classes",
}
"""What the scenarios are, in words."""


class Labelled(NamedTuple):
    """Inputs `x` [n, ...] with labels `y` [n]."""

    x: Shaped[np.ndarray, "n ..."]
    y: Int[np.ndarray, " n"]


@dataclass(frozen=True, eq=False)
class Task:
    """What each of two parents learns and is tested on.

    Attributes:
        scenario: one of `SCENARIOS`.
        data: name of the data set.
        heads: `own` where the label spaces differ, so that every parent keeps its head, or `shared`.
        classes: for every parent, the class of the data set that each output of its head stands for.
        train: for every parent, its training set; labels count the outputs of its head.
        test: for every parent, its test set; no image of the data set is in both, save in two looks under domain shift.
        bases: for every parent, what it is trained on before `train`, with the classes of the data set; mostly empty.
    """

    scenario: Scenario
    data: str
    heads: Heads
    classes: tuple[tuple[int, ...], ...]
    train: tuple[Labelled, ...]
    test: tuple[Labelled, ...]
    bases: tuple[Labelled, ...] = ()

    @cached_property
    def joint_train(self) -> Labelled:
        """The training sets of all parents, one after the other, with the classes of the data set as labels."""
        return self._joint(self.train)

    @cached_property
    def joint_test(self) -> Labelled:
        """The test sets of all parents, one after the other, with the classes of the data set as labels."""
        return self._joint(self.test)

    @cached_property
    def joint_classes(self) -> int:
        """How many classes all parents know together."""
        return len({c for mine in self.classes for c in mine})

    def _joint(self, parts: tuple[Labelled, ...]) -> Labelled:
        labels = [np.asarray(mine, np.int32)[part.y] for mine, part in zip(self.classes, parts, strict=True)]
        return Labelled(np.concatenate([part.x for part in parts]), np.concatenate(labels))


def make_task(data: Dataset, scenario: Scenario) -> Task:
    """The task of a scenario on a data set.

    Halves of the images are every other one, so that they do not depend on a seed or on the order of the file.

    Args:
        data: images, or vectors where the scenario does not turn them.
        scenario: one of `SCENARIOS`.

    Raises:
        ValueError: the classes cannot be halved, or inputs that are no square images in [0, 1] should be turned.

    Example:
        >>> task = make_task(digits(), "classes")
        >>> task.classes
        ((0, 1, 2, 3, 4), (5, 6, 7, 8, 9))
    """
    everything = Labelled(data.x_train, data.y_train), Labelled(data.x_test, data.y_test)
    match scenario:
        case "classes" | "bases":
            classes = _halved_classes(data)
            train, test = (tuple(_of_classes(part, mine) for mine in classes) for part in everything)
            bases = _halves(everything[0]) if scenario == "bases" else ()
            return Task(scenario, data.name, "own", classes, train, test, bases)
        case "halves":
            return Task(scenario, data.name, "shared", _all_classes(data), *map(_halves, everything))
        case "domains":
            _check_turnable(data)
            train, test = _halves(everything[0]), (everything[1], everything[1])
            looks = [(first, Labelled(turned(second.x), second.y)) for first, second in (train, test)]
            return Task(scenario, data.name, "shared", _all_classes(data), *looks)


def turned(x: Float[np.ndarray, "n side side ..."]) -> Float[np.ndarray, "n side side ..."]:
    """Images in [0, 1] inverted and rotated by 90 degrees: the look of the second domain."""
    return np.ascontiguousarray(np.rot90(1 - x, axes=(1, 2)))


def _all_classes(data: Dataset) -> tuple[tuple[int, ...], ...]:
    return (tuple(range(len(data.classes))),) * 2


def _halved_classes(data: Dataset) -> tuple[tuple[int, ...], ...]:
    count = len(data.classes)
    if count % 2 or count < 4:
        message = f"The data set {data.name} has {count} classes; to give each parent its own half of them, there must "
        raise ValueError(message + "be an even number and at least 4. The scenario 'halves' takes any number.")
    return tuple(range(count // 2)), tuple(range(count // 2, count))


def _of_classes(part: Labelled, classes: tuple[int, ...]) -> Labelled:
    """Return the examples of consecutive classes, with labels from 0 on."""
    mine = np.isin(part.y, classes)
    return Labelled(part.x[mine], part.y[mine] - np.int32(classes[0]))


def _halves(part: Labelled) -> tuple[Labelled, Labelled]:
    return Labelled(part.x[::2], part.y[::2]), Labelled(part.x[1::2], part.y[1::2])


def _check_turnable(data: Dataset) -> None:
    shape = data.x_train.shape[1:]
    low, high = data.x_train.min(), data.x_train.max()
    if len(shape) < 2 or shape[0] != shape[1] or low < 0 or high > 1:
        message = (
            f"The scenario 'domains' inverts and rotates images, but inputs of {data.name} have shape {shape} and "
        )
        raise ValueError(f"{message}values from {low:.3g} to {high:.3g}; give square images with values in [0, 1].")
