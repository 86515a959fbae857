"""Windows on a shared map: many regions of one picture, their features pooled from one pass of the convolutions.

He et al. 2014, §2.2 and §4.1: the map is computed once for a picture, and the pyramid pools any window of it. What is
computed here is meant for testing; gradients of it are not those of cropping where values tie.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

AT_ONCE = 64  # windows, so that what is gathered for them stays in a CPU's cache


def pool_windows(input: Tensor, windows: Tensor, levels: Sequence[int]) -> Tensor:
    """Maps `input` (B, C, h, w) and `windows` (N, 5) → (N, C · Σ n²), as `spatial_pyramid_pool2d` of each cropped map.

    A window is (picture, top, left, bottom, right) in cells, whole numbers, `bottom` and `right` not in it. The same
    bits as cropping the maps and pooling each: a bin of any height and width is the greatest of four blocks, in a table
    of the blocks whose sides are powers of two, which overlap to cover it.
    """
    pictures, channels, height, width = input.shape
    _check(windows, pictures, height, width)
    maps: dict[int, list[Tensor]] = {n: [] for n in levels}
    if not len(windows):
        return input.new_zeros(0, channels * sum(n * n for n in levels))
    base = [n for n in sorted(maps) if not any(m != n and m % n == 0 for m in maps)]  # the others are pooled from these
    longest = [max(_longest(windows[:, 3 + axis] - windows[:, 1 + axis], n) for n in base) for axis in (0, 1)]
    cells = input.permute(0, 2, 3, 1).contiguous()  # (B, h, w, C): each cell's channels lie together
    table = _blocks(cells, *(length.bit_length() for length in longest))  # (I, J, B, h, w, C)
    flat = table.flatten(0, 4)  # (I·J·B·h·w, C)
    for some in torch.split(windows, AT_ONCE):
        found: dict[int, Tensor] = {}
        for n in sorted(maps, reverse=True):
            finer = min((m for m in found if m % n == 0), default=None)
            if finer is None:
                found[n] = _greatest(flat, _corners(some, n, table.shape)).permute(0, 3, 1, 2)  # (N, C, n, n)
            else:
                found[n] = F.max_pool2d(found[finer], finer // n)
            maps[n].append(found[n].flatten(1))
    return torch.cat([torch.cat(maps[n]) for n in levels], 1)


def _check(windows: Tensor, pictures: int, height: int, width: int) -> None:
    if windows.ndim != 2 or windows.shape[1] != 5 or windows.is_floating_point():
        raise ValueError(f"windows {tuple(windows.shape)}, {windows.dtype}: give (N, 5) whole numbers")
    picture, top, left, bottom, right = windows.unbind(1)
    bad = (picture < 0) | (picture >= pictures) | (top < 0) | (left < 0) | (bottom > height) | (right > width)
    bad |= (top >= bottom) | (left >= right)
    if bad.any():
        first = int(bad.nonzero()[0])
        raise ValueError(
            f"window {first}, {windows[first].tolist()}: use picture, top, left, bottom, right inside {pictures} maps "
            f"of {height} × {width} cells, at least a cell high and wide"
        )


def _longest(sides: Tensor, n: int) -> int:
    """The most cells along one axis of a bin of level n."""
    start, stop = _edges(sides, n)
    return int((stop - start).max())


def _edges(sides: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """Starts and stops (N, n) of the bins along one axis of windows with `sides` cells. He et al. 2014, Appendix A."""
    i = torch.arange(n, device=sides.device)
    sides = sides[:, None]
    return i * sides // n, ((i + 1) * sides + n - 1) // n


def _blocks(cells: Tensor, rows: int, columns: int) -> Tensor:
    """(rows, columns, B, h, w, C): [i, j] at (y, x) is the greatest of 2^i × 2^j cells from there, as far as any."""
    in_rows = [cells]
    for i in range(rows - 1):
        in_rows.append(_pairs(in_rows[-1], 1, 2**i))
    both = [in_rows]
    for j in range(columns - 1):
        both.append([_pairs(block, 2, 2**j) for block in both[-1]])
    return torch.stack([torch.stack([both[j][i] for j in range(columns)]) for i in range(rows)])


def _pairs(block: Tensor, axis: int, step: int) -> Tensor:
    out, length = block.clone(), block.shape[axis]
    if step < length:
        further = block.narrow(axis, step, length - step)
        near = out.narrow(axis, 0, length - step)
        torch.maximum(near, further, out=near)
    return out


def _corners(windows: Tensor, n: int, shape: Sequence[int]) -> tuple[Tensor, ...]:
    """Where in the flat table the four blocks of each bin (N, n, n) lie."""
    _, columns, pictures, height, width, _ = shape
    picture, top, left, bottom, right = windows.unbind(1)
    (first_row, last_row, i), (first_column, last_column, j) = (
        _two_blocks(start, stop, n) for start, stop in ((top, bottom), (left, right))
    )
    tables = (i[:, :, None] * columns + j[:, None, :]) * pictures + picture[:, None, None]  # (N, n, n)
    return tuple(
        (tables * height + row[:, :, None]) * width + column[:, None, :]
        for row in (first_row, last_row)
        for column in (first_column, last_column)
    )


def _two_blocks(start: Tensor, stop: Tensor, n: int) -> tuple[Tensor, Tensor, Tensor]:
    """Along one axis, for each bin (N, n): where its first and its last block begin, and their power of two."""
    begin, end = (start[:, None] + edges for edges in _edges(stop - start, n))
    power = torch.frexp((end - begin).float()).exponent.long() - 1  # floor(log2), exactly; an MPS device has no double
    return begin, end - 2**power, power


def _greatest(flat: Tensor, places: tuple[Tensor, ...]) -> Tensor:
    """(N, n, n, C): the greatest of what `flat` holds at the places."""
    greatest = flat.index_select(0, places[0].flatten())
    for place in places[1:]:
        torch.maximum(greatest, flat.index_select(0, place.flatten()), out=greatest)
    return greatest.view(*places[0].shape, -1)


# From pixels to cells


@dataclass(frozen=True)
class Geometry:
    """Where the cells of a backbone's map look: cell i is centred on pixel `offset` + `stride` · i, from 0.

    `layers` are (kernel_size, stride, padding) of what the backbone runs, in order.
    """

    layers: tuple[tuple[int, int, int], ...]

    @property
    def stride(self) -> int:
        """Pixels from cell to cell: the product of all strides, 16 for ZF-5."""
        return math.prod(stride for _, stride, _ in self.layers)

    @property
    def offset(self) -> float:
        """The pixel on which cell 0 is centred: 14 for ZF-5; 0 where every layer pads by half its kernel."""
        offset, jump = 0.0, 1
        for kernel, stride, padding in self.layers:
            offset += jump * ((kernel - 1) / 2 - padding)
            jump *= stride
        return offset

    def cells(self, pixels: int) -> int:
        """How many cells the backbone makes of so many pixels."""
        for kernel, stride, padding in self.layers:
            pixels = (pixels + 2 * padding - kernel) // stride + 1
        return pixels

    def window(self, first: int, pixels: int, cells: int) -> tuple[int, int]:
        """Along one axis, the cells [start, stop) that stand for `pixels` px from `first`, of a map of `cells` cells.

        As many as the backbone would make of these pixels alone, and those that look nearest to where it would: the
        same ones, but for what padding adds at the edges, where `first` is a multiple of the stride.
        """
        size = min(self.cells(pixels), cells)
        start = min(max(0, round(first / self.stride)), cells - size)
        return start, start + size

    def windows(self, pixels: Tensor, height: int, width: int) -> Tensor:
        """Windows (N, 5) in px, of pictures whose maps have `height` × `width` cells → windows (N, 5) in cells."""
        rows = []
        for picture, top, left, bottom, right in pixels.tolist():
            first_row, last_row = self.window(top, bottom - top, height)
            first_column, last_column = self.window(left, right - left, width)
            rows.append((picture, first_row, first_column, last_row, last_column))
        return torch.tensor(rows, dtype=torch.int64, device=pixels.device).view(-1, 5)

    def paper_window(self, first: int, last: int) -> tuple[int, int]:
        """The paper's projection of the pixels `first` … `last`: cells from floor(x/S) + 1 to ceil(x/S) − 1, with both.

        He et al. 2014, Appendix A, for paddings of half a kernel; others are made up for by the offset, as it says.
        """
        left = math.floor((first - self.offset) / self.stride) + 1
        right = math.ceil((last - self.offset) / self.stride) - 1
        return left, right


def geometry(backbone: nn.Module) -> Geometry:
    """The geometry of convolutions and pools that stand in a row; raises ValueError where they do not."""
    layers = []
    for module in backbone.modules():
        if isinstance(module, nn.Conv2d | nn.MaxPool2d):
            kernel, stride, padding = (
                value if isinstance(value, int) else value[0]  # all of ours are square
                for value in (module.kernel_size, module.stride, module.padding)
            )
            layers.append((int(kernel), int(stride), int(padding)))
    if not isinstance(backbone, nn.Sequential) or any(
        isinstance(child, nn.Module) and list(child.children()) for child in backbone
    ):
        raise ValueError(f"{type(backbone).__name__}: its layers do not stand in a row, so that no cell has one place")
    return Geometry(tuple(layers))
