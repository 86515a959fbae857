from __future__ import annotations

import hashlib
import multiprocessing
import os
import pickle
import re
import shutil
import signal
import sys
import threading
import time
import types
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from spp_cls.data import facts as facts_module
from spp_cls.data import index as index_module
from spp_cls.data import layouts as layouts_module
from spp_cls.data.facts import ROTTEN, Facts, look_at
from spp_cls.data.index import SPLITS, Bad, Index, Paths, cache_folder, make_index, map_arrays, usable_index
from spp_cls.data.layouts import Listing, folder, table

SIZES = {"a/0.png": (30, 20), "a/1.jpg": (10, 40), "b/2.png": (20, 20), "b/3.png": (50, 5)}
PARTS = [f"{part}/{name}/0.png" for part in ("test", "train", "val") for name in "ab"]
ARRAYS = ("labels", "splits", "widths", "heights", "orientations", "kinds", "num_bytes", "mtimes", "hashes")


def layout(root: Path) -> Listing:
    return Listing(
        classes=("a", "b"),
        paths=sorted(SIZES),
        labels=[0, 0, 1, 1],
        splits=["train", "val", "test", "train"],
        passed_over=("a/notes.txt", "Thumbs.db"),
        notes=("a note",),
        sources=(str(root), str(root / "a"), str(root / "b")),
    )


def draw(file: Path, size: tuple[int, int]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size).save(file)


def noise(file: Path) -> None:
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (20, 20, 3), np.uint8)).save(file)


def age(root: Path, seconds: int = 3600) -> None:
    """All folders from `root` down are as old as that; folders that changed just now are not trusted."""
    for place, _, _ in os.walk(root):
        then = os.stat(place).st_mtime_ns - seconds * 10**9
        os.utime(place, ns=(then, then))


def rot(file: Path) -> None:
    """Another last byte under the old length and date."""
    stat, data = os.stat(file), file.read_bytes()
    file.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))


def the_store(cache: Path) -> Path:
    (store,) = cache.glob("*.npz")
    return store


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SPP_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """What `layout` lists."""
    for path, size in SIZES.items():
        draw(tmp_path / "root" / path, size)
    return tmp_path / "root"


@pytest.fixture
def parts(tmp_path: Path) -> Path:
    """What `folder` lists: the six pictures of PARTS, the folders an hour old."""
    for number, path in enumerate(PARTS):
        draw(tmp_path / "parts" / path, (number + 1, 9))
    age(tmp_path / "parts")
    return tmp_path / "parts"


@pytest.fixture
def listed(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The folders that the package's layouts list."""
    folders: list[Path] = []
    scan = layouts_module._scan

    def noted(root: Path) -> Any:
        folders.append(root)
        return scan(root)

    monkeypatch.setattr(layouts_module, "_scan", noted)
    return folders


# Columns


def test_arrays_and_rows(root: Path) -> None:
    index = make_index(root, layout)
    assert index.root == root and index.classes == ("a", "b") and len(index) == 4
    assert index.paths.tolist() == ["a/0.png", "a/1.jpg", "b/2.png", "b/3.png"]
    assert index.labels.tolist() == [0, 0, 1, 1] and index.labels.dtype == np.int64
    assert index.splits.tolist() == [0, 1, 2, 0] and index.splits.dtype == np.int8
    assert index.widths.tolist() == [30, 10, 20, 50] and index.widths.dtype == np.int32
    assert index.heights.tolist() == [20, 40, 20, 5] and index.heights.dtype == np.int32
    assert [index.kind_names[kind] for kind in index.kinds] == ["PNG RGB", "JPEG RGB", "PNG RGB", "PNG RGB"]
    stats = [os.stat(root / path) for path in index.paths.tolist()]
    assert index.num_bytes.tolist() == [stat.st_size for stat in stats]
    assert index.mtimes.tolist() == [stat.st_mtime_ns for stat in stats]
    assert [index.rows(split).tolist() for split in SPLITS] == [[0, 3], [1], [2]]
    assert index.counts == {"train": 2, "val": 1, "test": 1}
    assert index.path(3) == root / "b/3.png"
    assert index.bad == () and index.notes == ("a note",) and index.passed_over == ("a/notes.txt", "Thumbs.db")
    with pytest.raises(ValueError, match=r"^split='dev': must be one of train, val, test$"):
        index.rows("dev")


def test_sizes_are_upright(root: Path) -> None:
    tags = Image.Exif()
    tags[274] = 6
    Image.new("RGB", (30, 20)).save(root / "a/0.png", exif=tags)
    index = make_index(root, layout)
    assert (index.widths[0], index.heights[0]) == (20, 30) and index.orientations.tolist() == [6, 1, 1, 1]


def test_describe(root: Path) -> None:
    index = make_index(root, layout)
    expected = [
        f"{root}: 4 pictures of 2 classes (2 train, 1 val, 1 test)",
        "width 10 / 25 / 50, height 5 / 20 / 40 px (smallest / median / largest)",
        "passed over, no pictures: 2 (a/notes.txt, Thumbs.db)",
        "note: a note",
    ]
    assert index.describe().splitlines() == expected
    assert len(replace(index, notes=(), passed_over=()).describe().splitlines()) == 2
    bad = replace(index, bad=tuple(Bad(f"{number}.png", "bad") for number in range(1234)))
    assert bad.describe().splitlines()[2] == "left out, bad: 1,234 (0.png, 1.png, 2.png, …)"


def test_digest_is_that_of_the_content_wherever_it_lies(root: Path, tmp_path: Path) -> None:
    index = make_index(root, layout)
    shutil.copytree(root, tmp_path / "elsewhere")
    assert make_index(tmp_path / "elsewhere", layout).digest == index.digest
    # pinned: a digest that changes without a reason would refuse everybody's resume
    assert index.digest == "ee572cdd515c9f4b74a18488ef28ee6eebec8fbfce55dd873f78e42a3b77ce05"
    others = (
        replace(index, classes=("a", "c")),
        replace(index, paths=Paths.of(["a/0.png", "a/1.jpg", "b/2.png", "b/4.png"])),
        replace(index, labels=index.labels[::-1].copy()),
        replace(index, splits=index.splits[::-1].copy()),
        replace(index, widths=index.widths + 1),
        replace(index, heights=index.heights + 1),
    )
    assert len({index.digest, *(other.digest for other in others)}) == 7


def test_digest_is_the_same_whether_made_or_opened_and_however_it_was_read(root: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SPP_CACHE", str(tmp_path / "file"))
        unstored = make_index(root, layout)
    stored = make_index(root, layout)
    assert unstored.store is None and stored.store is not None
    assert unstored.digest == stored.digest == make_index(root, layout, whole=True).digest


@pytest.mark.parametrize(
    "texts", [["a/0.png"], ["", "", ""], [], [""], ["x", "", os.fsdecode(b"caf\xe9/\xff.png"), "bild-ä.png", "x"]]
)
def test_paths_are_a_list_in_one_buffer(texts: list[str]) -> None:
    paths = Paths.of(iter(texts))
    assert len(paths) == len(texts) and paths.tolist() == texts
    assert [paths[row] for row in range(len(paths))] == texts
    rows = np.arange(len(texts))[::-1]
    assert paths.take(rows) == texts[::-1] and paths.take([]) == []
    assert paths.text.nbytes == sum(len(os.fsencode(text)) for text in texts) + max(0, len(texts) - 1)


def test_names_of_any_bytes(tmp_path: Path, read: list[str]) -> None:
    name = os.fsdecode(b"caf\xe9.png")  # Latin-1, not UTF-8
    for top in ("x", "y"):
        draw(tmp_path / "odd" / top / name, (3, 2))
    (tmp_path / "odd/y/bad.png").touch()

    def odd(root: Path) -> Listing:
        paths = [f"x/{name}", "y/bad.png", f"y/{name}"]
        return Listing(("x", "y"), paths, [0, 1, 1], ["train", "test", "test"], passed_over=(f"x/{name}.txt",))

    index = make_index(tmp_path / "odd", odd)
    assert index.path(1).is_file() and len(index.digest) == 64 and index.passed_over == (f"x/{name}.txt",)
    read.clear()
    assert make_index(tmp_path / "odd", odd).digest == index.digest and read == ["bad.png"]


@pytest.mark.parametrize(
    "array",
    [
        np.arange(7, dtype=np.int64),
        np.arange(6, dtype=np.int8).reshape(2, 3),
        np.asfortranarray(np.arange(12, dtype=np.float32).reshape(3, 4)),
        np.zeros((0, 32), np.uint8),
        np.zeros(0, np.int16),
        np.array(3.5),
        np.array([True, False]),
        np.array(["a", "bcd"]),
    ],
    ids=lambda array: f"{array.dtype}{array.shape}",
)
def test_mapped_arrays_are_those_that_numpy_loads(tmp_path: Path, array: np.ndarray[Any, Any]) -> None:
    other = np.arange(5, dtype=np.uint8)  # an odd number of bytes before the next
    np.savez(tmp_path / "a.npz", first=other, array=array, last=other)
    mapped = map_arrays(tmp_path / "a.npz")
    with np.load(tmp_path / "a.npz") as loaded:
        assert list(mapped) == list(loaded) == ["first", "array", "last"]
        for name in loaded:
            assert mapped[name].dtype == loaded[name].dtype and mapped[name].shape == loaded[name].shape
            np.testing.assert_array_equal(mapped[name], loaded[name])
    assert array.size == 0 or not mapped["array"].flags.writeable


def test_mapped_arrays_are_not_compressed(tmp_path: Path) -> None:
    np.savez_compressed(tmp_path / "a.npz", array=np.arange(99))
    with pytest.raises(ValueError):
        map_arrays(tmp_path / "a.npz")


# Opened, as long as nothing has changed


def test_an_index_is_opened_without_listing_or_reading(parts: Path, cache: Path, listed: list[Path]) -> None:
    made = make_index(parts, folder)
    assert listed == [parts] and len(made) == 6
    store = the_store(cache)
    written = store.stat().st_mtime_ns
    opened = make_index(str(parts), partial(folder))
    assert listed == [parts] and opened.digest == made.digest and opened.store == store
    for name in ARRAYS:
        np.testing.assert_array_equal(getattr(opened, name), getattr(made, name))
        assert getattr(opened, name).dtype == getattr(made, name).dtype
    assert opened.paths.tolist() == PARTS and opened.describe() == made.describe()
    assert store.stat().st_mtime_ns == written


def test_a_folder_that_changed_just_now_is_listed_again(parts: Path, listed: list[Path]) -> None:
    now = 10**18
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("time.time_ns", lambda: now)
        for seconds, opened in ((0, False), (1.9, False), (2.1, True)):
            then = now - int(seconds * 1e9)
            os.utime(parts / "train" / "b", ns=(then, then))
            for other in (parts, *parts.iterdir(), *parts.glob("*/a"), parts / "val/b", parts / "test/b"):
                os.utime(other, ns=(0, 0))
            make_index(parts, folder)
            listed.clear()
            make_index(parts, folder)
            assert listed == ([] if opened else [parts])


def added(root: Path) -> None:
    draw(root / "train/a/1.png", (3, 3))


def removed(root: Path) -> None:
    draw(root / "train/a/1.png", (3, 3))
    age(root)
    make_index(root, folder)
    (root / "train/a/1.png").unlink()


def replaced(root: Path) -> None:
    draw(root / "new.png", (30, 3))
    (root / "new.png").replace(root / "train/a/0.png")


def overwritten(root: Path) -> None:
    draw(root / "train/a/0.png", (30, 3))
    age(root)


def touched(root: Path) -> None:
    os.utime(root / "val/b/0.png", ns=(0, 0))


def passed_over(root: Path) -> None:
    (root / "train/a/notes.txt").touch()


def emptied(root: Path) -> None:
    shutil.rmtree(root / "val/b")


@pytest.mark.parametrize("change", [added, removed, replaced, overwritten, touched, passed_over, emptied])
def test_whatever_changes_is_seen(
    parts: Path, listed: list[Path], change: Callable[[Path], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    make_index(parts, folder)
    change(parts)
    listed.clear()
    index = make_index(parts, folder)
    assert listed == [parts]
    monkeypatch.setenv("SPP_CACHE", str(parts.parent / "another"))
    anew = make_index(parts, folder)
    assert index.digest == anew.digest and index.passed_over == anew.passed_over
    np.testing.assert_array_equal(index.mtimes, anew.mtimes)


def test_of_very_many_files_the_folders_alone_are_asked(
    parts: Path, listed: list[Path], read: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(index_module, "STAT_AT_MOST", 5)
    make_index(parts, folder)
    listed.clear()
    read.clear()
    overwritten(parts)
    os.utime(parts / "train/a", ns=(0, 0))  # as if it had not been looked into since
    make_index(parts, folder)  # of which the folder's date tells
    assert listed == [parts] and read == ["0.png"]
    stat = os.stat(parts / "train/a/0.png")
    os.utime(parts / "train/a/0.png", ns=(0, stat.st_mtime_ns - 1))
    make_index(parts, folder)
    assert listed == [parts] and read == ["0.png"]  # not seen
    assert make_index(parts, folder, refresh=True).mtimes[2] == stat.st_mtime_ns - 1
    assert listed == [parts] * 2 and read == ["0.png"] * 2


def test_of_very_many_files_the_bad_are_looked_at(parts: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(index_module, "STAT_AT_MOST", 1)
    good = (parts / PARTS[0]).read_bytes()
    (parts / PARTS[0]).write_bytes(b"")
    assert len(make_index(parts, folder, whole=True).bad) == 1
    (parts / PARTS[0]).write_bytes(good)  # in place: no folder's date says so
    assert make_index(parts, folder).bad == ()


def test_a_table_that_changed_is_read_again(parts: Path, tmp_path: Path) -> None:
    lines = ["path,label,split", *(f"{path},{path.split('/')[1]},{path.split('/')[0]}" for path in PARTS)]
    file = tmp_path / "table.csv"
    file.write_text("\n".join(lines))
    os.utime(file, ns=(0, 0))
    of_table = partial(table, table=file)
    asked: list[Path] = []
    with pytest.MonkeyPatch.context() as patch:
        rows = layouts_module._read_table
        patch.setattr(layouts_module, "_read_table", lambda *a: asked.append(a[1]) or rows(*a))  # type: ignore[func-returns-value]
        first = make_index(parts, of_table)
        assert make_index(parts, of_table).digest == first.digest and len(asked) == 1
        file.write_text("\n".join(line.replace("b,", "c,") for line in lines))
        assert make_index(parts, of_table).classes == ("a", "c") and len(asked) == 2


def test_tables_of_one_name_in_two_folders_are_two(
    parts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in "bc":
        (tmp_path / name).mkdir()
        lines = ["path,label,split", *(f"{p},{p.split('/')[1].replace('b', name)},{p.split('/')[0]}" for p in PARTS)]
        (tmp_path / name / "table.csv").write_text("\n".join(lines))
        os.utime(tmp_path / name / "table.csv", ns=(0, 0))
    for name in "bc":
        monkeypatch.chdir(tmp_path / name)
        assert make_index(parts, partial(table, table="table.csv")).classes == ("a", name)


def test_the_layout_of_another_is_asked_each_time(root: Path, read: list[str]) -> None:
    age(root)
    asked: list[Path] = []

    def another(root: Path) -> Listing:
        asked.append(root)
        return layout(root)

    for _ in range(3):
        make_index(root, another)
    assert asked == [root] * 3 and sorted(read) == ["0.png", "1.jpg", "2.png", "3.png"]
    another.__module__ = "spp_cls.data.another"
    make_index(root, another)
    make_index(root, another)
    assert asked == [root] * 4 and len(read) == 4


def test_without_sources_the_layout_is_asked_each_time(root: Path) -> None:
    asked: list[Path] = []

    def blind(root: Path) -> Listing:
        asked.append(root)
        return replace(layout(root), sources=())

    blind.__module__ = "spp_cls.data.blind"
    make_index(root, blind)
    make_index(root, blind)
    assert asked == [root] * 2


# What is known of a file is read once


def test_changed_files_alone_are_read_again(root: Path, read: list[str]) -> None:
    make_index(root, layout)
    read.clear()
    Image.new("RGB", (7, 9)).save(root / "b/2.png")  # another length
    stat = os.stat(root / "b/3.png")
    os.utime(root / "b/3.png", ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))  # the same length, touched
    index = make_index(root, layout)
    assert sorted(read) == ["2.png", "3.png"]
    assert (index.widths[2], index.heights[2]) == (7, 9)


def test_what_another_layout_read_is_known(root: Path, read: list[str], cache: Path) -> None:
    def half(root: Path) -> Listing:
        return Listing(("a", "b"), ["a/0.png", "b/2.png"], [0, 1], ["train", "test"])

    make_index(root, half)
    assert sorted(read) == ["0.png", "2.png"]
    make_index(root, layout)
    assert sorted(read) == ["0.png", "1.jpg", "2.png", "3.png"]
    make_index(root, half)
    make_index(root, layout)
    assert len(read) == 4 and len(list(cache.glob("*.npz"))) == 2


def test_the_splits_of_another_seed_read_nothing(tmp_path: Path, read: list[str]) -> None:
    for name in "ab":
        for number in range(6):
            draw(tmp_path / "drawn" / name / f"{number}.png", (number + 1, 2))
    indices = [make_index(tmp_path / "drawn", partial(folder, split_seed=seed)) for seed in range(5)]
    assert len(read) == 12
    assert len({index.digest for index in indices}) > 1
    assert [index.widths.tolist() for index in indices] == [[1, 2, 3, 4, 5, 6] * 2] * 5


def test_hashes_are_kept_when_another_layout_reads_headers(root: Path, read: list[str]) -> None:
    def half(root: Path) -> Listing:
        return Listing(("a", "b"), ["a/0.png", "b/2.png"], [0, 1], ["train", "test"])

    make_index(root, layout)
    make_index(root, half, whole=True)
    read.clear()
    index = make_index(root, layout)
    assert read == [] and index.hashes.any(1).tolist() == [True, False, True, False]
    make_index(root, layout, whole=True)
    assert sorted(read) == ["1.jpg", "3.png"]


def test_the_hash_of_a_file_that_was_touched_and_restored_is_still_known(root: Path) -> None:
    def half(root: Path) -> Listing:
        return Listing(("a", "b"), ["a/0.png", "b/2.png"], [0, 1], ["train", "test"])

    first = make_index(root, half, whole=True)
    stat = os.stat(root / "b/2.png")
    for mtime in (stat.st_mtime_ns + 1, stat.st_mtime_ns):
        os.utime(root / "b/2.png", ns=(mtime, mtime))
        assert not make_index(root, layout).hashes[2].any()
    # Of two indices that agree on its date, the later knows its header only, the earlier all of it.
    np.testing.assert_array_equal(make_index(root, layout).hashes[2], first.hashes[1])


def test_first_the_headers_then_the_whole(parts: Path, read: list[str], listed: list[Path]) -> None:
    header = make_index(parts, folder)
    assert not header.checked and not header.hashes.any()
    whole = make_index(parts, folder, whole=True)
    assert whole.checked and whole.digest == header.digest
    sha256 = [hashlib.sha256((parts / path).read_bytes()).digest() for path in PARTS]
    assert [bytes(row) for row in whole.hashes] == sha256
    assert len(read) == 12 and len(listed) == 2
    make_index(parts, folder, whole=True)
    assert make_index(parts, folder).checked  # it is better than was asked for
    assert len(read) == 12 and len(listed) == 2


def test_whole_reads_what_changed_alone(root: Path, read: list[str]) -> None:
    make_index(root, layout, whole=True)
    read.clear()
    draw(root / "b/2.png", (7, 9))
    index = make_index(root, layout, whole=True)
    assert read == ["2.png"] and index.checked
    assert bytes(index.hashes[2]) == hashlib.sha256((root / "b/2.png").read_bytes()).digest()
    draw(root / "b/2.png", (9, 7))
    index = make_index(root, layout)
    assert not index.checked and index.hashes.any(1).tolist() == [True, True, False, True]


def test_again_finds_rot_and_forgives_what_is_restored(parts: Path, read: list[str]) -> None:
    Image.new("RGB", (4, 4)).save(parts / "train/a/1.ppm")
    age(parts)
    before = make_index(parts, folder, whole=True)
    rot(parts / "train/a/1.ppm")
    assert make_index(parts, folder, whole=True).bad == ()
    assert make_index(parts, folder, refresh=True, whole=True).bad == ()
    read.clear()
    rotten = make_index(parts, folder, again=True)
    assert len(read) == 7 and rotten.bad == (Bad("train/a/1.ppm", ROTTEN),) and len(rotten) == 6
    assert make_index(parts, folder).bad == make_index(parts, folder, refresh=True, whole=True).bad == rotten.bad
    rot(parts / "train/a/1.ppm")  # the same bit: as it was
    restored = make_index(parts, folder, again=True)
    assert restored.bad == () and restored.digest == before.digest
    np.testing.assert_array_equal(restored.hashes, before.hashes)


# Interrupted


@pytest.fixture
def one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(facts_module, "CHUNK", 1)
    monkeypatch.setattr(facts_module, "HEADER_THREADS", 1)


@pytest.mark.usefixtures("one_by_one")
def test_an_index_that_was_interrupted_is_made_from_where_it_was(
    root: Path, cache: Path, read: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    noted = facts_module.look_at

    def interrupted(file: str, whole: bool) -> Facts:
        if file.endswith("2.png"):
            raise KeyboardInterrupt
        return noted(file, whole)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(facts_module, "look_at", interrupted)
        make_index(root, layout)
    assert list(cache.glob("*.npz")) == [] and len(list(cache.glob("*.journal"))) == 1
    before = list(read)
    assert {"0.png", "1.jpg"} <= set(before)
    make_index(root, layout)
    assert sorted(read) == ["0.png", "1.jpg", "2.png", "3.png"]
    assert list(cache.glob("*.journal")) == []


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
@pytest.mark.usefixtures("one_by_one")
def test_an_index_that_was_killed_is_made_from_where_it_was(
    root: Path, cache: Path, read: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(file: str, whole: bool) -> Facts:
        if file.endswith("2.png"):
            os.kill(os.getpid(), signal.SIGKILL)
        return look_at(file, whole)

    with monkeypatch.context() as patch:
        patch.setattr(facts_module, "look_at", killed)
        process = multiprocessing.get_context("fork").Process(target=make_index, args=(root, layout))
        process.start()
        process.join(60)
    assert process.exitcode == -signal.SIGKILL
    (journal,) = cache.glob("*.journal")
    with journal.open("ab") as file:
        file.write(b'\n["b/2.png", 123, 45')  # as if it had been killed in the middle of a line
    index = make_index(root, layout)
    assert sorted(read) == ["2.png", "3.png"] and index.widths.tolist() == [30, 10, 20, 50]
    assert list(cache.glob("*.journal")) == []


# The file it is kept in


def test_damaged_or_foreign_files_are_ignored_and_rewritten(root: Path, cache: Path, read: list[str]) -> None:
    expected = make_index(root, layout).digest
    store = the_store(cache)
    data = store.read_bytes()
    arrays = {name: np.array(array) for name, array in map_arrays(store).items()}
    damages: dict[str, Callable[[], object]] = {
        "cut": lambda: store.write_bytes(data[: len(data) // 2]),
        "text": lambda: store.write_text("no zip"),
        "empty": lambda: store.write_bytes(b""),
        "foreign": lambda: np.savez(store, something=np.zeros(3)),
        "compressed": lambda: np.savez_compressed(store, **arrays),
        "lengths": lambda: np.savez(store, **{**arrays, "labels": arrays["labels"][:-1]}),
        "no json": lambda: np.savez(store, **{**arrays, "about": arrays["about"][:-1]}),
        "a folder": lambda: (store.unlink(), store.mkdir()),
    }
    for damage, do in damages.items():
        do()
        read.clear()
        assert make_index(root, layout).digest == expected and len(read) == 4, damage
        if store.is_dir():  # it cannot be replaced by a file, but nor is it an error
            store.rmdir()
            make_index(root, layout)
        read.clear()
        assert make_index(root, layout).digest == expected and read == [], damage


def test_a_cache_folder_that_cannot_be_written_is_no_error(
    parts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("not a folder")
    monkeypatch.setenv("SPP_CACHE", str(tmp_path / "file" / "cache"))
    index = make_index(parts, folder)
    assert len(index) == 6 and index.store is None and make_index(parts, folder).digest == index.digest


@pytest.mark.parametrize("written", [0, 100])
def test_a_full_disk_leaves_the_old_file_and_no_litter(
    root: Path, cache: Path, read: list[str], monkeypatch: pytest.MonkeyPatch, written: int
) -> None:
    make_index(root, layout)
    store = the_store(cache)
    before = store.read_bytes()

    def full(file: Any, **_: object) -> None:
        file.write(b"x" * written)
        raise OSError(28, "No space left on device")

    touched = os.stat(root / "b/3.png").st_mtime_ns + 1
    os.utime(root / "b/3.png", ns=(touched, touched))
    read.clear()
    with monkeypatch.context() as patch:
        patch.setattr(np, "savez", full)
        index = make_index(root, layout, whole=True)
        assert index.checked and index.mtimes[3] == touched and index.store is None  # not what the old file says
    assert the_store(cache) == store and store.read_bytes() == before
    assert {path.suffix for path in cache.iterdir()} <= {".npz", ".lock", ".journal"}
    assert len(read) == 4
    assert make_index(root, layout, whole=True).checked and len(read) == 4  # what was found is still known
    assert {path.suffix for path in cache.iterdir()} <= {".npz", ".lock"}


def test_where_the_cache_lies(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert cache_folder() == tmp_path / "cache"
    monkeypatch.delenv("SPP_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    make_index(root, layout)
    assert len(list((tmp_path / "xdg/spp_cls").glob("index_*.npz"))) == 1
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    make_index(root, layout)
    monkeypatch.chdir(root.parent)
    make_index("root", layout)  # the key is the absolute path
    assert len(list((tmp_path / "home/.cache/spp_cls").glob("*.npz"))) == 1
    assert sorted(path.name for path in root.iterdir()) == ["a", "b"]  # nothing among the data


def test_the_index_of_another_root_is_another(root: Path, parts: Path, cache: Path) -> None:
    make_index(root, layout)
    make_index(parts, folder)
    assert len(list(cache.glob("*.npz"))) == 2


# Two at once


def test_two_threads_make_one(
    parts: Path, cache: Path, read: list[str], listed: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    alone, meet = index_module.alone, threading.Barrier(2)

    def together(lock: Path, what: str) -> AbstractContextManager[None]:
        meet.wait(30)  # both have found that there is no index
        return alone(lock, what)

    monkeypatch.setattr(index_module, "alone", together)
    digests: list[str] = []
    threads = [threading.Thread(target=lambda: digests.append(make_index(parts, folder).digest)) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(read) == 6 and listed == [parts]
    assert digests == [make_index(parts, folder).digest] * 2
    assert sorted(path.suffix for path in cache.iterdir() if path.suffix != ".lock") == [".npz"]


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_two_processes_make_one(parts: Path, tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fork = multiprocessing.get_context("fork")
    alone, meet = index_module.alone, fork.Barrier(2)

    def together(lock: Path, what: str) -> AbstractContextManager[None]:
        meet.wait(30)
        return alone(lock, what)

    def noted(file: str, whole: bool) -> Facts:
        with open(tmp_path / "read", "a") as log:
            log.write(f"{file}\n")
        return look_at(file, whole)

    def make() -> None:
        digest = make_index(parts, folder).digest
        (tmp_path / f"digest_{os.getpid()}").write_text(digest)

    monkeypatch.setattr(index_module, "alone", together)
    monkeypatch.setattr(facts_module, "look_at", noted)
    processes = [fork.Process(target=make) for _ in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, 0]
    assert sorted((tmp_path / "read").read_text().splitlines()) == [str(parts / path) for path in PARTS]
    digests = {file.read_text() for file in tmp_path.glob("digest_*")}
    assert digests == {make_index(parts, folder).digest} and len(list(tmp_path.glob("digest_*"))) == 2


# Handed to another process


def test_a_pickled_index_is_opened_again(parts: Path) -> None:
    make_index(parts, folder)
    index = make_index(parts, folder)
    pickled = pickle.dumps(index)
    assert len(pickled) < 1000
    other = pickle.loads(pickled)
    assert other.digest == index.digest and other.root == parts and other.store == index.store
    assert other.paths.tolist() == PARTS and isinstance(other.labels.base, np.memmap)


@pytest.mark.parametrize("change", [added, lambda root: None])
def test_a_pickled_index_that_is_another_by_now_is_refused(parts: Path, change: Callable[[Path], None]) -> None:
    index = make_index(parts, folder)
    pickled = pickle.dumps(index)
    change(parts)
    make_index(parts, folder, refresh=True)
    if change is added:
        message = f"{index.store} has changed under this run: the pictures of {parts} were indexed anew; start again"
        with pytest.raises(RuntimeError, match=f"^{re.escape(message)}$"):
            pickle.loads(pickled)
        assert index.store is not None
        index.store.unlink()
        with pytest.raises(RuntimeError, match="start again$"):
            pickle.loads(pickled)
    else:  # written anew, but with the same contents
        assert pickle.loads(pickled).digest == index.digest
    assert index.paths.tolist() == PARTS  # what is open stays as it was


def test_an_index_that_is_not_in_a_file_is_pickled_whole(root: Path) -> None:
    stored = make_index(root, layout)
    changed = replace(stored, mtimes=stored.mtimes + 1)
    assert changed.store is None  # the file does not hold the change
    other = pickle.loads(pickle.dumps(changed))
    assert other.digest == stored.digest and (other.mtimes == stored.mtimes + 1).all()
    assert other.paths.tolist() == sorted(SIZES)


# Bad files


def test_bad_files_are_listed_and_left_out_of_the_rows(root: Path) -> None:
    good = make_index(root, layout)
    (root / "a/1.jpg").write_text("<html>")
    (root / "b/3.png").unlink()
    index = make_index(root, layout)
    assert index.bad == (
        Bad("a/1.jpg", "not a picture of a known format: begins with b'<html>'"),
        Bad("b/3.png", "No such file or directory"),
    )
    assert index.paths.tolist() == ["a/0.png", "b/2.png"] and index.classes == ("a", "b")
    for name in set(ARRAYS) - {"kinds"}:  # the rest is what it was
        np.testing.assert_array_equal(getattr(index, name), getattr(good, name)[[0, 2]])
    assert index.kind_names == ("PNG RGB",) and index.kinds.tolist() == [0, 0]
    assert index.counts == {"train": 1, "val": 0, "test": 1}
    assert make_index(root, layout).bad == index.bad


def test_every_file_may_be_bad(root: Path) -> None:
    for path in SIZES:
        (root / path).write_bytes(b"")
    for _ in range(2):
        index = make_index(root, layout)
        assert len(index) == 0 and len(index.bad) == 4 and index.counts == {"train": 0, "val": 0, "test": 0}
        assert index.describe().startswith(f"{root}: 0 pictures") and len(index.digest) == 64
        assert pickle.loads(pickle.dumps(index)).paths.tolist() == []


@pytest.mark.parametrize("whole", [False, True])
def test_a_bad_file_that_is_repaired_is_good(parts: Path, listed: list[Path], whole: bool) -> None:
    good = (parts / PARTS[2]).read_bytes()
    make_index(parts, folder)
    (parts / PARTS[2]).write_bytes(b"")
    bad = make_index(parts, folder, whole=whole)
    assert [path for path, _ in bad.bad] == [PARTS[2]]
    listed.clear()
    assert make_index(parts, folder, whole=whole).bad == bad.bad
    assert listed == []  # the bad file alone is looked at each time
    (parts / PARTS[2]).write_bytes(good)
    assert make_index(parts, folder).bad == ()


@pytest.mark.parametrize("whole", [False, True])
def test_a_picture_that_wanted_a_package_is_good_when_that_has_come(
    parts: Path, monkeypatch: pytest.MonkeyPatch, whole: bool
) -> None:
    heic = b"\0\0\0\x1cftypheic\0\0\0\0mif1heicmiaf" + bytes(40)
    (parts / PARTS[2]).write_bytes(heic)
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    make_index(parts, folder, whole=whole)
    assert "needs the package pillow-heif" in make_index(parts, folder).bad[0].reason

    def opened(file: Any, name: str) -> Image.Image:
        return Image.new("RGB", (20, 10))

    monkeypatch.setitem(sys.modules, "pillow_heif", types.SimpleNamespace(HeifImageFile=opened))
    index = make_index(parts, folder)
    assert index.bad == () and index.widths[2] == 20


def test_again_goes_on_where_it_was_interrupted(parts: Path, read: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    make_index(parts, folder, whole=True)
    monkeypatch.setattr(facts_module, "CHUNK", 1)
    counted = facts_module.look_at

    def interrupted(file: str, whole: bool) -> Facts:
        if len(read) == 4:
            raise KeyboardInterrupt
        return counted(file, whole)

    monkeypatch.setattr(os, "cpu_count", lambda: 1)
    read.clear()
    with monkeypatch.context() as interrupting:
        interrupting.setattr(facts_module, "look_at", interrupted)
        with pytest.raises(KeyboardInterrupt):
            make_index(parts, folder, again=True)
    assert len(read) == 4
    make_index(parts, folder, again=True)
    assert sorted(read) == sorted(make_names(parts))  # each once
    read.clear()
    make_index(parts, folder, again=True)
    assert sorted(read) == sorted(make_names(parts))  # and all of them in the next


def make_names(parts: Path) -> list[str]:
    return [Path(path).name for path in PARTS]


def test_what_is_bad_in_the_middle_of_a_file_is_found_by_whole(root: Path) -> None:
    noise(root / "b/2.png")
    data = (root / "b/2.png").read_bytes()
    (root / "b/2.png").write_bytes(data[: len(data) // 2])
    assert make_index(root, layout).bad == ()
    index = make_index(root, layout, whole=True)
    assert [path for path, _ in index.bad] == ["b/2.png"] and index.checked
    assert make_index(root, layout).bad == index.bad  # it stays known


# For training


@pytest.fixture
def many(tmp_path: Path) -> tuple[Path, Callable[[Path], Listing]]:
    """Ten pictures, of class "b" one for each split, and their layout."""
    paths = [f"{number}.png" for number in range(10)]
    for number, path in enumerate(paths):
        draw(tmp_path / "many" / path, (number + 1, 1))
    splits = ["train", "train", "train", "train", "train", "val", "test", "train", "val", "test"]
    listing = Listing(("a", "b"), paths, [0] * 7 + [1] * 3, splits)
    return tmp_path / "many", lambda root: listing


def stopped(message: str, call: Callable[[], Index]) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        call()


def test_training_stops_at_bad_files(many: tuple[Path, Callable[[Path], Listing]], read: list[str]) -> None:
    root, listing = many
    index = usable_index(root, listing)
    assert len(index) == 10 and not index.checked
    (root / "2.png").write_bytes(b"")
    more = "(spp check names all that are bad), or leave out what is bad by data.on_bad=skip"
    stopped(f"{root}/2.png: is empty (0 bytes); remove or repair it {more}", lambda: usable_index(root, listing))
    (root / "5.png").write_bytes(b"")
    (root / "7.png").write_bytes(b"")
    several = f"{root}/2.png: is empty (0 bytes) (and 2 more); remove or repair them {more}"
    stopped(several, lambda: usable_index(root, listing, "stop", max_bad=1.0))
    for number in (2, 5, 7):
        draw(root / f"{number}.png", (number + 1, 1))
    read.clear()
    assert usable_index(root, listing).digest == index.digest
    assert sorted(read) == ["2.png", "5.png", "7.png"]  # the good ones were remembered


def test_training_leaves_out_the_bad(many: tuple[Path, Callable[[Path], Listing]]) -> None:
    root, listing = many
    noise(root / "2.png")
    good = usable_index(root, listing)
    data = (root / "2.png").read_bytes()
    (root / "2.png").write_bytes(data[: len(data) // 2])  # its header is good
    assert usable_index(root, listing).bad == ()
    index = usable_index(root, listing, "skip", max_bad=0.1)  # exactly as many as are allowed
    assert [path for path, _ in index.bad] == ["2.png"] and index.checked and index.classes == ("a", "b")
    rest = [0, 1, 3, 4, 5, 6, 7, 8, 9]
    assert index.paths.tolist() == good.paths.take(rest)
    np.testing.assert_array_equal(index.labels, good.labels[rest])
    np.testing.assert_array_equal(index.splits, good.splits[rest])
    reason = index.bad[0].reason
    share = "10.00% of the pictures are bad, more than data.max_bad=1.00%: remove or repair them"
    stopped(f"{root}/2.png: {reason}; {share}", lambda: usable_index(root, listing, "skip"))
    stopped(
        f"{root}/2.png: {reason}; remove or repair it (spp check names all that are bad), "
        "or leave out what is bad by data.on_bad=skip",
        lambda: usable_index(root, listing),  # it is known by now
    )


def test_training_needs_something_to_be_left(many: tuple[Path, Callable[[Path], Listing]]) -> None:
    root, listing = many
    (root / "7.png").write_bytes(b"")
    left = f"{root}/7.png: is empty (0 bytes); without them 'b' has no training picture"
    stopped(left, lambda: usable_index(root, listing, "skip", 0.5))
    draw(root / "7.png", (8, 1))
    (root / "5.png").write_bytes(b"")
    assert usable_index(root, listing, "skip", 0.5).counts == {"train": 6, "val": 1, "test": 2}
    (root / "8.png").write_bytes(b"")
    left = f"{root}/5.png: is empty (0 bytes) (and 1 more); without them a part has no pictures: "
    counts = "{'train': 6, 'val': 0, 'test': 2}"
    stopped(left + counts, lambda: usable_index(root, listing, "skip", 0.5))


def test_what_to_do_with_the_bad_is_stop_or_skip(root: Path) -> None:
    stopped("data.on_bad='ignore': use stop or skip", lambda: usable_index(root, layout, "ignore"))


# What is said


def test_what_was_read_stands_on_stderr(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for options, words in (({}, "their headers read"), ({"whole": True}, "read whole")):
        make_index(root, layout, **options)
        out, err = capsys.readouterr()
        assert out == "" and re.fullmatch(rf"index of {re.escape(str(root))}: 4 pictures, {words} in \d+\.\d s\n", err)
        make_index(root, layout, **options)
        assert capsys.readouterr() == ("", "")
    make_index(root, layout, again=True, progress=False)
    assert capsys.readouterr() == ("", "")


def test_many_files_stay_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def width(file: str, whole: bool) -> Facts:
        return Facts(0, 0, int(Path(file).stem), 1, 1, "PNG", "RGB")

    monkeypatch.setattr(facts_module, "look_at", width)
    paths = [f"{number:03}.png" for number in range(300)]
    listing = Listing(("x",), paths, [0] * 300, ["train"] * 300)
    assert make_index(tmp_path, lambda root: listing).widths.tolist() == list(range(300))


@pytest.mark.slow
def test_who_waits_for_another_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    order: list[str] = []

    def hold() -> None:
        with index_module.alone(tmp_path / "a.lock", "it"):
            order.append("first")
            inside.set()
            time.sleep(2.5)  # the message comes after two seconds
            order.append("first leaves")

    inside = threading.Event()
    thread = threading.Thread(target=hold)
    thread.start()
    inside.wait(30)
    with index_module.alone(tmp_path / "a.lock", "it"):
        order.append("second")
    thread.join()
    assert order == ["first", "first leaves", "second"]
    assert capsys.readouterr().err == "waiting for another process that makes it\n"
