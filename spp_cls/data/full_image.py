"""Whole pictures in batches of one shape: no crop, no padding, and hardly a stretch.

Every picture has a home shape: its own aspect ratio on a grid of px. The homes lie on a line from tall to wide, and the
pictures with them; a batch is a piece of that line. Where the pieces end depends on how many pictures each home has and
on nothing else, so that it is the same in every epoch, on every rank; the epoch's order says which pictures fill them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

# How far a home may be from the shape of a batch that its images are in; one step of 16 px from 224 × 224 is 0.07, one
# of 32 px is 0.14. On Caltech-101, batches of 32 … 128: from 0.08 to 0.25 mean stretch hardly changes (1.3 … 1.7 %) and
# about 1 % of the images at most are in incomplete batches; at 0.05 they are up to 13 %.
BOUND = 0.15
# A batch of less than this share of its capacity joins a neighbour, whatever the bound: its few pictures would weigh
# many times what others weigh in a step.
SMALL = 0.25


@dataclass(frozen=True)
class FullImage:
    """Shapes of whole pictures: the shorter side at `size` px, both sides multiples of `multiple` px.

    No batch is of fewer than `least` pictures, as far as there are so many: one for each device and micro-batch.
    """

    size: int = 224
    multiple: int = 16
    least: int = 8

    def __post_init__(self) -> None:
        for name, value in (("size", self.size), ("multiple", self.multiple), ("least", self.least)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"sizes.{name}={value!r}: use a whole number of at least 1")
        if self.size < self.multiple:
            raise ValueError(
                f"sizes.size={self.size} is less than sizes.multiple={self.multiple}: use a size of at least that"
            )

    def homes(self, widths: NDArray[np.int32], heights: NDArray[np.int32]) -> NDArray[np.int32]:
        """Home shapes (n, 2), height and width in px, of pictures of `widths` (n,) and `heights` (n,) px.

        Sides are rounded to the nearest multiple, halves up; none is less than one, as `size` is not.
        """
        sides = np.stack([heights, widths], axis=1).astype(np.int64)
        # side / shorter · size / multiple + 1/2, rounded down: in whole numbers, so that no machine rounds otherwise.
        step = sides.min(axis=1, keepdims=True) * self.multiple
        steps = (2 * sides * self.size + step) // (2 * step)
        homes: NDArray[np.int32] = (steps * self.multiple).astype(np.int32)
        return homes


@dataclass(frozen=True, eq=False)
class Cut:
    """The b global batches that n images fall into in every epoch, before the epoch's order of batches.

    `shapes` (b, 2) are height and width in px, `counts` (b,) images, and `places` (n,) each image's home as a place
    on the line of homes.
    """

    shapes: NDArray[np.int32]
    counts: NDArray[np.int64]
    places: NDArray[np.unsignedinteger]

    def __len__(self) -> int:
        return len(self.counts)

    @property
    def ends(self) -> NDArray[np.int64]:
        """Where each batch ends (b,) in what `deal` gives."""
        return np.cumsum(self.counts)

    def deal(self, order: NDArray[np.int64]) -> NDArray[np.int64]:
        """The images (n,) batch after batch: batch k is `[ends[k - 1]:ends[k]]`.

        `order` (n,) is a permutation of the images. Those of one home follow each other as they do in it.
        """
        assert order.shape == self.places.shape
        return order[np.argsort(self.places[order], kind="stable")]


def cut(homes: NDArray[np.int32], batch_size: int, size: int, least: int = 1) -> Cut:
    """Batches for images of the home shapes `homes` (n, 2); every image is in exactly one.

    A batch holds as many images as have the px of `batch_size` squares of `size` px, but at least `least`, and more
    only where fewer than `least` would be left.
    The walk goes along the line. As long as a home has enough images for a batch, they are one. What is left over of
    it is filled up with images of the next homes, at that home's shape among theirs that stretches them least, and
    none beyond `BOUND`. A batch that stays incomplete for that, and below `SMALL`, joins its nearest neighbour;
    if that has no room for it, the two are divided anew: neither small, then stretched least, then most evenly.
    """
    assert len(homes) and batch_size >= 1 and size >= 1 and least >= 1
    keys, inverse, numbers = np.unique(homes @ np.array([1 << 31, 1]), return_inverse=True, return_counts=True)
    shapes = np.stack([keys >> 31, keys & ((1 << 31) - 1)], axis=1)
    along = np.argsort(shapes[:, 1] / shapes[:, 0], kind="stable")
    places = np.empty(len(along), dtype=np.min_scalar_type(len(along)))  # 16 bits and less are sorted faster
    places[along] = np.arange(len(along))
    shapes = shapes[along]
    line = _line(shapes, numbers[along], batch_size * size * size, least)

    pieces: list[_Piece] = []
    while not pieces or pieces[-1].end < line.ends[-1]:
        pieces.append(_next(line, pieces[-1].end if pieces else 0))
    pieces = _without_small(line, pieces)
    return Cut(
        shapes=shapes[[piece.place for piece in pieces]].astype(np.int32),
        counts=np.array([piece.end - piece.start for piece in pieces], dtype=np.int64),
        places=places[inverse],
    )


def stretch(widths: NDArray[np.int32], heights: NDArray[np.int32], shapes: NDArray[np.int32]) -> NDArray[np.float64]:
    """How far pictures (n,) are stretched at shapes (n, 2): the larger over the smaller aspect ratio, less 1."""
    return _apart(widths / heights, shapes[:, 1] / shapes[:, 0])


def _apart(a: NDArray[np.float64], b: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.maximum(a / b, b / a) - 1


class _Piece(NamedTuple):
    """Images start … end of the line as a batch, at the shape of the home at `place`."""

    start: int
    end: int
    place: int


@dataclass(frozen=True, eq=False)
class _Line:
    """The m homes from tall to wide: arrays (m,)."""

    ratios: NDArray[np.float64]  # width / height
    capacities: NDArray[np.int64]  # images of a batch of this shape
    ends: NDArray[np.int64]  # where this home's images end
    reaches: NDArray[np.int64]  # where those end that are within the bound of this shape
    least: int

    def place(self, image: int) -> int:
        """The home of an image of the line."""
        return int(np.searchsorted(self.ends, image, side="right"))

    def strain(self, start: int, end: int, place: int) -> float:
        """Mean stretch of the images start … end, as if each had just its home's shape, at the shape of `place`."""
        homes = slice(self.place(start), self.place(end - 1) + 1)
        numbers = np.diff(np.minimum(self.ends[homes], end), prepend=start)
        return float(numbers @ _apart(self.ratios[homes], self.ratios[place])) / (end - start)


def _line(shapes: NDArray[np.int64], numbers: NDArray[np.int64], budget: int, least: int) -> _Line:
    ratios, ends = shapes[:, 1] / shapes[:, 0], np.cumsum(numbers)
    last = np.searchsorted(ratios, ratios * (1 + BOUND), side="right") - 1
    return _Line(ratios, np.maximum(least, budget // shapes.prod(axis=1)), ends, ends[last], least)


def _next(line: _Line, start: int) -> _Piece:
    """The batch that begins at image `start`: complete if it can be, and then stretched least."""
    home = line.place(start)
    if start + line.capacities[home] <= line.ends[home]:  # what is below says the same, more slowly
        return _Piece(start, start + int(line.capacities[home]), home)
    found: list[tuple[bool, int, float, _Piece]] = []
    for place in range(home, int(np.searchsorted(line.ratios, line.ratios[home] * (1 + BOUND), side="right"))):
        complete = start + int(line.capacities[place])
        end = min(complete, int(line.reaches[place]))
        if place == home or end > line.ends[place - 1]:  # else it would hold no image of this home
            # Of incomplete ones the longest: it leaves least behind.
            rest = 0 if end == complete else start - end
            found.append((end < complete, rest, line.strain(start, end, place), _Piece(start, end, place)))
    return min(found)[-1]


def _without_small(line: _Line, pieces: list[_Piece]) -> list[_Piece]:
    """The same with every small batch joined to its nearest neighbour, if it has one."""
    pieces, k = list(pieces), 0
    while k < len(pieces) > 1:
        if not _small(line, pieces[k]):
            k += 1
            continue
        near, ratio = [j for j in (k - 1, k + 1) if 0 <= j < len(pieces)], line.ratios[pieces[k].place]
        nearest = min(near, key=lambda j: float(_apart(line.ratios[pieces[j].place], ratio)))
        first = min(k, nearest)
        room = int(line.capacities[pieces[nearest].place])
        joined = _joined(line, pieces[first].start, pieces[first + 1].end, room)
        pieces[first : first + 2] = joined
        k = first if len(joined) == 1 else first + 2  # one made of two may still be small
    return pieces


def _small(line: _Line, piece: _Piece) -> bool:
    return piece.end - piece.start < max(line.least, SMALL * float(line.capacities[piece.place]))


def _joined(line: _Line, start: int, end: int, room: int) -> list[_Piece]:
    """Images start … end, two batches by now, as one if `room` is enough, or else divided anew."""
    whole = _fitted(line, start, end)
    if whole is not None and end - start <= room:
        return [whole]
    for over in (0, line.least):  # beyond capacity only where it must be
        ways = [
            [_fitted(line, start, middle, over), _fitted(line, middle, end, over)] for middle in range(start + 1, end)
        ]
        found: list[tuple[int, float, int, list[_Piece]]] = []
        for way in ([_fitted(line, start, end, over)], *ways):
            parts = [part for part in way if part is not None]
            if len(parts) == len(way):
                strain = sum((part.end - part.start) * line.strain(*part) for part in parts)
                uneven = abs(parts[0].end - start - (end - parts[-1].start))
                small = len(parts) * sum(_small(line, part) for part in parts)  # one that is small before two
                found.append((small, round(strain, 9), uneven, parts))
        if found and min(part.end - part.start for part in min(found)[-1]) >= line.least:
            return min(found)[-1]
    places = range(line.place(start), line.place(end - 1) + 1)
    return [_Piece(start, end, min(places, key=lambda place: line.strain(start, end, place)))]


def _fitted(line: _Line, start: int, end: int, over: int = 0) -> _Piece | None:
    """The images at that home's shape among theirs that stretches them least; none if no such batch can hold them."""
    places = range(line.place(start), line.place(end - 1) + 1)
    enough = [place for place in places if line.capacities[place] + over >= end - start]
    return _Piece(start, end, min(enough, key=lambda place: line.strain(start, end, place))) if enough else None
