"""The index: which pictures there are, their label, split and size; made once, and checked."""

from __future__ import annotations

import hashlib
import json
import os
import sys
import uuid
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from .layouts import Listing
from .reader import read_size

SPLITS = ("train", "val", "test")
CHUNK = 64  # files for one task of the pool
THREADS = 8  # they wait for the disk, and share one core for the rest
DELAY = 2  # seconds before a bar is shown


@dataclass(frozen=True, eq=False)
class Index:
    """n pictures, sorted by path; the arrays are parallel.

    `paths` (n,) are relative to `root`; `labels` (n,) count in `classes`, `splits` (n,) in `SPLITS`; widths
    and heights (n,) are in px, after EXIF orientation. `notes` and `passed_over` are those of the `Listing`.
    """

    root: Path
    classes: tuple[str, ...]
    paths: NDArray[np.str_]
    labels: NDArray[np.int64]
    splits: NDArray[np.int8]
    widths: NDArray[np.int32]
    heights: NDArray[np.int32]
    notes: tuple[str, ...] = ()
    passed_over: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.paths)

    def path(self, row: int) -> Path:
        """Where the picture of `row` lies."""
        return self.root / str(self.paths[row])

    def rows(self, split: str) -> NDArray[np.int64]:
        """The positions of a split's pictures, ascending."""
        if split not in SPLITS:
            raise ValueError(f"split={split!r}: must be one of {', '.join(SPLITS)}")
        return np.flatnonzero(self.splits == SPLITS.index(split))

    @property
    def counts(self) -> dict[str, int]:
        """Pictures of each split."""
        return {split: len(self.rows(split)) for split in SPLITS}

    @cached_property
    def digest(self) -> str:
        """SHA-256 over classes, paths, labels, splits and sizes; the same wherever `root` lies."""
        sha = hashlib.sha256(json.dumps([self.classes, len(self)]).encode())
        sha.update(_joined(self.paths.tolist()))
        for array in (self.labels, self.splits, self.widths, self.heights):
            sha.update(array.astype("<i8").tobytes())
        return sha.hexdigest()

    def describe(self) -> str:
        """What is in it, in a few lines."""
        counts = ", ".join(f"{number:,} {split}" for split, number in self.counts.items())
        lines = [f"{self.root}: {len(self):,} pictures of {len(self.classes)} classes ({counts})"]
        sides = (("width", self.widths), ("height", self.heights))
        ranges = (f"{name} {side.min()} / {np.median(side):g} / {side.max()}" for name, side in sides)
        lines.append(f"{', '.join(ranges)} px (smallest / median / largest)")
        if self.passed_over:
            first = ", ".join(self.passed_over[:3]) + (", …" if len(self.passed_over) > 3 else "")
            lines.append(f"passed over, no pictures: {len(self.passed_over)} ({first})")
        return "\n".join([*lines, *(f"note: {note}" for note in self.notes)])


def make_index(root: Path | str, layout: Callable[[Path], Listing], *, progress: bool = True) -> Index:
    """Lists the pictures of `root` and reads the size of each in its header.

    Sizes are kept in a folder of the user ($SPP_CACHE, $XDG_CACHE_HOME/spp_cls or ~/.cache/spp_cls); a file
    is read again only if its length or its time of change differs. `progress`: a bar on stderr if it takes
    more than two seconds. Raises one `ValueError` that names the first file that cannot be read, the reason,
    and how many more there are.
    """
    root = Path(root)
    listing = layout(root)
    cache = _cache_file(root)
    known = _load(cache)
    chunks = [listing.paths[i : i + CHUNK] for i in range(0, len(listing.paths), CHUNK)]
    bar = tqdm(
        total=len(listing.paths),
        desc="reading sizes",
        unit=" pictures",
        file=sys.stderr,
        delay=DELAY,
        disable=not progress,
    )
    facts: list[_Facts | ValueError] = []
    with bar, ThreadPoolExecutor(THREADS) as pool:
        for found in pool.map(lambda paths: [_look(root, path, known) for path in paths], chunks):
            facts += found
            bar.update(len(found))

    good = {p: fact for p, fact in zip(listing.paths, facts, strict=True) if isinstance(fact, _Facts)}
    if any(known.get(path) != fact for path, fact in good.items()):
        _save(cache, known | good)
    bad = [fact for fact in facts if isinstance(fact, ValueError)]
    if bad:
        raise ValueError(_bad_files(bad)) from bad[0]
    return Index(
        root=root,
        classes=listing.classes,
        paths=np.array(listing.paths, dtype=np.str_),
        labels=np.array(listing.labels, dtype=np.int64),
        splits=np.array([SPLITS.index(split) for split in listing.splits], dtype=np.int8),
        widths=np.array([good[path].width for path in listing.paths], dtype=np.int32),
        heights=np.array([good[path].height for path in listing.paths], dtype=np.int32),
        notes=listing.notes,
        passed_over=listing.passed_over,
    )


class _Facts(NamedTuple):
    """What the cache keeps of a file."""

    bytes: int
    mtime_ns: int
    width: int
    height: int


def _look(root: Path, path: str, known: dict[str, _Facts]) -> _Facts | ValueError:
    file = os.path.join(root, path)
    try:
        stat = os.stat(file)
    except OSError as error:
        return ValueError(f"{file}: {error.strerror}")
    fact = known.get(path)
    if fact is not None and (fact.bytes, fact.mtime_ns) == (stat.st_size, stat.st_mtime_ns):
        return fact
    try:
        return _Facts(stat.st_size, stat.st_mtime_ns, *read_size(Path(file)))
    except ValueError as error:
        return error


def _bad_files(errors: list[ValueError]) -> str:
    more = f" (and {len(errors) - 1} more)" if len(errors) > 1 else ""
    return f"{errors[0]}{more}; remove or repair {'them' if more else 'it'}"


def _cache_file(root: Path) -> Path:
    folder = os.environ.get("SPP_CACHE")
    if not folder:
        folder = os.path.join(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "spp_cls")
    key = hashlib.sha256(os.fsencode(os.path.abspath(root))).hexdigest()[:16]
    return Path(folder) / f"index_{key}.npz"


def _load(cache: Path) -> dict[str, _Facts]:
    """The facts by path; none if the file is not there or cannot be read."""
    try:
        with open(cache, "rb") as file, np.load(file, allow_pickle=False) as arrays:
            paths = arrays["paths"].tobytes().decode("utf-8", "surrogateescape").split("\0")
            facts = arrays["facts"]
        if facts.shape != (len(paths), len(_Facts._fields)) or facts.dtype != np.int64:
            return {}
        return {path: _Facts(*fact) for path, fact in zip(paths, facts.tolist(), strict=True)}
    except Exception:  # a cut zip, a foreign file, no permission: whatever it is, the pictures tell it anew
        return {}


def _save(cache: Path, known: dict[str, _Facts]) -> None:
    """Writes the file whole or not at all; a cache folder that cannot be written costs time, not the run."""
    temporary = cache.with_name(f"{cache.stem}_{uuid.uuid4().hex}.tmp")
    paths = np.frombuffer(_joined(list(known)), dtype=np.uint8)
    facts = np.array(list(known.values()), dtype=np.int64)
    try:
        cache.parent.mkdir(parents=True, exist_ok=True)
        try:
            with open(temporary, "wb") as file:
                np.savez(file, paths=paths, facts=facts)
            os.replace(temporary, cache)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError:
        pass


def _joined(paths: list[str]) -> bytes:
    return "\0".join(paths).encode("utf-8", "surrogateescape")
