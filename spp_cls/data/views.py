"""Views of a test image: what `sizes` are for training, these are for testing.

A test size s resizes the original picture so that its shorter side is round(s · resize / region) px, which is
round(s · 256 / 224) in the paper's setting, aspect ratio kept; a view is then cut from it. Scores are averaged over
the views of an image.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

Crops = Callable[[Tensor, int], Tensor]


def center_crop(image: Tensor, size: int) -> Tensor:
    """(3, h, w) → the centre (1, 3, size, size)."""
    top, left = _middle(image, size)
    return image[None, :, top : top + size, left : left + size]


def ten_crop(image: Tensor, size: int) -> Tensor:
    """(3, h, w) → (10, 3, size, size): centre and corners of the whole image, then their mirror images (§3.1.1)."""
    bottom, right = image.shape[1] - size, image.shape[2] - size
    places = [_middle(image, size), (0, 0), (0, right), (bottom, 0), (bottom, right)]
    crops = torch.stack([image[:, y : y + size, x : x + size] for y, x in places])
    return torch.cat([crops, crops.flip(3)])


def full_image(image: Tensor, size: int) -> Tensor:
    """(3, h, w) → the whole image (1, 3, h, w) at its own aspect ratio (Table 3)."""
    return image[None]


CROPS: dict[str, Crops] = {"center_crop": center_crop, "ten_crop": ten_crop, "full_image": full_image}


@dataclass(frozen=True)
class Views:
    """A way to test: which views are cut, and at which test size in px; None is the training region's."""

    crops: str
    size: int | None = None

    def __post_init__(self) -> None:
        if self.crops not in CROPS:
            raise ValueError(f"views.crops={self.crops!r}: use one of {', '.join(CROPS)}")
        if self.size is not None and (not isinstance(self.size, int) or self.size < 1):
            raise ValueError(f"views.size={self.size}: use a number of px, like 224")

    def __call__(self, image: Tensor) -> Tensor:
        """(3, h, w), resized already → (V, 3, h', w')."""
        assert self.size is not None
        return CROPS[self.crops](image, self.size)

    @property
    def num_views(self) -> int:
        """Views of one image."""
        return len(CROPS[self.crops](torch.empty(3, 1, 1, dtype=torch.uint8), 1))

    def shorter_side(self, resize: int, region: int) -> int:
        """What the shorter side of the picture is resized to, in px."""
        assert self.size is not None
        return round(self.size * resize / region)


def _middle(image: Tensor, size: int) -> tuple[int, int]:
    return round((image.shape[1] - size) / 2), round((image.shape[2] - size) / 2)
