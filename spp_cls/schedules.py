"""Schedules: pure functions of (progress, errors) → the factor on the learning rate.

`progress` is the share of all optimizer steps that is done, 0 … 1; `errors` are the validation errors in percent of
the epochs so far. So a schedule has no state of its own to restore. One of one's own is any such function, named in
a config by `_target_` with `_partial_: true`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

Schedule = Callable[[float, Sequence[float]], float]


def constant(progress: float, errors: Sequence[float], *, warmup: float = 0.0) -> float:
    """1 throughout, after a linear rise over the share `warmup`."""
    return _rise(progress, warmup)


def step(
    progress: float,
    errors: Sequence[float],
    *,
    milestones: Sequence[float] = (0.5, 0.75),
    factor: float = 0.1,
    warmup: float = 0.0,
) -> float:
    """× `factor` at each milestone, a share of training."""
    return float(_rise(progress, warmup) * factor ** sum(progress >= m for m in milestones))


def cosine(progress: float, errors: Sequence[float], *, warmup: float = 0.0, end: float = 0.0) -> float:
    """Half a cosine from 1 to `end` after a linear rise over the share `warmup`."""
    if progress <= warmup:
        return _rise(progress, warmup)
    return _half_cosine(1.0, end, (progress - warmup) / (1 - warmup))


def one_cycle(
    progress: float,
    errors: Sequence[float],
    *,
    rise: float = 0.3,
    start: float = 1 / 25,
    end: float = 1 / 250_000,
) -> float:
    """Half a cosine up from `start` to 1 over the share `rise`, half a cosine down to `end` (Smith 2018)."""
    if 0 < rise >= progress:
        return _half_cosine(start, 1.0, progress / rise)
    return _half_cosine(1.0, end, (progress - rise) / (1 - rise))


def plateau(
    progress: float,
    errors: Sequence[float],
    *,
    patience: int = 5,
    factor: float = 0.1,
    drops: int = 2,
    threshold: float = 0.1,
) -> float:
    """× `factor`, at most `drops` times, when the error has not fallen by `threshold` points for `patience` epochs.

    He et al. 2014, §3: 0.01, divided by 10 twice when the error plateaus.
    """
    best, waited, dropped = math.inf, 0, 0
    for error in errors:
        if error < best - threshold:
            best, waited = error, 0
        else:
            waited += 1
        if waited >= patience and dropped < drops:
            dropped, waited = dropped + 1, 0
    return float(factor**dropped)


def _rise(progress: float, warmup: float) -> float:
    return min(1.0, progress / warmup) if warmup > 0 else 1.0


def _half_cosine(start: float, end: float, share: float) -> float:
    return end + (start - end) * (1 + math.cos(math.pi * min(1.0, share))) / 2
