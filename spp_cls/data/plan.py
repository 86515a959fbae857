"""Order and chance as a table: (seed, epoch) → the order of the images and eight uniform numbers for each.

Crop, flip and colour come from these numbers alone, so that there is no random state to save, the number of workers
does not matter, and two ranks × 32 see what one rank × 64 sees.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from .full_image import Cut

# What each of the eight numbers of an image decides.
CROP_X, CROP_Y, FLIP, COLOUR = 0, 1, 2, slice(3, 6)
NUM_UNIFORMS = 8
LAST_BATCHES = ("drop", "keep")

Shape = tuple[int, int]  # height and width in px


class MicroBatch(NamedTuple):
    """What one rank loads at once: positions in the training part (B,), their uniforms (B, 8), and where it stands.

    `shape` is that of whole pictures, None where regions are cut. `weight` is what the mean of its losses counts in
    the mean over the global batch: 1 but where that does not divide. `last`: the last of its global batch.
    """

    epoch: int
    batch: int
    indices: npt.NDArray[np.int64]
    uniforms: npt.NDArray[np.float32]
    shape: Shape | None = None
    weight: float = 1.0
    last: bool = True


def order_and_uniforms(seed: int, epoch: int, num_images: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float32]]:
    """A permutation (n,) and uniforms (n, 8) in [0, 1); row i of the uniforms belongs to image i."""
    chance = np.random.Generator(np.random.Philox(key=[seed, epoch]))
    return chance.permutation(num_images), chance.random((num_images, NUM_UNIFORMS), dtype=np.float32)


@functools.lru_cache(maxsize=4)
def order_of_batches(seed: int, epoch: int, num_batches: int) -> npt.NDArray[np.int64]:
    """In which order the batches of a `Cut` come; a stream of its own beside those of the images and of the sizes."""
    chance = np.random.Generator(np.random.Philox(key=[seed, epoch], counter=[0, 0, 0, 2]))
    return chance.permutation(num_batches)


@dataclass(frozen=True)
class Plan:
    """The batches of every epoch for one rank.

    `batch_size` is the global batch of one optimizer step. Each rank loads it in `accumulation` micro-batches. The
    last, short batch of an epoch is dropped, or with `last_batch` keep divided as evenly as it goes. With a `cut`,
    batches are those of whole pictures, each of one shape, and every image is in one. What is in a batch never
    depends on the ranks.
    """

    num_images: int
    batch_size: int
    seed: int = 0
    rank: int = 0
    world_size: int = 1
    accumulation: int = 1
    last_batch: str = "drop"
    cut: Cut | None = None

    def __post_init__(self) -> None:
        if self.seed < 0:
            raise ValueError(f"seed={self.seed}: use a whole number of at least 0")
        if self.last_batch not in LAST_BATCHES:
            raise ValueError(f"data.last_batch={self.last_batch!r}: use one of {', '.join(LAST_BATCHES)}")
        parts = self.world_size * self.accumulation
        among = f"{self.world_size} devices × {self.accumulation} accumulated micro-batches"
        if self.batch_size < 1:
            raise ValueError(f"data.batch_size={self.batch_size}: use a whole number of at least 1")
        if self.cut is not None:
            if self.cut.counts.min() < parts:
                raise ValueError(
                    f"data.batch_size={self.batch_size} gives batches of whole pictures of as few as "
                    f"{self.cut.counts.min()}, which do not divide among {among}: use a larger one"
                )
            return
        if self.batch_size % parts:
            raise ValueError(
                f"data.batch_size={self.batch_size} is the batch of one optimizer step "
                f"and does not divide among {among}"
            )
        if self.last_batch == "drop" and self.batch_size > self.num_images:
            raise ValueError(
                f"data.batch_size={self.batch_size} is more than the {self.num_images} training images: use less"
            )
        if self.last_batch == "keep" and 0 < self.num_images % self.batch_size < self.world_size:
            raise ValueError(
                f"data.last_batch=keep leaves a batch of {self.num_images % self.batch_size} images for "
                f"{self.world_size} devices: use drop, or another data.batch_size"
            )

    @property
    def micro_batch_size(self) -> int:
        """Images that one rank loads and computes at once, at most."""
        return -(-max(self.counts) // (self.world_size * self.accumulation))

    def images_at_once(self, shape: Shape) -> int:
        """Images of `shape` that one rank computes at once, at most: of long whole pictures there are fewer."""
        if self.cut is None:
            return self.micro_batch_size
        counts = self.cut.counts[(self.cut.shapes == shape).all(1)]
        return -(-int(counts.max(initial=0)) // (self.world_size * self.accumulation))

    @property
    def counts(self) -> list[int]:
        """Images of each global batch; the order of a cut's batches is another in every epoch."""
        if self.cut is not None:
            return [int(count) for count in self.cut.counts]
        whole, rest = divmod(self.num_images, self.batch_size)
        return [self.batch_size] * whole + ([rest] if rest and self.last_batch == "keep" else [])

    @property
    def num_batches(self) -> int:
        """Global batches, that is optimizer steps, of an epoch."""
        if self.cut is not None:
            return len(self.cut)
        keep = self.last_batch == "keep"
        return (self.num_images + keep * (self.batch_size - 1)) // self.batch_size

    def __len__(self) -> int:
        """Micro-batches of an epoch."""
        if self.cut is not None or self.last_batch == "drop":
            return self.num_batches * self.accumulation
        return sum(self._rounds(count) for count in self.counts)

    def shape(self, epoch: int, batch: int) -> Shape | None:
        """The shape of the whole pictures in a global batch; None where regions are cut."""
        if self.cut is None:
            return None
        height, width = self.cut.shapes[order_of_batches(self.seed, epoch, len(self.cut))[batch]]
        return int(height), int(width)

    def micro_batches(self, epoch: int, start: int = 0) -> Iterator[MicroBatch]:
        """This rank's micro-batches of `epoch` from the global batch `start` on."""
        order, uniforms = order_and_uniforms(self.seed, epoch, self.num_images)
        for batch, images in self._global_batches(order, epoch, start):
            shape, rounds = self.shape(epoch, batch), self._rounds(len(images))
            parts = np.array_split(images, rounds * self.world_size)
            for i, indices in enumerate(parts[self.rank :: self.world_size]):
                # Lightning divides by the accumulation, and the ranks' gradients are averaged.
                weight = len(indices) * self.accumulation * self.world_size / len(images)
                yield MicroBatch(epoch, batch, indices, uniforms[indices], shape, weight, i == rounds - 1)

    def _global_batches(
        self, order: npt.NDArray[np.int64], epoch: int, start: int
    ) -> Iterator[tuple[int, npt.NDArray[np.int64]]]:
        """The number and the images of each global batch from `start` on."""
        if self.cut is None:
            for batch in range(start, self.num_batches):
                yield batch, order[batch * self.batch_size : (batch + 1) * self.batch_size]
            return
        dealt, ends = self.cut.deal(order), self.cut.ends
        turns = order_of_batches(self.seed, epoch, len(self.cut))
        for batch in range(start, self.num_batches):
            turn = turns[batch]
            yield batch, dealt[ends[turn] - self.cut.counts[turn] : ends[turn]]

    def _rounds(self, images: int) -> int:
        """In how many micro-batches a rank loads a global batch: fewer than usual where it is too short for them."""
        return min(self.accumulation, images // self.world_size)
