"""Data sets: splits, readers of generated files, names, and what happens when a file is missing or wrong."""

import io
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from permjax.data.dataset import MissingData, split
from permjax.data.generated import markov_tokens, random_tokens
from permjax.data.images import random_crop_flip
from permjax.data.registry import load

pytestmark = pytest.mark.fast


def jpeg(image):
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "JPEG", quality=95)
    return buffer.getvalue()


def pictures(n, shape=(32, 32, 3), seed=0):
    """Smooth pictures, which JPEG keeps almost as they are."""
    corners = np.random.default_rng(seed).integers(0, 256, (n, 2, 2, 3), np.uint8)
    return [np.asarray(Image.fromarray(c).resize(shape[1::-1], Image.Resampling.BILINEAR)) for c in corners]


@pytest.fixture
def image_folder(tmp_path):
    for i, image in enumerate(pictures(6, (8, 6, 3))):
        folder = tmp_path / "pets" / ("cat" if i % 2 else "ant")
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(folder / f"{i}.{'png' if i < 4 else 'jpg'}")
    (tmp_path / "pets" / "notes.txt").write_text("not an image")
    return tmp_path


def test_digits_need_no_file_and_are_split_without_loss_or_overlap():
    data = load("digits")
    assert data.x_train.shape == (1437, 8, 8)
    assert data.x_train.dtype == np.float32
    assert data.y_train.dtype == np.int32
    assert (data.x_train.min(), data.x_train.max()) == (0, 1)
    assert data.classes == tuple("0123456789")
    rows = np.concatenate([data.x_train, data.x_test]).reshape(1797, -1)
    other = load("digits", seed=1)
    others = np.concatenate([other.x_train, other.x_test]).reshape(1797, -1)
    assert not np.array_equal(rows, others)
    np.testing.assert_array_equal(np.sort(rows.sum(axis=1)), np.sort(others.sum(axis=1)))


def test_a_seed_decides_a_split_and_no_seed_keeps_the_order():
    x, y = np.arange(10), np.arange(10) % 3
    first, again, other = (split(x, y, train_size=7, seed=s, classes=("a", "b", "c"), name="n") for s in (0, 0, 1))
    assert np.array_equal(first.x_train, again.x_train)
    assert not np.array_equal(first.x_train, other.x_train)
    assert np.array_equal(first.y_test, first.x_test % 3)
    plain = split(x, y, train_size=7, seed=None, classes=("a", "b", "c"), name="n")
    assert np.array_equal(plain.x_test, [7, 8, 9])


def test_an_archive_is_read_and_bytes_become_the_unit_interval(tmp_path):
    x = np.random.default_rng(0).integers(0, 256, (10, 4, 4), np.uint8)
    np.savez(tmp_path / "a.npz", x=x, y=np.arange(10) % 2)
    data = load("npz", root=tmp_path, path="a.npz", seed=None)
    np.testing.assert_allclose(data.x_train, x[:8] / 255, rtol=1e-6)
    assert data.name == "a"
    assert data.classes == ("0", "1")


def test_images_in_folders_are_labelled_by_the_name_of_their_folder(image_folder):
    data = load("folder", root=image_folder, path="pets", seed=None, train_size=3)
    assert data.classes == ("ant", "cat")
    assert data.x_train.shape == (3, 8, 6, 3)
    assert data.y_train.tolist() + data.y_test.tolist() == [0, 0, 0, 1, 1, 1]
    np.testing.assert_allclose(data.x_train[0], pictures(6, (8, 6, 3))[0] / 255, atol=1e-6)
    assert load("folder", path=image_folder / "pets", size=(5, 4)).x_test.shape[1:] == (5, 4, 3)


def test_jpeg_streams_are_decoded_in_order(tmp_path):
    images = pictures(5)
    streams = [jpeg(image) for image in images]
    arrays = {}
    for part, some in (("train", slice(0, 3)), ("test", slice(3, 5))):
        sizes = [len(s) for s in streams[some]]
        arrays[f"{part}_jpeg"] = np.frombuffer(b"".join(streams[some]), np.uint8)
        arrays[f"{part}_offsets"] = np.concatenate([[0], np.cumsum(sizes)])
        arrays[f"{part}_labels"] = np.arange(5, dtype=np.uint8)[some]
    (tmp_path / "images").mkdir()
    np.savez(tmp_path / "images" / "cifar10_jpeg.npz", **arrays, class_names=np.array(list("abcde")))
    data = load("cifar10", root=tmp_path, train_size=2, test_size=2)
    assert data.x_train.shape == (2, 32, 32, 3)
    assert data.y_test.tolist() == [3, 4]
    for got, image in zip(data.x_test, images[3:], strict=True):
        assert np.abs(got - image / 255).mean() < 0.02
    with pytest.raises(ValueError, match="'train_size' is 4, but there are 3 train images"):
        load("cifar10", root=tmp_path, train_size=4)


def test_blobs_can_be_told_apart_by_their_centres():
    data = load("blobs", spread=0.1, classes=3, features=8)
    centres = np.stack([data.x_train[data.y_train == c].mean(axis=0) for c in range(3)])
    nearest = np.linalg.norm(data.x_test[:, None] - centres[None], axis=-1).argmin(axis=1)
    assert (nearest == data.y_test).all()


def test_tokens_lie_in_the_vocabulary_and_chains_follow_their_table():
    uniform = random_tokens(jax.random.key(0), 4, 50, 7)
    assert set(np.unique(uniform)) == set(range(7))
    chain = np.asarray(markov_tokens(jax.random.key(1), 8, 200, 7))
    assert chain.shape == (8, 200)
    followers = {a: set(chain[:, 1:][chain[:, :-1] == a].tolist()) for a in range(7)}
    assert max(map(len, followers.values())) <= 2


def test_augmented_images_are_shifted_or_mirrored_copies():
    images = jnp.asarray(np.random.default_rng(0).random((64, 6, 6, 2), np.float32))
    changed = np.asarray(random_crop_flip(jax.random.key(0), images, pad=2))
    padded = np.pad(images, ((0, 0), (2, 2), (2, 2), (0, 0)))
    seen = set()
    for old, new in zip(padded, changed, strict=True):
        crops = {
            (i, j, flip): old[i : i + 6, j : j + 6][:, :: -1 if flip else 1]
            for i in range(5)
            for j in range(5)
            for flip in (False, True)
        }
        found = [where for where, crop in crops.items() if np.array_equal(crop, new)]
        assert len(found) == 1
        seen.update(found)
    assert {flip for _, _, flip in seen} == {False, True}
    assert {i for i, _, _ in seen} == {j for _, j, _ in seen} == set(range(5))


@pytest.mark.parametrize("name", ["mnist10k", "cifar10"])
def test_missing_data_says_which_file_what_it_is_and_how_to_name_it(tmp_path, name, monkeypatch):
    with pytest.raises(MissingData, match=rf"{name}.*\.npz: this needs .*npz.*`data.root`.*PERMJAX_DATA"):
        load(name, root=tmp_path)
    monkeypatch.setenv("PERMJAX_DATA", str(tmp_path / "elsewhere"))
    with pytest.raises(FileNotFoundError, match="elsewhere"):
        load(name)
    monkeypatch.delenv("PERMJAX_DATA")
    with pytest.raises(MissingData, match=rf"no data/images/{name}.*npz: this needs .*PERMJAX_DATA"):
        load(name)


def test_wrong_names_options_and_files_are_refused_with_a_sentence(tmp_path, image_folder):
    np.savez(tmp_path / "odd.npz", x=np.zeros((3, 2)))
    np.savez(tmp_path / "uneven.npz", x=np.zeros((3, 2)), y=np.zeros(2, int))
    np.savez(tmp_path / "pickled.npz", x=np.array([{}, {}]), y=np.zeros(2, int))
    (tmp_path / "text.npz").write_text("hello")
    (tmp_path / "empty").mkdir()
    Image.fromarray(np.zeros((3, 3, 3), np.uint8)).save(image_folder / "pets" / "cat" / "small.png")
    wrong = [
        (("digit",), {}, "no data set 'digit'.*'digits'"),
        (("digits",), {"sead": 3}, "no option 'sead'.*'seed'"),
        (("digits",), {"train_size": 1797}, r"train_size must lie in 1\.\.1796"),
        (("npz",), {}, "needs the option 'path'"),
        (("npz", tmp_path), {"path": "odd.npz"}, "no array 'y'"),
        (("npz", tmp_path), {"path": "uneven.npz"}, "3 inputs but 2 labels"),
        (("npz", tmp_path), {"path": "pickled.npz"}, "not the NumPy archive"),
        (("npz", tmp_path), {"path": "text.npz"}, "text.npz is not the NumPy archive"),
        (("npz", tmp_path), {"path": "none.npz"}, r"There is no .*none\.npz"),
        (("folder", tmp_path), {"path": "empty"}, "no images in"),
        (("folder", tmp_path), {"path": "pets"}, "2 sizes .*option `size`"),
    ]
    for args, options, message in wrong:
        with pytest.raises((ValueError, MissingData), match=message):
            load(*args, **options)
    (image_folder / "pets" / "cat" / "small.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"small\.png cannot be read as an image"):
        load("folder", root=tmp_path, path="pets")


needs_data = pytest.mark.skipif(
    not os.environ.get("PERMJAX_DATA"), reason="PERMJAX_DATA is not set; real images are not here."
)


@pytest.mark.data
@needs_data
def test_real_mnist_is_split_8000_to_2000():
    data = load("mnist10k")
    assert data.x_train.shape == (8000, 28, 28)
    assert data.x_test.shape == (2000, 28, 28)
    assert np.bincount(data.y_train).min() > 600


@pytest.mark.data
@needs_data
def test_real_cifar_is_decoded():
    data = load("cifar10", train_size=200, test_size=50)
    assert data.x_train.shape == (200, 32, 32, 3)
    assert "cat" in data.classes
    assert 0.3 < data.x_train.mean() < 0.6
