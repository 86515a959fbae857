"""Order and chance as a table: (seed, epoch) → the order of the images and eight uniform numbers for each.

Crop, flip and colour come from these numbers alone, so that there is no random state to save, the number of workers
does not matter, and two ranks × 32 see what one rank × 64 sees.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

# What each of the eight numbers of an image decides.
CROP_X, CROP_Y, FLIP, COLOUR = 0, 1, 2, slice(3, 6)
NUM_UNIFORMS = 8


class MicroBatch(NamedTuple):
    """What one rank loads at once: positions in the training part (B,), their uniforms (B, 8), and where it stands."""

    epoch: int
    batch: int
    indices: npt.NDArray[np.int64]
    uniforms: npt.NDArray[np.float32]


def order_and_uniforms(seed: int, epoch: int, num_images: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float32]]:
    """A permutation (n,) and uniforms (n, 8) in [0, 1); row i of the uniforms belongs to image i."""
    chance = np.random.Generator(np.random.Philox(key=[seed, epoch]))
    return chance.permutation(num_images), chance.random((num_images, NUM_UNIFORMS), dtype=np.float32)


@dataclass(frozen=True)
class Plan:
    """The batches of every epoch for one rank.

    `batch_size` is the global batch of one optimizer step. Each rank loads it in `accumulation` micro-batches; the
    last, short batch of an epoch is dropped.
    """

    num_images: int
    batch_size: int
    seed: int = 0
    rank: int = 0
    world_size: int = 1
    accumulation: int = 1

    def __post_init__(self) -> None:
        if self.seed < 0:
            raise ValueError(f"seed={self.seed}: use a whole number of at least 0")
        if self.batch_size < 1 or self.batch_size % (self.world_size * self.accumulation):
            raise ValueError(
                f"data.batch_size={self.batch_size} is the batch of one optimizer step and does not divide among "
                f"{self.world_size} devices × {self.accumulation} accumulated micro-batches"
            )
        if self.batch_size > self.num_images:
            raise ValueError(
                f"data.batch_size={self.batch_size} is more than the {self.num_images} training images: use less"
            )

    @property
    def micro_batch_size(self) -> int:
        """Images that one rank loads and computes at once."""
        return self.batch_size // (self.world_size * self.accumulation)

    @property
    def num_batches(self) -> int:
        """Global batches, that is optimizer steps, of an epoch."""
        return self.num_images // self.batch_size

    def __len__(self) -> int:
        """Micro-batches of an epoch."""
        return self.num_batches * self.accumulation

    def micro_batches(self, epoch: int, start: int = 0) -> Iterator[MicroBatch]:
        """This rank's micro-batches of `epoch` from the global batch `start` on."""
        order, uniforms = order_and_uniforms(self.seed, epoch, self.num_images)
        for batch in range(start, self.num_batches):
            whole = order[batch * self.batch_size : (batch + 1) * self.batch_size]
            parts = whole.reshape(self.accumulation, self.world_size, self.micro_batch_size)
            for indices in parts[:, self.rank]:
                yield MicroBatch(epoch, batch, indices, uniforms[indices])
