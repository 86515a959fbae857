from __future__ import annotations

import pytest
import torch
import torchvision
from torch import Tensor, nn

from spp_cls.models import sppnet
from spp_cls.models.backbones import BACKBONES, Backbone
from spp_cls.models.pyramid import spatial_pyramid_pool2d
from spp_cls.models.windows import Geometry, geometry, pool_windows


def maps(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).relu()


def some_windows(number: int, pictures: int, height: int, width: int) -> Tensor:
    chance = torch.Generator().manual_seed(1)
    picture = torch.randint(0, pictures, (number,), generator=chance)
    rows = torch.randint(0, height + 1, (number, 2), generator=chance).sort(1).values
    columns = torch.randint(0, width + 1, (number, 2), generator=chance).sort(1).values
    windows = torch.stack([picture, rows[:, 0], columns[:, 0], rows[:, 1], columns[:, 1]], 1)
    return windows[(rows[:, 0] < rows[:, 1]) & (columns[:, 0] < columns[:, 1])]


@pytest.mark.parametrize("levels", [[6, 3, 2, 1], [4, 3, 2, 1], [7, 5], [1], [2, 6, 2]], ids=str)
@pytest.mark.parametrize(("height", "width"), [(13, 13), (1, 1), (5, 40), (30, 45)])
def test_windows_are_the_bits_of_cropped_maps(levels: list[int], height: int, width: int) -> None:
    input = maps(2, 8, height, width)
    windows = some_windows(200, 2, height, width)
    cropped = [
        spatial_pyramid_pool2d(input[picture : picture + 1, :, top:bottom, left:right], levels)
        for picture, top, left, bottom, right in windows.tolist()
    ]
    pooled = pool_windows(input, windows, levels)
    assert torch.equal(pooled, torch.cat(cropped))
    assert torch.equal(pool_windows(input.contiguous(memory_format=torch.channels_last), windows, levels), pooled)


def test_one_level_is_torchvisions_roi_pool() -> None:
    input, windows = maps(2, 4, 20, 31), some_windows(300, 2, 20, 31)
    picture, top, left, bottom, right = windows.unbind(1)
    regions = torch.stack([picture, left, top, right - 1, bottom - 1], 1).float()  # theirs hold their last cell
    theirs = torchvision.ops.roi_pool(input, regions, output_size=6, spatial_scale=1.0)
    assert torch.equal(pool_windows(input, windows, [6]), theirs.flatten(1))


def test_no_window_gives_nothing() -> None:
    assert pool_windows(maps(1, 4, 5, 5), torch.zeros(0, 5, dtype=torch.int64), [2, 1]).shape == (0, 20)


@pytest.mark.parametrize(
    ("window", "line"),
    [
        ([1, 0, 0, 5, 7], "window 1, [1, 0, 0, 5, 7]: use picture, top, left, bottom, right inside 1 maps of 5 × 7"),
        ([0, 0, 0, 6, 7], "window 1, [0, 0, 0, 6, 7]: use"),
        ([0, -1, 0, 5, 7], "window 1, [0, -1, 0, 5, 7]: use"),
        ([0, 2, 0, 2, 7], "window 1, [0, 2, 0, 2, 7]: use"),
    ],
)
def test_windows_outside_the_map_are_named(window: list[int], line: str) -> None:
    with pytest.raises(ValueError) as caught:
        pool_windows(maps(1, 4, 5, 7), torch.tensor([[0, 0, 0, 1, 1], window]), [1])
    assert str(caught.value).startswith(line)
    with pytest.raises(ValueError, match=r"windows \(1, 5\), torch.float32: give \(N, 5\) whole numbers"):
        pool_windows(maps(1, 4, 5, 7), torch.zeros(1, 5), [1])


# From pixels to cells


def test_the_geometry_of_zf5_by_hand() -> None:
    # conv1 7/2/1: 2 px in, 2 px a cell; pool1 3/2/1: 4; conv2 5/2/1: + 4 px, 8; pool2 3/2/0: + 8 px, 16.
    zf5 = geometry(Backbone(BACKBONES["zf5"], width=0.1))
    assert (zf5.stride, zf5.offset) == (16, 14.0)
    assert (zf5.cells(224), zf5.cells(180)) == (13, 10)


@pytest.mark.parametrize("name", list(BACKBONES))
def test_cells_are_those_that_the_backbone_makes(name: str) -> None:
    backbone = Backbone(BACKBONES[name], width=0.1)
    measured = backbone(torch.zeros(1, 3, 224, 181)).shape[2:]
    assert measured == (geometry(backbone).cells(224), geometry(backbone).cells(181))


@pytest.mark.parametrize("name", list(BACKBONES))
def test_the_cell_that_sees_a_pixel_is_centred_on_it(name: str) -> None:
    """Two routes: where the gradient of a cell lies, and what the strides and paddings say."""
    backbone = Backbone(BACKBONES[name], width=0.1)
    for module in backbone.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.constant_(module.weight, 1.0)
            nn.init.zeros_(module.bias)  # type: ignore[arg-type]
        if isinstance(module, nn.MaxPool2d):  # whose gradient looks at one cell; the mean looks at all that it sees
            module.forward = nn.AvgPool2d(module.kernel_size, module.stride, module.padding).forward  # type: ignore
    images = torch.ones(1, 3, 224, 224, dtype=torch.float64, requires_grad=True)
    out = backbone.double()(images)
    cell = out.shape[-1] // 2
    out[0, 0, cell, cell].backward()
    assert images.grad is not None
    rows = images.grad[0, 0].abs().sum(1)
    centre = float((rows * torch.arange(224)).sum() / rows.sum())
    found = geometry(backbone)
    assert centre == pytest.approx(found.offset + found.stride * cell, abs=1e-6)


def test_windows_at_whole_strides_are_where_a_crop_would_look() -> None:
    zf5 = geometry(sppnet("zf5", 2, width=0.1).backbone)
    cells = zf5.cells(256)
    assert cells == 15
    assert [zf5.window(first, 224, cells) for first in (0, 16, 32)] == [(0, 13), (1, 14), (2, 15)]
    assert zf5.window(31, 224, cells) == (2, 15)  # the nearest
    assert zf5.window(0, 400, cells) == (0, 15)  # as far as there is any


def test_the_papers_projection_by_hand() -> None:
    padded_by_half = Geometry(((7, 2, 3), (3, 2, 1), (5, 2, 2), (3, 2, 1)))
    assert (padded_by_half.stride, padded_by_half.offset) == (16, 0.0)
    # floor(100/16) + 1 = 7, ceil(200/16) − 1 = 12: cells centred on 112 … 192.
    assert padded_by_half.paper_window(100, 200) == (7, 12)


def test_layers_that_do_not_stand_in_a_row() -> None:
    with pytest.raises(ValueError, match="ResNet: its layers do not stand in a row"):
        geometry(torchvision.models.resnet18())
