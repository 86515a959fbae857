"""The training size in px as a pure function of (seed, epoch, batch): nothing to restore, the same on every rank.

A schedule of one's own is any function `(seed, epoch, batch, **options) -> int`, named in a config by `_target_` with
`_partial_: true`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

Sizes = Callable[[int, int, int], int]


def single(seed: int, epoch: int, batch: int, *, size: int) -> int:
    """The same size always: the paper's single-size training."""
    return size


def alternating(seed: int, epoch: int, batch: int, *, sizes: Sequence[int]) -> int:
    """A whole epoch at each size in turn: the paper's multi-size training, §2.3.

    Paper: which size comes first is not said. Here: `sizes` in the order given, and the default [180, 224] ends an
    even number of epochs at 224, the test size.
    """
    if not sizes:
        raise ValueError("sizes.sizes=[]: give at least one size in px, like [180, 224]")
    return sizes[epoch % len(sizes)]


def uniform(seed: int, epoch: int, batch: int, *, low: int, high: int) -> int:
    """One size an epoch, drawn from low … high, both included: the paper's random-size training, §3.1.3."""
    chance = np.random.Generator(np.random.Philox(key=[seed, epoch], counter=[0, 0, 0, 1]))  # beside the plan's
    return int(chance.integers(low, high, endpoint=True))


def planned(sizes: Sizes, seed: int, epoch: int, batch: int, region: int) -> int:
    """`sizes(seed, epoch, batch)`, refused where it is no size that a region of `region` px can be resized to."""
    size = sizes(seed, epoch, batch)
    if isinstance(size, bool) or not isinstance(size, int) or size < 1:
        raise ValueError(f"sizes gave {size!r} for epoch {epoch}: a training size is a whole number of px")
    if size > region:
        raise ValueError(
            f"sizes gave {size} px for epoch {epoch}, more than data.region={region}: "
            f"raise data.region to {size} (and data.resize with it), or train at smaller sizes"
        )
    return size
