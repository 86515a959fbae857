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
from .views import Views

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
    """Views (B, V, 3, h, w) uint8, labels (B,), and the images' rows in the index (B,)."""

    views: Tensor
    labels: Tensor
    rows: Tensor


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


def read_views(path: Path, views: Views, resize: int, region: int, known: Known | None = None) -> Tensor:
    """The views (V, 3, h, w) uint8 of the picture at `path`."""
    image = read_rgb(path, known=known)
    shape = resized_shape(image.shape[2], image.shape[1], views.shorter_side(resize, region))
    return views(resized(image, shape))


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
    """Rows of the index → `ViewsBatch`; the rows of one batch must give views of one shape."""

    index: Index
    views: Views
    resize: int
    region: int

    def __getitem__(self, rows: npt.NDArray[np.int64]) -> ViewsBatch | ValueError:
        try:
            views = [
                read_views(self.index.path(row), self.views, self.resize, self.region, self.index.known(row))
                for row in rows
            ]
        except ValueError as error:
            return error
        labels = torch.from_numpy(self.index.labels[rows])
        stack = torch.stack([each.permute(0, 2, 3, 1) for each in views])  # (B, V, h, w, 3): as they lie in memory
        return ViewsBatch(stack.movedim(-1, -3), labels, torch.from_numpy(rows))

    def batches(self, rows: npt.NDArray[np.int64], batch_size: int) -> list[npt.NDArray[np.int64]]:
        """`rows` in batches of at most `batch_size` views, each of one shape, each row once."""
        images = max(1, batch_size // self.views.num_views)
        if self.views.crops != "full_image":
            return [rows[i : i + images] for i in range(0, len(rows), images)]
        shorter = self.views.shorter_side(self.resize, self.region)
        by_shape: dict[tuple[int, int], list[int]] = {}
        for row in rows:
            shape = resized_shape(int(self.index.widths[row]), int(self.index.heights[row]), shorter)
            by_shape.setdefault(shape, []).append(int(row))
        return [
            np.array(same[i : i + images], np.int64)
            for _, same in sorted(by_shape.items())
            for i in range(0, len(same), images)
        ]
