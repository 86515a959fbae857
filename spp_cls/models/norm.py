"""Local response normalisation, y = x · (k + α · S(x²))^−β, with S over neighbours in space or across channels.

The paper says only "LRN". The released ZF-5 has S = the mean over 3 × 3 cells of one channel (`within_channel`);
Krizhevsky et al. 2012 have S = the sum over 5 neighbouring channels (`across_channels`). S is symmetric in both, so
one closed-form backward serves: dx = g·d^−β − 2αβ · x · S(g·x·d^(−β−1)), with d = k + α·S(x²).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import reduce
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

BLOCK = 2**17  # numbers that are worked on at a time on a CPU; half a megabyte of float32


def mean_in_window(input: Tensor, size: int) -> Tensor:
    """Mean over size × size cells of each channel, zeros outside counted, as Caffe's within-channel norm does."""
    if input.is_cuda and not torch.compiler.is_compiling():  # one kernel; below it would be one for each neighbour
        return F.avg_pool2d(input, size, stride=1, padding=size // 2)
    return _sum_along(_sum_along(input, 2, size), 3, size).mul_(1 / size**2)


def sum_over_channels(input: Tensor, size: int) -> Tensor:
    """Sum over the `size` nearest channels at each cell, zeros outside."""
    return _sum_along(input, 1, size)


def _sum_along(input: Tensor, axis: int, size: int) -> Tensor:
    """Sum over the `size` nearest along one axis, zeros outside."""
    length, reach = input.shape[axis], size // 2
    if torch.compiler.is_compiling():  # which makes one loop of this, but several of sums in place
        padded = F.pad(input, [0, 0] * (input.ndim - axis - 1) + [reach, reach])
        return reduce(torch.add, (padded.narrow(axis, k, length) for k in range(size)))
    total = input.clone(memory_format=torch.preserve_format)
    for k in range(1, min(reach, length - 1) + 1):
        total.narrow(axis, k, length - k).add_(input.narrow(axis, 0, length - k))
        total.narrow(axis, 0, length - k).add_(input.narrow(axis, k, length - k))
    return total


def _power(d: Tensor, beta: float) -> Tensor:
    """d^−β; three quarters, the value of all sources, by square roots, which are several times faster."""
    return (d * d.sqrt()).rsqrt_() if beta == 0.75 else d.pow(-beta)


class _Normalise(torch.autograd.Function):
    """Computed in float32 whatever comes in: x² · α is too fine for bfloat16. Keeps nothing but its input."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, norm: LocalResponseNorm) -> Tensor:
        ctx.save_for_backward(input)
        ctx.norm = norm
        out = torch.empty_like(input)
        for images, rows, around, inside in _blocks(input, norm.halo):
            x = _at_least_float32(input[images, :, around])
            out[images, :, rows] = (x * _power(norm.scale(x), norm.beta))[:, :, inside]
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (input,), norm = ctx.saved_tensors, ctx.norm
        dx = torch.empty_like(input)
        for images, rows, around, inside in _blocks(input, 2 * norm.halo):  # the neighbours' neighbours
            x = _at_least_float32(input[images, :, around])
            d = norm.scale(x)
            g = _power(d, norm.beta).mul_(grad[images, :, around])  # g·d^−β
            spread = norm.neighbours((g * x).div_(d), norm.size)
            dx[images, :, rows] = g.addcmul_(spread, x, value=-2 * norm.alpha * norm.beta)[:, :, inside]
        return dx, None


def _blocks(input: Tensor, halo: int) -> Iterator[tuple[slice, slice, slice, slice]]:
    """Images, rows of them, these with `halo` rows on either side, and the rows inside those: all of `input` in turn.

    On a CPU a block, and what is computed from it, stays in the cache, which takes half the time of whole maps.
    """
    images, channels, height, width = input.shape
    if input.device.type != "cpu" or torch.compiler.is_compiling():
        yield slice(None), slice(None), slice(None), slice(None)
        return
    rows = max(1, min(height, BLOCK // (channels * width)))
    at_once = max(1, BLOCK // (channels * height * width)) if rows == height else 1
    for first in range(0, images, at_once):
        for top in range(0, height, rows):
            low, high = max(0, top - halo), min(height, top + rows + halo)
            inside = slice(top - low, min(height, top + rows) - low)
            yield slice(first, first + at_once), slice(top, top + rows), slice(low, high), inside


def _at_least_float32(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


class LocalResponseNorm(nn.Module):
    """(B, C, h, w) → the same shape and dtype, normalised by `neighbours` of `size`; right in bfloat16 too.

    `halo` is how many rows away a cell's neighbours lie.
    """

    def __init__(
        self,
        neighbours: Callable[[Tensor, int], Tensor],
        size: int,
        alpha: float,
        beta: float,
        k: float,
        halo: int,
    ) -> None:
        super().__init__()
        if size % 2 == 0:
            raise ValueError(f"size={size}: a norm looks at as many neighbours on either side; use an odd number")
        self.neighbours, self.size, self.alpha, self.beta, self.k = neighbours, size, alpha, beta, k
        self.halo = halo

    def scale(self, x: Tensor) -> Tensor:
        """d = k + α · S(x²)."""
        return self.neighbours(x * x, self.size).mul_(self.alpha).add_(self.k)

    def forward(self, input: Tensor) -> Tensor:
        if torch.compiler.is_exporting():  # an exporter follows plain operations only
            x = _at_least_float32(input)
            d = self.neighbours(x * x, self.size) * self.alpha + self.k
            return (x * _power(d, self.beta)).to(input.dtype)
        out: Tensor = _Normalise.apply(input, self)
        return out

    def extra_repr(self) -> str:
        return f"{self.neighbours.__name__}, size={self.size}, alpha={self.alpha}, beta={self.beta}, k={self.k}"


def within_channel(size: int = 3, alpha: float = 5e-5, beta: float = 0.75, k: float = 1.0) -> LocalResponseNorm:
    """The released ZF-5's norm: 3 × 3 cells of one channel, α = 5e-5 on their mean (cuda-convnet's `rnorm`)."""
    return LocalResponseNorm(mean_in_window, size, alpha, beta, k, halo=size // 2)


def across_channels(size: int = 5, alpha: float = 1e-4, beta: float = 0.75, k: float = 2.0) -> LocalResponseNorm:
    """Krizhevsky's norm: 5 channels, α = 1e-4 on the plain sum, β = 0.75, k = 2.

    `nn.LocalResponseNorm` and Caffe divide alpha by size; the same norm there is (5, alpha=5e-4, beta=0.75, k=2), and
    theirs of alpha=1e-4 and k=1 is (5, alpha=2e-5, beta=0.75, k=1) here.
    """
    return LocalResponseNorm(sum_over_channels, size, alpha, beta, k, halo=0)


# Paper: "LRN", no numbers. Here: the released ZF-5's within-channel norm for the ZF net, Krizhevsky's for the others,
# because no source gives theirs; either can be chosen for any net, with other constants by `norm_constants`.
NORMS: dict[str, Callable[..., nn.Module]] = {
    "within_channel": within_channel,
    "across_channels": across_channels,
    "none": nn.Identity,
}
CONSTANTS = ("size", "alpha", "beta", "k")


def make_norm(kind: str, constants: Mapping[str, float] | None = None) -> nn.Module:
    """A norm of `NORMS`, with `constants` (size, alpha, beta, k) where they shall be others than the kind's own.

    Raises ValueError where the kind or a constant is not known, or has a value that no norm can have.
    """
    if kind not in NORMS:
        raise ValueError(f"norm={kind!r}: use one of {', '.join(NORMS)}")
    constants = dict(constants or {})
    if kind == "none" and constants:
        raise ValueError(f"norm_constants={constants}: norm=none has none; choose a norm, or use null")
    least = {"size": 1, "alpha": 0, "beta": 0, "k": 1e-3}  # a k of 0 would divide by the squares of dark places
    for name, value in constants.items():
        if name not in CONSTANTS:
            raise ValueError(f"norm_constants has {name!r}: use {', '.join(CONSTANTS)}")
        right = not isinstance(value, bool) and isinstance(value, int | float) and value >= least[name]
        if not right or (name == "size" and value not in range(1, 1000, 2)):
            what = "an odd whole number" if name == "size" else "a number"
            raise ValueError(f"norm_constants.{name}={value!r}: use {what} of at least {least[name]}")
    return NORMS[kind](**constants)
