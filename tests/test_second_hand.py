"""The claims of docs/second_hand.md, computed: each test bears the name that the page cites."""

from __future__ import annotations

import ast
import math
import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from spp_cls.models.bins import appendix_a, ceil_padded, is_right, pool_by_edges, same, window

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "second_hand.md"
FILTERS = 256


def pooled_size(a: int, win: int, stride: int, padding: int = 0, ceil_mode: bool = False) -> int:
    """Bins per side that max_pool2d makes of an a×a map."""
    return F.max_pool2d(torch.zeros(1, 1, a, a), win, stride, padding, ceil_mode=ceil_mode).shape[-1]


def conv_size(a: int, kernel: int, stride: int, padding: int) -> int:
    return F.conv2d(torch.zeros(1, 1, a, a), torch.zeros(1, 1, kernel, kernel), None, stride, padding).shape[-1]


def cells_seen(a: int, win: int, stride: int, count: int) -> set[int]:
    return {cell for i in range(count) for cell in range(i * stride, i * stride + win)} & set(range(a))


def pyramid(x: Tensor, levels: tuple[int, ...]) -> Tensor:
    h, w = x.shape[-2:]
    return torch.cat([pool_by_edges(x, appendix_a(h, w, n)).flatten(1) for n in levels], 1)


# --- the pyramid and its length


def test_levels_5_4_3_2_1_have_55_bins_and_6_3_2_1_have_50() -> None:
    assert sum(n * n for n in (5, 4, 3, 2, 1)) == 55
    assert sum(n * n for n in (6, 3, 2, 1)) == 50
    assert pyramid(torch.rand(1, FILTERS, 13, 13), (6, 3, 2, 1)).shape == (1, 12_800)


def test_levels_4_2_1_have_21_bins_and_5376_values() -> None:
    assert sum(n * n for n in (4, 2, 1)) == 21
    assert pyramid(torch.rand(1, FILTERS, 13, 13), (4, 2, 1)).shape == (1, 5_376)


@pytest.mark.parametrize(("h", "w", "length"), [(13, 14, 46_592), (19, 14, 68_096), (13, 13, 43_264)])
def test_flat_maps_have_46592_68096_and_43264_values_and_their_pyramids_one_length(h: int, w: int, length: int) -> None:
    x = torch.rand(1, FILTERS, h, w)
    assert x.flatten(1).shape == (1, length)
    assert pyramid(x, (6, 3, 2, 1)).shape == (1, 12_800)


def test_a_rectangle_needs_no_square() -> None:
    x = torch.zeros(1, 1, 10, 20)
    x[..., 19] = 1  # beyond a square of side min(H, W) = 10
    vector = pyramid(x, (6, 3, 2, 1))
    assert vector.shape == pyramid(x[..., :10], (6, 3, 2, 1)).shape == (1, 50)
    assert vector.sum() == 6 + 3 + 2 + 1  # the last column of bins of every level sees it


def test_one_head_serves_180_and_224_px() -> None:
    lengths = {pyramid(torch.rand(1, FILTERS, a, a), (6, 3, 2, 1)).shape[1] for a in (10, 13)}
    assert lengths == {12_800}


# --- windows and strides


def test_window_written_as_n_over_a_is_one_cell_at_a_stride_of_zero() -> None:
    assert (math.ceil(6 / 13), math.floor(6 / 13)) == (1, 0)
    with pytest.raises(RuntimeError, match="stride"):
        F.max_pool2d(torch.zeros(1, 1, 13, 13), 1, 0)
    assert (math.ceil(13 / 6), math.floor(13 / 6)) == (3, 2)
    assert pooled_size(13, 3, 2) == 6


def test_windows_of_13_for_3_2_1_are_5_7_13() -> None:
    assert [math.ceil(13 / n) for n in (3, 2, 1)] == [5, 7, 13]


def test_ceil_floor_is_right_where_a_mod_n_is_0_or_1_and_nowhere_else() -> None:
    for n in range(1, 7):
        for a in range(1, 65):
            assert is_right(window, a, a, n) == (a >= n and a % n in (0, 1))


def test_ceil_floor_is_right_at_13_for_the_papers_levels() -> None:
    assert all(is_right(window, 13, 13, n) for n in (6, 4, 3, 2, 1))


def test_ceil_floor_at_180_px_gives_24320_values_not_12800() -> None:
    sides = [pooled_size(10, math.ceil(10 / n), 10 // n) for n in (6, 3, 2, 1)]
    assert sides == [9, 3, 2, 1]
    assert FILTERS * sum(side * side for side in sides) == 24_320


def test_ceil_floor_on_10_by_20_gives_17408_values_not_12800() -> None:
    x = torch.zeros(1, FILTERS, 10, 20)
    levels = [
        F.max_pool2d(x, (math.ceil(10 / n), math.ceil(20 / n)), (10 // n, 20 // n)).flatten(1) for n in (6, 3, 2, 1)
    ]
    assert torch.cat(levels, 1).shape == (1, 17_408)
    assert pyramid(x, (6, 3, 2, 1)).shape == (1, 12_800)


def test_ceil_floor_gives_25_bins_at_11_and_36_at_7_for_n_4() -> None:
    assert pooled_size(11, 3, 2) ** 2 == 25
    assert pooled_size(7, 2, 1) ** 2 == 36


@pytest.mark.parametrize("a", [13, 10])
def test_same_fails_at_13_and_10_for_n_6(a: int) -> None:
    with pytest.raises(ValueError, match="not 6×6"):
        same(a, a, 6)
    # SAME makes ceil(a/stride) bins: 7 and 10 with a stride of floor(a/n), 5 and 5 with one of ceil(a/n).
    assert math.ceil(a / (a // 6)) == {13: 7, 10: 10}[a]
    assert math.ceil(a / math.ceil(a / 6)) == 5


def test_released_level_2_has_a_stride_of_7_where_the_paper_has_6() -> None:
    # Windows of 7 at strides of 7, rounded up: [0, 7) and [7, 13).
    assert pooled_size(13, 7, 7, ceil_mode=True) == 2
    assert window(13, 13, 2)[0] == [(0, 7), (6, 13)]


# --- other rules


def test_caffes_padding_pools_other_cells_and_stops_at_13_for_n_6() -> None:
    # 10 cells, n = 6: kernel and stride 2, padding 1.
    assert pooled_size(10, 2, 2, 1) == 6
    assert ceil_padded(10, 10, 6)[0] == [(0, 1), (1, 3), (3, 5), (5, 7), (7, 9), (9, 10)]
    assert appendix_a(10, 10, 6)[0] == [(0, 2), (1, 4), (3, 5), (5, 7), (6, 9), (8, 10)]
    with pytest.raises(RuntimeError, match="pad should be at most half"):
        pooled_size(13, 3, 3, 3)
    with pytest.raises(ValueError, match="first bin without cells"):
        ceil_padded(13, 13, 6)


def test_caffes_padding_divided_by_slash_is_a_type_error() -> None:
    with pytest.raises(TypeError, match="padding"):
        F.max_pool2d(torch.zeros(1, 1, 10, 10), 2, 2, (2 * 6 - 10 + 1) / 2)  # type: ignore[call-overload]


def test_half_padding_in_ceil_mode_raises_or_miscounts() -> None:
    raises, miscounts = [], {}
    for n in range(1, 7):
        for a in range(n, 65):
            k = -(-a // n)
            try:
                count = pooled_size(a, k, k, (k * n - a) // 2, ceil_mode=True)
            except RuntimeError:
                raises.append((a, n))
            else:
                if count != n:
                    miscounts[a, n] = count
    assert raises == [(6, 5), (11, 5), (7, 6), (8, 6), (13, 6), (14, 6)]
    assert miscounts == {(5, 4): 3, (7, 5): 4, (9, 6): 5}


def test_window_of_the_remainder_plus_one_skips_cells() -> None:
    for n in range(1, 7):
        for a in range(n, 65):
            assert pooled_size(a, a % n + 1, a // n) == n
    assert 13 - len(cells_seen(13, 13 % 2 + 1, 13 // 2, 2)) == 9
    assert cells_seen(18, 18 % 6 + 1, 18 // 6, 6) == {0, 3, 6, 9, 12, 15}


def test_window_of_floor_plus_remainder_covers_all_with_larger_windows() -> None:
    for n in range(1, 7):
        for a in range(n, 65):
            win, stride = a // n + a % n, a // n
            assert pooled_size(a, win, stride) == n
            assert cells_seen(a, win, stride, n) == set(range(a))
    # 10 cells, n = 6: windows of 5; the longest bin of Appendix A has 3.
    assert 10 // 6 + 10 % 6 == 5
    assert max(stop - start for start, stop in appendix_a(10, 10, 6)[0]) == 3


def test_window_and_stride_of_floor_miscount_or_drop_the_tail() -> None:
    assert pooled_size(10, 10 // 4, 10 // 4) == 5
    assert pooled_size(13, 13 // 4, 13 // 4) == 4 and cells_seen(13, 3, 3, 4) == set(range(12))
    wide = F.max_pool2d(torch.zeros(1, 1, 10, 20), 10 // 2)  # the window from the height
    assert wide.shape[-2:] == (2, 4)


def test_yolo_block_keeps_the_map_and_has_no_fixed_length() -> None:
    def block(x: Tensor) -> Tensor:
        return torch.cat([x] + [F.max_pool2d(x, k, stride=1, padding=k // 2) for k in (5, 9, 13)], 1)

    assert block(torch.rand(1, 8, 13, 13)).shape == (1, 32, 13, 13)
    assert block(torch.rand(1, 8, 10, 10)).shape == (1, 32, 10, 10)


# --- the nets and their training


def test_180_px_by_a_crop_loses_a_third_of_the_region() -> None:
    region = torch.zeros(1, 1, 224, 224)
    region[..., :8, :] = region[..., -8:, :] = region[..., :, :8] = region[..., :, -8:] = 1  # a frame
    cropped = region[..., 22:202, 22:202]
    resized = F.interpolate(region, size=(180, 180), mode="bilinear", antialias=True)
    assert cropped.shape == resized.shape
    assert cropped.sum() == 0
    assert (resized[..., 0, :] > 0.99).all() and (resized[..., :, -1] > 0.99).all()
    assert pytest.approx(0.354, abs=5e-4) == 1 - 180**2 / 224**2


def test_conv1_paddings_of_a_port_give_other_maps_than_table_1() -> None:
    # Convnet*-5, 11×11 at stride 4: Table 1 says 55, which takes padding 2.
    assert conv_size(224, 11, 4, 5) == 56 and conv_size(224, 11, 4, 2) == 55
    # Overfeat, 7×7 at stride 2, then pool 3×3 at stride 3: Table 1 says 36.
    assert conv_size(224, 7, 2, 3) == 112 and pooled_size(112, 3, 3) == 37
    assert conv_size(224, 7, 2, 1) == 110 and pooled_size(110, 3, 3) == 36
    # ZF-5, the same conv, then pool 3×3 at stride 2: Table 1 says 55.
    assert pooled_size(112, 3, 2) == 55 and pooled_size(112, 3, 2, ceil_mode=True) == 56
    assert pooled_size(110, 3, 2, ceil_mode=True) == 55


def test_local_response_norm_over_96_channels_is_not_within_channel() -> None:
    def within_channel(x: Tensor) -> Tensor:
        return x / (1 + 5e-5 * F.avg_pool2d(x * x, 3, stride=1, padding=1)).pow(0.75)

    x = torch.full((1, 96, 5, 5), 50.0)
    changed = x.clone()
    changed[:, 0] = 500  # the first channel alone
    across = torch.nn.LocalResponseNorm(96)
    assert not torch.allclose(across(x)[:, 40], across(changed)[:, 40])
    assert torch.equal(within_channel(x)[:, 1:], within_channel(changed)[:, 1:])


# --- the page


def defined_tests(path: Path) -> set[str]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return {node.name for node in tree.body if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")}


def test_page_names_only_tests_that_exist_and_all_of_this_file() -> None:
    named = set(re.findall(r"`(test_\w+)`", PAGE.read_text(encoding="utf-8")))
    here, bins = defined_tests(Path(__file__)), defined_tests(ROOT / "tests" / "models" / "test_bins.py")
    assert named <= here | bins, named - here - bins
    of_claims = {name for name in here if not name.startswith("test_page_")}
    assert of_claims <= named, of_claims - named


def test_page_rows_are_whole() -> None:
    rows = [line for line in PAGE.read_text(encoding="utf-8").splitlines() if line.startswith("|")]
    claims = [row for row in rows if not row.startswith(("| claim ", "|---"))]
    assert len(claims) > 20
    for row in claims:
        cells = [cell.strip() for cell in row.strip("|").split(" | ")]
        assert len(cells) == 4 and all(cells), row
        assert cells[1].split(",")[0] in ("right", "wrong", "in part"), row
        assert "`test_" in cells[3] or "text, " in cells[3], row
