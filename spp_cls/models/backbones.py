"""The convolutional parts: the four columns of Table 1, and three nets for small pictures; each is a tuple of layers.

A convolution is always followed by a ReLU; the last pool of each net is left out, since the pyramid replaces it.
Map sizes stand behind the layers, at 224 and at 180 px.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from .norm import make_norm


@dataclass(frozen=True)
class Conv:
    """`out_channels` filters of kernel_size², then ReLU."""

    out_channels: int
    kernel_size: int
    stride: int = 1
    padding: int = 0


@dataclass(frozen=True)
class Pool:
    """Max pooling, rounding down."""

    kernel_size: int
    stride: int
    padding: int = 0


@dataclass(frozen=True)
class Norm:
    """Local response normalisation, of the kind that the backbone is built with."""


Layer = Conv | Pool | Norm

# Paper: no padding is printed anywhere, "whatever gives the expected sizes". Here: paddings that give the printed sizes
# at 224 and ZF-5's 10 × 10 at 180, because these are all that the paper checks; of Overfeat they make 14 × 14 there.
# Paper: ZF-5's pool1 makes 55 cells of 110; the released net rounds up. Here: padding 1 and rounding down, because to
# round up breaks torch.export with a free size. There are as many cells at 180, 200, 224, 227 and 256 px, and one more
# at one size in eight (189); each looks 2 px further to the left and above.
ZF5: tuple[Layer, ...] = (
    Conv(96, 7, stride=2, padding=1),  # 110 | 88
    Norm(),
    Pool(3, 2, padding=1),  # 55 | 44
    Conv(256, 5, stride=2, padding=1),  # 27 | 21
    Norm(),
    Pool(3, 2),  # 13 | 10
    Conv(384, 3, padding=1),
    Conv(384, 3, padding=1),
    Conv(256, 3, padding=1),  # 13 | 10
)
CONVNET5: tuple[Layer, ...] = (
    Conv(96, 11, stride=4, padding=2),  # 55 | 44
    Norm(),
    Conv(256, 5, padding=2),  # 55 | 44
    Norm(),
    Pool(3, 2),  # 27 | 21
    Conv(384, 3, padding=1),
    Pool(3, 2),  # 13 | 10
    Conv(384, 3, padding=1),
    Conv(256, 3, padding=1),  # 13 | 10
)
OVERFEAT5: tuple[Layer, ...] = (
    Conv(96, 7, stride=2, padding=1),  # 110 | 88
    Pool(3, 3),  # 36 | 29
    Norm(),
    Conv(256, 5, padding=2),  # 36 | 29
    Pool(2, 2),  # 18 | 14
    Conv(512, 3, padding=1),
    Conv(512, 3, padding=1),
    Conv(512, 3, padding=1),  # 18 | 14
)
OVERFEAT7: tuple[Layer, ...] = (*OVERFEAT5, Conv(512, 3, padding=1), Conv(512, 3, padding=1))  # 18 | 14
TUTORIAL64: tuple[Layer, ...] = (  # 64 px
    Conv(128, 3),  # 62
    Pool(2, 2),  # 31
    Conv(128, 3),  # 29
    Pool(2, 2),  # 14
    Conv(128, 3),  # 12
    Pool(2, 2),  # 6
    Conv(128, 3),  # 4
)
SMALL32: tuple[Layer, ...] = (  # 32 | 26 px
    Conv(32, 3, padding=1),
    Pool(2, 2),  # 16 | 13
    Conv(64, 3, padding=1),
    Pool(2, 2),  # 8 | 6
    Conv(128, 3, padding=1),
    Conv(128, 3, padding=1),  # 8 | 6
)
TINY: tuple[Layer, ...] = (
    Conv(16, 5, stride=4, padding=2),  # 56 | 45
    Pool(3, 2, padding=1),  # 28 | 23
    Conv(32, 3, padding=1),
    Pool(3, 2),  # 13 | 11
    Conv(64, 3, padding=1),  # 13 | 11
)

BACKBONES: dict[str, tuple[Layer, ...]] = {
    "zf5": ZF5,
    "convnet5": CONVNET5,
    "overfeat5": OVERFEAT5,
    "overfeat7": OVERFEAT7,
    "tutorial64": TUTORIAL64,
    "small32": SMALL32,
    "tiny": TINY,
}


class Backbone(nn.Sequential):
    """Convolutions by the names of the paper (conv1, relu1, norm1, pool1, conv2 …): (B, 3, H, W) → (B, C, h, w)."""

    out_channels: int

    def __init__(
        self,
        layers: tuple[Layer, ...],
        norm: str = "none",
        width: float = 1.0,
        in_channels: int = 3,
        norm_constants: Mapping[str, float] | None = None,
    ) -> None:
        make_norm(norm, norm_constants)  # refused even where no layer would be one
        if width <= 0:
            raise ValueError(f"width={width}: use a factor above 0, like 0.25")
        modules: OrderedDict[str, nn.Module] = OrderedDict()
        number, channels = 0, in_channels
        for layer in layers:
            if isinstance(layer, Conv):
                number, filters = number + 1, scaled(layer.out_channels, width)
                modules[f"conv{number}"] = nn.Conv2d(channels, filters, layer.kernel_size, layer.stride, layer.padding)
                modules[f"relu{number}"] = nn.ReLU(inplace=True)
                channels = filters
            elif isinstance(layer, Pool):
                modules[f"pool{number}"] = nn.MaxPool2d(layer.kernel_size, layer.stride, layer.padding)
            else:
                modules[f"norm{number}"] = make_norm(norm, norm_constants)
        super().__init__(modules)
        self.out_channels = channels

    def forward_features(self, images: Tensor) -> dict[str, Tensor]:
        """Every map by name; conv1 … are given after their ReLU."""
        features, x = {}, images
        for name, module in self.named_children():
            x = module(x)
            features[name.replace("relu", "conv")] = x
        return features


def scaled(channels: int, width: float) -> int:
    """`channels` × `width`, at least 1."""
    return max(1, round(channels * width))
