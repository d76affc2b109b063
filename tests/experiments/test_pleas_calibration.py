"""Calibration: whose images they are, and that those of PLeaS-free are nobody's."""

import numpy as np
import pytest

from permjax.data.dataset import Dataset
from permjax.data.digits import digits
from permjax.data.generated import blobs
from permjax.experiments.pleas_calibration import calibration, foreign_calibration
from permjax.experiments.pleas_tasks import SCENARIOS, make_task

TASK = make_task(digits(), "classes")


def images(*shape, name="noise"):
    """A task on random images of a shape."""
    x = np.random.default_rng(0).random((40, *shape), np.float32)
    y = np.arange(40, dtype=np.int32) % 4
    return make_task(Dataset(x, y, x, y, tuple("abcd"), name), "classes")


@pytest.mark.parametrize("scenario", SCENARIOS)
@pytest.mark.parametrize("samples", [2, 51, 100])
def test_every_image_is_one_of_its_owner_and_owners_have_equally_many(scenario, samples):
    task = make_task(digits(), scenario)
    found = calibration(task, samples, seed=3)
    assert found.x.shape == (samples, 8, 8)
    assert abs(int((found.owner == 0).sum()) - int((found.owner == 1).sum())) <= 1
    own = [{image.tobytes() for image in part.x} for part in task.train]
    assert all(image.tobytes() in own[owner] for image, owner in zip(found.x, found.owner, strict=True))


def test_images_are_drawn_once_in_mixed_order_and_by_the_seed():
    found, again, other = (calibration(TASK, 200, seed) for seed in (0, 0, 1))
    assert len({image.tobytes() for image in found.x}) == 200
    assert 0 < found.owner[:20].sum() < 20
    np.testing.assert_array_equal(found.x, again.x)
    assert not np.array_equal(found.x, other.x)


def test_more_images_than_there_are_or_fewer_than_parents_are_refused():
    with pytest.raises(ValueError, match=r"5000 calibration images.*708 and 729"):
        calibration(TASK, 5000, seed=0)
    with pytest.raises(ValueError, match="at least one"):
        calibration(TASK, 1, seed=0)


@pytest.mark.parametrize("name", ["white_noise", "smooth_noise", "digits", "blobs"])
@pytest.mark.parametrize("shape", [(28, 28), (20, 12, 3)])
def test_foreign_inputs_have_the_shape_of_the_task_and_lie_in_the_unit_interval(name, shape):
    found = foreign_calibration(images(*shape), name, 30, seed=0)
    assert found.x.shape == (30, *shape)
    assert found.x.dtype == np.float32
    assert found.owner is None
    assert found.x.min() >= 0
    assert 0.5 < found.x.max() <= 1
    assert name.replace("_", " ") in found.source
    np.testing.assert_array_equal(found.x, foreign_calibration(images(*shape), name, 30, seed=0).x)


def test_resizing_keeps_the_pixels_of_the_image_and_puts_others_in_between():
    big = foreign_calibration(images(15, 15), "digits", 20, seed=0).x
    small = {image.tobytes() for part in (digits().x_train, digits().x_test) for image in part}
    for image in big:
        assert np.ascontiguousarray(image[::2, ::2]).tobytes() in small
        np.testing.assert_allclose(image[1::2, ::2], (image[:-1:2, ::2] + image[2::2, ::2]) / 2, atol=1e-6)


def test_colours_become_grey_and_grey_is_repeated():
    found = foreign_calibration(images(15, 15, 3), "digits", 5, seed=0).x
    np.testing.assert_array_equal(found[..., 0], found[..., 2])
    np.testing.assert_array_equal(found[..., 0], foreign_calibration(images(15, 15), "digits", 5, seed=0).x)


def test_smooth_noise_is_smooth_and_white_noise_is_not():
    def roughness(name):
        x = foreign_calibration(images(28, 28), name, 20, seed=0).x
        return np.abs(np.diff(x, axis=1)).mean() / x.std()

    assert roughness("smooth_noise") < 0.3 < 0.8 < roughness("white_noise")


def test_vectors_take_noise_and_blobs_but_no_images():
    task = make_task(blobs(features=12), "halves")
    for name in ("white_noise", "smooth_noise"):
        assert foreign_calibration(task, name, 5, seed=0).x.shape == (5, 12)
    with pytest.raises(ValueError, match=r"digits have shape \(8, 8\).*task's \(12,\)"):
        foreign_calibration(task, "digits", 5, seed=0)


def test_the_own_data_too_many_images_and_unknown_names_are_refused():
    with pytest.raises(ValueError, match="which is digits itself"):
        foreign_calibration(TASK, "digits", 5, seed=0)
    with pytest.raises(ValueError, match=r"9999 calibration images.*the 1797 of digits"):
        foreign_calibration(images(28, 28), "digits", 9999, seed=0)
    with pytest.raises(ValueError, match="no data set 'smoth_noise'"):
        foreign_calibration(TASK, "smoth_noise", 5, seed=0)
