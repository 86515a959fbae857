"""The index: which pictures there are, with label, split, size and hash; made once, and opened from then on.

It is a table of columns that are mapped into memory, in the user's cache folder and never among the data. To open it
costs nothing; to make it, one look at the header of each file, or for `spp check` at all of it.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
import struct
import sys
import time
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt
from filelock import FileLock, Timeout

from ..whole import written_whole
from .facts import ROTTEN, Facts, find_facts, look_at, read_journal
from .layouts import Listing
from .reader import Known

SPLITS = ("train", "val", "test")
ON_BAD = ("stop", "skip")
STAT_AT_MOST = 100_000  # files that are looked at each time an index is opened; of more, their folders' dates are
VERSION = 1  # of what is known: raised when reader or layouts find something else, so that it is found anew
RECENT = 2_000_000_000  # ns: a folder as young as this may change again without another date

Layout = Callable[[Path], Listing]


class Paths:
    """n texts in one buffer: a list of them would take ten times the memory, in each process."""

    def __init__(self, text: npt.NDArray[np.uint8], starts: npt.NDArray[np.int64]) -> None:
        self.text, self._starts = text, starts  # (bytes,), with a zero between two; (n + 1,)

    @classmethod
    def of(cls, paths: Iterable[str]) -> Paths:
        encoded = [path.encode("utf-8", "surrogateescape") for path in paths]
        starts = np.cumsum([0, *(len(path) + 1 for path in encoded)], dtype=np.int64)
        return cls(np.frombuffer(b"\0".join(encoded), dtype=np.uint8), starts)

    def __len__(self) -> int:
        return len(self._starts) - 1

    def __getitem__(self, row: int) -> str:
        row = range(len(self))[row]
        return bytes(self.text[self._starts[row] : self._starts[row + 1] - 1]).decode("utf-8", "surrogateescape")

    def take(self, rows: Iterable[int]) -> list[str]:
        """The texts of `rows`."""
        return [self[row] for row in rows]

    def tolist(self) -> list[str]:
        """All of them."""
        return bytes(self.text).decode("utf-8", "surrogateescape").split("\0") if len(self) else []


class Bad(NamedTuple):
    """A file that is not in the index, and why."""

    path: str
    reason: str


@dataclass(frozen=True, eq=False)
class Index:
    """n pictures, sorted by path; the columns are parallel.

    `paths` (n,) are relative to `root`; `labels` (n,) count in `classes`, `splits` (n,) in `SPLITS`; `widths` and
    `heights` (n,) are in px, after EXIF orientation; `kinds` (n,) count in `kind_names`, like "JPEG RGB". `hashes`
    (n, 32) are SHA-256, zero where only the header of the file was read; `checked`: none is. `bad` are the files
    that are left out. `notes` and `passed_over` are those of the `Listing`. `store` is the file it was opened from.
    """

    root: Path
    classes: tuple[str, ...]
    paths: Paths
    labels: npt.NDArray[np.int64]
    splits: npt.NDArray[np.int8]
    widths: npt.NDArray[np.int32]
    heights: npt.NDArray[np.int32]
    orientations: npt.NDArray[np.int8]
    kinds: npt.NDArray[np.int16]
    num_bytes: npt.NDArray[np.int64]
    mtimes: npt.NDArray[np.int64]
    hashes: npt.NDArray[np.uint8]
    kind_names: tuple[str, ...] = ()
    checked: bool = False
    bad: tuple[Bad, ...] = ()
    notes: tuple[str, ...] = ()
    passed_over: tuple[str, ...] = ()
    store: Path | None = field(default=None, init=False)  # so that no `replace` takes it along

    def __len__(self) -> int:
        return len(self.paths)

    def path(self, row: int) -> Path:
        """Where the picture of `row` lies."""
        return self.root / self.paths[row]

    def known(self, row: int) -> Known:
        """What a reader can compare the file of `row` with."""
        return Known(int(self.num_bytes[row]), int(self.widths[row]), int(self.heights[row]))

    def rows(self, split: str) -> npt.NDArray[np.int64]:
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
        sha.update(self.paths.text.data)
        for array in (self.labels, self.splits, self.widths, self.heights):
            sha.update(array.astype("<i8").data)
        return sha.hexdigest()

    def __reduce__(self) -> Any:
        """A process that is handed the index opens it again, where it can: the columns are not copied."""
        if self.store is not None:
            return _reopen, (self.store, self.root, self.digest)
        return super().__reduce__()

    def describe(self) -> str:
        """What is in it, in a few lines."""
        counts = ", ".join(f"{number:,} {split}" for split, number in self.counts.items())
        lines = [f"{self.root}: {len(self):,} pictures of {len(self.classes)} classes ({counts})"]
        if len(self):
            sides = (("width", self.widths), ("height", self.heights))
            ranges = (f"{name} {side.min()} / {np.median(side):g} / {side.max()}" for name, side in sides)
            lines.append(f"{', '.join(ranges)} px (smallest / median / largest)")
        if self.bad:
            lines.append(f"left out, bad: {_first([bad.path for bad in self.bad])}")
        if self.passed_over:
            lines.append(f"passed over, no pictures: {_first(self.passed_over)}")
        return "\n".join([*lines, *(f"note: {note}" for note in self.notes)])


def make_index(
    root: Path | str,
    layout: Layout,
    *,
    whole: bool = False,
    refresh: bool = False,
    again: bool = False,
    progress: bool = True,
) -> Index:
    """The index of the pictures that `layout` finds in `root`; opened if it is made already and still true.

    It lies in a folder of the user ($SPP_CACHE, $XDG_CACHE_HOME/spp_cls or ~/.cache/spp_cls), written whole or not at
    all, by one process at a time. It is still true if the dates of the folders that were listed, and of up to
    `STAT_AT_MOST` files, are what they were; with `refresh`, every file is listed and looked at. Of a file that
    changed, the header is read, or all of it (`whole`); `again` reads every file whole. A search that was interrupted
    goes on where it was. `progress`: on stderr, what was made, and a bar if it takes more than two seconds.
    """
    root = Path(root)
    root_key, store = _root_key(root), _store(root, layout)
    fresh = None if refresh or again else _opened(store, root, layout, whole)
    if fresh is not None:
        return fresh
    with alone(store.with_name(f"index_{root_key}.lock"), f"the index of {root}"):
        fresh = None if refresh or again else _opened(store, root, layout, whole)  # another process made it meanwhile
        if fresh is not None:
            return fresh
        began = time.time_ns()
        listing = layout(root)
        journal = store.with_name(f"index_{root_key}{'.again' if again else ''}.journal")
        found = read_journal(journal)
        known = _known(store.parent, root_key) | ({} if again else found)
        facts, read = find_facts(
            root,
            listing.paths,
            known,
            found if again else None,
            whole=whole or again,
            again=again,
            journal=journal if store.parent.is_dir() else None,
            progress=progress,
        )
        index = _joined(root, listing, facts)
        if read and progress and (refresh or not index.bad):  # else one line shall say what is bad
            what = "read whole" if whole or again else "their headers read"
            print(
                f"index of {root}: {read:,} pictures, {what} in {(time.time_ns() - began) / 1e9:.1f} s", file=sys.stderr
            )
        bad = [(path, fact) for path, fact in zip(listing.paths, facts, strict=True) if fact.reason]
        about = {
            "listed_at": began,
            "sources": [_stamp(source) for source in listing.sources],
            "bad": [[path, *fact] for path, fact in bad],
        }
        if not _save(store, index, about):
            if progress and not index.bad:
                print(f"{store.parent}: cannot be written; what was found is not kept", file=sys.stderr)
            return index
        with contextlib.suppress(OSError):
            journal.unlink(missing_ok=True)
        opened = _read(store, root)
        return opened[0] if opened else index


def usable_index(root: Path | str, layout: Layout, on_bad: str = "stop", max_bad: float = 0.01) -> Index:
    """The index for training: with `on_bad` stop, one without bad pictures; with skip, one that leaves them out.

    To skip, every file is read whole once, so that all is decided before training; more than the share `max_bad`
    is refused. Raises one `ValueError` that names the first bad file, the reason, and how many more there are.
    """
    if on_bad not in ON_BAD:
        raise ValueError(f"data.on_bad={on_bad!r}: use stop or skip")
    index = make_index(root, layout, whole=on_bad == "skip")
    if not index.bad:
        return index
    first, number = index.bad[0], len(index.bad)
    named = f"{index.root / first.path}: {first.reason}" + (f" (and {number - 1} more)" if number > 1 else "")
    if on_bad == "stop":
        raise ValueError(
            f"{named}; remove or repair {'them' if number > 1 else 'it'} "
            f"(spp check names all that are bad), or leave out what is bad by data.on_bad=skip"
        )
    share = number / (number + len(index))
    if share > max_bad:
        raise ValueError(
            f"{named}; {share:.2%} of the pictures are bad, more than data.max_bad={max_bad:.2%}: remove or repair them"
        )
    lacking = sorted(set(range(len(index.classes))) - set(index.labels[index.rows("train")].tolist()))
    if lacking:
        raise ValueError(f"{named}; without them {index.classes[lacking[0]]!r} has no training picture")
    if min(index.counts.values()) == 0:
        raise ValueError(f"{named}; without them a part has no pictures: {index.counts}")
    return index


def cache_folder() -> Path:
    """Where this user's indices and caches lie."""
    folder = os.environ.get("SPP_CACHE")
    if not folder:
        folder = os.path.join(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "spp_cls")
    return Path(folder)


# From facts to columns, to a file, and back


def _joined(root: Path, listing: Listing, facts: list[Facts]) -> Index:
    good = [i for i, fact in enumerate(facts) if not fact.reason]
    kinds = [f"{facts[i].format} {facts[i].mode}" for i in good]
    kind_names = tuple(sorted(set(kinds)))
    kind = {name: number for number, name in enumerate(kind_names)}
    hashes = b"".join(bytes.fromhex(facts[i].sha256) or bytes(32) for i in good)

    def column(values: Iterable[int], dtype: type) -> Any:
        return np.fromiter(values, dtype, len(good))

    return Index(
        root=root,
        classes=listing.classes,
        paths=Paths.of(listing.paths[i] for i in good),
        labels=column((listing.labels[i] for i in good), np.int64),
        splits=column((SPLITS.index(listing.splits[i]) for i in good), np.int8),
        widths=column((facts[i].width for i in good), np.int32),
        heights=column((facts[i].height for i in good), np.int32),
        orientations=column((facts[i].orientation for i in good), np.int8),
        kinds=column((kind[name] for name in kinds), np.int16),
        num_bytes=column((facts[i].num_bytes for i in good), np.int64),
        mtimes=column((facts[i].mtime_ns for i in good), np.int64),
        hashes=np.frombuffer(hashes, np.uint8).reshape(-1, 32),
        kind_names=kind_names,
        checked=all(fact.checked for fact in facts),
        bad=tuple(Bad(path, fact.reason) for path, fact in zip(listing.paths, facts, strict=True) if fact.reason),
        notes=listing.notes,
        passed_over=listing.passed_over,
    )


_COLUMNS = ("labels", "splits", "widths", "heights", "orientations", "kinds", "num_bytes", "mtimes", "hashes")
_TEXTS = ("classes", "kind_names", "notes", "passed_over")


def _save(store: Path, index: Index, about: Mapping[str, Any]) -> bool:
    """Writes the file whole or not at all, and says which: a cache that cannot be written costs time, not the run."""
    text = json.dumps({**about, "checked": index.checked, **{name: getattr(index, name) for name in _TEXTS}})
    columns = {name: getattr(index, name) for name in _COLUMNS}
    columns["text"], columns["starts"] = index.paths.text, index.paths._starts
    try:
        with written_whole(store) as beside, beside.open("wb") as file:
            np.savez(file, about=np.frombuffer(text.encode(), np.uint8), **columns)
    except OSError:
        return False
    return True


def _read(store: Path, root: Path) -> tuple[Index, dict[str, Any]] | None:
    """The index in the file `store` and what is noted about it; None if it is not there or cannot be read."""
    try:
        columns = map_arrays(store)
        about = json.loads(bytes(columns["about"]))
        paths = Paths(columns["text"], columns["starts"])
        rest: dict[str, Any] = {name: tuple(about[name]) for name in _TEXTS}
        rest.update((name, columns[name]) for name in _COLUMNS)
        index = Index(
            root=root,
            paths=paths,
            checked=about["checked"],
            bad=tuple(Bad(path, Facts(*fact).reason) for path, *fact in about["bad"]),
            **rest,
        )
        if any(len(columns[name]) != len(paths) for name in _COLUMNS):
            return None
        object.__setattr__(index, "store", store)
        return index, about
    except Exception:  # a cut zip, a foreign file, no permission: whatever it is, the pictures tell it anew
        return None


def map_arrays(path: Path) -> dict[str, npt.NDArray[Any]]:
    """The arrays of an uncompressed .npz by name, mapped into memory: nothing is read before it is looked at."""
    arrays: dict[str, npt.NDArray[Any]] = {}
    with open(path, "rb") as file, zipfile.ZipFile(file) as members:
        for member in members.infolist():
            file.seek(member.header_offset + 26)  # zip's local header: the lengths of its last two fields
            name, extra = struct.unpack("<HH", file.read(4))
            file.seek(name + extra, os.SEEK_CUR)
            if np.lib.format.read_magic(file) != (1, 0):
                raise ValueError(f"{path}: not the kind of .npz that is written here")
            shape, by_columns, dtype = np.lib.format.read_array_header_1_0(file)
            order: Literal["F", "C"] = "F" if by_columns else "C"
            empty = 0 in shape
            array = np.zeros(shape, dtype) if empty else np.memmap(path, dtype, "r", file.tell(), shape, order)
            arrays[member.filename.removesuffix(".npy")] = np.asarray(array)
    return arrays


def _reopen(store: Path, root: Path, digest: str) -> Index:
    opened = _read(store, root)
    if opened is None or opened[0].digest != digest:
        raise RuntimeError(f"{store} has changed under this run: the pictures of {root} were indexed anew; start again")
    return opened[0]


# Whether it is still true


def _opened(store: Path, root: Path, layout: Layout, whole: bool) -> Index | None:
    """The index in `store`, if it is there and what it was made from has not changed."""
    # What another's layout depends on is not known here: it is asked each time.
    if not _function(layout).__module__.startswith("spp_cls.data.") or not store.is_file():
        return None
    opened = _read(store, root)
    if opened is None or (whole and not opened[0].checked):
        return None
    index, about = opened
    if not about["sources"] or _healed(root, about["bad"]):
        return None
    for source in about["sources"]:
        if source[1] > about["listed_at"] - RECENT or _stamp(source[0]) != source:
            return None
    files = [(path, *fact[:2]) for path, *fact in about["bad"]]  # one that is repaired in place is seen in any case
    if len(index) <= STAT_AT_MOST:
        files += zip(index.paths.tolist(), index.num_bytes.tolist(), index.mtimes.tolist(), strict=True)
    for path, num_bytes, mtime in files:
        try:
            stat = os.stat(os.path.join(root, path))
        except OSError:
            return None
        if (stat.st_size, stat.st_mtime_ns) != (num_bytes, mtime):
            return None
    return index


def _healed(root: Path, bad: list[list[Any]]) -> bool:
    """Whether one that was bad can be read by now: it was repaired, or a package that reads it has come."""
    return any(fact[-1] != ROTTEN and not look_at(os.path.join(root, path), True).reason for path, *fact in bad)


def _stamp(source: str) -> list[Any]:
    """Path, time of change and, of a file, length of something that was listed."""
    try:
        stat = os.stat(source)
    except OSError:
        return [source, -1, -1]
    return [source, stat.st_mtime_ns, 0 if os.path.isdir(source) else stat.st_size]


def _known(folder: Path, root_key: str) -> dict[str, Facts]:
    """What any index of this root knows of each file, the latest last."""
    known: dict[str, Facts] = {}
    try:
        stores = sorted(folder.glob(f"index_{root_key}_*.npz"), key=lambda path: path.stat().st_mtime_ns)
    except OSError:
        return known
    for store in stores:
        opened = _read(store, folder)
        if opened is None:
            continue
        index, about = opened
        for path, fact in _facts_of(index):
            before = known.get(path)
            if before is None or fact.checked or not before.checked or before[:2] != fact[:2]:
                known[path] = fact
        known.update((path, Facts(*fact)) for path, *fact in about["bad"])
    return known


def _facts_of(index: Index) -> Iterator[tuple[str, Facts]]:
    checked: Any = index.hashes.any(1)
    columns = (index.num_bytes, index.mtimes, index.widths, index.heights, index.orientations)
    numbers = zip(*(column.tolist() for column in columns), strict=True)
    kinds = [name.split(" ", 1) for name in index.kind_names]
    rows = zip(index.paths.tolist(), numbers, index.kinds.tolist(), checked.tolist(), index.hashes, strict=True)
    for path, five, kind, whole, sha256 in rows:
        format, mode = kinds[kind]
        digest = sha256.tobytes().hex() if whole else ""
        yield path, Facts._make((*five, format, mode, whole, digest, ""))


def _store(root: Path, layout: Layout) -> Path:
    """The file of an index."""
    return cache_folder() / f"index_{_root_key(root)}_{_layout_key(layout)}.npz"


def _root_key(root: Path) -> str:
    return hashlib.sha256(b"%d %b" % (VERSION, os.fsencode(os.path.abspath(root)))).hexdigest()[:16]


def _layout_key(layout: Layout) -> str:
    function = _function(layout)
    options = dict(getattr(layout, "keywords", {}))
    for key, value in options.items():
        if isinstance(value, (str, Path)):  # a table: of one name in two folders, they are two
            options[key] = os.path.abspath(value)
    name = f"{function.__module__}.{getattr(function, '__qualname__', '')}"
    text = json.dumps([VERSION, name, getattr(layout, "args", ()), options], default=str, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def _function(layout: Layout) -> Any:
    return layout.func if isinstance(layout, functools.partial) else layout


@contextlib.contextmanager
def alone(lock: Path, what: str) -> Iterator[None]:
    """One process at a time, which makes `what`; where the folder cannot be written, each for itself."""
    try:
        lock.parent.mkdir(parents=True, exist_ok=True)
        held = FileLock(lock)
        try:
            held.acquire(timeout=2)
        except Timeout:
            print(f"waiting for another process that makes {what}", file=sys.stderr)
            held.acquire()
    except OSError as error:
        if isinstance(error, Timeout):
            raise
        yield
        return
    try:
        yield
    finally:
        held.release()


def _first(names: Iterable[str]) -> str:
    names = list(names)
    return f"{len(names):,} ({', '.join(names[:3])}{', …' if len(names) > 3 else ''})"
