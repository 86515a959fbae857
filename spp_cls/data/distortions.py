"""What a picture may suffer before it is tested, to see how much a net minds: shift, rotation, another aspect ratio.

Each takes a picture (3, h, w) in uint8 and gives one in uint8; what comes in from outside repeats the picture's edge.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from .device import resize


def shift(image: Tensor, *, share: float) -> Tensor:
    """To the right and down by a share of the shorter side."""
    _, height, width = image.shape
    by = round(share * min(height, width))
    rows = (torch.arange(height) - by).clamp(0, height - 1)
    columns = (torch.arange(width) - by).clamp(0, width - 1)
    return image[:, rows][:, :, columns]


def rotate(image: Tensor, *, degrees: float) -> Tensor:
    """Anticlockwise about the middle."""
    _, height, width = image.shape
    cos, sin = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    # Where each pixel comes from, in units of half the sides.
    back = torch.tensor([[cos, -sin * height / width, 0.0], [sin * width / height, cos, 0.0]])
    grid = F.affine_grid(back[None], [1, 3, height, width], align_corners=False)
    turned = F.grid_sample(image[None].float(), grid, padding_mode="border", align_corners=False)
    return turned[0].round().clamp(0, 255).byte()


def stretch(image: Tensor, *, factor: float) -> Tensor:
    """As many times as wide."""
    _, height, width = image.shape
    return resize(image[None], (height, max(1, round(width * factor))))[0]
