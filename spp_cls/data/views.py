"""Views of a test image: what `sizes` are for training, these are for testing.

A way to test is a tuple of passes. In each the picture is resized, aspect ratio kept, and views are taken from it:
cut from its pixels, pooled from its map as windows, or the whole of it. Scores are averaged over all views of an image.

A test size s resizes the original picture so that its shorter side is round(s · resize / region) px, which is
round(s · 256 / 224) in the paper's setting. The paper's six scales are for views of 224 px, and go along with s.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .distortions import rotate, shift, stretch

VIEW = 224  # px of the view that the scales are given for
SCALES = (224, 256, 300, 360, 448, 560)  # px of the shorter side (He et al. 2014, §3.1.5)

Places = Callable[[int, int, int], list[tuple[int, int]]]  # height, width and a view's size → top and left of each view


def centre(height: int, width: int, size: int) -> list[tuple[int, int]]:
    """The middle of the picture."""
    return [(round((height - size) / 2), round((width - size) / 2))]


def four(height: int, width: int, size: int) -> list[tuple[int, int]]:
    """The corners of the whole picture, though they may be the same."""
    bottom, right = height - size, width - size
    return [(0, 0), (0, right), (bottom, 0), (bottom, right)]


def five(height: int, width: int, size: int) -> list[tuple[int, int]]:
    """Centre and corners of the whole picture (He et al. 2014, §3.1.1)."""
    return [*centre(height, width, size), *four(height, width, size)]


def nine(height: int, width: int, size: int) -> list[tuple[int, int]]:
    """Centre, corners, middles of the sides; centre and both ends where the shorter one is a view's (§3.1.5).

    So a picture has its 96 views, whatever its shape: places that are the same, as in a square, count as often.
    """
    ((middle, across),) = centre(height, width, size)
    bottom, right = height - size, width - size
    if min(height, width) == size:
        return [(middle, across), (0, 0), (bottom, right)]
    return [*five(height, width, size), (0, across), (middle, 0), (middle, right), (bottom, across)]


@dataclass(frozen=True)
class Pass:
    """Views of a picture at one size of it.

    places: where they are; None is one view, the whole picture.
    mirrored: the mirror image of each, too.
    on_maps: the picture goes through the convolutions once, its mirror image once, and views are windows on their maps.
    scale: shorter side of the picture in px where a view has 224; None is that of training, `resize` for a `region`.
    warped: both sides become the shorter one, whatever the aspect ratio was.
    distortion: what is done to the picture (3, H, W) before it is resized; not for whole ones.
    """

    places: Places | None
    mirrored: bool = False
    on_maps: bool = False
    scale: int | None = None
    warped: bool = False
    distortion: Callable[[Tensor], Tensor] | None = None

    @property
    def whole(self) -> bool:
        """Whether the net is given whole pictures, so that those of one batch must have one shape."""
        return self.places is None or self.on_maps

    def shorter_side(self, size: int, resize: int, region: int) -> int:
        """What the shorter side of the picture is resized to, in px, for views of `size` px."""
        return round(size * resize / region) if self.scale is None else round(self.scale * size / VIEW)

    def num_views(self, shorter: int, size: int) -> int:
        """Views of a picture whose shorter side has become `shorter` px."""
        return len(self.places(shorter, shorter, size) if self.places else [()]) * (1 + self.mirrored)

    def images(self, image: Tensor, size: int) -> Tensor:
        """What the net is given of the resized picture (3, h, w): (V, 3, h', w'), mirror images last."""
        if self.places is None or self.on_maps:
            images = image[None]
        else:
            places = self.places(image.shape[1], image.shape[2], size)
            images = torch.stack([image[:, y : y + size, x : x + size] for y, x in places])
        return torch.cat([images, images.flip(3)]) if self.mirrored else images

    def windows(self, height: int, width: int, size: int) -> Tensor | None:
        """Windows (N, 5) in px on `images`: which of them, top, left, bottom, right; None where these are the views."""
        if self.places is None or not self.on_maps:
            return None
        places = self.places(height, width, size)
        windows = [(0, y, x, y + size, x + size) for y, x in places]
        if self.mirrored:  # where the mirror image has the same pixels
            windows += [(1, y, width - size - x, y + size, width - x) for y, x in places]
        return torch.tensor(windows)


SIX_SCALES = tuple(Pass(nine, mirrored=True, on_maps=True, scale=scale) for scale in SCALES)
# Paper: at which scale the two full views of its 98 are, is not said. Here: as `full_image` (256 px for views of 224),
# because the full views of Table 3 are so.
FULL_VIEWS = Pass(None, mirrored=True)

PROTOCOLS: dict[str, tuple[Pass, ...]] = {
    "center_crop": (Pass(centre),),
    "ten_crop": (Pass(five, mirrored=True),),
    "full_image": (Pass(None),),
    "eight_crop_full": (Pass(four, mirrored=True), FULL_VIEWS),
    "ten_crop_maps": (Pass(five, mirrored=True, on_maps=True),),
    "multi_scale": SIX_SCALES,
    "multi_scale_full": (*SIX_SCALES, FULL_VIEWS),
    "multi_scale_pixels": tuple(Pass(nine, mirrored=True, scale=scale) for scale in SCALES),
    "warp": (Pass(None, scale=VIEW, warped=True),),  # the whole picture as a square of the test size, to compare
    # What a net minds: by 10 % of the shorter side to the right and down; degrees anticlockwise; % of the width.
    "shift_10": (Pass(centre, distortion=partial(shift, share=0.1)),),
    **{f"rotate_{by}": (Pass(centre, distortion=partial(rotate, degrees=by)),) for by in (10, 20)},
    **{f"stretch_{by}": (Pass(centre, distortion=partial(stretch, factor=by / 100)),) for by in (75, 133)},
}


@dataclass(frozen=True)
class Views:
    """A way to test: which views are taken, and at which test size in px; None is the training region's."""

    crops: str
    size: int | None = None

    def __post_init__(self) -> None:
        if self.crops not in PROTOCOLS:
            raise ValueError(f"views.crops={self.crops!r}: use one of {', '.join(PROTOCOLS)}")
        if self.size is not None and (not isinstance(self.size, int) or self.size < 1):
            raise ValueError(f"views.size={self.size}: use a number of px, like 224")

    @property
    def passes(self) -> tuple[Pass, ...]:
        """What is taken of each picture, one after the other."""
        return PROTOCOLS[self.crops]

    @property
    def num_views(self) -> int:
        """Views of one image."""
        return sum(each.num_views(each.shorter_side(VIEW, 256, VIEW), VIEW) for each in self.passes)

    def shorter_side(self, resize: int, region: int) -> int:
        """What the shorter side of the picture is resized to, in px, in passes that have no scale of their own."""
        assert self.size is not None
        return round(self.size * resize / region)

    def smallest_side(self, resize: int, region: int) -> int:
        """In px, of what a net is given at the least: of views, or of pictures that are taken whole."""
        assert self.size is not None
        size = self.size
        return min(each.shorter_side(size, resize, region) if each.places is None else size for each in self.passes)

    def check(self, net: Any) -> None:
        """Raise ValueError where views are windows on maps and `net` has no such windows."""
        if not any(each.on_maps for each in self.passes):
            return
        try:
            if not hasattr(net, "forward_windows"):
                raise ValueError(f"{type(net).__name__}: has no forward_windows")
            net.geometry()
        except ValueError as error:
            raise ValueError(f"views.crops={self.crops} pools windows of maps: {error}; use views=ten_crop") from error
