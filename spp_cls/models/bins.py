"""Which cells of an h × w map are the n × n bins of a pyramid level: Appendix A's rule, and others to study.

Each rule returns `Edges`, or raises a ValueError where it cannot give n × n bins. Pictures: `docs/bins.md`.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

# (rows, columns): n half-open intervals (start, stop) in cells each, clipped to the map.
Edges = tuple[list[tuple[int, int]], list[tuple[int, int]]]
Rule = Callable[[int, int, int], Edges]


def appendix_a(h: int, w: int, n: int) -> Edges:
    """The bins of an h × w map at level n (He et al. 2014, Appendix A), for any h, w, n ≥ 1.

    Row i is [floor(i·h/n), ceil((i+1)·h/n)): all the cells that its exact n-th share of the height touches.
    It is never empty, and two neighbours share at most one row of cells. Equal to `adaptive_max_pool2d`.
    """
    _check_positive("appendix_a", h, w, n)

    def axis(cells: int) -> list[tuple[int, int]]:
        return [(i * cells // n, _ceil_div((i + 1) * cells, n)) for i in range(n)]

    return axis(h), axis(w)


def window(h: int, w: int, n: int) -> Edges:
    """Windows of ceil(a/n) cells at a stride of floor(a/n), each axis with its own a (He et al. 2014, §2.3).

    With r = a mod n, it gives n bins where r ≤ floor(a/n), and Appendix A's where r is 0 or 1 and a ≥ n.
    """

    def axis(cells: int) -> list[tuple[int, int]]:
        stride = _stride("window", h, w, n, cells)
        win = _ceil_div(cells, n)
        return _slide(cells, win, stride, (cells - win) // stride + 1)

    return _n_by_n("window", h, w, n, axis(h), axis(w))


def floor(h: int, w: int, n: int) -> Edges:
    """Windows and strides of floor(h/n) cells, both axes from the height, as in tutorials (n = 1, 2, 4, …).

    The variant that takes the columns from the width is `floor(h, h, n)[0], floor(w, w, n)[1]`.
    """
    win = _stride("floor", h, w, n, h)
    return _n_by_n("floor", h, w, n, *(_slide(cells, win, win, cells // win) for cells in (h, w)))


def same(h: int, w: int, n: int) -> Edges:
    """The windows and strides of §2.3 under TensorFlow's SAME padding, which makes ceil(a/stride) bins.

    As in tensorflow issue 6011: window ceil(a/n), stride floor(a/n); n bins only where n divides a.
    """

    def axis(cells: int) -> list[tuple[int, int]]:
        stride = _stride("same", h, w, n, cells)
        # The padding itself is not in here: a map that needs some has more than n bins.
        return _slide(cells, _ceil_div(cells, n), stride, _ceil_div(cells, stride))

    return _n_by_n("same", h, w, n, axis(h), axis(w))


def ceil_padded(h: int, w: int, n: int) -> Edges:
    """Windows and strides of k = ceil(a/n), padded by floor((k·n − a + 1)/2) at both ends, as in Caffe.

    It fails where the padding is k or more: the first bin would hold no cell, and Caffe stops. PyTorch is
    stricter: its pooling refuses a padding above k/2, as for 9 cells and n = 4 (k = 3, padding 2).
    """
    _check_positive("ceil_padded", h, w, n)

    def axis(cells: int) -> list[tuple[int, int]]:
        win = _ceil_div(cells, n)
        pad = (win * n - cells + 1) // 2
        if pad >= win:
            given = f"a first bin without cells: padding {pad}, window {win}"
            raise ValueError(f"ceil_padded: a {h}×{w} map with n = {n} gives {given}")
        return _slide(cells, win, win, n, before=pad)

    return axis(h), axis(w)


RULES: dict[str, Rule] = {
    "appendix_a": appendix_a,
    "window": window,
    "floor": floor,
    "same": same,
    "ceil_padded": ceil_padded,
}


def is_right(rule: Rule, h: int, w: int, n: int) -> bool:
    """Whether the rule gives Appendix A's bins for this map and level."""
    try:
        return rule(h, w, n) == appendix_a(h, w, n)
    except ValueError:
        return False


def pool_by_edges(input: Tensor, edges: Edges, pool: str = "max") -> Tensor:
    """Pools (B, C, H, W) to (B, C, n, n), one call for each interval: slow, literal, differentiable.

    A bin's average is over the cells it holds; padding never counts. At ties the maximum's gradient goes to
    one cell, the first in reading order, as in `adaptive_max_pool2d`.
    """
    if pool not in ("max", "average"):
        raise ValueError(f"pool={pool!r}: must be 'max' or 'average'")

    pool2d = F.max_pool2d if pool == "max" else F.avg_pool2d
    rows, columns = edges
    # Columns before rows: so the first cell in reading order wins a tie.
    x = torch.cat([pool2d(input[..., a:b], (1, b - a)) for a, b in columns], dim=-1)  # (B, C, H, n)
    return torch.cat([pool2d(x[..., a:b, :], (b - a, 1)) for a, b in rows], dim=-2)  # (B, C, n, n)


def _ceil_div(a: int, n: int) -> int:
    return -(-a // n)


def _slide(cells: int, win: int, stride: int, count: int, before: int = 0) -> list[tuple[int, int]]:
    starts = [i * stride - before for i in range(count)]
    return [(max(start, 0), min(start + win, cells)) for start in starts]


def _check_positive(rule: str, h: int, w: int, n: int) -> None:
    if min(h, w, n) < 1:
        raise ValueError(f"{rule}: a {h}×{w} map with n = {n}: all three must be at least 1")


def _stride(rule: str, h: int, w: int, n: int, cells: int) -> int:
    """floor(cells/n), refused where it is 0."""
    _check_positive(rule, h, w, n)
    if cells < n:
        raise ValueError(f"{rule}: a {h}×{w} map with n = {n} gives a stride of 0: needs {n} cells or more")
    return cells // n


def _n_by_n(rule: str, h: int, w: int, n: int, rows: list[tuple[int, int]], columns: list[tuple[int, int]]) -> Edges:
    if (len(rows), len(columns)) != (n, n):
        given = f"{len(rows)}×{len(columns)} bins, not {n}×{n}"
        raise ValueError(f"{rule}: a {h}×{w} map with n = {n} gives {given}")
    return rows, columns
