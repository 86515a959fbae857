from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from spp_cls.models.bins import (
    RULES,
    Edges,
    Rule,
    appendix_a,
    ceil_padded,
    floor,
    is_right,
    pool_by_edges,
    same,
    window,
)

LEVELS = (1, 2, 3, 4, 6)


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Thousands of poolings of tiny maps: on busy cores two threads are up to a thousand times slower."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def maps_and_levels() -> list[tuple[int, int, int]]:
    return [(h, w, n) for h in range(1, 41) for w in range(1, 41) for n in LEVELS]


def random_map(h: int, w: int) -> Tensor:
    # Below zero: a bin that took a padding zero for a cell would show.
    return torch.rand(2, 3, h, w, generator=torch.Generator().manual_seed(100 * h + w)) - 2


def edges_or_none(rule: Rule, h: int, w: int, n: int) -> Edges | None:
    try:
        return rule(h, w, n)
    except ValueError:
        return None


# --- hand-computed


def test_appendix_a_at_13_and_10() -> None:
    rows, columns = appendix_a(13, 10, 6)
    assert rows == [(0, 3), (2, 5), (4, 7), (6, 9), (8, 11), (10, 13)]
    assert columns == [(0, 2), (1, 4), (3, 5), (5, 7), (6, 9), (8, 10)]
    assert appendix_a(13, 10, 3) == ([(0, 5), (4, 9), (8, 13)], [(0, 4), (3, 7), (6, 10)])
    assert appendix_a(13, 10, 2) == ([(0, 7), (6, 13)], [(0, 5), (5, 10)])
    assert appendix_a(13, 10, 1) == ([(0, 13)], [(0, 10)])


def test_appendix_a_repeats_the_cells_of_a_map_smaller_than_n() -> None:
    assert appendix_a(1, 2, 4) == ([(0, 1)] * 4, [(0, 1), (0, 1), (1, 2), (1, 2)])
    assert appendix_a(2, 3, 3) == ([(0, 1), (0, 2), (1, 2)], [(0, 1), (1, 2), (2, 3)])


def test_window_at_13_is_three_by_two_and_equals_appendix_a() -> None:
    rows, columns = window(13, 13, 6)  # Fig. 4's formula: ceil(13/6) = 3, floor(13/6) = 2
    assert rows == columns == [(0, 3), (2, 5), (4, 7), (6, 9), (8, 11), (10, 13)]
    assert all(is_right(window, 13, 13, n) for n in (6, 4, 3, 2, 1))


def test_window_leaves_the_last_row_of_10_unseen_at_level_4() -> None:
    assert window(10, 10, 4)[0] == [(0, 3), (2, 5), (4, 7), (6, 9)]  # row 9 is in none


def test_floor_takes_the_window_from_the_height() -> None:
    assert floor(10, 11, 2) == ([(0, 5), (5, 10)], [(0, 5), (5, 10)])  # column 10 is in none
    assert floor(9, 11, 2) == ([(0, 4), (4, 8)], [(0, 4), (4, 8)])


def test_same_where_n_divides_the_map() -> None:
    assert same(12, 6, 3) == ([(0, 4), (4, 8), (8, 12)], [(0, 2), (2, 4), (4, 6)])


def test_ceil_padded_puts_the_short_bins_at_the_ends() -> None:
    assert ceil_padded(10, 10, 6)[0] == [(0, 1), (1, 3), (3, 5), (5, 7), (7, 9), (9, 10)]
    assert ceil_padded(9, 9, 4)[0] == [(0, 1), (1, 4), (4, 7), (7, 9)]


@pytest.mark.parametrize(
    ("rule", "h", "w", "n", "message"),
    [
        (window, 10, 10, 6, "window: a 10×10 map with n = 6 gives 9×9 bins, not 6×6"),
        (window, 10, 20, 6, "window: a 10×20 map with n = 6 gives 9×6 bins, not 6×6"),
        (window, 9, 5, 6, "window: a 9×5 map with n = 6 gives a stride of 0: needs 6 cells or more"),
        (floor, 10, 20, 2, "floor: a 10×20 map with n = 2 gives 2×4 bins, not 2×2"),
        (floor, 20, 3, 2, "floor: a 20×3 map with n = 2 gives 2×0 bins, not 2×2"),
        (floor, 3, 20, 4, "floor: a 3×20 map with n = 4 gives a stride of 0: needs 4 cells or more"),
        (same, 13, 13, 6, "same: a 13×13 map with n = 6 gives 7×7 bins, not 6×6"),
        (same, 10, 10, 6, "same: a 10×10 map with n = 6 gives 10×10 bins, not 6×6"),
        (
            ceil_padded,
            13,
            12,
            6,
            "ceil_padded: a 13×12 map with n = 6 gives a first bin without cells: padding 3, window 3",
        ),
    ],
)
def test_messages_say_what_the_rule_gives_instead(rule: Rule, h: int, w: int, n: int, message: str) -> None:
    with pytest.raises(ValueError) as error:
        rule(h, w, n)
    assert str(error.value) == message


@pytest.mark.parametrize("rule", RULES.values())
@pytest.mark.parametrize("size", [(0, 5, 2), (5, 0, 2), (5, 5, 0), (-3, 5, 2)])
def test_every_rule_refuses_sizes_below_one(rule: Rule, size: tuple[int, int, int]) -> None:
    with pytest.raises(ValueError, match="must be at least 1"):
        rule(*size)


def test_rules_are_named_as_their_functions() -> None:
    assert list(RULES) == [rule.__name__ for rule in RULES.values()]


# --- what Appendix A's bins are


def test_appendix_a_holds_exactly_the_cells_that_the_share_touches() -> None:
    for cells in range(1, 65):
        for n in range(1, 9):
            for i, (start, stop) in enumerate(appendix_a(cells, 1, n)[0]):
                # Cell c is [c, c+1), the share is (i·cells/n, (i+1)·cells/n); both times n.
                touched = [c for c in range(cells) if (c + 1) * n > i * cells and c * n < (i + 1) * cells]
                assert touched == list(range(start, stop))


def test_appendix_a_is_never_empty_covers_all_and_overlaps_by_one_cell_at_most() -> None:
    for cells in range(1, 129):
        for n in range(1, 11):
            rows = appendix_a(cells, cells, n)[0]
            assert rows[0][0] == 0 and rows[-1][1] == cells and all(start < stop for start, stop in rows)
            assert all(before[1] - after[0] in (0, 1) for before, after in pairwise(rows))


@pytest.mark.parametrize("pool", ["max", "average"])
def test_appendix_a_is_adaptive_pooling(pool: str) -> None:
    adaptive = F.adaptive_max_pool2d if pool == "max" else F.adaptive_avg_pool2d
    for h, w, n in maps_and_levels():
        x = random_map(h, w)
        pooled = pool_by_edges(x, appendix_a(h, w, n), pool)
        if pool == "max":
            assert torch.equal(pooled, adaptive(x, n)), (h, w, n)
        else:
            assert torch.allclose(pooled, adaptive(x, n), atol=1e-6), (h, w, n)


# --- the rules of others against the pooling calls that they stand for


def by_window(x: Tensor, n: int) -> Tensor:
    h, w = x.shape[-2:]
    return F.max_pool2d(x, (-(-h // n), -(-w // n)), (h // n, w // n))


def by_floor(x: Tensor, n: int) -> Tensor:
    return F.max_pool2d(x, x.shape[-2] // n, x.shape[-2] // n)


def by_same(x: Tensor, n: int) -> Tensor:
    """SAME as TensorFlow defines it: padding for ceil(cells/stride) windows, its odd cell at the end."""
    win, stride = [], []
    sides: list[int] = []
    for cells in x.shape[-2:]:
        win.append(-(-cells // n))
        stride.append(cells // n)
        padding = max(win[-1] - (cells % stride[-1] or stride[-1]), 0)
        sides[:0] = [padding // 2, padding - padding // 2]  # F.pad wants the last axis first
    return F.max_pool2d(F.pad(x, sides, value=-torch.inf), win, stride)


def window_and_padding(cells: int, n: int) -> tuple[int, int]:
    win = -(-cells // n)
    return win, (win * n - cells + 1) // 2


def by_ceil_padded(x: Tensor, n: int) -> Tensor:
    win, padding = zip(*(window_and_padding(cells, n) for cells in x.shape[-2:]), strict=True)
    return F.max_pool2d(x, win, win, padding)


def pooled_or_none(call: Callable[[Tensor, int], Tensor], x: Tensor, n: int) -> Tensor | None:
    try:
        return call(x, n)
    except (
        RuntimeError,
        ZeroDivisionError,
    ):  # a stride of 0, no bins at all, or a padding above half the window
        return None


@pytest.mark.parametrize(("rule", "call"), [(window, by_window), (floor, by_floor), (same, by_same)])
def test_rule_is_its_pooling_call_and_fails_where_that_does(rule: Rule, call: Callable[[Tensor, int], Tensor]) -> None:
    for h, w, n in maps_and_levels():
        x = random_map(h, w)
        edges, pooled = edges_or_none(rule, h, w, n), pooled_or_none(call, x, n)
        if edges is None:
            assert pooled is None or pooled.shape[-2:] != (n, n), (h, w, n)
        else:
            assert pooled is not None and torch.equal(pool_by_edges(x, edges), pooled), (h, w, n)


def test_ceil_padded_is_its_pooling_call_where_pytorch_allows_the_padding() -> None:
    for h, w, n in maps_and_levels():
        x = random_map(h, w)
        edges, pooled = edges_or_none(ceil_padded, h, w, n), pooled_or_none(by_ceil_padded, x, n)
        axes = [window_and_padding(cells, n) for cells in (h, w)]
        assert (edges is None) == any(padding >= win for win, padding in axes), (h, w, n)
        assert (pooled is None) == any(2 * padding > win for win, padding in axes), (h, w, n)
        if pooled is not None:
            assert edges is not None and torch.equal(pool_by_edges(x, edges), pooled), (h, w, n)


def caffe_pooling(cells: int, win: int, stride: int, padding: int) -> list[tuple[int, int]] | None:
    """The windows of Caffe's pooling layer along one axis, after its source; None where its checks stop."""
    if padding >= win:
        return None
    count = -(-(cells + 2 * padding - win) // stride) + 1
    if padding and (count - 1) * stride >= cells + padding:
        count -= 1  # the last window must start inside the map
    starts = [i * stride - padding for i in range(count)]
    return [(max(start, 0), min(start + win, cells)) for start in starts]


def test_ceil_padded_is_what_caffe_pools_and_fails_where_caffe_stops() -> None:
    for cells in range(1, 129):
        for n in range(1, 17):
            win, padding = window_and_padding(cells, n)
            edges = edges_or_none(ceil_padded, cells, cells, n)
            assert (None if edges is None else edges[0]) == caffe_pooling(cells, win, win, padding), (
                cells,
                n,
            )
            assert edges is None or all(start < stop for start, stop in edges[0])


def test_sizes_at_which_ceil_padded_stops_in_caffe_and_in_pytorch() -> None:
    levels_and_sizes = [(n, a) for n in range(1, 7) for a in range(1, 65)]
    caffe = {(n, a) for n, a in levels_and_sizes if edges_or_none(ceil_padded, a, a, n) is None}
    torch_ = {(n, a) for n, a in levels_and_sizes if pooled_or_none(by_ceil_padded, random_map(a, a), n) is None}
    assert len(caffe) == 22 and len(torch_) == 29
    assert torch_ - caffe == {(4, 9), (5, 11), (5, 12), (6, 14), (6, 15), (6, 19), (6, 25)}
    assert (6, 13) in caffe  # the paper's own map
    assert {a for n, a in torch_ if n in (1, 2, 4)} == {1, 2, 3, 5, 9}


# --- §2.3's rule, size by size


def window_count(a: int, n: int) -> int | None:
    """Bins per side that floor-mode pooling gives, or None for a stride of 0."""
    pooled = pooled_or_none(by_window, torch.zeros(1, 1, a, a), n)
    return None if pooled is None else pooled.shape[-1]


def test_window_gives_the_wrong_count_at_exactly_these_sizes() -> None:
    wrong = {n: {a: window_count(a, n) for a in range(n, 65) if window_count(a, n) != n} for n in range(1, 7)}
    assert wrong == {
        1: {},
        2: {},
        3: {5: 4},
        4: {6: 5, 7: 6, 11: 5},
        5: {7: 6, 8: 7, 9: 8, 13: 6, 14: 6, 19: 6},
        6: {8: 7, 9: 8, 10: 9, 11: 10, 15: 7, 16: 7, 17: 8, 22: 7, 23: 7, 29: 7},
    }
    for n in range(1, 7):
        failing = {a for a in range(1, 65) if edges_or_none(window, a, a, n) is None}
        assert failing == set(range(1, n)) | set(wrong[n])
        assert all(window_count(a, n) is None for a in range(1, n))


def test_window_leaves_the_last_cells_unseen_at_exactly_these_sizes() -> None:
    unseen = {}
    for n in range(1, 7):
        edges = {a: edges_or_none(window, a, a, n) for a in range(1, 65)}
        unseen[n] = {a: a - found[0][-1][1] for a, found in edges.items() if found and found[0][-1][1] < a}
    assert {n: list(sizes) for n, sizes in unseen.items()} == {
        1: [],
        2: [],
        3: [a for a in range(8, 65) if a % 3 == 2],
        4: [10] + [a for a in range(14, 65) if a % 4 >= 2],
        5: [12, 17, 18] + [a for a in range(22, 65) if a % 5 >= 2],
        6: [14, 20, 21, 26, 27, 28] + [a for a in range(32, 65) if a % 6 >= 2],
    }
    assert all(count == a % n - 1 for n, sizes in unseen.items() for a, count in sizes.items())


def test_window_is_right_where_a_mod_n_is_0_or_1() -> None:
    for n in range(1, 7):
        assert [a for a in range(1, 65) if is_right(window, a, a, n)] == [a for a in range(n, 65) if a % n in (0, 1)]


def test_ceil_mode_gives_too_many_bins_wherever_a_mod_n_is_2_or_more() -> None:
    too_many = {n: 0 for n in range(1, 7)}
    for n in range(1, 7):
        for a in range(n, 65):
            count = F.max_pool2d(torch.zeros(1, 1, a, a), -(-a // n), a // n, ceil_mode=True).shape[-1]
            assert (count > n) == (a % n >= 2) and count >= n
            too_many[n] += count > n
    assert too_many == {1: 0, 2: 0, 3: 20, 4: 30, 5: 36, 6: 39}


def test_window_is_right_for_20_of_64_square_maps_under_the_papers_pyramid() -> None:
    right = [a for a in range(1, 65) if all(is_right(window, a, a, n) for n in (6, 3, 2, 1))]
    assert right == [6, 7, 12, 13, 18, 19, 24, 25, 30, 31, 36, 37, 42, 43, 48, 49, 54, 55, 60, 61]


def test_table_of_docs_bins_md() -> None:
    """Square maps up to 64, the paper's pyramid: Appendix A's bins, bins of other cells, failures."""
    page = (Path(__file__).parents[2] / "docs" / "bins.md").read_text(encoding="utf-8")
    for name, rule in RULES.items():
        right = other = 0
        for a in range(1, 65):
            if all(edges_or_none(rule, a, a, n) for n in (6, 3, 2, 1)):
                all_right = all(is_right(rule, a, a, n) for n in (6, 3, 2, 1))
                right, other = right + all_right, other + (not all_right)
        assert f"| `{name}` | {right} | {other} | {64 - right - other} |" in page


def test_same_gives_n_bins_only_where_n_divides_the_map() -> None:
    for n in range(1, 7):
        for a in range(1, 65):
            assert (edges_or_none(same, a, a, n) is not None) == (a % n == 0) == is_right(same, a, a, n)


# --- pool_by_edges


def test_pool_by_edges_by_hand() -> None:
    x = torch.arange(12.0).reshape(1, 1, 3, 4)
    edges = ([(0, 2), (1, 3)], [(0, 1), (1, 4)])
    assert pool_by_edges(x, edges).tolist() == [[[[4, 7], [8, 11]]]]
    assert pool_by_edges(x, edges, "average").tolist() == [[[[2, 4], [6, 8]]]]


def test_gradient_of_the_maximum_goes_to_the_cell_that_adaptive_pooling_takes_also_at_ties() -> None:
    weights = torch.arange(1.0, 37).reshape(6, 6)
    for h, w in [(13, 13), (10, 10), (10, 20), (4, 3)]:
        x = torch.randint(0, 3, (2, 3, h, w), generator=torch.Generator().manual_seed(h)).double()
        ours, adaptive = x.clone().requires_grad_(), x.clone().requires_grad_()
        (pool_by_edges(ours, appendix_a(h, w, 6)) * weights).sum().backward()  # type: ignore[no-untyped-call]
        (F.adaptive_max_pool2d(adaptive, 6) * weights).sum().backward()  # type: ignore[no-untyped-call]
        assert ours.grad is not None and adaptive.grad is not None and torch.equal(ours.grad, adaptive.grad)


def test_gradient_of_the_average_is_exact() -> None:
    x = torch.rand(1, 2, 5, 7, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda y: pool_by_edges(y, appendix_a(5, 7, 3), "average"), x)


def test_unknown_pool_is_refused() -> None:
    with pytest.raises(ValueError, match="pool='mean': must be 'max' or 'average'"):
        pool_by_edges(torch.zeros(1, 1, 4, 4), appendix_a(4, 4, 2), "mean")
