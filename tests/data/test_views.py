from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torchvision.transforms import functional as tv

from spp_cls.data.views import CROPS, Views, center_crop, full_image, ten_crop


def image(height: int, width: int) -> Tensor:
    """(3, h, w): every pixel has a colour of its own."""
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    return torch.stack([y, x, (3 * y + 5 * x) % 256]).to(torch.uint8)


def as_set(crops: Tensor) -> set[bytes]:
    return {crop.contiguous().numpy().tobytes() for crop in crops}


@pytest.mark.parametrize(("height", "width"), [(16, 16), (16, 25), (31, 17), (16, 20), (18, 19), (21, 16)])
def test_center_crop_is_torchvisions(height: int, width: int) -> None:
    picture = image(height, width)
    assert torch.equal(center_crop(picture, 16), tv.center_crop(picture, [16, 16])[None])


@pytest.mark.parametrize(("height", "width"), [(16, 16), (16, 24), (32, 18), (20, 20)])
def test_ten_crop_is_torchvisions_set(height: int, width: int) -> None:
    picture = image(height, width)
    crops = ten_crop(picture, 16)
    assert crops.shape == (10, 3, 16, 16)
    assert as_set(crops) == as_set(torch.stack(tv.ten_crop(picture, [16, 16])))


@pytest.mark.parametrize(("height", "width"), [(20, 24), (17, 16), (19, 22), (23, 31), (24, 21)])
def test_ten_crop_goes_centre_corners_mirrors(height: int, width: int) -> None:
    picture = image(height, width)
    crops = ten_crop(picture, 16)
    top_left, top_right, bottom_left, bottom_right, centre = tv.five_crop(picture, [16, 16])
    expected = torch.stack([centre, top_left, top_right, bottom_left, bottom_right])
    assert torch.equal(crops[:5], expected)
    # torchvision mirrors the picture before it looks for the centre: a pixel aside where the margin is odd.
    assert torch.equal(crops[5:], expected.flip(3))


def test_ten_crop_of_a_picture_of_that_size_is_itself_and_its_mirror() -> None:
    picture = image(16, 16)
    assert torch.equal(ten_crop(picture, 16), torch.stack([picture] * 5 + [picture.flip(2)] * 5))


def test_full_image_is_the_whole_image() -> None:
    picture = image(17, 31)
    assert torch.equal(full_image(picture, 16), picture[None])


def test_num_views_and_call() -> None:
    assert {crops: Views(crops).num_views for crops in CROPS} == {"center_crop": 1, "ten_crop": 10, "full_image": 1}
    picture = image(20, 30)
    for crops, cut in CROPS.items():
        assert torch.equal(Views(crops, 16)(picture), cut(picture, 16))


@pytest.mark.parametrize(
    ("size", "resize", "region", "shorter"),
    [(224, 256, 224, 256), (180, 256, 224, 206), (256, 256, 224, 293), (32, 36, 32, 36), (26, 36, 32, 29)],
)
def test_shorter_side(size: int, resize: int, region: int, shorter: int) -> None:
    assert Views("center_crop", size).shorter_side(resize, region) == shorter


def test_every_size_can_be_cut_from_its_shorter_side() -> None:
    for resize, region in ((256, 224), (36, 32), (224, 224), (257, 256)):
        assert all(Views("ten_crop", size).shorter_side(resize, region) >= size for size in range(1, 600))


def test_refused() -> None:
    with pytest.raises(ValueError, match=r"^views.crops='9_crop': use one of center_crop, ten_crop, full_image$"):
        Views("9_crop")
    with pytest.raises(ValueError, match=r"^views.size=0: use a number of px, like 224$"):
        Views("center_crop", 0)
