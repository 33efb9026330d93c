"""The handwritten digits that come with scikit-learn: real images that every machine has."""

from __future__ import annotations

import numpy as np

from dino_kit.randomness import stream

DIGITS, DIGITS_MOVED = "digits", "digits:moved"


class DigitsSource:
    """Handwritten digits of scikit-learn, 8 × 8 pixels.

    80 % of each class are to train, the rest to test; the split is drawn once and for all, class
    by class. With ``moved`` a digit is seen through a window of 6 × 6 pixels at a place of its own,
    also drawn once: in pictures of one size it is moved by up to a sixth of the side, and 4/3 as
    large.
    """

    def __init__(self, split: str, moved: bool = False):
        from sklearn.datasets import load_digits

        pixels, labels = load_digits(return_X_y=True)
        chosen = []
        for digit in range(10):
            of_class = np.flatnonzero(labels == digit)
            order = stream("digits split", digit).permutation(of_class)
            cut = round(0.8 * len(order))
            chosen.append(order[:cut] if split == "train" else order[cut:])
        self._rows = np.sort(np.concatenate(chosen))
        self._labels = labels[self._rows]
        ink = (pixels[self._rows].reshape(-1, 8, 8, 1) * (255 / 16)).round()  # 0 paper … 255 ink
        self._images = [image for image in ink.astype(np.uint8).repeat(3, axis=3)]
        if moved:
            pairs = zip(self._images, self._rows, strict=True)
            self._images = [_through_a_window(image, row) for image, row in pairs]
        self.classes = [str(digit) for digit in range(10)]
        self.root = DIGITS_MOVED if moved else DIGITS

    def __len__(self) -> int:
        return len(self._rows)

    def read(self, index: int) -> np.ndarray:
        return self._images[index]

    def label(self, index: int) -> int:
        return int(self._labels[index])

    def key(self, index: int) -> str:
        return str(self._rows[index])

    def name(self, index: int) -> str:
        return f"{self.root}[{self._rows[index]}]"


def _through_a_window(image: np.ndarray, row: int) -> np.ndarray:
    top, left = stream("moved digit", int(row)).integers(0, 3, size=2)
    return image[top : top + 6, left : left + 6]
