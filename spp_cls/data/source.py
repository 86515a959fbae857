"""Sources: a planned batch of positions → uint8 pixels, from the files of a folder or from a cache of them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from .device import resize
from .index import Index
from .plan import CROP_X, CROP_Y, MicroBatch, Shape
from .reader import Known, read_rgb
from .views import Pass, Views

PLACES = ("anywhere", "five")
# Paper: "from the center or the four corners of the entire image". Here: anywhere by default, because what the paper
# says it follows (Krizhevsky, Howard) crops at random; `place: five` is the literal reading.
FIVE = np.array([(0.5, 0.5), (0, 0), (0, 1), (1, 0), (1, 1)], np.float32)  # share of the room above, and to the left

Pixels = npt.NDArray[np.uint8]  # (h, w, 3)


class TrainBatch(NamedTuple):
    """Pictures (B, 3, H, W) uint8, labels (B,), uniforms (B, 8), the shape in px that the plan gives them, and the
    weight of their mean loss."""

    images: Tensor
    labels: Tensor
    uniforms: Tensor
    shape: Shape
    weight: float


class ViewsBatch(NamedTuple):
    """Views (B, V, 3, h, w) uint8, labels (B,), and the images' rows in the index (B,).

    With windows (N, 5) in px (which of the V, top, left, bottom, right), these are the views, of each image alike.
    """

    views: Tensor
    labels: Tensor
    rows: Tensor
    windows: Tensor | None = None


class Pictures(Protocol):
    """Whole training pictures by position: `shapes` (n, 2) are their heights and widths in px."""

    @property
    def shapes(self) -> npt.NDArray[np.int32]: ...

    def __getitem__(self, position: int) -> Pixels: ...


def resized_shape(width: int, height: int, shorter: int) -> Shape:
    """(height, width) in px after the shorter side became `shorter`, aspect ratio kept."""
    scale = shorter / min(width, height)
    return max(shorter, round(height * scale)), max(shorter, round(width * scale))


def resized_shapes(
    widths: npt.NDArray[np.int32], heights: npt.NDArray[np.int32], shorter: int
) -> npt.NDArray[np.int32]:
    """`resized_shape` of n pictures: (n, 2)."""
    scales = shorter / np.minimum(widths, heights)
    sides = np.rint(np.stack([heights * scales, widths * scales], axis=1))
    shapes: npt.NDArray[np.int32] = np.maximum(shorter, sides).astype(np.int32)
    return shapes


def read_resized(path: Path, shape: Shape, *, draft: bool = False, known: Known | None = None) -> Tensor:
    """The picture at `path` as (3, *shape) uint8, within two grey levels of Pillow's bilinear resizing.

    `draft`: a large JPEG may be decoded at 1/2, 1/4 or 1/8 of its size, but no smaller than `shape`.
    """
    return resized(read_rgb(path, draft=(shape[1], shape[0]) if draft else None, known=known), shape)


def resized(image: Tensor, shape: Shape) -> Tensor:
    """(3, h, w) → (3, *shape)."""
    return resize(image[None], shape)[0]


def corners(
    uniforms: npt.NDArray[np.float32], shapes: npt.NDArray[np.int32], region: int, place: str
) -> npt.NDArray[np.int64]:
    """Top and left (B, 2) in px of the regions that uniforms (B, 8) choose in pictures of shapes (B, 2)."""
    if place == "five":
        room = (shapes - region).astype(np.float32)
        places = np.rint(FIVE[(uniforms[:, CROP_X] * 5).astype(np.int64)] * room)
    else:
        room = (shapes - region + 1).astype(np.float32)
        places = uniforms[:, [CROP_Y, CROP_X]] * room
    return np.asarray(places, np.int64)


def take_views(image: Tensor, one: Pass, size: int, resize: int, region: int) -> tuple[Tensor, Tensor | None]:
    """Of a picture (3, H, W) what a net is given in a pass: images (V, 3, h, w) uint8, and windows on them or None."""
    image = one.distortion(image) if one.distortion else image
    shorter = one.shorter_side(size, resize, region)
    height, width = (shorter, shorter) if one.warped else resized_shape(image.shape[2], image.shape[1], shorter)
    return one.images(resized(image, (height, width)), size), one.windows(height, width, size)


def read_views(
    path: Path, views: Views, resize: int, region: int, known: Known | None = None
) -> list[tuple[Tensor, Tensor | None]]:
    """`take_views` of the picture at `path`, for each pass."""
    assert views.size is not None
    image = read_rgb(path, known=known)
    return [take_views(image, one, views.size, resize, region) for one in views.passes]


@dataclass(frozen=True, eq=False)
class Files:
    """The training pictures as they lie on disk: decoded and resized to `shapes` each time they are asked for."""

    index: Index
    rows: npt.NDArray[np.int64]
    shapes: npt.NDArray[np.int32]
    draft: bool = True

    def __getitem__(self, position: int) -> Pixels:
        row, (height, width) = int(self.rows[position]), self.shapes[position].tolist()
        known = self.index.known(row)
        image = read_resized(self.index.path(row), (height, width), draft=self.draft, known=known)
        return image.permute(1, 2, 0).numpy()


@dataclass(frozen=True)
class TrainSource:
    """Micro-batches of the plan → `TrainBatch`: regions of `region` px, or whole pictures where the plan says so."""

    pictures: Pictures
    labels: npt.NDArray[np.int64]
    region: int
    place: str

    def __getitem__(self, planned: MicroBatch) -> TrainBatch | ValueError:
        at, shape = planned.indices, planned.shape or (self.region, self.region)
        pixels = np.empty((len(at), *shape, 3), np.uint8)
        try:
            if planned.shape is None:
                places = corners(planned.uniforms, self.pictures.shapes[at], self.region, self.place).tolist()
                for i, (position, (top, left)) in enumerate(zip(at.tolist(), places, strict=True)):
                    whole = self.pictures[position]
                    pixels[i] = whole[top : top + self.region, left : left + self.region]
            else:
                for i, position in enumerate(at.tolist()):
                    whole = self.pictures[position]
                    if whole.shape[:2] != shape:  # it joined others
                        image = torch.from_numpy(whole.copy()).permute(2, 0, 1)  # torch wants it writable
                        whole = resized(image, shape).permute(1, 2, 0).numpy()
                    pixels[i] = whole
        except ValueError as error:
            return error  # raised again by the loader: a worker would bury the one line in a traceback
        images = torch.from_numpy(pixels).permute(0, 3, 1, 2)  # (B, H, W, 3) → (B, 3, H, W), channels_last
        uniforms, labels = torch.from_numpy(planned.uniforms), torch.from_numpy(self.labels[at])
        return TrainBatch(images, labels, uniforms, shape, planned.weight)


@dataclass(frozen=True)
class ViewsSource:
    """A pass by its number, and rows of the index → `ViewsBatch`; one batch must give views of one shape."""

    index: Index
    views: Views
    resize: int
    region: int

    def __getitem__(self, asked: tuple[int, npt.NDArray[np.int64]]) -> ViewsBatch | ValueError:
        number, rows = asked
        one, size = self.views.passes[number], self._size
        try:
            taken = [
                take_views(
                    read_rgb(self.index.path(row), known=self.index.known(row)), one, size, self.resize, self.region
                )
                for row in rows
            ]
        except ValueError as error:
            return error
        labels = torch.from_numpy(self.index.labels[rows])
        stack = torch.stack([views.permute(0, 2, 3, 1) for views, _ in taken])  # (B, V, h, w, 3): as they lie in memory
        return ViewsBatch(stack.movedim(-1, -3), labels, torch.from_numpy(rows), taken[0][1])

    def batches(self, rows: npt.NDArray[np.int64], batch_size: int) -> list[tuple[int, npt.NDArray[np.int64]]]:
        """In each pass each row once, in batches that give views of one shape.

        They are of at most `batch_size` views; or, where windows are pooled from maps, of about as many px as
        `batch_size` regions have, so that large scales need no more memory than small ones.
        """
        found: list[tuple[int, npt.NDArray[np.int64]]] = []
        for number, one in enumerate(self.views.passes):
            views = one.num_views(one.shorter_side(self._size, self.resize, self.region), self._size)
            for (height, width), same in self._alike(one, rows):
                if one.on_maps:
                    images = batch_size * self.region**2 // (height * width * (1 + one.mirrored))
                else:
                    images = batch_size // views
                images = max(1, images)
                found += [(number, same[i : i + images]) for i in range(0, len(same), images)]
        return found

    def _alike(self, one: Pass, rows: npt.NDArray[np.int64]) -> list[tuple[Shape, npt.NDArray[np.int64]]]:
        """`rows` by the shape in px that their pictures have, where the net is given whole ones."""
        if not one.whole:
            return [((0, 0), rows)]
        shorter = one.shorter_side(self._size, self.resize, self.region)
        groups: dict[Shape, list[int]] = {}
        shapes = resized_shapes(self.index.widths[rows], self.index.heights[rows], shorter)
        if one.warped:
            shapes[:] = shorter
        for row, (height, width) in zip(rows.tolist(), shapes.tolist(), strict=True):
            groups.setdefault((height, width), []).append(row)
        return [(shape, np.array(same, np.int64)) for shape, same in sorted(groups.items())]

    @property
    def _size(self) -> int:
        assert self.views.size is not None
        return self.views.size
