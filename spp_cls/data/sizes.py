"""The training size in px as a pure function of (seed, epoch, batch): nothing to restore, the same on every rank.

A schedule of one's own is any function `(seed, epoch, batch, **options) -> int`, named in a config by `_target_` with
`_partial_: true`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

Sizes = Callable[[int, int, int], int]

_AT_ONCE = 1024  # batches whose numbers are drawn together: a plan of all epochs asks for millions


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


def per_batch(seed: int, epoch: int, batch: int, *, sizes: Sequence[int]) -> int:
    """A size for each global batch, drawn from `sizes`, each as likely; not in the paper."""
    if not sizes:
        raise ValueError("sizes.sizes=[]: give at least one size in px, like [128, 160, 192, 224]")
    block, place = divmod(batch, _AT_ONCE)
    return sizes[int(_chances(seed, epoch, block)[place] * len(sizes))]


@functools.lru_cache(maxsize=4)
def _chances(seed: int, epoch: int, block: int) -> npt.NDArray[np.float64]:
    chance = np.random.Generator(np.random.Philox(key=[seed, epoch], counter=[0, 0, block, 3]))  # beside the others'
    return chance.random(_AT_ONCE)


def growing(seed: int, epoch: int, batch: int, *, low: int, high: int, epochs: int, steps: int = 4) -> int:
    """From `low` to `high` px in `steps` stretches of about `epochs` / `steps` epochs each, the last at `high`.

    Where there are fewer epochs than steps, each epoch is a step of its own. Not in the paper.
    """
    for name, value in (("epochs", epochs), ("steps", steps)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"sizes.{name}={value!r}: use a whole number of at least 1")
    steps = min(steps, epochs)
    step = min(epoch, epochs - 1) * steps // epochs  # 0 … steps - 1
    return high if step == steps - 1 else round(low + (high - low) * step / (steps - 1))


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
