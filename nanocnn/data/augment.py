"""What augmentation does to the images of a batch, and a batch of a split: augmented and normalised.

The arithmetic is kernels/augment.py. What is drawn for a sample depends on (seed, epoch, sample) only: on 1 rank or 4,
resumed or not, in whatever batch it comes.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ..kernels.augment import augment as kernel
from ..kernels.memory import empty
from .datasets import DataError, Split


@dataclass(frozen=True)
class Augment:
    """Random crop after padding by `pad` pixels, random horizontal flip, cutout of a square of `cutout` pixels.

    The padding mirrors the image, so that no black border shows where it was. Cutout fills with the mean, as T. DeVries
    and G. W. Taylor, "Improved Regularization of Convolutional Neural Networks with Cutout" (2017), section 3: its
    centre may lie anywhere, so that part of the square may fall outside.
    """

    pad: int = 4
    flip: bool = True
    cutout: int = 0

    @property
    def sizes(self) -> tuple[int, bool, int]:
        """As the kernel takes them."""
        return self.pad, self.flip, self.cutout

    def check(self, images: np.ndarray) -> None:
        """Raise DataError if `images` (N, H, W, C) are too small for this."""
        smallest = min(images.shape[1:3])
        if not 0 <= self.pad < smallest or not 0 <= self.cutout <= smallest:
            raise DataError(
                f"pad {self.pad} and cutout {self.cutout} do not fit images of {images.shape[1]} x {images.shape[2]} "
                f"pixels; expected a pad of 0 to {smallest - 1} and a cutout of 0 to {smallest}"
            )


NOTHING = Augment(0, flip=False)  # but normalisation


def load_batch(
    split: Split,
    samples: np.ndarray,
    augment: Augment | None = None,
    seed: int = 0,
    epoch: int = 0,
    dtype: type = np.float32,
) -> np.ndarray:
    """Images `samples` (n,) of a split, augmented and normalised: (n, H, W, C). NumPy only, so that any thread may."""
    x = empty((len(samples), *split.images.shape[1:]), dtype)
    sizes = (augment or NOTHING).sizes
    return kernel.__wrapped__(split.images, samples, *scale_and_shift(split, dtype), *sizes, seed, epoch, out=x)


def scale_and_shift(split: Split, dtype: type) -> tuple[np.ndarray, np.ndarray]:
    """a and b (C,) with which (v / 255 - mean) / std is v * a - b; float32, unless `dtype` is wider."""
    wide = np.result_type(dtype, np.float32)
    return (1 / (255 * split.std)).astype(wide), (split.mean / split.std).astype(wide)
