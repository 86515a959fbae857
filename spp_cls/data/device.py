"""The device step: uint8 pictures → float, at the planned size, flipped, colour-shifted, normalised, channels_last."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .plan import COLOUR, FLIP, Shape

# Principal components of ImageNet's colours for pixels in [0, 1], as in Krizhevsky et al. 2012, §4.1; the numbers are
# those published with fb.resnet.torch. Columns of the vectors belong to the values.
EIGENVALUES = (0.2175, 0.0188, 0.0045)
EIGENVECTORS = ((-0.5675, 0.7192, 0.4009), (-0.5808, -0.0045, -0.8140), (-0.5836, -0.6948, 0.4203))


Mean = Sequence[float] | Tensor  # grey levels (0–255) of R, G, B; or an image of them, (3, H, W) in float32


def device_step(
    images: Tensor,
    uniforms: Tensor,
    shape: Shape,
    *,
    mean: Mean,
    std: Sequence[float],
    flip: float = 0.5,
    colour: float = 0.1,
) -> Tensor:
    """Pictures (B, 3, H, W) in uint8 and uniforms (B, 8) → (B, 3, *shape) in float32, channels_last.

    `flip` is the share of mirrored pictures, `colour` the σ of the PCA shift; `mean` and `std` are in grey levels
    (0–255). He et al. 2014, §2.3: a smaller training size is the same region, resized, not a smaller crop; §3.1: a mean
    image is warped to that size.
    """
    scale, offset = _scale_and_offset(mean, std, images.device, shape)
    base = offset if offset.ndim == 3 else None  # (h, w, 3)
    shift = colour_shift(uniforms, colour) * scale
    offset = shift if base is not None else offset + shift  # (B, 3)
    mirrored = uniforms[:, FLIP] < flip
    route = _image_by_image if images.device.type == "cpu" else _at_once
    return route(images, shape, mirrored, scale, offset, base)


# Paper: a mean image is subtracted; of mirrored pictures it says nothing. Here: the picture is mirrored, the mean image
# is not, because cuda-convnet, in which the paper's nets were trained, does so; Caffe mirrors both.


def _image_by_image(
    images: Tensor, shape: Shape, mirrored: Tensor, scale: Tensor, offset: Tensor, base: Tensor | None = None
) -> Tensor:
    """On a CPU, and in uint8 as long as it goes: the whole batch in float would be bound by memory."""
    height, width = shape
    out = torch.empty(len(images), height, 3 * width)
    base = None if base is None else base.reshape(height, 3 * width)
    # What is broadcast has the length of a row, so that the innermost loop is a long one.
    scales, offsets = scale.repeat(width), offset.repeat(1, width)
    for image, mirror, row, place in zip(images, mirrored.tolist(), offsets, out, strict=True):
        resized = resize(image[None], shape)[0].permute(1, 2, 0)  # (h, w, 3)
        pixels = (resized.flip(1) if mirror else resized).reshape(height, 3 * width)
        torch.addcmul(row if base is None else base + row, pixels.float(), scales, out=place)
    return out.view(len(images), height, width, 3).permute(0, 3, 1, 2)


def _at_once(
    images: Tensor, shape: Shape, mirrored: Tensor, scale: Tensor, offset: Tensor, base: Tensor | None = None
) -> Tensor:
    resized = resize(images.float(), shape)
    resized = torch.where(mirrored[:, None, None, None], resized.flip(3), resized)
    out = resized * scale[:, None, None] + offset[:, :, None, None]
    if base is not None:
        out += base.permute(2, 0, 1)
    return out.contiguous(memory_format=torch.channels_last)


def resize(images: Tensor, shape: Shape) -> Tensor:
    """(B, 3, H, W) → (B, 3, *shape), bilinear with antialias: within two grey levels of Pillow's."""
    if images.shape[-2:] == shape:
        return images
    if len(images) == 1:  # or torch would not see that it is channels_last, and turn it round twice
        images = images[0].permute(1, 2, 0)[None].permute(0, 3, 1, 2)
    return F.interpolate(images, shape, mode="bilinear", antialias=True)


def normalise(images: Tensor, mean: Mean, std: Sequence[float]) -> Tensor:
    """(…, 3, H, W) of grey levels → float32, (x − mean) / std, with colours last in memory.

    A mean image is warped to H × W, whatever part of a picture that is: a region, a crop, or all of it.
    """
    scale, offset = _scale_and_offset(mean, std, images.device, (images.shape[-2], images.shape[-1]))
    return torch.addcmul(offset, images.movedim(-3, -1).float(), scale).movedim(-1, -3)


def colour_shift(uniforms: Tensor, sigma: float) -> Tensor:
    """(B, 8) → (B, 3) grey levels to add to R, G, B: components weighted by λ · N(0, σ) (Krizhevsky et al. 2012).

    The published eigenvalues are for pixels in [0, 1], so that one σ of 0.1 is 5.5 grey levels along the first.
    """
    chance = uniforms[:, COLOUR].clamp(1e-6, 1 - 1e-6)  # uniforms are below 1, but may be 0
    weights = torch.special.ndtri(chance) * sigma * 255 * uniforms.new_tensor(EIGENVALUES)  # (B, 3)
    shift: Tensor = weights @ uniforms.new_tensor(EIGENVECTORS).T
    return shift


def _scale_and_offset(mean: Mean, std: Sequence[float], device: torch.device, shape: Shape) -> tuple[Tensor, Tensor]:
    """1 / std (3,), and −mean / std: (3,), or of a mean image (h, w, 3)."""
    scale = 1 / torch.tensor(tuple(std), dtype=torch.float32, device=device)
    if isinstance(mean, Tensor):
        return scale, -_warped(mean, shape, device) * scale
    return scale, -torch.tensor(tuple(mean), dtype=torch.float32, device=device) * scale


@functools.lru_cache(maxsize=64)  # by which image it is, not by its pixels: a tensor is hashed so
def _warped(mean: Tensor, shape: Shape, device: torch.device) -> Tensor:
    """The mean image (3, H, W) at `shape`, as (h, w, 3): on the CPU, so that all devices have the same."""
    with torch.inference_mode(False), torch.no_grad():
        return resize(mean[None].cpu().float(), shape)[0].permute(1, 2, 0).contiguous().to(device)
