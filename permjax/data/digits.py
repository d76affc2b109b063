"""The handwritten digits that come with scikit-learn: 1,797 images of 8 x 8, no download."""

import numpy as np

from permjax.data.dataset import Dataset, split


def digits(*, seed: int | None = 0, train_size: int = 1437) -> Dataset:
    """Images float32 [n, 8, 8] in [0, 1] with a seeded split; the default trains on 80 %.

    Source: Alpaydin and Kaynak, Optical Recognition of Handwritten Digits (1998), as packed in scikit-learn.
    """
    from sklearn.datasets import load_digits  # takes a second to import, and only this set needs it

    bunch = load_digits()
    images = (bunch.images / 16).astype(np.float32)  # pyright: ignore[reportAttributeAccessIssue]
    labels = bunch.target  # pyright: ignore[reportAttributeAccessIssue]
    classes = tuple(str(digit) for digit in range(10))
    return split(images, labels, train_size=train_size, seed=seed, classes=classes, name="digits")
