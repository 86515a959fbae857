"""Caches of the training pictures at the size that they are needed in, so that no epoch decodes and resizes them again.

Two kinds: raw pixels, mapped into memory (the fastest; the very pixels that the files give), and JPEG (a seventh of the
disk; a little loss). A cache is a folder with two files, the pictures one behind the other and where each ends, and a
manifest, written last, with a fingerprint of what is in them.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import io
import json
import os
import re
import shutil
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from ..cost import available_memory
from ..whole import write_whole
from .index import alone, cache_folder
from .reader import DECODERS
from .source import Files, Pixels

FORMAT = 1  # of the folder: another number makes all caches anew
QUALITY = 95
CHUNK = 64  # pictures that are in memory at once while a cache is made, and lost if it is interrupted
SAMPLE = 32  # pictures that are encoded to estimate how large a JPEG cache will be
PROBES = 8  # pictures that are compared with their files when a cache is opened
SHARE = 0.5  # of the free disk and memory that `auto` takes at most


def to_jpeg(pixels: Pixels) -> bytes:
    """The picture as a JPEG."""
    file = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(pixels)).save(file, "JPEG", quality=QUALITY)
    return file.getvalue()


def from_jpeg(data: npt.NDArray[np.uint8]) -> Pixels:
    """The picture (h, w, 3) in a JPEG."""
    image: Tensor = DECODERS["JPEG"](torch.from_numpy(data.copy()), mode="RGB")  # a copy: torch wants it writable
    return image.permute(1, 2, 0).numpy()


# How a picture becomes bytes, for each kind.
KINDS: dict[str, Callable[[Pixels], bytes]] = {"raw": lambda pixels: pixels.tobytes(), "jpeg": to_jpeg}


@dataclass(frozen=True, eq=False)
class Cache:
    """The pictures of a finished cache by position; `shapes` (n, 2) are their heights and widths in px."""

    folder: Path
    kind: str
    shapes: npt.NDArray[np.int32]
    ends: npt.NDArray[np.int64]
    data: npt.NDArray[np.uint8]

    def bytes(self, position: int) -> npt.NDArray[np.uint8]:
        """What is kept of a picture."""
        return self.data[(self.ends[position - 1] if position else 0) : self.ends[position]]

    def __getitem__(self, position: int) -> Pixels:
        data = self.bytes(position)
        if self.kind == "jpeg":
            return from_jpeg(data)
        return data.reshape(int(self.shapes[position, 0]), int(self.shapes[position, 1]), 3)

    def __reduce__(self) -> Any:
        return _open, (self.folder, self.kind, self.shapes)  # mapped again, not copied


@functools.lru_cache(maxsize=4)  # a second for a million pictures
def fingerprint(files: Files, kind: str) -> str:
    """SHA-256 over all that decides what a cache of `files` holds: which files, as they are, at which shapes."""
    rows = files.rows
    sha = hashlib.sha256(json.dumps([FORMAT, kind, QUALITY if kind == "jpeg" else 0, files.draft, len(rows)]).encode())
    sha.update("\0".join(files.index.paths.take(rows)).encode("utf-8", "surrogateescape"))
    sha.update(files.shapes.astype("<i4").tobytes())
    for column in (files.index.num_bytes, files.index.mtimes):
        sha.update(column[rows].astype("<i8").tobytes())
    return sha.hexdigest()


def num_bytes(files: Files, kind: str) -> int:
    """Bytes of disk that a cache will take: exact for raw, for JPEG estimated from a sample."""
    pixels = int(files.shapes.astype(np.int64).prod(1).sum())
    if kind == "raw":
        return 3 * pixels
    sample = np.unique(np.linspace(0, len(files.rows) - 1, SAMPLE).astype(int)).tolist()
    pictures = [files[position] for position in sample]
    encoded = sum(len(KINDS[kind](picture)) for picture in pictures)
    return int(pixels * encoded / sum(picture.shape[0] * picture.shape[1] for picture in pictures))


def choose(files: Files, parent: Path | str | None) -> str | None:
    """The kind of cache for these pictures and this machine: raw, jpeg, or None; and says which, and why.

    One that is made already is taken. Else raw, if half of the free disk holds it and half of the free memory, from
    which it will be read; else JPEG, if half of the free disk holds that.
    """
    place, memory = _place(parent), available_memory() or 0
    disk = _free(place)
    need = {kind: num_bytes(files, kind) for kind in KINDS}
    made = [kind for kind in KINDS if is_made(files, kind, parent)]
    if made:
        kind, why = made[0], "made already"
    elif need["raw"] <= SHARE * disk and need["raw"] <= SHARE * memory:
        kind, why = "raw", "it fits"
    elif need["jpeg"] <= SHARE * disk:
        kind, why = "jpeg", "raw pixels would not fit"
    else:
        kind, why = "", "neither fits"
    print(
        f"data.cache=auto: {kind or 'none'}, {why} (raw {_gb(need['raw'])}, jpeg about {_gb(need['jpeg'])}; "
        f"free are {_gb(disk)} of disk and {_gb(memory)} of memory)",
        file=sys.stderr,
    )
    return kind or None


def is_made(files: Files, kind: str, parent: Path | str | None) -> bool:
    """Whether a finished cache of just these pictures is there."""
    return _manifest(where(files, kind, parent)).get("fingerprint") == fingerprint(files, kind)


def where(files: Files, kind: str, parent: Path | str | None) -> Path:
    """The folder of the cache."""
    name = re.sub(r"\W+", "-", files.index.root.resolve().name)[:40]
    return _place(parent) / f"{name}_{kind}_{fingerprint(files, kind)[:12]}"


def open_cache(folder: Path, files: Files, kind: str) -> Cache:
    """The finished cache in `folder`; a `ValueError` where it holds other pictures than `files`, or not all of them."""
    manifest = _manifest(folder)
    if not manifest:
        raise ValueError(f"{folder}: no finished cache is there; make it by spp cache data.cache={kind} …")
    if manifest.get("fingerprint") != fingerprint(files, kind):
        raise ValueError(
            f"{folder}: is a cache of other pictures, or of these before they changed, or at another size: "
            f"remove it, and make it anew by spp cache data.cache={kind} …"
        )
    cache = _open(folder, kind, files.shapes)
    if len(cache.ends) != len(files.shapes) or (len(cache.ends) and len(cache.data) != cache.ends[-1]):
        raise ValueError(f"{folder}: its files are not as long as they were: remove it, and make it anew")
    # Names, lengths and dates may agree by chance, and another version of a library may decode otherwise.
    for position in np.linspace(0, len(cache.ends) - 1, PROBES).astype(int).tolist():
        if KINDS[kind](files[position]) != cache.bytes(position).tobytes():
            raise ValueError(
                f"{folder}: holds something else than {files.index.path(int(files.rows[position]))} gives now: "
                f"remove it, and make it anew by spp cache data.cache={kind} …"
            )
    return cache


@dataclass(frozen=True)
class Kept:
    """A cache, the bytes that it takes, and what it holds of which root; where it is unfinished that is not known."""

    folder: Path
    num_bytes: int
    kind: str = ""
    root: str = ""
    pictures: int = 0


def all_kept(parent: Path | str | None) -> list[Kept]:
    """Every cache below `parent`, or else in the user's cache folder, the largest first."""
    found = []
    for pictures in _place(parent).glob("*/pictures.bin"):
        manifest = _manifest(pictures.parent)
        about = {key: manifest[key] for key in ("kind", "root", "pictures") if key in manifest}
        found.append(Kept(pictures.parent, pictures.stat().st_size, **about))
    return sorted(found, key=lambda kept: (-kept.num_bytes, kept.folder))


def others(files: Files, kind: str, parent: Path | str | None) -> list[Kept]:
    """Other caches of pictures of the same root: of another time, size or kind."""
    here = where(files, kind, parent)
    return [kept for kept in all_kept(parent) if kept.folder != here and kept.root == _root(files)]


def make_cache(files: Files, kind: str, parent: Path | str | None = None, *, progress: bool = True) -> Cache:
    """The cache of `files`, made on all cores where it is not there yet; one that was interrupted is gone on with.

    It lies below `parent`, or else in the user's cache folder. Says beforehand how much disk it takes. Raises a
    `ValueError` where there is too little, or where a picture cannot be read.
    """
    folder = where(files, kind, parent)
    if _manifest(folder):
        return open_cache(folder, files, kind)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with alone(folder.with_suffix(".lock"), f"the cache {folder}"):
            if not _manifest(folder):  # another process has not made it meanwhile
                _fill(folder, files, kind, progress)
    except OSError as error:
        raise ValueError(
            f"{folder}: cannot be written ({error.strerror or error}): give data.cache_folder=…"
        ) from error
    return open_cache(folder, files, kind)


def _fill(folder: Path, files: Files, kind: str, progress: bool) -> None:
    total, encode = len(files.rows), KINDS[kind]
    with (folder / "pictures.bin").open("ab") as pictures, (folder / "ends.bin").open("ab") as ends:
        done, end = _whole_so_far(folder)
        pictures.truncate(end)
        ends.truncate(8 * done)
        need = num_bytes(files, kind) * (total - done) // max(1, total)
        free = _free(folder)
        if need > free:
            raise ValueError(
                f"data.cache={kind} needs {_gb(need)} at {folder}, and {_gb(free)} are free: use "
                f"{'data.cache=jpeg, ' if kind == 'raw' else ''}another data.cache_folder, or data.cache=null"
            )
        if progress:
            rest = f", {done:,} are there already" if done else ""
            about = "" if kind == "raw" else "about "
            print(
                f"{kind} cache of {total:,} pictures{rest}: {about}{_gb(need)} at {folder} ({_gb(free)} free)",
                file=sys.stderr,
            )
        bar = tqdm(total=total, initial=done, desc=f"{kind} cache", unit=" pictures", disable=not progress, delay=2)
        pool = ThreadPoolExecutor(os.cpu_count() or 1)
        try:
            with bar:
                for start in range(done, total, CHUNK):
                    positions = range(start, min(start + CHUNK, total))
                    parts = list(pool.map(lambda position: encode(files[position]), positions))
                    pictures.write(b"".join(parts))
                    pictures.flush()
                    os.fsync(pictures.fileno())  # before it is said where they end
                    stops = end + np.cumsum([len(part) for part in parts], dtype="<i8")
                    ends.write(stops.tobytes())
                    ends.flush()
                    end = int(stops[-1])
                    bar.update(len(parts))
        finally:  # at once, if it was interrupted
            pool.shutdown(cancel_futures=True)
        os.fsync(ends.fileno())
    manifest = {"fingerprint": fingerprint(files, kind), "kind": kind, "pictures": total, "bytes": end}
    write_whole(folder / "manifest.json", json.dumps({**manifest, "root": _root(files)}) + "\n")


def _whole_so_far(folder: Path) -> tuple[int, int]:
    """How many pictures a cache that was interrupted holds whole, and where the last of them ends."""
    stops = np.fromfile(folder / "ends.bin", "<i8")
    done = int(np.searchsorted(stops, (folder / "pictures.bin").stat().st_size, side="right"))
    return done, int(stops[done - 1]) if done else 0


def _open(folder: Path, kind: str, shapes: npt.NDArray[np.int32]) -> Cache:
    ends = np.fromfile(folder / "ends.bin", "<i8")
    data = np.asarray(np.memmap(folder / "pictures.bin", np.uint8, "r"))
    return Cache(folder, kind, shapes, ends, data)


def _manifest(folder: Path) -> dict[str, Any]:
    """What is noted of a finished cache; nothing where there is none."""
    with contextlib.suppress(OSError, ValueError):
        manifest = json.loads((folder / "manifest.json").read_text())
        if isinstance(manifest, dict):
            return manifest
    return {}


def _root(files: Files) -> str:
    return os.path.abspath(files.index.root)


def _place(parent: Path | str | None) -> Path:
    return Path(parent) if parent else cache_folder() / "pictures"


def _free(place: Path) -> int:
    """Bytes free on the disk of a folder that may not be there yet."""
    there = next(folder for folder in (place.absolute(), *place.absolute().parents) if folder.exists())
    return shutil.disk_usage(there).free


def _gb(size: int) -> str:
    return f"{size / 1e9:.2f} GB" if size >= 1e7 else f"{size / 1e6:.1f} MB"
