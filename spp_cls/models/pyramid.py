"""Spatial pyramid pooling: a map of any size becomes a vector of fixed length.

He et al. 2014, §2.2 and Appendix A. Level n cuts a map of h × w cells into n × n bins; row i of the bins holds the
cells [floor(i·h/n), ceil((i+1)·h/n)), columns likewise, for any h, w ≥ 1, also smaller than n.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .bins import Edges, pool_by_edges

POOLS = ("max", "average")


def spatial_pyramid_pool2d(
    input: Tensor,
    levels: Sequence[int],
    pool: str = "max",
    bins: Callable[[int, int, int], Edges] | None = None,
) -> Tensor:
    """Pool `input` (B, C, h, w) into (B, C · Σ n²): levels in the order given, channel-major inside each.

    `bins` is a rule (h, w, n) → edges of the bins from `spp_cls.models.bins`, for study; without one the bins are
    Appendix A's, at full speed. He et al. 2014, §2.2.
    """
    if pool not in POOLS:
        raise ValueError(f"pool={pool!r}: use one of {', '.join(POOLS)}")
    if bins is not None:
        maps = {n: pool_by_edges(input, bins(input.shape[-2], input.shape[-1], n), pool) for n in set(levels)}
    elif pool == "max":
        maps = _max_pyramid(input, levels)
    else:
        maps = {n: _adaptive_average(input, n) for n in set(levels)}
    return torch.cat([maps[n].flatten(1) for n in levels], dim=1)  # (B, C, n, n) → (B, C·n²) each


def _max_pyramid(input: Tensor, levels: Sequence[int]) -> dict[int, Tensor]:
    """Level → (B, C, n, n). A level that divides a finer one is pooled from it.

    Exact, because floor(i·k·h / (k·n)) = floor(i·h/n), likewise ceil, and neighbouring bins leave no gap: bin i of
    level n is the union of the bins i·k … i·k+k−1 of level k·n. {6,3,2,1} so reads the map once.
    """
    maps: dict[int, Tensor] = {}
    for n in sorted(set(levels), reverse=True):
        finer = min((m for m in maps if m % n == 0), default=None)
        maps[n] = _adaptive_max(input, n) if finer is None else F.max_pool2d(maps[finer], finer // n)
    return maps


def _adaptive_max(input: Tensor, n: int) -> Tensor:
    # adaptive_max_pool2d has Appendix A's bins, but no deterministic backward on CUDA (pytorch#131972), wrong values
    # on MPS where n does not divide the map (pytorch#190064), and no form that exports with a free size.
    if torch.compiler.is_exporting():
        return _axis_by_axis(input, n, "max")
    if _has_to_be_deterministic(input) or input.device.type == "mps":
        return _gathered_max(input, n)
    return F.adaptive_max_pool2d(input, n)


def _adaptive_average(input: Tensor, n: int) -> Tensor:
    # adaptive_avg_pool2d has Appendix A's bins, but no form that exports with a free size, and on CUDA no deterministic
    # backward (torch.use_deterministic_algorithms names it).
    if torch.compiler.is_exporting() or _has_to_be_deterministic(input):
        return _axis_by_axis(input, n, "average")
    return F.adaptive_avg_pool2d(input, n)


def _has_to_be_deterministic(input: Tensor) -> bool:
    return input.is_cuda and torch.are_deterministic_algorithms_enabled()


def _gathered_max(input: Tensor, n: int) -> Tensor:
    """The same bins and bits from index_select and max_pool2d: each bin's cells are listed, short bins repeat one."""
    rows, columns = (_cells(size, n, input.device)[0] for size in input.shape[-2:])  # (n, k) each
    gathered = input.index_select(-2, rows.flatten()).index_select(-1, columns.flatten())  # (B, C, n·kh, n·kw)
    return F.max_pool2d(gathered, (rows.shape[1], columns.shape[1]))


def _axis_by_axis(input: Tensor, n: int, pool: str) -> Tensor:
    """The same bins for an exporter, to whom sizes are symbols and a window is no number; averages to a rounding."""
    in_rows = _pool_last_axis(input, n, pool)  # (B, C, h, n)
    return _pool_last_axis(in_rows.mT, n, pool).mT


def _pool_last_axis(x: Tensor, n: int, pool: str) -> Tensor:
    cells, own = _cells(x.shape[-1], n, x.device)
    x = torch.unflatten(x.index_select(-1, cells.flatten()), -1, (n, cells.shape[1]))  # (…, n, k)
    return x.amax(-1) if pool == "max" else (x * own).sum(-1) / own.sum(-1)


def _cells(size: int, n: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """(n, k) cells of each bin along one axis, and which are its own, not repeats of its last.

    k = floor(size/n) + 2 is the longest that a bin can be.
    """
    i = torch.arange(n, device=device)[:, None]
    start, stop = i * size // n, ((i + 1) * size + n - 1) // n
    cells = start + torch.arange(size // n + 2, device=device)
    return torch.minimum(cells, stop - 1), cells < stop


class SpatialPyramidPool2d(nn.Module):
    """`spatial_pyramid_pool2d` as a layer: (B, C, h, w) of any h, w ≥ 1 → (B, C · num_bins)."""

    def __init__(
        self,
        levels: Sequence[int],
        pool: str = "max",
        bins: Callable[[int, int, int], Edges] | None = None,
    ) -> None:
        super().__init__()
        if not levels or any(isinstance(n, bool) or not isinstance(n, int) or n < 1 for n in levels):
            raise ValueError(f"levels={levels}: a pyramid needs whole numbers of at least 1, like [6, 3, 2, 1]")
        if pool not in POOLS:
            raise ValueError(f"pool={pool!r}: use one of {', '.join(POOLS)}")
        self.levels = tuple(levels)
        self.pool = pool
        self.bins = bins

    @property
    def num_bins(self) -> int:
        """Σ n²: 50 for {6,3,2,1}, 30 for {4,3,2,1}, 21 for {4,2,1}."""
        return sum(n * n for n in self.levels)

    def forward(self, input: Tensor) -> Tensor:
        return spatial_pyramid_pool2d(input, self.levels, self.pool, self.bins)

    def extra_repr(self) -> str:
        rule = "" if self.bins is None else f", bins={self.bins.__name__}"
        return f"levels={list(self.levels)}, pool={self.pool!r}{rule}"
