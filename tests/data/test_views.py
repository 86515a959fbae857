from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn
from torchvision.transforms import functional as tv

from spp_cls.data.device import resize
from spp_cls.data.distortions import rotate, shift, stretch
from spp_cls.data.source import resized_shape, take_views
from spp_cls.data.views import FULL_VIEWS, PROTOCOLS, SCALES, Pass, Views, centre, five, nine
from spp_cls.models import SPPNet, sppnet


def image(height: int, width: int) -> Tensor:
    """(3, h, w): every pixel has a colour of its own."""
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    return torch.stack([y, x, (3 * y + 5 * x) % 256]).to(torch.uint8)


def cut(crops: str, picture: Tensor, size: int = 16) -> Tensor:
    (one,) = PROTOCOLS[crops]
    assert one.windows(picture.shape[1], picture.shape[2], size) is None
    return one.images(picture, size)


def as_set(crops: Tensor) -> set[bytes]:
    return {crop.contiguous().numpy().tobytes() for crop in crops}


@pytest.mark.parametrize(("height", "width"), [(16, 16), (16, 25), (31, 17), (16, 20), (18, 19), (21, 16)])
def test_center_crop_is_torchvisions(height: int, width: int) -> None:
    picture = image(height, width)
    assert torch.equal(cut("center_crop", picture), tv.center_crop(picture, [16, 16])[None])


@pytest.mark.parametrize(("height", "width"), [(16, 16), (16, 24), (32, 18), (20, 20)])
def test_ten_crop_is_torchvisions_set(height: int, width: int) -> None:
    picture = image(height, width)
    crops = cut("ten_crop", picture)
    assert crops.shape == (10, 3, 16, 16)
    assert as_set(crops) == as_set(torch.stack(tv.ten_crop(picture, [16, 16])))


@pytest.mark.parametrize(("height", "width"), [(20, 24), (17, 16), (19, 22), (23, 31), (24, 21)])
def test_ten_crop_goes_centre_corners_mirrors(height: int, width: int) -> None:
    picture = image(height, width)
    crops = cut("ten_crop", picture)
    top_left, top_right, bottom_left, bottom_right, centre = tv.five_crop(picture, [16, 16])
    expected = torch.stack([centre, top_left, top_right, bottom_left, bottom_right])
    assert torch.equal(crops[:5], expected)
    # torchvision mirrors the picture before it looks for the centre: a pixel aside where the margin is odd.
    assert torch.equal(crops[5:], expected.flip(3))


def test_ten_crop_of_a_picture_of_that_size_is_itself_and_its_mirror() -> None:
    picture = image(16, 16)
    assert torch.equal(cut("ten_crop", picture), torch.stack([picture] * 5 + [picture.flip(2)] * 5))


def test_eight_crops_and_two_full_views_are_the_ten_crops_with_the_picture_for_its_centre() -> None:
    picture = image(20, 31)
    corners, full = PROTOCOLS["eight_crop_full"]
    ten = cut("ten_crop", picture)
    assert torch.equal(corners.images(picture, 16), torch.cat([ten[1:5], ten[6:]]))
    assert torch.equal(full.images(picture, 16), torch.stack([picture, picture.flip(2)]))
    assert corners.shorter_side(16, 20, 16) == full.shorter_side(16, 20, 16) == 20


def test_full_image_is_the_whole_image() -> None:
    picture = image(17, 31)
    assert torch.equal(cut("full_image", picture), picture[None])


def test_the_numbers_of_views_are_the_papers() -> None:
    assert {crops: Views(crops).num_views for crops in PROTOCOLS} == {
        "center_crop": 1,
        "ten_crop": 10,
        "full_image": 1,
        "eight_crop_full": 10,
        "ten_crop_maps": 10,
        "multi_scale": 96,
        "multi_scale_full": 98,
        "multi_scale_pixels": 96,
        **dict.fromkeys(("warp", "shift_10", "rotate_10", "rotate_20", "stretch_75", "stretch_133"), 1),
    }
    assert SCALES == (224, 256, 300, 360, 448, 560)


# Places


def test_places_by_hand() -> None:
    # 256 × 341 px: 32 and 117 px are free; half of 117 is 58.5, which goes to the even 58.
    assert centre(256, 341, 224) == [(16, 58)]
    assert five(256, 341, 224) == [(16, 58), (0, 0), (0, 117), (32, 0), (32, 117)]
    assert Counter(nine(256, 341, 224)) == Counter((y, x) for y in (0, 16, 32) for x in (0, 58, 117))
    assert nine(224, 299, 224) == [(0, 38), (0, 0), (0, 75)]  # as high as a view
    assert nine(299, 224, 224) == [(38, 0), (0, 0), (75, 0)]
    assert nine(224, 224, 224) == [(0, 0)] * 3
    assert len(nine(225, 225, 224)) == 9
    assert five(224, 224, 224) == [(0, 0)] * 5  # the ten views of a square are ten


# Of a picture of 4:3, at each of the scales: height and width in px, the tops and the lefts of its views.
BY_HAND = [
    ((224, 299), (0,), (0, 38, 75)),
    ((256, 341), (0, 16, 32), (0, 58, 117)),
    ((300, 400), (0, 38, 76), (0, 88, 176)),
    ((360, 480), (0, 68, 136), (0, 128, 256)),
    ((448, 597), (0, 112, 224), (0, 186, 373)),
    ((560, 747), (0, 168, 336), (0, 262, 523)),
]


def test_the_96_and_2_views_of_a_picture_of_4_to_3_by_hand() -> None:
    *scales, full = Views("multi_scale_full", 224).passes
    assert tuple(scales) == Views("multi_scale", 224).passes and len(scales) == 6
    found = 0
    for one, ((height, width), tops, lefts) in zip(scales, BY_HAND, strict=True):
        assert one.shorter_side(224, 256, 224) == height
        windows = one.windows(height, width, 224)
        assert windows is not None
        expected = [(0, y, x, y + 224, x + 224) for y in tops for x in lefts]
        # On the mirror image what was `x` px from the left is as far from the right.
        expected += [(1, y, width - x - 224, y + 224, width - x) for y in tops for x in lefts]
        assert Counter(map(tuple, windows.tolist())) == Counter(expected)
        assert len(windows) == one.num_views(height, 224) == (6 if height == 224 else 18)
        found += len(windows)
    assert found == 96
    assert full.shorter_side(224, 256, 224) == 256 and full.num_views(256, 224) == 2
    picture = image(256, 341)
    assert torch.equal(full.images(picture, 224), torch.stack([picture, picture.flip(2)]))
    assert full.windows(256, 341, 224) is None


@pytest.mark.parametrize("shape", [(300, 300), (300, 301), (300, 900)])
def test_a_picture_of_any_shape_has_96_views(shape: tuple[int, int]) -> None:
    numbers = []
    for one in PROTOCOLS["multi_scale"]:
        shorter = one.shorter_side(224, 256, 224)
        windows = one.windows(*resized_shape(shape[1], shape[0], shorter), 224)
        assert windows is not None and len(windows) == one.num_views(shorter, 224)
        numbers.append(len(windows))
    assert numbers == [6, 18, 18, 18, 18, 18]
    assert FULL_VIEWS.num_views(256, 224) == 2  # of a picture and its mirror image


@pytest.mark.parametrize(
    ("size", "sides"),
    [
        (224, [224, 256, 300, 360, 448, 560]),
        (32, [32, 37, 43, 51, 64, 80]),
        (26, [26, 30, 35, 42, 52, 65]),
        (448, [448, 512, 600, 720, 896, 1120]),
    ],
)
def test_scales_go_along_with_the_size_and_the_full_views_with_resize(size: int, sides: list[int]) -> None:
    *scales, full = Views("multi_scale_full", size).passes
    assert [one.shorter_side(size, 36, 32) for one in scales] == sides
    assert full.shorter_side(size, 36, 32) == round(size * 36 / 32)
    (ten,) = Views("ten_crop_maps", size).passes
    assert ten.shorter_side(size, 256, 224) == Views("ten_crop", size).shorter_side(256, 224)


@pytest.mark.parametrize("shape", [(37, 37), (37, 52), (61, 40), (32, 45), (32, 33)])
@pytest.mark.parametrize("one", [*PROTOCOLS["ten_crop_maps"], PROTOCOLS["multi_scale"][1]], ids=["ten", "nine"])
def test_windows_hold_the_pixels_of_the_crops(one: Pass, shape: tuple[int, int]) -> None:
    picture = image(*shape)
    windows, images = one.windows(*shape, 32), one.images(picture, 32)
    assert windows is not None and torch.equal(images, torch.stack([picture, picture.flip(2)]))
    held = torch.stack([images[i, :, top:bottom, left:right] for i, top, left, bottom, right in windows.tolist()])
    assert torch.equal(held, replace(one, on_maps=False).images(picture, 32))


# Windows on maps against crops of pixels


def both_ways(net: SPPNet, picture: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Logits of the ten crops, and of the ten windows on maps."""
    (crops,), (maps,) = PROTOCOLS["ten_crop"], PROTOCOLS["ten_crop_maps"]
    windows = maps.windows(picture.shape[1], picture.shape[2], size)
    assert windows is not None
    with torch.no_grad():
        return net.eval()(crops.images(picture, size)), net.forward_windows(maps.images(picture, size), windows)


def smooth(height: int, width: int, seed: int) -> Tensor:
    noise = torch.randn(1, 3, height // 8, width // 8, generator=torch.Generator().manual_seed(seed))
    return 2 * F.interpolate(noise, (height, width), mode="bicubic")[0]


@pytest.mark.parametrize("shape", [(48, 64), (64, 48), (32, 72), (56, 56)])
def test_without_padding_ten_windows_at_whole_strides_are_ten_crops(shape: tuple[int, int]) -> None:
    class Unpadded(nn.Sequential):
        out_channels = 8

    torch.manual_seed(0)
    backbone = Unpadded(nn.Conv2d(3, 6, 3, 2), nn.ReLU(), nn.MaxPool2d(2, 2), nn.Conv2d(6, 8, 3), nn.ReLU())
    net = SPPNet(backbone, 5, levels=(3, 2, 1), fc=(16,))
    assert net.geometry().stride == 4
    crops, maps = both_ways(net, smooth(*shape, seed=1), 32)  # 8 px are free, or a multiple: centres at whole strides
    torch.testing.assert_close(maps, crops, rtol=0, atol=1e-6)
    assert crops.std(0).max() > 1e-3  # and not because all views are one


@pytest.mark.parametrize(("name", "inner"), [("zf5", slice(4, 9)), ("tiny", slice(2, 11))])
def test_padding_is_all_that_differs_between_ten_windows_and_ten_crops(name: str, inner: slice) -> None:
    net = sppnet(name, 10, width=0.25, seed=0).eval()
    picture = smooth(256, 320, seed=2)  # 32 and 96 px are free: all ten views are at whole strides
    (crops,), (maps,) = PROTOCOLS["ten_crop"], PROTOCOLS["ten_crop_maps"]
    windows = maps.windows(256, 320, 224)
    assert windows is not None
    with torch.no_grad():
        of_crops = net.backbone(crops.images(picture, 224))
        whole = net.backbone(maps.images(picture, 224))
    cells = net.geometry().windows(windows, whole.shape[2], whole.shape[3]).tolist()
    for of_crop, (i, top, left, bottom, right) in zip(of_crops, cells, strict=True):
        window = whole[i, :, top:bottom, left:right]
        assert window.shape == of_crop.shape == (of_crop.shape[0], 13, 13)
        # Cells that see no edge of the crop: of ZF-5 a cell sees 139 px, of `tiny` 77.
        torch.testing.assert_close(window[:, inner, inner], of_crop[:, inner, inner], rtol=0, atol=1e-5)
        assert (window - of_crop).abs().max() > 1e-2  # those that do see zeros, where the window has the picture


@pytest.mark.parametrize("shape", [(256, 320), (256, 341), (341, 256)])
@pytest.mark.parametrize("name", ["zf5", "tiny"])
def test_with_padding_ten_windows_are_close_to_ten_crops(name: str, shape: tuple[int, int]) -> None:
    """Found for random weights, whether at whole strides or not: a cosine of 0.968 and more between the logits of a
    crop and of its window, 0.014 and less between the mean scores of ten, of which the ten classes have 0.1 each."""
    net = sppnet(name, 10, width=0.25 if name == "zf5" else 1.0, seed=0)
    crops, maps = both_ways(net, smooth(*shape, seed=2), 224)
    assert F.cosine_similarity(maps, crops).min() > 0.95
    assert (maps.softmax(1).mean(0) - crops.softmax(1).mean(0)).abs().max() < 0.02


@pytest.mark.slow
def test_nets_without_windows_are_refused_in_one_line() -> None:
    body = nn.Sequential(*list(torchvision.models.resnet18().children())[:-2])
    body.out_channels = 512  # type: ignore[assignment]
    for crops in ("ten_crop_maps", "multi_scale", "multi_scale_full"):
        for net, reason in (
            (SPPNet(body, 3), "Sequential: its layers do not stand in a row, so that no cell has one place"),
            (
                sppnet("tiny", 3, pool="average"),
                "windows on a shared map are pooled by the maxima of Appendix A's bins",
            ),
            (nn.Linear(2, 3), "Linear: has no forward_windows"),
        ):
            with pytest.raises(ValueError) as refused:
                Views(crops).check(net)
            line = str(refused.value)
            assert line.startswith(f"views.crops={crops} pools windows of maps: ") and reason in line
            assert line.endswith("; use views=ten_crop") and "\n" not in line
    for crops, passes in PROTOCOLS.items():
        Views(crops).check(sppnet("tiny", 3))
        if not any(one.on_maps for one in passes):
            Views(crops).check(nn.Linear(2, 3))


# Sizes


def test_the_least_that_a_net_is_given() -> None:
    assert (
        Views("center_crop", 28).smallest_side(256, 224) == Views("multi_scale_full", 28).smallest_side(256, 224) == 28
    )
    assert Views("full_image", 28).smallest_side(256, 224) == 32  # 28 · 256 / 224
    assert Views("warp", 28).smallest_side(256, 224) == 28


@pytest.mark.parametrize(
    ("size", "resize", "region", "shorter"),
    [(224, 256, 224, 256), (180, 256, 224, 206), (256, 256, 224, 293), (32, 36, 32, 36), (26, 36, 32, 29)],
)
def test_shorter_side(size: int, resize: int, region: int, shorter: int) -> None:
    assert Views("center_crop", size).shorter_side(resize, region) == shorter


def test_every_size_can_be_cut_from_its_shorter_side() -> None:
    for shorter, region in ((256, 224), (36, 32), (224, 224), (257, 256)):
        assert all(Views("ten_crop", size).shorter_side(shorter, region) >= size for size in range(1, 600))


def test_refused() -> None:
    with pytest.raises(ValueError, match=r"^views.crops='9_crop': use one of center_crop, ten_crop, full_image, "):
        Views("9_crop")
    with pytest.raises(ValueError, match=r"^views.size=0: use a number of px, like 224$"):
        Views("center_crop", 0)


# Pictures that were distorted


def test_a_warped_picture_is_a_square_of_the_test_size() -> None:
    (one,) = Views("warp", 16).passes
    picture = image(20, 40)
    images, windows = take_views(picture, one, 16, 256, 224)
    assert windows is None and torch.equal(images[0], resize(picture[None], (16, 16))[0])


@pytest.mark.parametrize(
    ("crops", "distorted"),
    [
        ("shift_10", lambda image: shift(image, share=0.1)),
        ("rotate_20", lambda image: rotate(image, degrees=20)),
        ("stretch_133", lambda image: stretch(image, factor=1.33)),
    ],
)
def test_the_centre_of_a_distorted_picture(crops: str, distorted: Any) -> None:
    picture = image(40, 60)
    (one,), (usual,) = Views(crops, 32).passes, Views("center_crop", 32).passes
    found, _ = take_views(picture, one, 32, 36, 32)
    assert torch.equal(found, take_views(distorted(picture), usual, 32, 36, 32)[0])
    assert not torch.equal(found, take_views(picture, usual, 32, 36, 32)[0])
