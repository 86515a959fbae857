from __future__ import annotations

import math
from fractions import Fraction
from functools import cache

import numpy as np
import numpy.typing as npt
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from spp_cls.models import pyramid
from spp_cls.models.bins import appendix_a, window
from spp_cls.models.pyramid import SpatialPyramidPool2d, _gathered_max, spatial_pyramid_pool2d

PYRAMIDS = ((6, 3, 2, 1), (4, 3, 2, 1), (4, 2, 1))
LEVELS = (1, 2, 3, 4, 6)
SIZES = [(h, w) for h in range(1, 41) for w in range(1, 41)]
ODD_SIZES = [(1, 1), (1, 7), (2, 5), (5, 3), (6, 6), (10, 10), (13, 13), (14, 10), (18, 18), (7, 40)]


@cache
def edges(cells: int, n: int) -> list[tuple[int, int]]:
    """Appendix A as printed: floor on the left and top, ceiling on the right and bottom, in exact fractions."""
    return [(math.floor(Fraction(i * cells, n)), math.ceil(Fraction((i + 1) * cells, n))) for i in range(n)]


def by_brute_force(maps: npt.NDArray[np.float32], n: int) -> npt.NDArray[np.float32]:
    """(B, C, h, w) → (B, C, n, n), bin by bin."""
    h, w = maps.shape[-2:]
    out = np.empty((*maps.shape[:2], n, n), np.float32)
    for i, (top, bottom) in enumerate(edges(h, n)):
        for j, (left, right) in enumerate(edges(w, n)):
            out[:, :, i, j] = maps[:, :, top:bottom, left:right].max((2, 3))
    return out


def whole_numbers(h: int, w: int) -> Tensor:
    # Below zero: a bin that took a padding zero for a cell would show.
    generator = torch.Generator().manual_seed(100 * h + w)
    return torch.randint(-1000, 0, (1, 2, h, w), generator=generator).float()


def distinct(h: int, w: int) -> Tensor:
    """Two maps of which no two cells are alike."""
    order = torch.randperm(2 * h * w, generator=torch.Generator().manual_seed(100 * h + w))
    return order.float().view(1, 2, h, w) - 2 * h * w


# --- the bins


def test_every_size_up_to_40_has_the_bins_of_appendix_a_bit_for_bit() -> None:
    for h, w in SIZES:
        x = whole_numbers(h, w)
        expected = {n: torch.from_numpy(by_brute_force(x.numpy(), n)) for n in LEVELS}
        for levels in PYRAMIDS:
            vector = torch.cat([expected[n].flatten(1) for n in levels], 1)
            assert torch.equal(spatial_pyramid_pool2d(x, levels), vector), (h, w, levels)
        for n in LEVELS:
            assert torch.equal(F.adaptive_max_pool2d(x, n), expected[n]), (h, w, n)
            assert torch.equal(_gathered_max(x, n), expected[n]), (h, w, n)


def test_brute_force_by_hand() -> None:
    x = np.arange(1, 7, dtype=np.float32).reshape(1, 1, 2, 3)  # 1 2 3 / 4 5 6
    assert by_brute_force(x, 2).tolist() == [[[[2, 3], [5, 6]]]]  # columns [0,2) and [1,3): they share the middle one
    assert by_brute_force(x, 4).tolist() == [[[[1, 2, 3, 3]] * 2 + [[4, 5, 6, 6]] * 2]]


def test_average_equals_adaptive_avg_pool2d() -> None:
    for h, w in ODD_SIZES:
        x = whole_numbers(h, w)
        for levels in PYRAMIDS:
            expected = torch.cat([F.adaptive_avg_pool2d(x, n).flatten(1) for n in levels], 1)
            assert torch.equal(spatial_pyramid_pool2d(x, levels, "average"), expected)


@pytest.mark.parametrize("pool", ["max", "average"])
def test_the_rule_appendix_a_gives_what_is_built_in(pool: str) -> None:
    for h, w in ODD_SIZES:
        x = whole_numbers(h, w)
        literal = spatial_pyramid_pool2d(x, (6, 3, 2, 1), pool, appendix_a)
        # Averages of rows of averages are rounded otherwise.
        rtol = 0 if pool == "max" else 1e-6
        torch.testing.assert_close(literal, spatial_pyramid_pool2d(x, (6, 3, 2, 1), pool), rtol=rtol, atol=0)


def test_another_rule_is_used_and_fails_where_it_has_no_bins() -> None:
    x = whole_numbers(13, 13)
    assert torch.equal(spatial_pyramid_pool2d(x, [6], bins=window), spatial_pyramid_pool2d(x, [6]))
    x = whole_numbers(14, 14)  # 6 windows of 3 at a stride of 2 end at cell 13
    assert torch.equal(spatial_pyramid_pool2d(x, [6], bins=window), F.max_pool2d(x, 3, 2).flatten(1))
    with pytest.raises(ValueError, match=r"window: a 10×10 map with n = 6 gives 9×9 bins, not 6×6"):
        spatial_pyramid_pool2d(whole_numbers(10, 10), [6], bins=window)


def test_one_level_of_6_is_the_ordinary_last_pool_at_13_and_at_18() -> None:
    x = torch.randn(2, 8, 13, 13, generator=torch.Generator().manual_seed(0))
    assert torch.equal(spatial_pyramid_pool2d(x, [6]), F.max_pool2d(x, 3, 2).flatten(1))
    x = torch.randn(2, 8, 18, 18, generator=torch.Generator().manual_seed(0))
    assert torch.equal(spatial_pyramid_pool2d(x, [6]), F.max_pool2d(x, 3, 3).flatten(1))


# --- the vector


def test_levels_in_the_order_given_channel_major_inside_each() -> None:
    x = torch.tensor([[1.0, 2.0, 3.0, 4.0], [50.0, 60.0, 70.0, 80.0]]).view(1, 2, 2, 2)
    assert spatial_pyramid_pool2d(x, [2, 1]).tolist() == [[1, 2, 3, 4, 50, 60, 70, 80, 4, 80]]
    assert spatial_pyramid_pool2d(x, [1, 2]).tolist() == [[4, 80, 1, 2, 3, 4, 50, 60, 70, 80]]
    assert spatial_pyramid_pool2d(x, [1, 1], "average").tolist() == [[2.5, 65, 2.5, 65]]


def test_a_map_smaller_than_n_repeats_its_cells() -> None:
    assert spatial_pyramid_pool2d(torch.tensor([[[[7.0]]]]), [6, 3, 2, 1]).tolist() == [[7.0] * 50]
    x = torch.tensor([[[[1.0, 2.0]]]])  # columns of 3: {1}, {1, 2}, {2}
    assert spatial_pyramid_pool2d(x, [3]).tolist() == [[1, 2, 2] * 3]


@pytest.mark.parametrize(("levels", "num_bins"), [((6, 3, 2, 1), 50), ((4, 3, 2, 1), 30), ((4, 2, 1), 21), ((6,), 36)])
def test_num_bins_and_length(levels: tuple[int, ...], num_bins: int) -> None:
    layer = SpatialPyramidPool2d(levels)
    assert layer.num_bins == num_bins
    for h, w in ((13, 13), (10, 10), (1, 3), (30, 45)):
        assert layer(torch.zeros(2, 256, h, w)).shape == (2, 256 * num_bins)


@pytest.mark.parametrize("pool", ["max", "average"])
def test_memory_format_changes_nothing(pool: str) -> None:
    for h, w in ODD_SIZES:
        x = whole_numbers(h, w)
        pooled = spatial_pyramid_pool2d(x.to(memory_format=torch.channels_last), (6, 3, 2, 1), pool)
        rtol = 0 if pool == "max" else 1e-6
        torch.testing.assert_close(pooled, spatial_pyramid_pool2d(x, (6, 3, 2, 1), pool), rtol=rtol, atol=0)


# --- gradients


@pytest.mark.parametrize("pool", ["max", "average"])
@pytest.mark.parametrize("size", [(1, 1), (2, 5), (7, 4), (10, 10)])
def test_gradcheck(pool: str, size: tuple[int, int]) -> None:
    x = distinct(*size).double().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: spatial_pyramid_pool2d(x, (6, 3, 2, 1), pool), x, eps=0.1)


def gradient(x: Tensor, pooled: Tensor) -> Tensor:
    weights = torch.arange(1.0, pooled.numel() + 1).view_as(pooled)  # whole: exact in any order of adding
    (grad,) = torch.autograd.grad(pooled, x, weights)
    return grad


def test_the_gathered_path_has_the_same_gradient_bit_for_bit() -> None:
    for h, w in [*ODD_SIZES, *((h, w) for h in range(1, 15) for w in range(1, 15))]:
        x = distinct(h, w).requires_grad_()
        for n in LEVELS:
            expected = gradient(x, F.adaptive_max_pool2d(x, n))
            assert torch.equal(gradient(x, _gathered_max(x, n)), expected), (h, w, n)


def test_a_level_pooled_from_a_finer_one_has_the_same_gradient_bit_for_bit() -> None:
    for h, w in ODD_SIZES:
        x = distinct(h, w).requires_grad_()
        for levels in PYRAMIDS:
            naive = torch.cat([F.adaptive_max_pool2d(x, n).flatten(1) for n in levels], 1)
            assert torch.equal(gradient(x, spatial_pyramid_pool2d(x, levels)), gradient(x, naive)), (h, w, levels)


def test_at_ties_the_gradient_keeps_its_sum() -> None:
    x = torch.ones(1, 1, 13, 13, requires_grad=True)
    for pooled in (spatial_pyramid_pool2d(x, (6, 3, 2, 1)), _gathered_max(x, 6)):
        assert gradient(x, pooled).sum() == sum(range(1, pooled.numel() + 1))


# --- for an exporter


def test_what_an_exporter_sees_is_the_same_bits_without_adaptive_pooling(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = [whole_numbers(h, w) for h, w in ODD_SIZES]
    expected = [spatial_pyramid_pool2d(x, (6, 3, 2, 1)) for x in inputs]
    monkeypatch.setattr(torch.compiler, "is_exporting", lambda: True)
    monkeypatch.setattr(pyramid.F, "adaptive_max_pool2d", None)
    assert all(torch.equal(spatial_pyramid_pool2d(x, (6, 3, 2, 1)), y) for x, y in zip(inputs, expected, strict=True))


def test_averages_for_an_exporter_are_those_of_adaptive_avg_pool2d(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = [distinct(h, w) / 100 for h, w in ODD_SIZES]
    expected = [spatial_pyramid_pool2d(x, (6, 4, 3, 1), "average") for x in inputs]
    monkeypatch.setattr(torch.compiler, "is_exporting", lambda: True)
    monkeypatch.setattr(pyramid.F, "adaptive_avg_pool2d", None)
    for x, y in zip(inputs, expected, strict=True):
        torch.testing.assert_close(spatial_pyramid_pool2d(x, (6, 4, 3, 1), "average"), y, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("pool", ["max", "average"])
def test_exports_with_a_free_size(pool: str) -> None:
    free = {dim: torch.export.Dim.AUTO for dim in (0, 2, 3)}
    layer = SpatialPyramidPool2d((6, 3, 2, 1), pool)
    program = torch.export.export(layer, (torch.randn(2, 3, 13, 15),), dynamic_shapes=(free,)).module()
    for h, w in ((13, 13), (10, 10), (40, 7), (3, 4), (6, 12)):
        x = torch.randn(5, 3, h, w)
        torch.testing.assert_close(program(x), layer(x), rtol=0, atol=0 if pool == "max" else 1e-6)


# --- mistakes


@pytest.mark.parametrize("levels", [[], [0], [6, -1], [2.0], [True], ["6"]])
def test_levels_that_are_none(levels: list[int]) -> None:
    with pytest.raises(
        ValueError, match=r"^levels=.*: a pyramid needs whole numbers of at least 1, like \[6, 3, 2, 1\]"
    ):
        SpatialPyramidPool2d(levels)


def test_a_pool_that_is_none() -> None:
    for call in (
        lambda: SpatialPyramidPool2d([1], "mean"),
        lambda: spatial_pyramid_pool2d(torch.ones(1, 1, 1, 1), [1], "mean"),
    ):
        with pytest.raises(ValueError, match="^pool='mean': use one of max, average$"):
            call()


def test_repr_says_levels_and_rule() -> None:
    assert repr(SpatialPyramidPool2d((6, 1))) == "SpatialPyramidPool2d(levels=[6, 1], pool='max')"
    assert repr(SpatialPyramidPool2d([2], bins=window)) == "SpatialPyramidPool2d(levels=[2], pool='max', bins=window)"
