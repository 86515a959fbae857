"""What is known of each file of a data set: found on all cores, remembered while it is being found."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from stat import S_ISREG
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from .reader import decode, read_header, reason_of

CHUNK = 64  # files for one task of the pool
HEADER_THREADS = 8  # they wait for the disk, and share one core for the rest
DELAY = 2  # seconds before a bar is shown
ROTTEN = "other contents at the same length and date as before: restore it, or touch it if that is meant"


class Facts(NamedTuple):
    """Of one file: length in bytes, time of change in ns, width and height in px (upright), EXIF orientation, format,
    mode; whether all of it was read, and then its SHA-256; and what is wrong with it, if anything is."""

    num_bytes: int
    mtime_ns: int
    width: int = 0
    height: int = 0
    orientation: int = 1
    format: str = ""
    mode: str = ""
    checked: bool = False
    sha256: str = ""
    reason: str = ""


def look_at(file: str, whole: bool) -> Facts:
    """The facts of a file: from its header, or from all of it, strictly decoded."""
    try:
        stat = os.stat(file)
    except OSError as error:
        return Facts(0, 0, checked=whole, reason=reason_of(error))
    if not S_ISREG(stat.st_mode):  # to open a pipe would wait for ever
        return Facts(stat.st_size, stat.st_mtime_ns, checked=whole, reason="is no file, but a pipe or a device")
    facts = Facts(stat.st_size, stat.st_mtime_ns, checked=whole)
    try:
        if whole:
            data = np.fromfile(file, np.uint8)
            facts = facts._replace(sha256=hashlib.sha256(data.data).hexdigest())
            header = decode(io.BytesIO(data.data))[1]
        else:
            header = read_header(Path(file))
    except Exception as error:
        named = " ".join(f"{Path(file)}:".split()) + " "  # as `reason_of` leaves it
        return facts._replace(reason=reason_of(error).removeprefix(named))
    return facts._replace(**header._asdict())


def find_facts(
    root: Path,
    paths: Sequence[str],
    known: Mapping[str, Facts],
    fresh: Mapping[str, Facts] | None = None,
    *,
    whole: bool = False,
    again: bool = False,
    journal: Path | None = None,
    progress: bool = True,
) -> tuple[list[Facts], int]:
    """The facts of `paths`, and how many files were read for them.

    A file is read again only if its length or time of change is not the `known` one, if only its header is known but
    all of it is wanted (`whole`), or if it was bad; or in any case (`again`), and then contents that changed under an
    unchanged date are called bad. `fresh` are facts of this very search, before it was interrupted. What is found is
    added to the `journal` line by line, so that a kill loses the last lines at most.
    """

    def find(path: str) -> tuple[str, Facts, bool]:
        file, before, done = os.path.join(root, path), known.get(path), (fresh or {}).get(path)
        if done is not None and _unchanged(file, done):
            return path, done, False
        if before is not None and not again and _still_holds(file, before, whole):
            return path, before, False
        # What was bad when all of it was read is not good because its header is.
        now = look_at(file, whole or (before is not None and before.checked and bool(before.reason)))
        if before is not None and before.sha256 and now[:2] == before[:2] and now.sha256 not in ("", before.sha256):
            now = now._replace(sha256=before.sha256, reason=now.reason or ROTTEN)
        return path, now, True

    chunks = [paths[i : i + CHUNK] for i in range(0, len(paths), CHUNK)]
    bar = tqdm(
        total=len(paths),
        desc="reading pictures" if whole else "reading sizes",
        unit=" pictures",
        file=sys.stderr,
        delay=DELAY,
        disable=not progress,
    )
    pool = ThreadPoolExecutor((os.cpu_count() or 1) if whole else HEADER_THREADS)
    facts: list[Facts] = []
    read = 0
    with bar, _journal(journal) as note:

        def find_chunk(chunk: Sequence[str]) -> list[tuple[str, Facts, bool]]:
            found = [find(path) for path in chunk]
            note([(path, fact) for path, fact, was_read in found if was_read])  # at once: one before may take long
            return found

        try:
            for found in pool.map(find_chunk, chunks):
                read += sum(was_read for _, _, was_read in found)
                facts += [fact for _, fact, _ in found]
                bar.update(len(found))
        finally:  # at once, if it was interrupted
            pool.shutdown(cancel_futures=True)
    return facts, read


def read_journal(journal: Path | None) -> dict[str, Facts]:
    """What a search that was interrupted had found, by path."""
    found: dict[str, Facts] = {}
    if journal is not None and journal.is_file():
        for line in journal.read_bytes().split(b"\n"):
            with contextlib.suppress(ValueError, TypeError):  # a line that was cut
                path, *facts = json.loads(line)
                found[path] = Facts(*facts)
    return found


def _still_holds(file: str, before: Facts, whole: bool) -> bool:
    # What was bad is looked at again: a package that reads it may have come.
    return not before.reason and (before.checked or not whole) and _unchanged(file, before)


def _unchanged(file: str, before: Facts) -> bool:
    try:
        stat = os.stat(file)
    except OSError:
        return False
    return (stat.st_size, stat.st_mtime_ns) == before[:2]


@contextlib.contextmanager
def _journal(journal: Path | None) -> Iterator[Callable[[list[tuple[str, Facts]]], None]]:
    """Writes lines to the journal; without one, or where it cannot be written, nowhere."""
    try:
        file = journal.open("ab") if journal else None
    except OSError:
        file = None

    def note(found: list[tuple[str, Facts]]) -> None:
        if file and found:
            with contextlib.suppress(OSError):
                # The line's end stands before it: so it is parted from one that was cut.
                file.write(b"".join(b"\n" + json.dumps([path, *facts]).encode() for path, facts in found))
                file.flush()

    try:
        yield note
    finally:
        if file:
            with contextlib.suppress(OSError):
                file.close()
