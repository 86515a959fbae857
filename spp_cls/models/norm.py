"""Local response normalisation, y = x · (k + α · S(x²))^−β, with S over neighbours in space or across channels.

The paper says only "LRN". The released ZF-5 has S = the mean over 3 × 3 cells of one channel (`within_channel`);
Krizhevsky et al. 2012 have S = the sum over 5 neighbouring channels (`across_channels`). S is symmetric in both, so
one closed-form backward serves: dx = g·d^−β − 2αβ · x · S(g·x·d^(−β−1)), with d = k + α·S(x²).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


def mean_in_window(input: Tensor, size: int) -> Tensor:
    """Mean over size × size cells of each channel, zeros outside counted, as Caffe's within-channel norm does."""
    return F.avg_pool2d(input, size, stride=1, padding=size // 2)


def sum_over_channels(input: Tensor, size: int) -> Tensor:
    """Sum over the `size` nearest channels at each cell, zeros outside."""
    total, channels = input.clone(memory_format=torch.preserve_format), input.shape[1]
    for k in range(1, min(size // 2, channels - 1) + 1):
        total[:, k:] += input[:, : channels - k]
        total[:, : channels - k] += input[:, k:]
    return total


def _power(d: Tensor, beta: float) -> Tensor:
    """d^−β; three quarters, the value of all sources, by square roots, which are several times faster."""
    return (d * d.sqrt()).rsqrt_() if beta == 0.75 else d.pow(-beta)


class _Normalise(torch.autograd.Function):
    """Computed in float32 whatever comes in: x² · α is too fine for bfloat16."""

    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        neighbours: Callable[[Tensor, int], Tensor],
        size: int,
        alpha: float,
        beta: float,
        k: float,
    ) -> Tensor:
        x = _at_least_float32(input)
        d = neighbours(x * x, size).mul_(alpha).add_(k)
        ctx.save_for_backward(input, d)
        ctx.neighbours, ctx.size, ctx.alpha, ctx.beta = neighbours, size, alpha, beta
        return (x * _power(d, beta)).to(input.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None, None, None]:
        input, d = ctx.saved_tensors
        x, g = _at_least_float32(input), _at_least_float32(grad)
        g = g * _power(d, ctx.beta)  # g·d^−β
        spread = ctx.neighbours((g * x).div_(d), ctx.size)
        dx = g.sub_(spread.mul_(x), alpha=2 * ctx.alpha * ctx.beta)
        return dx.to(input.dtype), None, None, None, None, None


def _at_least_float32(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


class LocalResponseNorm(nn.Module):
    """(B, C, h, w) → the same shape and dtype, normalised by `neighbours` of `size`; right in bfloat16 too."""

    def __init__(
        self, neighbours: Callable[[Tensor, int], Tensor], size: int, alpha: float, beta: float, k: float
    ) -> None:
        super().__init__()
        if size % 2 == 0:
            raise ValueError(f"size={size}: a norm looks at as many neighbours on either side; use an odd number")
        self.neighbours, self.size, self.alpha, self.beta, self.k = neighbours, size, alpha, beta, k

    def forward(self, input: Tensor) -> Tensor:
        if torch.compiler.is_exporting():  # an exporter follows plain operations only
            x = _at_least_float32(input)
            d = self.neighbours(x * x, self.size) * self.alpha + self.k
            return (x * _power(d, self.beta)).to(input.dtype)
        out: Tensor = _Normalise.apply(input, self.neighbours, self.size, self.alpha, self.beta, self.k)
        return out

    def extra_repr(self) -> str:
        return f"{self.neighbours.__name__}, size={self.size}, alpha={self.alpha}, beta={self.beta}, k={self.k}"


def within_channel() -> LocalResponseNorm:
    """The released ZF-5's norm: 3 × 3 cells of one channel, α = 5e-5, β = 0.75 (cuda-convnet's `rnorm`)."""
    return LocalResponseNorm(mean_in_window, size=3, alpha=5e-5, beta=0.75, k=1.0)


def across_channels() -> LocalResponseNorm:
    """Krizhevsky's norm: 5 channels, α = 1e-4 on the plain sum, β = 0.75, k = 2.

    `nn.LocalResponseNorm` divides alpha by size; the same norm there is (5, alpha=5e-4, beta=0.75, k=2).
    """
    return LocalResponseNorm(sum_over_channels, size=5, alpha=1e-4, beta=0.75, k=2.0)


# Paper: "LRN", no numbers. Here: the released ZF-5's within-channel norm for the ZF net, Krizhevsky's for the others,
# because no source gives theirs; either can be chosen for any net.
NORMS: dict[str, Callable[[], nn.Module]] = {
    "within_channel": within_channel,
    "across_channels": across_channels,
    "none": nn.Identity,
}
