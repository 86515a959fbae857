from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from spp_cls.models.backbones import BACKBONES, Backbone, Conv, Norm, Pool, scaled
from spp_cls.models.norm import LocalResponseNorm
from spp_cls.models.pyramid import spatial_pyramid_pool2d


def sides(name: str, size: int, **arguments: float) -> dict[str, int]:
    """Side of every map of a backbone, found without computing."""
    with torch.device("meta"):
        features = Backbone(BACKBONES[name], **arguments).forward_features(torch.empty(1, 3, size, size))
    assert all(x.shape[2] == x.shape[3] for x in features.values())
    return {layer: x.shape[3] for layer, x in features.items()}


# Table 1 at 224 px: what is printed, and which layer has it. For ZF-5, 55 is the pool's and 27 the convolution's.
TABLE1 = {
    "zf5": {"pool1": 55, "conv2": 27, "conv3": 13, "conv4": 13, "conv5": 13},
    "convnet5": {"conv1": 55, "pool2": 27, "pool3": 13, "conv4": 13, "conv5": 13},
    "overfeat5": {"pool1": 36, "pool2": 18, "conv3": 18, "conv4": 18, "conv5": 18},
    "overfeat7": {"pool1": 36, "pool2": 18, "conv3": 18, "conv4": 18, "conv5": 18, "conv6": 18, "conv7": 18},
}


@pytest.mark.parametrize("name", TABLE1)
def test_printed_map_sizes_at_224(name: str) -> None:
    found = sides(name, 224)
    assert {layer: found[layer] for layer in TABLE1[name]} == TABLE1[name]


@pytest.mark.parametrize(
    ("name", "size", "last"),
    [
        ("zf5", 180, 10),
        ("convnet5", 180, 10),
        ("overfeat5", 180, 14),
        ("overfeat7", 180, 14),
        ("zf5", 227, 13),
        ("convnet5", 227, 13),
        ("tiny", 224, 13),
        ("tiny", 180, 11),
    ],
)
def test_last_map(name: str, size: int, last: int) -> None:
    assert list(sides(name, size).values())[-1] == last


def test_every_map_of_the_comments() -> None:
    assert list(sides("zf5", 224).items())[:6] == [
        ("conv1", 110), ("norm1", 110), ("pool1", 55), ("conv2", 27), ("norm2", 27), ("pool2", 13),
    ]  # fmt: skip
    zf5_at_180 = sides("zf5", 180)
    assert [zf5_at_180[layer] for layer in ("conv1", "pool1", "conv2", "pool2", "conv5")] == [88, 44, 21, 10, 10]
    convnet5_at_180 = sides("convnet5", 180)
    assert [convnet5_at_180[layer] for layer in ("conv1", "conv2", "pool2", "conv3", "pool3")] == [44, 44, 21, 21, 10]
    overfeat_at_180 = sides("overfeat5", 180)
    assert [overfeat_at_180[layer] for layer in ("conv1", "pool1", "conv2", "pool2")] == [88, 29, 29, 14]


def test_small32_whose_last_pool_without_spp_is_the_ordinary_one() -> None:
    assert list(sides("small32", 32).values()) == [32, 16, 16, 8, 8, 8]
    assert list(sides("small32", 26).values()) == [26, 13, 13, 6, 6, 6]
    maps = torch.randn(2, 3, 8, 8)
    assert torch.equal(spatial_pyramid_pool2d(maps, [4]), F.max_pool2d(maps, 2).flatten(1))


def test_tutorial64_at_64() -> None:
    assert list(sides("tutorial64", 64).values()) == [62, 31, 29, 14, 12, 6, 4]


def zf5_rounding_up(size: int) -> list[int]:
    """Sides of pool1 and conv5 of a ZF-5 whose pool1 rounds up."""
    pool1 = -(-((size + 2 - 7) // 2 + 1 - 3) // 2) + 1
    conv2 = (pool1 + 2 - 5) // 2 + 1
    return [pool1, (conv2 - 3) // 2 + 1]


def test_zf5_pads_pool1_and_has_the_maps_of_rounding_up() -> None:
    ours = {size: [sides("zf5", size)[layer] for layer in ("pool1", "conv5")] for size in range(180, 260)}
    assert all(ours[size] == zf5_rounding_up(size) for size in (180, 200, 224, 227, 256))
    wider = [size for size, maps in ours.items() if maps[1] != zf5_rounding_up(size)[1]]
    assert wider == [189, 190, 205, 206, 221, 222, 237, 238, 253, 254]
    assert (ours[189], zf5_rounding_up(189)) == ([47, 11], [46, 10])


@pytest.mark.parametrize(
    ("name", "parameters"),
    [("zf5", 3_726_464), ("convnet5", 3_747_200), ("overfeat5", 6_528_640), ("overfeat7", 11_248_256)],
)
def test_parameters_of_the_convolutions(name: str, parameters: int) -> None:
    with torch.device("meta"):
        backbone = Backbone(BACKBONES[name], norm="across_channels")
    assert sum(p.numel() for p in backbone.parameters()) == parameters


@pytest.mark.parametrize(
    ("name", "order"),
    [
        ("zf5", "conv1 norm1 pool1 conv2 norm2 pool2 conv3 conv4 conv5"),
        ("convnet5", "conv1 norm1 conv2 norm2 pool2 conv3 pool3 conv4 conv5"),
        ("overfeat5", "conv1 pool1 norm1 conv2 pool2 conv3 conv4 conv5"),
        ("overfeat7", "conv1 pool1 norm1 conv2 pool2 conv3 conv4 conv5 conv6 conv7"),
    ],
)
def test_order_of_table_1(name: str, order: str) -> None:
    assert list(sides(name, 224)) == order.split()


def test_filters_of_table_1() -> None:
    filters = {
        name: [layer.out_channels for layer in layers if isinstance(layer, Conv)] for name, layers in BACKBONES.items()
    }
    assert filters["zf5"] == filters["convnet5"] == [96, 256, 384, 384, 256]
    assert filters["overfeat5"] == [96, 256, 512, 512, 512]
    assert filters["overfeat7"] == [96, 256, 512, 512, 512, 512, 512]


def test_features_are_the_layers_one_after_another() -> None:
    torch.manual_seed(0)
    backbone = Backbone((Conv(4, 3), Norm(), Pool(2, 2), Conv(5, 3, padding=1)), norm="across_channels")
    images = 100 * torch.randn(2, 3, 12, 10)
    given = images.clone()
    conv1 = torch.conv2d(images, backbone.conv1.weight, backbone.conv1.bias).clamp_min(0)
    norm1 = nn.LocalResponseNorm(5, alpha=5e-4, beta=0.75, k=2)(conv1)
    pool1 = norm1[:, :, :10, :].unfold(2, 2, 2).unfold(3, 2, 2).amax((-1, -2))
    conv2 = torch.conv2d(pool1, backbone.conv2.weight, backbone.conv2.bias, padding=1).clamp_min(0)
    features = backbone.forward_features(images)
    assert list(features) == ["conv1", "norm1", "pool1", "conv2"]
    for name, expected in zip(features, (conv1, norm1, pool1, conv2), strict=True):
        torch.testing.assert_close(features[name], expected)
    assert torch.equal(backbone(images), features["conv2"])
    assert torch.equal(images, given)


@pytest.mark.parametrize("norm", ["within_channel", "across_channels", "none"])
def test_norm_is_of_the_kind_asked_for(norm: str) -> None:
    layers = Backbone(BACKBONES["zf5"], norm, width=0.01)
    kinds = {type(layers.norm1), type(layers.norm2)}
    assert kinds == ({nn.Identity} if norm == "none" else {LocalResponseNorm})


def test_constants_reach_every_norm() -> None:
    layers = Backbone(BACKBONES["zf5"], "across_channels", width=0.01, norm_constants={"k": 1.0})
    assert {(norm.size, norm.alpha, norm.k) for norm in (layers.norm1, layers.norm2)} == {(5, 1e-4, 1.0)}
    with pytest.raises(ValueError, match=r"^norm_constants has 'gamma'"):  # even where no layer is a norm
        Backbone(BACKBONES["tiny"], "across_channels", norm_constants={"gamma": 1.0})


def test_width_is_a_factor_on_the_filters() -> None:
    with torch.device("meta"):
        backbone = Backbone(BACKBONES["zf5"], width=0.25)
    assert [m.out_channels for m in backbone.modules() if isinstance(m, nn.Conv2d)] == [24, 64, 96, 96, 64]
    assert backbone.out_channels == 64
    assert sides("zf5", 224, width=0.25) == sides("zf5", 224)
    assert [scaled(n, 0.01) for n in (16, 64, 256)] == [1, 1, 3]
    assert [scaled(n, 2.0) for n in (16, 96)] == [32, 192]


def test_in_channels() -> None:
    assert Backbone(BACKBONES["tiny"], in_channels=1)(torch.zeros(1, 1, 32, 32)).shape == (1, 64, 1, 1)


def test_mistakes() -> None:
    with pytest.raises(ValueError, match="^norm='lrn': use one of within_channel, across_channels, none$"):
        Backbone(BACKBONES["tiny"], "lrn")
    with pytest.raises(ValueError, match=r"^width=0: use a factor above 0, like 0\.25$"):
        Backbone(BACKBONES["tiny"], width=0)
