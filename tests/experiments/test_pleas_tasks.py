"""Tasks for merging: who learns what, and that nothing is learned or tested twice."""

from dataclasses import replace

import numpy as np
import pytest

from permjax.data.dataset import Dataset
from permjax.data.digits import digits
from permjax.data.generated import blobs
from permjax.experiments.pleas_tasks import SCENARIOS, make_task, turned

pytestmark = pytest.mark.fast

DATA = digits()


def as_rows(part):
    """Images as a set of bytes, to compare sets of images."""
    return {image.tobytes() for image in part.x}


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_every_label_is_an_output_of_the_head_and_joint_labels_are_those_of_the_data(scenario):
    task = make_task(DATA, scenario)
    for part, classes in (*zip(task.train, task.classes, strict=True), *zip(task.test, task.classes, strict=True)):
        assert set(part.y) == set(range(len(classes)))
    known = {image.tobytes(): label for image, label in zip(DATA.x_test, DATA.y_test, strict=True)}
    known |= {turned(image[None]).tobytes(): label for image, label in zip(DATA.x_test, DATA.y_test, strict=True)}
    joint = task.joint_test
    assert [known[image.tobytes()] for image in joint.x] == joint.y.tolist()
    assert len(task.joint_train.x) == sum(len(part.y) for part in task.train)


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_no_parent_learns_an_image_that_anyone_is_tested_on(scenario):
    task = make_task(DATA, scenario)
    seen = set().union(*(as_rows(part) for part in (*task.train, *task.bases)))
    assert not seen & as_rows(task.joint_test)


def test_parents_of_different_label_spaces_share_no_class_and_no_image():
    task = make_task(DATA, "classes")
    assert task.classes == ((0, 1, 2, 3, 4), (5, 6, 7, 8, 9))
    assert task.heads == "own"
    assert task.joint_classes == 10
    assert not as_rows(task.train[0]) & as_rows(task.train[1])
    assert sum(len(part.y) for part in task.train) == len(DATA.y_train)
    assert sum(len(part.y) for part in task.test) == len(DATA.y_test)


def test_halves_are_disjoint_balanced_and_complete():
    task = make_task(DATA, "halves")
    assert task.heads == "shared"
    assert not as_rows(task.train[0]) & as_rows(task.train[1])
    assert as_rows(task.train[0]) | as_rows(task.train[1]) == {image.tobytes() for image in DATA.x_train}
    assert abs(len(task.test[0].y) - len(task.test[1].y)) <= 1


def test_the_second_domain_is_inverted_and_rotated_and_tested_on_all_images():
    task = make_task(DATA, "domains")
    assert [len(part.y) for part in task.test] == [len(DATA.y_test)] * 2
    by_hand = 1 - np.stack([image.T[::-1] for image in DATA.x_test])
    np.testing.assert_array_equal(task.test[1].x, by_hand)
    np.testing.assert_array_equal(task.test[1].y, DATA.y_test)
    np.testing.assert_array_equal(task.train[1].x, turned(DATA.x_train[1::2]))


def test_turning_four_times_gives_the_image_back():
    image = DATA.x_test[:3]
    np.testing.assert_allclose(turned(turned(turned(turned(image)))), image, atol=1e-6)


def test_bases_know_all_classes_of_different_images():
    task = make_task(DATA, "bases")
    assert [set(part.y) for part in task.bases] == [set(range(10))] * 2
    assert not as_rows(task.bases[0]) & as_rows(task.bases[1])
    assert task.classes == make_task(DATA, "classes").classes


def test_vectors_can_be_split_but_not_turned():
    data = blobs(classes=4)
    assert make_task(data, "classes").classes == ((0, 1), (2, 3))
    with pytest.raises(ValueError, match=r"have shape \(16,\).*give square images with values in \[0, 1\]"):
        make_task(data, "domains")


def test_images_beyond_the_unit_interval_cannot_be_inverted():
    with pytest.raises(ValueError, match="values from 0 to 3"):
        make_task(replace(DATA, x_train=3 * DATA.x_train), "domains")


def test_an_odd_number_of_classes_cannot_be_halved():
    data = blobs(classes=5)
    with pytest.raises(ValueError, match=r"has 5 classes.*even number"):
        make_task(data, "classes")
    few = Dataset(data.x_train, data.y_train % 2, data.x_test, data.y_test % 2, ("a", "b"), "two")
    with pytest.raises(ValueError, match="at least 4"):
        make_task(few, "bases")
