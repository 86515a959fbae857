"""The net of He et al. 2014, Figure 1: convolutions, a spatial pyramid, fully connected layers."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from .backbones import BACKBONES, Backbone, scaled
from .bins import RULES, Edges
from .initialise import initialise, load_weights
from .pyramid import SpatialPyramidPool2d
from .windows import Geometry, geometry, pool_windows


class SPPNet(nn.Module):
    """A backbone under a pyramid: images (B, 3, H, W) of any size that the backbone takes → logits (B, num_classes).

    `backbone` is any module (B, 3, H, W) → (B, out_channels, h, w) with an attribute `out_channels`. `fc` holds the
    widths of the hidden fully connected layers; they and the last are called fc6, fc7, fc8.
    """

    def __init__(
        self,
        backbone: nn.Module,
        num_classes: int,
        levels: Sequence[int] = (6, 3, 2, 1),
        pool: str = "max",
        bins: Callable[[int, int, int], Edges] | None = None,
        fc: Sequence[int] = (4096, 4096),
        dropout: float = 0.5,
    ) -> None:
        super().__init__()
        if num_classes < 1:
            raise ValueError(f"num_classes={num_classes}: a classifier needs at least 1")
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout={dropout}: use a share from 0 up to 1, like 0.5")
        self.backbone = backbone
        self.pyramid = SpatialPyramidPool2d(levels, pool, bins)
        # Paper: Overfeat-7's fully connected layers are fc8 and fc9. Here: fc6, fc7, fc8 in every net, because what
        # reads features by name should not depend on the backbone.
        head: OrderedDict[str, nn.Module] = OrderedDict()
        features = int(backbone.out_channels) * self.pyramid.num_bins  # type: ignore[arg-type]
        for number, width in enumerate(fc, start=6):
            head[f"fc{number}"] = nn.Linear(features, width)
            head[f"relu{number}"] = nn.ReLU(inplace=True)
            head[f"drop{number}"] = nn.Dropout(dropout)
            features = width
        head[f"fc{6 + len(fc)}"] = nn.Linear(features, num_classes)
        self.head = nn.Sequential(head)
        self.num_classes = num_classes

    def forward(self, images: Tensor) -> Tensor:
        x = self.backbone(images)  # (B, 256, 13, 13) at 224 px, (B, 256, 10, 10) at 180
        x = self.pyramid(x)  # (B, 12800)
        logits: Tensor = self.head(x)  # (B, num_classes)
        return logits

    def forward_features(self, images: Tensor) -> dict[str, Tensor]:
        """Named intermediates: conv1 … conv5 (after their ReLU), `pyramid`, fc6, fc7 (after ReLU), fc8 (the logits)."""
        if isinstance(self.backbone, Backbone):
            features = self.backbone.forward_features(images)
            x = list(features.values())[-1]
        else:
            x = self.backbone(images)
            features = {"backbone": x}
        x = features["pyramid"] = self.pyramid(x)
        for name, module in self.head.named_children():
            x = module(x)
            if not name.startswith("drop"):
                features[name.replace("relu", "fc")] = x
        return features

    def forward_windows(self, images: Tensor, windows: Tensor) -> Tensor:
        """Logits (N, num_classes) of windows of `images` (B, 3, H, W), whose maps are computed once each.

        `windows` (N, 5) are (picture, top, left, bottom, right) in px, `bottom` and `right` not in them. Raises
        ValueError for nets whose cells have no one place, and for pyramids of means or of other bins. He et al. 2014,
        §3.1.5.
        """
        look = self.geometry()
        maps = self.backbone(images)
        cells = look.windows(windows, maps.shape[-2], maps.shape[-1])
        logits: Tensor = self.head(pool_windows(maps, cells, self.pyramid.levels))
        return logits

    def geometry(self) -> Geometry:
        """Where the cells of its maps look; raises ValueError where `forward_windows` cannot be."""
        if self.pyramid.pool != "max" or self.pyramid.bins is not None:
            raise ValueError(f"{self.pyramid}: windows on a shared map are pooled by the maxima of Appendix A's bins")
        return geometry(self.backbone)

    def smallest_size(self, largest: int = 1024) -> int:
        """The smallest square, in px, that the backbone turns into a map of at least one cell."""
        low, high = 1, largest
        while low < high:
            middle = (low + high) // 2
            low, high = (low, middle) if self._takes(middle) else (middle + 1, high)
        return low

    def _takes(self, size: int) -> bool:
        mode = self.backbone.training
        try:
            self.backbone.eval()
            with torch.no_grad():
                parameter = next(self.backbone.parameters())
                self.backbone(parameter.new_zeros(1, 3, size, size))
            return True
        except RuntimeError:
            return False
        finally:
            self.backbone.train(mode)


def sppnet(
    name: str,
    num_classes: int,
    levels: Sequence[int] = (6, 3, 2, 1),
    pool: str = "max",
    bins: str = "appendix_a",
    norm: str = "none",
    norm_constants: Mapping[str, float] | None = None,
    fc: Sequence[int] = (4096, 4096),
    dropout: float = 0.5,
    width: float = 1.0,
    init: str = "kaiming",
    init_from: str | None = None,
    seed: int = 0,
) -> SPPNet:
    """An `SPPNet` on the backbone `name` of this package; `width` scales filters and hidden layers alike.

    `norm_constants` are those of `norm` (size, alpha, beta, k) that shall be others than the kind's own.
    """
    if name not in BACKBONES:
        raise ValueError(f"name={name!r}: use one of {', '.join(BACKBONES)}")
    backbone = Backbone(BACKBONES[name], norm, width, norm_constants=norm_constants)
    hidden = [scaled(features, width) for features in fc]
    net = SPPNet(backbone, num_classes, levels, pool, bins_rule(bins), hidden, dropout)
    initialise(net, init, seed)
    if init_from is not None:
        load_weights(net, init_from)
    return net


def bins_rule(name: str) -> Callable[[int, int, int], Edges] | None:
    """The rule called `name`; None for Appendix A's, which the pyramid has built in."""
    if name not in RULES:
        raise ValueError(f"bins={name!r}: use one of {', '.join(RULES)}")
    return None if name == "appendix_a" else RULES[name]
