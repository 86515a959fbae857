from __future__ import annotations

import os
import re
import shutil
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from spp_cls.data import index as index_module
from spp_cls.data.index import SPLITS, Index, make_index
from spp_cls.data.layouts import Listing
from spp_cls.data.reader import read_size

SIZES = {"a/0.png": (30, 20), "a/1.jpg": (10, 40), "b/2.png": (20, 20), "b/3.png": (50, 5)}


def layout(root: Path) -> Listing:
    return Listing(
        classes=("a", "b"),
        paths=sorted(SIZES),
        labels=[0, 0, 1, 1],
        splits=["train", "val", "test", "train"],
        passed_over=("a/notes.txt", "Thumbs.db"),
        notes=("a note",),
    )


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SPP_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for path, size in SIZES.items():
        (tmp_path / "root" / path).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", size).save(tmp_path / "root" / path)
    return tmp_path / "root"


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the files whose header is read."""
    names: list[str] = []

    def counted(path: Path) -> tuple[int, int]:
        names.append(path.name)
        return read_size(path)

    monkeypatch.setattr(index_module, "read_size", counted)
    return names


def test_arrays_and_rows(root: Path) -> None:
    index = make_index(root, layout)
    assert index.root == root and index.classes == ("a", "b") and len(index) == 4
    assert index.paths.tolist() == ["a/0.png", "a/1.jpg", "b/2.png", "b/3.png"]
    assert index.labels.tolist() == [0, 0, 1, 1] and index.labels.dtype == np.int64
    assert index.splits.tolist() == [0, 1, 2, 0] and index.splits.dtype == np.int8
    assert index.widths.tolist() == [30, 10, 20, 50] and index.widths.dtype == np.int32
    assert index.heights.tolist() == [20, 40, 20, 5] and index.heights.dtype == np.int32
    assert [index.rows(split).tolist() for split in SPLITS] == [[0, 3], [1], [2]]
    assert index.counts == {"train": 2, "val": 1, "test": 1}
    assert index.path(3) == root / "b/3.png"
    with pytest.raises(ValueError, match=r"^split='dev': must be one of train, val, test$"):
        index.rows("dev")


def test_sizes_are_upright(root: Path) -> None:
    tags = Image.Exif()
    tags[274] = 6
    Image.new("RGB", (30, 20)).save(root / "a/0.png", exif=tags)
    index = make_index(root, layout)
    assert (index.widths[0], index.heights[0]) == (20, 30)


def test_describe(root: Path) -> None:
    assert make_index(root, layout).describe().splitlines() == [
        f"{root}: 4 pictures of 2 classes (2 train, 1 val, 1 test)",
        "width 10 / 25 / 50, height 5 / 20 / 40 px (smallest / median / largest)",
        "passed over, no pictures: 2 (a/notes.txt, Thumbs.db)",
        "note: a note",
    ]
    quiet = replace(make_index(root, layout), notes=(), passed_over=())
    assert len(quiet.describe().splitlines()) == 2


def test_digest_is_that_of_the_content_wherever_it_lies(root: Path, tmp_path: Path) -> None:
    index = make_index(root, layout)
    shutil.copytree(root, tmp_path / "elsewhere")
    assert make_index(tmp_path / "elsewhere", layout).digest == index.digest
    # pinned: a digest that changes without a reason would refuse everybody's resume
    assert index.digest == "ee572cdd515c9f4b74a18488ef28ee6eebec8fbfce55dd873f78e42a3b77ce05"
    others = (
        replace(index, classes=("a", "c")),
        replace(index, paths=np.array(["a/0.png", "a/1.jpg", "b/2.png", "b/4.png"])),
        replace(index, labels=index.labels[::-1].copy()),
        replace(index, splits=index.splits[::-1].copy()),
        replace(index, widths=index.widths + 1),
        replace(index, heights=index.heights + 1),
    )
    assert len({index.digest, *(other.digest for other in others)}) == 7


def test_second_call_reads_no_header(root: Path, read: list[str], cache: Path) -> None:
    first = make_index(root, layout)
    assert sorted(read) == ["0.png", "1.jpg", "2.png", "3.png"]
    written = next(cache.iterdir()).stat().st_mtime_ns
    read.clear()
    second = make_index(root, layout)
    assert read == [] and second.digest == first.digest
    assert next(cache.iterdir()).stat().st_mtime_ns == written  # nothing new, nothing written


def test_changed_files_alone_are_read_again(root: Path, read: list[str]) -> None:
    make_index(root, layout)
    read.clear()
    Image.new("RGB", (7, 9)).save(root / "b/2.png")  # another length
    stat = os.stat(root / "b/3.png")
    os.utime(root / "b/3.png", ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))  # the same length, touched
    index = make_index(root, layout)
    assert sorted(read) == ["2.png", "3.png"]
    assert (index.widths[2], index.heights[2]) == (7, 9)


def test_what_another_layout_read_is_kept(root: Path, read: list[str]) -> None:
    def half(root: Path) -> Listing:
        return Listing(("a", "b"), ["a/0.png", "b/2.png"], [0, 1], ["train", "test"])

    make_index(root, half)
    assert sorted(read) == ["0.png", "2.png"]
    make_index(root, layout)
    assert sorted(read) == ["0.png", "1.jpg", "2.png", "3.png"]
    make_index(root, half)
    make_index(root, layout)
    assert len(read) == 4


@pytest.mark.parametrize("damage", ["cut", "text", "empty", "foreign", "lengths"])
def test_a_cache_that_cannot_be_read_is_ignored_and_rewritten(
    root: Path, cache: Path, read: list[str], damage: str
) -> None:
    expected = make_index(root, layout).digest
    (file,) = cache.iterdir()
    whole = file.read_bytes()
    if damage == "foreign":
        np.savez(file, something=np.zeros(3))
    elif damage == "lengths":
        np.savez(file, paths=np.frombuffer(b"a/0.png", np.uint8), facts=np.zeros((2, 4), np.int64))
    else:
        file.write_bytes({"cut": whole[: len(whole) // 2], "text": b"no zip", "empty": b""}[damage])
    read.clear()
    assert make_index(root, layout).digest == expected and len(read) == 4
    read.clear()
    assert make_index(root, layout).digest == expected and read == []


def test_a_cache_folder_that_cannot_be_written_is_no_error(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("not a folder")
    monkeypatch.setenv("SPP_CACHE", str(tmp_path / "file" / "cache"))
    assert len(make_index(root, layout)) == 4


def test_a_write_that_fails_leaves_the_old_cache_and_no_litter(
    root: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_index(root, layout)
    (file,) = cache.iterdir()
    whole = file.read_bytes()
    Image.new("RGB", (7, 9)).save(root / "b/2.png")

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "savez", full)
    assert make_index(root, layout).widths[2] == 7
    assert [path.name for path in cache.iterdir()] == [file.name] and file.read_bytes() == whole


def test_where_the_cache_lies(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SPP_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    make_index(root, layout)
    assert len(list((tmp_path / "xdg/spp_cls").glob("index_*.npz"))) == 1
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    make_index(root, layout)
    monkeypatch.chdir(root.parent)
    make_index("root", layout)  # the key is the absolute path
    assert len(list((tmp_path / "home/.cache/spp_cls").iterdir())) == 1


def test_two_threads_at_once(root: Path, cache: Path) -> None:
    digests: list[str] = []
    start = threading.Barrier(2)

    def make() -> None:
        start.wait()
        digests.append(make_index(root, layout).digest)

    threads = [threading.Thread(target=make) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert digests == [make_index(root, layout).digest] * 2
    assert [path.suffix for path in cache.iterdir()] == [".npz"]


def test_one_bad_file(root: Path) -> None:
    (root / "b/2.png").write_bytes(b"")
    reason = f"{root / 'b/2.png'}: is empty (0 bytes); remove or repair it"
    with pytest.raises(ValueError, match=f"^{re.escape(reason)}$"):
        make_index(root, layout)


def test_more_bad_files_and_the_good_ones_are_remembered(root: Path, read: list[str]) -> None:
    (root / "a/1.jpg").write_text("<html>")
    (root / "b/2.png").write_bytes(b"")
    (root / "b/3.png").unlink()
    reason = "1.jpg: not a picture of a known format: begins with b'<html>' (and 2 more); remove or repair them"
    with pytest.raises(ValueError, match=re.escape(reason) + "$"):
        make_index(root, layout)
    for path in ("a/1.jpg", "b/2.png", "b/3.png"):
        Image.new("RGB", SIZES[path]).save(root / path)
    read.clear()
    make_index(root, layout)
    assert sorted(read) == ["1.jpg", "2.png", "3.png"]


def test_the_bar_stands_on_stderr_only_if_it_takes_long(
    root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    make_index(root, layout)
    assert capsys.readouterr() == ("", "")
    monkeypatch.setattr(index_module, "DELAY", 0)
    make_index(root, layout, progress=False)
    assert capsys.readouterr() == ("", "")
    make_index(root, layout)
    out, err = capsys.readouterr()
    assert out == "" and "reading sizes" in err and "4/4" in err


def test_names_of_any_bytes(tmp_path: Path, read: list[str]) -> None:
    name = os.fsdecode(b"caf\xe9.png")  # Latin-1, not UTF-8
    for folder in ("x", "y"):
        (tmp_path / "odd" / folder).mkdir(parents=True)
        Image.new("RGB", (3, 2)).save(tmp_path / "odd" / folder / name)

    def odd(root: Path) -> Listing:
        return Listing(("x", "y"), [f"x/{name}", f"y/{name}"], [0, 1], ["train", "test"])

    index = make_index(tmp_path / "odd", odd)
    assert index.path(1).is_file() and len(index.digest) == 64
    read.clear()
    assert make_index(tmp_path / "odd", odd).digest == index.digest and read == []


@pytest.fixture
def big(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(index_module, "read_size", lambda path: (int(path.stem), 1))
    yield


@pytest.mark.usefixtures("big")
def test_many_files_stay_in_order(tmp_path: Path) -> None:
    for number in range(300):
        (tmp_path / f"{number:03}.png").touch()
    paths = [f"{number:03}.png" for number in range(300)]
    listing = Listing(("x",), paths, [0] * 300, ["train"] * 300)
    index: Index = make_index(tmp_path, lambda root: listing)
    assert index.widths.tolist() == list(range(300))
