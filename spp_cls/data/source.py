"""Sources: a planned batch of positions → uint8 pixels, decoded from the files of a folder."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor

from .index import Index
from .plan import CROP_X, CROP_Y, MicroBatch
from .reader import read_rgb
from .views import Views

PLACES = ("anywhere", "five")


class TrainBatch(NamedTuple):
    """Regions (B, 3, R, R) uint8, labels (B,), uniforms (B, 8), and the size in px that the plan gives them."""

    images: Tensor
    labels: Tensor
    uniforms: Tensor
    size: int


class ViewsBatch(NamedTuple):
    """Views (B, V, 3, h, w) uint8, labels (B,), and the images' rows in the index (B,)."""

    views: Tensor
    labels: Tensor
    rows: Tensor


def resized_shape(width: int, height: int, shorter: int) -> tuple[int, int]:
    """(width, height) in px after the shorter side became `shorter`, aspect ratio kept."""
    scale = shorter / min(width, height)
    return max(shorter, round(width * scale)), max(shorter, round(height * scale))


def cut_region(
    image: Image.Image, uniforms: npt.NDArray[np.float32], resize: int, region: int, place: str
) -> npt.NDArray[np.uint8]:
    """The training region (region, region, 3) of an image whose shorter side is resized to `resize`.

    One resampling of the region's box in the original: at most a rounding away from resizing all of it and cropping.
    """
    width, height = resized_shape(*image.size, resize)
    # Paper: 224 px "from the center or the four corners of the entire image". Here: anywhere by default, because what
    # the paper says it follows (Krizhevsky, Howard) crops at random; `place: five` is the literal reading.
    if place == "five":
        x, y = [(0.5, 0.5), (0, 0), (1, 0), (0, 1), (1, 1)][int(uniforms[CROP_X] * 5)]
        left, top = round(x * (width - region)), round(y * (height - region))
    else:
        left = int(uniforms[CROP_X] * (width - region + 1))
        top = int(uniforms[CROP_Y] * (height - region + 1))
    sx, sy = image.width / width, image.height / height
    box = (
        left * sx,
        top * sy,
        min((left + region) * sx, image.width),
        min((top + region) * sy, image.height),
    )
    return np.asarray(image.resize((region, region), Image.Resampling.BILINEAR, box=box))


def read_views(path: Path, views: Views, resize: int, region: int) -> Tensor:
    """The views (V, 3, h, w) uint8 of the picture at `path`."""
    image = read_rgb(path)
    shape = resized_shape(*image.size, views.shorter_side(resize, region))
    pixels = np.array(image.resize(shape, Image.Resampling.BILINEAR))  # a copy: torch wants it writable
    return views(torch.from_numpy(pixels).permute(2, 0, 1))  # (h, w, 3) → (3, h, w)


@dataclass(frozen=True)
class TrainSource:
    """Micro-batches of the plan → `TrainBatch`; the plan's positions count within `rows` of the index."""

    index: Index
    rows: npt.NDArray[np.int64]
    resize: int
    region: int
    place: str

    def __getitem__(self, planned: MicroBatch) -> TrainBatch | ValueError:
        rows = self.rows[planned.indices]
        pixels = np.empty((len(rows), self.region, self.region, 3), np.uint8)
        try:
            for i, row in enumerate(rows):
                image = read_rgb(self.index.path(row))
                pixels[i] = cut_region(image, planned.uniforms[i], self.resize, self.region, self.place)
        except ValueError as error:
            return error  # raised again by the loader: a worker would bury the one line in a traceback
        images = torch.from_numpy(pixels).permute(0, 3, 1, 2)  # (B, R, R, 3) → (B, 3, R, R), channels_last
        labels = torch.from_numpy(self.index.labels[rows])
        return TrainBatch(images, labels, torch.from_numpy(planned.uniforms), size=self.region)


@dataclass(frozen=True)
class ViewsSource:
    """Rows of the index → `ViewsBatch`; the rows of one batch must give views of one shape."""

    index: Index
    views: Views
    resize: int
    region: int

    def __getitem__(self, rows: npt.NDArray[np.int64]) -> ViewsBatch | ValueError:
        try:
            views = [read_views(self.index.path(row), self.views, self.resize, self.region) for row in rows]
        except ValueError as error:
            return error
        labels = torch.from_numpy(self.index.labels[rows])
        return ViewsBatch(torch.stack(views), labels, torch.from_numpy(rows))

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
