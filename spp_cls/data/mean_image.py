"""The mean image that the paper subtracts: the mean of each pixel over the training regions, or one in a file."""

from __future__ import annotations

import contextlib
import hashlib
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from ..whole import written_whole
from .index import Index, alone, cache_folder
from .source import Files, resized_shapes

OF_TRAINING = "train"  # the word for: compute it of the training part
# Pictures that a mean is taken of, at most. The standard error of a pixel's mean is then a quarter of a grey level.
AT_MOST = 65_536
CHUNK = 256  # pictures that are in memory at once


def find_mean_image(chosen: str, index: Index, resize: int, region: int) -> Tensor:
    """The mean image (3, H, W), in grey levels and float32: of the file `chosen`, or of the training part for `train`.

    What is computed is kept in the user's cache folder. Raises ValueError where the file is no such image.
    """
    if not isinstance(chosen, str):
        raise ValueError(f"data.mean_image={chosen!r}: use train, a file, or null")
    if chosen != OF_TRAINING:
        return read_mean_image(Path(chosen))
    sha = hashlib.sha256(f"{index.digest}/{resize}/{region}/{AT_MOST}".encode())
    for column in (index.num_bytes, index.mtimes):  # other pictures may have the same names and shapes
        sha.update(column[index.rows("train")].astype("<i8").tobytes())
    kept = cache_folder() / f"mean_{sha.hexdigest()[:20]}.npy"
    with alone(kept.with_suffix(".lock"), "the mean image"):
        with contextlib.suppress(OSError, ValueError, EOFError):  # the last of an empty file, left by a power cut
            return _as_tensor(np.load(kept, allow_pickle=False), kept)
        mean = mean_of_regions(index, resize, region)
        # A cache that cannot be written costs time, not the run.
        with contextlib.suppress(OSError), written_whole(kept) as beside, beside.open("wb") as file:
            np.save(file, mean)
    return _as_tensor(mean, kept)


def mean_of_regions(index: Index, resize: int, region: int, progress: bool = True) -> npt.NDArray[np.float32]:
    """The mean (region, region, 3) in grey levels of the centre regions of the training pictures.

    Of more than `AT_MOST` pictures it is that of as many, evenly spaced. Sums are whole numbers, so that the same
    pictures give the same bits.

    Paper: the mean of the 224 px crops, which crops is not said. Here: of the centres, because these are where the
    regions lie on average.
    """
    rows = index.rows("train")
    files = Files(index, rows, resized_shapes(index.widths[rows], index.heights[rows], resize))
    chosen = np.unique(np.linspace(0, len(rows) - 1, min(len(rows), AT_MOST)).astype(np.int64)).tolist()

    def centre(position: int) -> npt.NDArray[np.uint8]:
        whole = files[position]
        top, left = (whole.shape[0] - region) // 2, (whole.shape[1] - region) // 2
        return whole[top : top + region, left : left + region]

    total = np.zeros((region, region, 3), np.int64)
    bar = tqdm(total=len(chosen), desc="mean image", unit=" pictures", disable=not progress, delay=2, file=sys.stderr)
    pool = ThreadPoolExecutor(os.cpu_count() or 1)
    try:
        with bar:
            for start in range(0, len(chosen), CHUNK):
                positions = chosen[start : start + CHUNK]
                for pixels in pool.map(centre, positions):
                    total += pixels
                bar.update(len(positions))
    finally:  # at once, if it was interrupted
        pool.shutdown(cancel_futures=True)
    return np.asarray(total / len(chosen), np.float32)


def read_mean_image(path: Path) -> Tensor:
    """The image (3, H, W) in a .npy file of (H, W, 3) grey levels, or in a picture; R, G, B."""
    try:
        if path.suffix == ".npy":
            pixels = np.load(path, allow_pickle=False)
        else:
            with Image.open(path) as image:
                pixels = np.asarray(image.convert("RGB"))
    except (OSError, ValueError, EOFError) as error:
        raise ValueError(
            f"data.mean_image={path}: cannot be read ({' '.join(str(error).split())}); give train, a .npy, or a .png"
        ) from error
    return _as_tensor(pixels, path)


def digest(mean: Tensor) -> str:
    """SHA-256 of its shape and numbers."""
    values = mean.contiguous().numpy().astype("<f4")
    return hashlib.sha256(str(tuple(mean.shape)).encode() + values.tobytes()).hexdigest()


def _as_tensor(pixels: npt.NDArray[np.generic], path: Path) -> Tensor:
    right = pixels.ndim == 3 and pixels.shape[2] == 3 and pixels.size and np.issubdtype(pixels.dtype, np.number)
    if not right or not np.isfinite(pixels).all() or pixels.min() < 0 or pixels.max() > 255:
        raise ValueError(
            f"data.mean_image={path}: holds {pixels.dtype} of {pixels.shape}; it must be (H, W, 3) of 0 … 255, R, G, B"
        )
    return torch.from_numpy(np.ascontiguousarray(pixels.astype(np.float32).transpose(2, 0, 1)))
