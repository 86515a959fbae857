from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spp_cls.models import bins
from spp_cls.models.backbones import BACKBONES, Backbone
from spp_cls.models.pyramid import spatial_pyramid_pool2d
from spp_cls.models.sppnet import SPPNet, bins_rule, sppnet


def images(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def tiny(**arguments: object) -> SPPNet:
    given = {"levels": (3, 2, 1), "fc": (16, 16), "width": 0.25, **arguments}
    return sppnet("tiny", 5, **given).eval()  # type: ignore[arg-type]


# --- sizes and parameters of the paper's nets


@pytest.mark.parametrize(
    ("name", "fc6", "totals"),
    [
        ("zf5", (9216, 7680, 12800), ("62.36", "56.07", "77.04")),
        ("convnet5", (9216, 7680, 12800), ("62.38", "56.09", "77.06")),
        ("overfeat5", (18432, 15360, 25600), ("102.91", "90.33", "132.27")),
        ("overfeat7", (18432, 15360, 25600), ("107.63", "95.05", "136.99")),
    ],
)
def test_parameters_without_pyramid_with_30_and_with_50_bins(
    name: str, fc6: tuple[int, ...], totals: tuple[str, ...]
) -> None:
    for levels, features, millions in zip(([6], [4, 3, 2, 1], [6, 3, 2, 1]), fc6, totals, strict=True):
        with torch.device("meta"):
            net = SPPNet(Backbone(BACKBONES[name]), 1000, levels)
            assert net(torch.empty(1, 3, 224, 224)).shape == net(torch.empty(1, 3, 180, 200)).shape == (1, 1000)
        assert net.head.fc6.in_features == features
        assert f"{sum(p.numel() for p in net.parameters()) / 1e6:.2f}" == millions
        assert [net.head.fc6.out_features, net.head.fc7.out_features, net.head.fc8.out_features] == [4096, 4096, 1000]


def test_tutorial64_takes_21_bins_of_128_filters() -> None:
    net = sppnet("tutorial64", 2, levels=(1, 2, 4), fc=(1024,))
    assert (net.head.fc6.in_features, net.head.fc6.out_features) == (21 * 128, 1024)
    assert (net.head.fc7.in_features, net.head.fc7.out_features) == (1024, 2)
    assert net(images(2, 3, 64, 64)).shape == (2, 2)


def test_width_scales_filters_and_hidden_layers() -> None:
    net = sppnet("zf5", 10, fc=(400, 200), width=0.05)
    assert [m.out_channels for m in net.modules() if isinstance(m, nn.Conv2d)] == [5, 13, 19, 19, 13]
    shapes = [(m.in_features, m.out_features) for m in net.modules() if isinstance(m, nn.Linear)]
    assert shapes == [(13 * 50, 20), (20, 10), (10, 10)]


# --- what it computes


def test_forward_is_convolutions_pyramid_and_fully_connected_layers() -> None:
    net, x = tiny(), images(2, 3, 70, 90)
    vector = spatial_pyramid_pool2d(net.backbone(x), (3, 2, 1))
    fc6 = F.linear(vector, net.head.fc6.weight, net.head.fc6.bias).clamp_min(0)
    fc7 = F.linear(fc6, net.head.fc7.weight, net.head.fc7.bias).clamp_min(0)
    fc8 = F.linear(fc7, net.head.fc8.weight, net.head.fc8.bias)
    features = net.forward_features(x)
    for name, expected in (("pyramid", vector), ("fc6", fc6), ("fc7", fc7), ("fc8", fc8)):
        assert torch.equal(features[name], expected), name
    assert torch.equal(net(x), fc8)


@pytest.mark.parametrize("name", BACKBONES)
def test_both_routes_give_the_same_logits(name: str) -> None:
    net = sppnet(name, 4, norm="within_channel", fc=(16, 16), width=0.04).eval()
    x = 50 * images(2, 3, 96, 71)
    features = net.forward_features(x)
    assert torch.equal(features["fc8"], net(x))
    assert all(bool((features[layer] >= 0).all()) for layer in features if layer != "fc8")


def test_names_of_the_features_in_order() -> None:
    net = sppnet("zf5", 4, norm="within_channel", fc=(16, 16), width=0.04).eval()
    names = "conv1 norm1 pool1 conv2 norm2 pool2 conv3 conv4 conv5 pyramid fc6 fc7 fc8"
    assert list(net.forward_features(images(1, 3, 96, 96))) == names.split()
    assert list(tiny(fc=()).forward_features(images(1, 3, 64, 64)))[-2:] == ["pyramid", "fc6"]
    foreign = nn.Conv2d(3, 2, 3)
    net = SPPNet(foreign_with_channels(foreign, 2), 4, [1], fc=(8,)).eval()
    assert list(net.forward_features(images(1, 3, 9, 9))) == ["backbone", "pyramid", "fc6", "fc7"]


def foreign_with_channels(module: nn.Module, out_channels: int) -> nn.Module:
    module.out_channels = out_channels  # type: ignore[assignment]
    return module


def test_any_size_gives_a_vector_of_one_length() -> None:
    net = tiny()
    for h, w in ((24, 24), (33, 200), (224, 180), (97, 31)):
        features = net.forward_features(images(2, 3, h, w))
        assert features["pyramid"].shape == (2, 16 * 14)
        assert features["fc8"].shape == (2, 5)


def test_one_level_of_6_is_the_net_with_an_ordinary_last_pool() -> None:
    net, x = tiny(levels=[6]), images(2, 3, 224, 224)
    assert torch.equal(net(x), net.head(F.max_pool2d(net.backbone(x), 3, 2).flatten(1)))


def test_pool_and_bins_reach_the_pyramid() -> None:
    x = images(1, 3, 224, 224)
    net = tiny(pool="average")
    assert torch.equal(net(x), net.head(spatial_pyramid_pool2d(net.backbone(x), (3, 2, 1), "average")))
    net = tiny(levels=[6], bins="window")
    assert torch.equal(net(x), tiny(levels=[6])(x))  # the rule is right at 13 × 13
    assert net.pyramid.bins is bins.window


def test_dropout_acts_in_training_only() -> None:
    net, x = tiny(fc=(400,), init="gaussian"), images(2, 3, 64, 64)
    assert torch.equal(net(x), net(x))
    torch.manual_seed(0)
    assert not torch.equal(net.train()(x), net(x))
    assert torch.equal(tiny(dropout=0.0).train()(x), tiny(dropout=0.0)(x))


def test_exports_with_free_sizes() -> None:
    net = sppnet("tiny", 3, fc=(8,), width=0.2, norm="across_channels").eval()
    free = {dim: torch.export.Dim.AUTO for dim in (0, 2, 3)}
    program = torch.export.export(net, (images(2, 3, 64, 72),), dynamic_shapes=(free,)).module()
    for shape in ((1, 3, 224, 224), (3, 3, 180, 97)):
        torch.testing.assert_close(program(images(*shape)), net(images(*shape)))


# --- the smallest size


@pytest.mark.parametrize(
    "net",
    [
        sppnet("tiny", 2, fc=(), width=0.1),
        sppnet("zf5", 2, fc=(), width=0.02),
        sppnet("tutorial64", 2, fc=(), width=0.02),
    ],
    ids=["tiny", "zf5", "tutorial64"],
)
def test_smallest_size_by_trying_every_size(net: SPPNet) -> None:
    def takes(size: int) -> bool:
        try:
            return net(torch.zeros(1, 3, size, size)).shape == (1, 2)
        except RuntimeError:
            return False

    smallest = net.smallest_size()
    assert [takes(size) for size in range(1, 80)] == [size >= smallest for size in range(1, 80)]
    assert net.backbone(torch.zeros(1, 3, smallest, smallest)).shape[-2:] == (1, 1)


def test_smallest_size_leaves_the_net_as_it_was() -> None:
    backbone = nn.Sequential(nn.Conv2d(3, 4, 5), nn.BatchNorm2d(4))
    net = SPPNet(foreign_with_channels(backbone, 4), 2, [1], fc=())
    before = {name: value.clone() for name, value in net.state_dict().items()}
    assert net.smallest_size() == 5
    assert net.backbone.training
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


# --- mistakes


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": "zf6"}, r"^name='zf6': use one of zf5, convnet5, overfeat5, overfeat7, tutorial64, small32, tiny$"),
        ({"num_classes": 0}, "^num_classes=0: a classifier needs at least 1$"),
        ({"dropout": 1.0}, r"^dropout=1\.0: use a share from 0 up to 1, like 0\.5$"),
        ({"bins": "roi"}, "^bins='roi': use one of appendix_a, window, floor, same, ceil_padded$"),
        ({"levels": []}, r"^levels=\[\]: a pyramid needs whole numbers"),
        ({"pool": "sum"}, "^pool='sum': use one of max, average$"),
        ({"init": "xavier"}, "^init='xavier': use one of gaussian, kaiming$"),
    ],
)
def test_mistakes(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        sppnet(**{"name": "tiny", "num_classes": 3, "fc": (), **arguments})  # type: ignore[arg-type]


def test_bins_rule_names_the_rules() -> None:
    assert bins_rule("appendix_a") is None
    assert bins_rule("floor") is bins.floor


def test_init_from_is_loaded_after_the_initialisation(tmp_path: Path) -> None:
    source = tiny(seed=1)
    torch.save({"state_dict": {f"net.{k}": v for k, v in source.state_dict().items()}}, tmp_path / "a.ckpt")
    loaded = tiny(seed=2, init_from=str(tmp_path / "a.ckpt"))
    assert all(torch.equal(value, source.state_dict()[name]) for name, value in loaded.state_dict().items())


# Windows on shared maps


def test_a_window_of_the_whole_picture_is_the_picture() -> None:
    net = sppnet("zf5", 5, width=0.1, norm="within_channel").eval()
    images = torch.randn(2, 3, 250, 331, generator=torch.Generator().manual_seed(0))
    whole = torch.tensor([[0, 0, 0, 250, 331], [1, 0, 0, 250, 331]])
    with torch.no_grad():
        torch.testing.assert_close(net.forward_windows(images, whole), net(images), rtol=1e-5, atol=1e-6)


def test_windows_are_pooled_from_the_cells_that_look_at_them() -> None:
    net = sppnet("zf5", 5, width=0.1).eval()
    images = torch.randn(1, 3, 256, 256, generator=torch.Generator().manual_seed(0))
    windows = torch.tensor([[0, 0, 0, 224, 224], [0, 32, 16, 256, 240]])
    with torch.no_grad():
        maps = net.backbone(images)  # (1, 26, 15, 15)
        by_hand = [
            net.head(net.pyramid(maps[:, :, top : top + 13, left : left + 13])) for top, left in ((0, 0), (2, 1))
        ]
        torch.testing.assert_close(net.forward_windows(images, windows), torch.cat(by_hand), rtol=1e-5, atol=1e-6)


def test_nets_that_have_no_windows() -> None:
    with pytest.raises(ValueError, match="pool='average'.*are pooled by the maxima of Appendix A's bins"):
        sppnet("tiny", 5, pool="average").forward_windows(torch.zeros(1, 3, 64, 64), torch.zeros(0, 5).long())


def test_nets_of_one_seed_start_alike_wherever_shapes_allow() -> None:
    without, with_spp = (sppnet("zf5", 5, levels=levels, width=0.05, seed=3) for levels in ([6], [6, 3, 2, 1]))
    a, b = without.state_dict(), with_spp.state_dict()
    assert [name for name in a if a[name].shape != b[name].shape] == ["head.fc6.weight"]
    assert all(torch.equal(a[name], b[name]) for name in a if name != "head.fc6.weight")
    other = sppnet("zf5", 5, levels=[6], width=0.05, seed=4).state_dict()
    assert not any(torch.equal(a[name], other[name]) for name in a if name.endswith("weight"))
