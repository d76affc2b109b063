"""Readers of image files, and their augmentation."""

import io
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Shaped, UInt8
from PIL import Image, UnidentifiedImageError

from permjax.data.dataset import Dataset, MissingData, split, to_unit

_SUFFIXES = (".png", ".jpg", ".jpeg")


def require(path: Path, what: str, setting: str = "`data.root` of the configuration or PERMJAX_DATA") -> Path:
    """The path if it exists.

    Raises:
        MissingData: says which file is wanted, what it is, and which setting names its folder.
    """
    if not path.exists():
        message = f"There is no {path}: this needs {what}. Get it from its source, put it there, "
        raise MissingData(message + f"or let {setting} name the folder that has it.")
    return path


def npz(path: str | Path, *, seed: int | None = 0, train_size: int | None = None, name: str | None = None) -> Dataset:
    """A NumPy archive with inputs `x` and integer labels `y`, split by a seeded shuffle.

    Args:
        path: the `.npz` file. Inputs of bytes are scaled to [0, 1], floats are taken as they are.
        seed: of the shuffle; none keeps the order of the file.
        train_size: how many examples are for training; 80 % by default.
        name: of the data set; that of the file by default.

    Raises:
        MissingData: there is no such file.
        ValueError: the file is no such archive, lacks `x` or `y`, or the split is impossible.
    """
    path = require(Path(path), "a NumPy archive (npz) with the arrays x and y", "the option `path`")
    arrays = read_npz(path, ("x", "y"))
    x, y = to_unit(arrays["x"]), arrays["y"]
    classes = tuple(str(label) for label in range(int(y.max()) + 1))
    size = len(x) * 4 // 5 if train_size is None else train_size
    return split(x, y, train_size=size, seed=seed, classes=classes, name=name or path.stem)


def mnist10k(root: Path, *, seed: int | None = 0) -> Dataset:
    """The 10,000 test images of MNIST: 8,000 for training, 2,000 for testing, float32 [n, 28, 28] in [0, 1].

    Without a seed the last 2,000 of the file are for testing; these were written more neatly than the others.

    Source: LeCun et al., Gradient-based learning applied to document recognition (1998).
    """
    path = require(root / "images" / "mnist10k.npz", "the MNIST test set as an npz file with x [10000, 28, 28], y")
    return npz(path, seed=seed, train_size=8000, name="mnist10k")


def cifar10(root: Path, *, train_size: int = 50_000, test_size: int = 10_000) -> Dataset:
    """CIFAR-10 from JPEG streams, float32 [n, 32, 32, 3] in [0, 1]; the first images of an already shuffled file.

    JPEG is lossy, so accuracies are not comparable with published ones; the set calls itself `CIFAR-10 (JPEG)`.

    Source: Krizhevsky, Learning multiple layers of features from tiny images (2009).
    """
    what = "CIFAR-10 as JPEG streams in an npz file with {train,test}_jpeg, _offsets and _labels, and class_names"
    path = require(root / "images" / "cifar10_jpeg.npz", what)
    parts = [f"{part}_{kind}" for part in ("train", "test") for kind in ("jpeg", "offsets", "labels")]
    arrays = read_npz(path, (*parts, "class_names"))
    x_train, y_train = _decoded(arrays, "train", train_size)
    x_test, y_test = _decoded(arrays, "test", test_size)
    classes = tuple(str(name) for name in arrays["class_names"])
    return Dataset(x_train, y_train, x_test, y_test, classes, "CIFAR-10 (JPEG)")


def folder(
    path: str | Path, *, size: tuple[int, int] | None = None, seed: int | None = 0, train_size: int | None = None
) -> Dataset:
    """Images in one folder per class, `path/class/*.png|jpg|jpeg`, as float32 [n, height, width, 3] in [0, 1].

    Args:
        path: the folder of the classes; their names in alphabetical order are the labels.
        size: height and width to resize to; without it all images must have one size.
        seed: of the shuffle that splits them; none keeps them in order.
        train_size: how many images are for training; 80 % by default.

    Raises:
        MissingData: there is no such folder.
        ValueError: there are no images in it, one cannot be read, or their sizes differ.
    """
    path = require(Path(path), "a folder with one folder of images per class", "the option `path`")
    classes = tuple(sorted(entry.name for entry in path.iterdir() if entry.is_dir()))
    files = [(file, i) for i, name in enumerate(classes) for file in _image_files(path / name)]
    if not files:
        message = f"There are no images in {path}; they must lie as class/name.png (or .jpg, .jpeg)."
        raise ValueError(message)
    images = _decode(((file.read_bytes(), str(file)) for file, _ in files), size)
    labels = np.array([label for _, label in files])
    train_size = len(files) * 4 // 5 if train_size is None else train_size
    return split(to_unit(images), labels, train_size=train_size, seed=seed, classes=classes, name=path.name)


def random_crop_flip(
    key: Array, images: Float[Array, "n height width channels"], *, pad: int = 4
) -> Float[Array, "n height width channels"]:
    """Each image shifted by up to `pad` pixels in each direction (zeros move in) and mirrored half of the time."""

    def one(key: Array, image: Array) -> Array:
        shift_key, flip_key = jax.random.split(key)
        start = jax.random.randint(shift_key, (2,), 0, 2 * pad + 1)
        padded = jnp.pad(image, ((pad, pad), (pad, pad), (0, 0)))
        crop = jax.lax.dynamic_slice(padded, (start[0], start[1], jnp.zeros_like(start[0])), image.shape)
        return jnp.where(jax.random.bernoulli(flip_key), crop[:, ::-1], crop)

    return jax.vmap(one)(jax.random.split(key, len(images)), images)


def read_npz(path: Path, names: Iterable[str]) -> dict[str, np.ndarray]:
    """Arrays of a NumPy archive by name, without unpickling anything."""
    try:
        with np.load(path, allow_pickle=False) as archive:
            missing = [name for name in names if name not in archive]
            if missing:
                have = ", ".join(archive.files)
                raise ValueError(f"it has no array {missing[0]!r}, only {have}")
            return {name: archive[name] for name in names}
    except (ValueError, OSError, AttributeError) as error:
        raise ValueError(f"{path} is not the NumPy archive that was wanted: {error}.") from None


def _decoded(arrays: dict[str, np.ndarray], part: str, size: int) -> tuple[Any, Any]:
    stream, offsets, labels = (arrays[f"{part}_{kind}"] for kind in ("jpeg", "offsets", "labels"))
    if not 0 < size <= len(labels):
        raise ValueError(f"'{part}_size' is {size}, but there are {len(labels)} {part} images; choose in between.")
    pieces = ((stream[offsets[i] : offsets[i + 1]].tobytes(), f"{part} image {i}") for i in range(size))
    return to_unit(_decode(pieces)), labels[:size].astype(np.int32)


def _image_files(path: Path) -> list[Path]:
    return sorted(file for file in path.iterdir() if file.suffix.lower() in _SUFFIXES)


def _decode(
    pieces: Iterable[tuple[bytes, str]], size: tuple[int, int] | None = None
) -> UInt8[np.ndarray, "n height width 3"]:
    def one(piece: tuple[bytes, str]) -> Shaped[np.ndarray, "height width 3"]:
        data, name = piece
        try:
            image = Image.open(io.BytesIO(data)).convert("RGB")
        except (UnidentifiedImageError, OSError) as error:
            raise ValueError(f"{name} cannot be read as an image: {error}.") from None
        return np.asarray(image if size is None else image.resize((size[1], size[0])))

    with ThreadPoolExecutor() as pool:
        images = list(pool.map(one, pieces))
    sizes = sorted({image.shape[:2] for image in images})
    if len(sizes) > 1:
        message = f"The images have {len(sizes)} sizes (height, width), among them {sizes[0]} and {sizes[-1]}; "
        raise ValueError(message + "give the option `size` to resize them all.")
    return np.stack(images)
