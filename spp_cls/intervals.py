"""What a few runs say: means with intervals, differences of paired runs, and the sentence that follows from them.

Two things vary: the seed (training anew gives another net) and the test images (others of the same kind would have been
easier or harder). `mean_interval` and `paired` are of the first alone, `over_images` and `paired_over_images` of both.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Literal

import numpy as np
import numpy.typing as npt
from scipy import special

Wrong = npt.NDArray[np.bool_]  # (S, N): whether the net of a seed answers an image wrongly
Kind = Literal["better", "worse", "equal", "not known"]

# Paired differences of a run that `more_seeds` may end are taken at this level; it then covers 95 % or more.
STOPPED_LEVEL = 0.97
LEAST = 5  # seeds before it may: after fewer it covers as little as 93 %

_POWER = 0.8  # "could have been seen" means in four tables of five
_SAME = 1e-9  # points; narrower than any interval that is not of equal numbers


@dataclass(frozen=True)
class Estimate:
    """A mean over `n` seeds and its interval at `level`; `low` and `high` are nan where n < 2."""

    mean: float
    low: float
    high: float
    n: int
    level: float = 0.95

    @property
    def half(self) -> float:
        """Half of the interval's width."""
        return (self.high - self.low) / 2


@dataclass(frozen=True)
class Conclusion:
    """What a difference says.

    `holds` is whether the paper's claim does, None where there is none or it is not known. `seen` is the smallest
    difference, in points, that these seeds would have shown in four tables of five; nan where n < 2.
    """

    kind: Kind
    text: str
    holds: bool | None
    seen: float


def mean_interval(values: Sequence[float], level: float = 0.95) -> Estimate:
    """Mean of one value a seed, with Student's interval: of the mean that ever more seeds would come to.

    No value gives n = 0 and a mean of nan. Raises ValueError for a value that is not finite.
    """
    _check_level(level)
    numbers = np.asarray(values, np.float64)
    if not np.isfinite(numbers).all():
        raise ValueError(f"values={list(values)}: each has to be finite")
    n = len(numbers)
    if n == 0:
        return Estimate(math.nan, math.nan, math.nan, 0, level)
    mean = float(numbers.mean())
    if n == 1:
        return Estimate(mean, math.nan, math.nan, 1, level)
    half = _student((1 + level) / 2, n - 1) * float(numbers.std(ddof=1)) / math.sqrt(n)
    return Estimate(mean, mean - half, mean + half, n, level)


def paired(a: Mapping[int, float], b: Mapping[int, float], level: float = 0.95) -> Estimate:
    """Mean of a − b, with Student's interval, over the seeds that both have; seed → value."""
    return mean_interval([a[seed] - b[seed] for seed in sorted(a.keys() & b.keys())], level)


def over_images(wrong: Wrong, level: float = 0.95) -> Estimate:
    """Error in percent of the nets `wrong` (S, N) of S seeds on N images, with an interval over seeds and images.

    The interval is of the error that the recipe would have on average over ever more seeds and ever more images of the
    test set's kind; with one seed it is of that one net. What an answer varies by is taken apart into what is peculiar
    to the seed, to the image, which all seeds share, and to the two together (a random-effects model of two crossed
    factors), and of the variance of the mean each has its part: Student's interval with Satterthwaite's (1946) degrees
    of freedom. A bootstrap over both would count the last part three times (Owen 2007, The pigeonhole bootstrap), and
    that is most of what differs between two nets; it knows nothing of Student's t besides. The interval is never
    narrower than that over the seeds alone: where these are few and differ most, Satterthwaite's degrees of freedom are
    too many. Simulated (500 images; 2, 3, 5 and 18 seeds; each part the largest, and none), intervals at 95 % cover 92
    to 99 %, least where five seeds differ by more than ten points; without the last rule 88 to 96 %.

    Raises ValueError unless `wrong` is bool, (S, N) and not empty.
    """
    _check_wrong("wrong", wrong)
    found = _crossed(wrong.astype(np.float64), level)
    return replace(found, low=max(0.0, found.low), high=min(100.0, found.high))


def paired_over_images(wrong_a: Wrong, wrong_b: Wrong, level: float = 0.95) -> Estimate:
    """Error of `wrong_a` − error of `wrong_b`, both (S, N), in percent points, as `over_images` does it.

    Row i of both is of one seed and column j of one image: they are pairs. Raises ValueError as `over_images` does,
    and where the shapes differ.
    """
    _check_wrong("wrong_a", wrong_a)
    _check_wrong("wrong_b", wrong_b)
    if wrong_a.shape != wrong_b.shape:
        raise ValueError(f"wrong_b: shape {wrong_b.shape}; it has to be that of wrong_a, {wrong_a.shape}")
    return _crossed(wrong_a.astype(np.float64) - wrong_b, level)


def _crossed(values: npt.NDArray[np.float64], level: float) -> Estimate:
    """100 × the mean of `values` (S, N), with its interval over other rows and other columns of the same kinds."""
    _check_level(level)
    seeds, images = values.shape
    mean, by_seed, by_image = values.mean(), values.mean(1), values.mean(0)
    rest = values - by_seed[:, None] - by_image + mean
    # Of rows, columns and the rest: squares, their degrees of freedom, and how many there are, over which they average.
    parts = [
        (float(((by_seed - mean) ** 2).sum()), seeds - 1, seeds),
        (float(((by_image - mean) ** 2).sum()), images - 1, images),
        (float((rest**2).sum()), (seeds - 1) * (images - 1), seeds * images),
    ]
    # What each says of the variance of the mean. The first two hold the third, so that it would count once too often.
    of_seeds, of_images, of_rest = (squares / (degrees * n) if degrees else 0.0 for squares, degrees, n in parts)
    variance = max(of_seeds + of_images - of_rest, of_seeds, of_images)
    if variance == 0:
        return Estimate(100 * float(mean), 100 * float(mean), 100 * float(mean), seeds, level)
    shares = zip((of_seeds, of_images, of_rest), parts, strict=True)
    degrees = 1 / sum((part / variance) ** 2 / max(1, own) for part, (_, own, _) in shares)
    half = _student((1 + level) / 2, degrees) * math.sqrt(variance)
    if seeds > 1:
        half = max(half, _student((1 + level) / 2, seeds - 1) * math.sqrt(of_seeds))  # as `mean_interval`
    return Estimate(100 * float(mean), 100 * float(mean - half), 100 * float(mean + half), seeds, level)


def conclusion(difference: Estimate, paper: float | None, margin: float) -> Conclusion:
    """What `difference`, as `paired` gives it (error of a row − error of its baseline, in points), says.

    "better" and "worse" where the interval leaves nought out. "equal" where it does not, and the interval at
    1 − 2 (1 − level), so 90 % for 95 %, lies within ± `margin` points: that is the two one-sided tests at 5 %. Else
    "not known". The paper's claim is the sign of `paper`, its own difference: how large it was is a matter of its data.
    "equal" contradicts it where `paper` is no smaller than the margin, and decides nothing where it is smaller.
    Seeds that all give the same number say nothing of their spread, so nothing is known from them.

    Each interval stands for itself: of twenty comparisons of equal things, one comes out as a difference.
    """
    if not margin > 0:
        raise ValueError(f"margin={margin}: it has to be above 0")
    mean, n = difference.mean, difference.n
    if n < 2:
        text = "not run yet" if n == 0 else f"not known yet: {signed(mean)} points, one run each"
        return Conclusion("not known", text, None, math.nan)
    low, high, level = difference.low, difference.high, difference.level
    sem = difference.half / _student((1 + level) / 2, n - 1)
    seen = (_student((1 + level) / 2, n - 1) + _student(_POWER, n - 1)) * sem
    if difference.half < _SAME:
        text = f"not known yet: all {n} seeds give {signed(mean)} points, which says nothing of their spread"
        return Conclusion("not known", text, None, seen)

    inner = _student(level, n - 1) * sem
    within = abs(mean) + inner < margin
    if high < 0 or low > 0:
        kind: Kind = "better" if high < 0 else "worse"
        nearest, farthest = sorted((abs(low), abs(high)))
        text = f"{kind} by {abs(mean):.2f} points ({nearest:.2f} to {farthest:.2f}), n = {n}"
        if within:
            text += f", which is less than {margin:g}"
        holds = None if paper is None else (mean < 0) == (paper < 0) and paper != 0
    elif within:
        kind = "equal"
        text = f"equal within {margin:g} points: {signed(mean)} ({signed(low)} to {signed(high)}), n = {n}"
        holds = None if paper is None or 0 < abs(paper) < margin else paper == 0
    else:
        text = (
            f"not known yet: {signed(mean)} points ({signed(low)} to {signed(high)}), n = {n}; "
            f"a difference of {seen:.2f} could have been seen"
        )
        if paper is not None:
            text += f", the paper's is {signed(paper)}"
        return Conclusion("not known", text, None, seen)
    if paper is not None:
        verdict = {True: "holds here", False: "does not hold here", None: "is no larger than that"}[holds]
        text += f": the paper's claim ({signed(paper)}) {verdict}"
    return Conclusion(kind, text, holds, seen)


def more_seeds(half_widths: Sequence[float], n: int, least: int, most: int, precision: float) -> bool:
    """Whether one more seed is to be run: not from `least` on if all `half_widths` are ≤ `precision`, nor from `most`.

    `half_widths` are of the paired differences over the `n` seeds so far, in points; neither nan nor 0 is known. The
    rule looks at widths alone and never at which side of nought an interval lies: who stops at the first significant
    difference finds one sooner or later where there is none.

    Still, runs tend to be stopped when their spread looks small by chance. Simulated (normal differences, most = 20,
    precision from half their standard deviation to twice it), intervals at 95 % cover 90 to 95 % with least = 3 and
    92 to 95 % with least = 5; at STOPPED_LEVEL and with least = 5 they cover 95 to 97 %.

    Raises ValueError unless 2 ≤ least ≤ most and precision > 0.
    """
    if not 2 <= least <= most:
        raise ValueError(f"least={least}, most={most}: 2 ≤ least ≤ most is needed")
    if not precision > 0:
        raise ValueError(f"precision={precision}: it has to be above 0")
    return n < most and (n < least or not all(_SAME <= half <= precision for half in half_widths))


def signed(points: float) -> str:
    """Two decimals with a true sign: −1.01, +0.30, 0.00."""
    text = f"{points:+.2f}".replace("-", "−")
    return text[1:] if text[1:] == "0.00" else text


@cache
def _student(p: float, degrees: float) -> float:
    return float(special.stdtrit(degrees, p))


def _check_level(level: float) -> None:
    if not 0.5 < level < 1:
        raise ValueError(f"level={level}: a share such as 0.95 is needed, above 0.5 and below 1")


def _check_wrong(name: str, wrong: Wrong) -> None:
    if wrong.dtype != np.bool_ or wrong.ndim != 2 or 0 in wrong.shape:
        raise ValueError(f"{name}: {wrong.dtype} of shape {wrong.shape}; bool of shape (seeds, images) is needed")
