from __future__ import annotations

import json
import os
import pickle
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from spp_cls.data import cache as cache_module
from spp_cls.data.cache import Cache, choose, fingerprint, is_made, make_cache, num_bytes, open_cache, where
from spp_cls.data.full_image import FullImage
from spp_cls.data.index import make_index
from spp_cls.data.layouts import folder
from spp_cls.data.source import Files, resized_shapes


def files_of(root: Path, resize: int = 36, draft: bool = True) -> Files:
    index = make_index(root, folder, progress=False)
    rows = index.rows("train")
    return Files(index, rows, resized_shapes(index.widths[rows], index.heights[rows], resize), draft)


@pytest.fixture(scope="module")
def files(pictures: Path) -> Files:
    return files_of(pictures)


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The positions of the files that are decoded."""
    positions: list[int] = []
    decode = Files.__getitem__

    def counted(self: Files, position: int) -> np.ndarray:  # type: ignore[type-arg]
        positions.append(position)
        return decode(self, position)

    monkeypatch.setattr(Files, "__getitem__", counted)
    return positions


def test_a_raw_cache_holds_the_very_pixels_of_the_files(files: Files, tmp_path: Path) -> None:
    cache = make_cache(files, "raw", tmp_path, progress=False)
    assert len(cache.ends) == len(files.rows) == 36
    for position in range(36):
        assert np.array_equal(cache[position], files[position])
    assert len(cache.data) == num_bytes(files, "raw") == 3 * int(files.shapes.prod(1).sum())


def test_a_raw_cache_of_whole_pictures_holds_them_at_their_homes(files: Files, tmp_path: Path) -> None:
    rows = files.rows
    homes = FullImage(32, 8).homes(files.index.widths[rows], files.index.heights[rows])
    whole = replace(files, shapes=homes)
    cache = make_cache(whole, "raw", tmp_path, progress=False)
    assert all(np.array_equal(cache[position], whole[position]) for position in range(36))
    assert [cache[position].shape[:2] for position in range(36)] == [tuple(home) for home in homes.tolist()]


def test_a_jpeg_cache_is_near_and_small(files: Files, tmp_path: Path) -> None:
    cache = make_cache(files, "jpeg", tmp_path, progress=False)
    for position in (0, 17, 35):
        error = cache[position].astype(float) - files[position]
        assert 10 * np.log10(255**2 / (error**2).mean()) > 33  # dB
    assert len(cache.data) < num_bytes(files, "raw") / 2
    assert abs(num_bytes(files, "jpeg") - len(cache.data)) < 0.1 * len(cache.data)  # the estimate


@pytest.mark.parametrize("kind", ["raw", "jpeg"])
def test_one_that_is_made_is_opened(files: Files, tmp_path: Path, read: list[int], kind: str) -> None:
    assert not is_made(files, kind, tmp_path)
    first = make_cache(files, kind, tmp_path, progress=False)
    assert is_made(files, kind, tmp_path) and set(read) == set(range(36))
    read.clear()
    second = make_cache(files, kind, tmp_path, progress=False)
    third = pickle.loads(pickle.dumps(second))
    assert read == [0, 5, 10, 15, 20, 25, 30, 35] and isinstance(third, Cache) and len(pickle.dumps(second)) < 2000
    assert all(np.array_equal(first[i], second[i]) and np.array_equal(first[i], third[i]) for i in range(36))


@pytest.mark.parametrize("kind", ["raw", "jpeg"])
@pytest.mark.parametrize("cut", ["at the end of a chunk", "in a picture", "in an end", "pictures behind ends"])
def test_one_that_was_interrupted_is_gone_on_with(
    files: Files, tmp_path: Path, read: list[int], monkeypatch: pytest.MonkeyPatch, kind: str, cut: str
) -> None:
    whole = make_cache(files, kind, tmp_path / "whole", progress=False)
    monkeypatch.setattr(cache_module, "CHUNK", 8)
    monkeypatch.setattr(cache_module, "SAMPLE", 2)  # the first and the last

    def killed(self: Files, position: int) -> np.ndarray:  # type: ignore[type-arg]
        if position == 20:
            raise KeyboardInterrupt
        return decode(self, position)

    decode = Files.__getitem__
    with monkeypatch.context() as killing:
        killing.setattr(Files, "__getitem__", killed)
        with pytest.raises(KeyboardInterrupt):
            make_cache(files, kind, tmp_path / "cut", progress=False)
    here = where(files, kind, tmp_path / "cut")
    assert not is_made(files, kind, tmp_path / "cut") and len(np.fromfile(here / "ends.bin", "<i8")) == 16
    kept = 16
    if cut == "in a picture":
        os.truncate(here / "pictures.bin", int(whole.ends[12]) - 1)
        kept = 12
    elif cut == "in an end":
        os.truncate(here / "ends.bin", 8 * 15 + 3)
        kept = 15
    elif cut == "pictures behind ends":
        with (here / "pictures.bin").open("ab") as file:
            file.write(b"more")
    monkeypatch.setattr(cache_module, "PROBES", 0)
    read.clear()
    again = make_cache(files, kind, tmp_path / "cut", progress=False)
    sampled = set(read) - set(range(kept, 36))  # pictures that a JPEG cache's size is estimated from
    assert set(range(kept, 36)) <= set(read) and (kind == "jpeg" or not sampled)
    assert np.array_equal(again.ends, whole.ends) and np.array_equal(again.data, whole.data)


def test_what_the_fingerprint_sees(pictures: Path, files: Files, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(pictures, copy)  # with the dates of the files
    assert fingerprint(files_of(copy), "raw") == fingerprint(files, "raw")
    touched = next((copy / "train" / "a").iterdir())
    os.utime(touched, ns=(0, 10**18))
    others = [
        fingerprint(files_of(copy), "raw"),
        fingerprint(files, "jpeg"),
        fingerprint(files_of(pictures, resize=40), "raw"),
        fingerprint(files_of(pictures, draft=False), "raw"),
        fingerprint(replace(files, rows=files.rows[:-1], shapes=files.shapes[:-1]), "raw"),
    ]
    assert len({fingerprint(files, "raw"), *others}) == 6


def test_a_stale_or_foreign_cache_is_refused(files: Files, tmp_path: Path) -> None:
    made = make_cache(files, "raw", tmp_path, progress=False)
    other = replace(files, draft=False)
    shutil.copytree(made.folder, where(other, "raw", tmp_path))  # laid where another is looked for
    with pytest.raises(ValueError, match=r"is a cache of other pictures, or of these before they changed"):
        make_cache(other, "raw", tmp_path, progress=False)
    with pytest.raises(ValueError, match=r"no finished cache is there; make it by spp cache data.cache=jpeg"):
        open_cache(tmp_path / "none", files, "jpeg")
    os.truncate(made.folder / "pictures.bin", len(made.data) - 1)
    with pytest.raises(ValueError, match=r"its files are not as long as they were: remove it"):
        make_cache(files, "raw", tmp_path, progress=False)
    (made.folder / "manifest.json").write_text('{"finger')
    assert not is_made(files, "raw", tmp_path)


@pytest.mark.parametrize("kind", ["raw", "jpeg"])
def test_pictures_of_the_same_names_lengths_and_dates_are_told_apart(tmp_path: Path, kind: str) -> None:
    chance = np.random.default_rng(0)
    for root in ("one", "two"):
        for path in ("a/0.ppm", "a/1.ppm", "a/2.ppm", "b/0.ppm", "b/1.ppm", "b/2.ppm"):
            file = tmp_path / root / "pictures" / path
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(chance.integers(0, 256, (40, 50, 3), np.uint8)).save(file)
            os.utime(file, ns=(0, 0))
    one, two = (files_of(tmp_path / root / "pictures") for root in ("one", "two"))
    made = make_cache(one, kind, tmp_path / "caches", progress=False)
    assert where(two, kind, tmp_path / "caches") == made.folder
    with pytest.raises(ValueError, match=r"holds something else than .*/two/pictures/./..ppm gives now: remove it"):
        make_cache(two, kind, tmp_path / "caches", progress=False)


def test_too_little_disk_is_said_before_a_picture_is_read(
    files: Files, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, read: list[int]
) -> None:
    monkeypatch.setattr(cache_module, "_free", lambda _: 1000)
    with pytest.raises(ValueError, match=r"^data.cache=raw needs 0.2 MB at .*, and 0.0 MB are free: use data.cache=jp"):
        make_cache(files, "raw", tmp_path, progress=False)
    assert read == []


def test_a_folder_that_cannot_be_written_is_named(files: Files, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"cannot be written \(Not a directory\): give data.cache_folder="):
        make_cache(files, "raw", tmp_path / "file", progress=False)


def test_a_picture_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    chance = np.random.default_rng(0)
    for name in "ab":
        (tmp_path / "root" / name).mkdir(parents=True)
        for i in range(4):
            pixels = chance.integers(0, 256, (40, 50, 3), np.uint8)
            Image.fromarray(pixels).save(tmp_path / "root" / name / f"{i}.jpg")
    files = files_of(tmp_path / "root")
    broken = files.index.path(int(files.rows[2]))
    broken.write_bytes(broken.read_bytes()[:-300] + bytes(300))
    with pytest.raises(ValueError, match=rf"^{broken}: "):
        make_cache(files, "raw", tmp_path, progress=False)
    assert not is_made(files, "raw", tmp_path)


@pytest.mark.parametrize(
    ("disk", "memory", "kind"),
    [(10**9, 10**9, "raw"), (10**9, 10**5, "jpeg"), (10**5, 10**9, "jpeg"), (10, 10**9, None), (10**9, None, "jpeg")],
)
def test_auto_takes_what_fits_into_half_of_what_is_free(
    files: Files,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    disk: int,
    memory: int | None,
    kind: str | None,
) -> None:
    assert num_bytes(files, "raw") > 5 * 10**4 and 10**4 < num_bytes(files, "jpeg") < 5 * 10**4
    monkeypatch.setattr(cache_module, "_free", lambda _: disk)
    monkeypatch.setattr(cache_module, "available_memory", lambda: memory)
    assert choose(files, tmp_path) == kind
    assert capsys.readouterr().err.startswith(f"data.cache=auto: {kind or 'none'}, ")


def test_auto_takes_the_one_that_is_made(files: Files, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_cache(files, "jpeg", tmp_path, progress=False)
    assert choose(files, tmp_path) == "jpeg"
    assert "data.cache=auto: jpeg, made already" in capsys.readouterr().err


def test_the_manifest_tells_what_is_there(files: Files, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cache = make_cache(files, "raw", tmp_path)
    manifest = json.loads((cache.folder / "manifest.json").read_text())
    assert (manifest["kind"], manifest["pictures"], manifest["bytes"]) == ("raw", 36, len(cache.data))
    assert "raw cache of 36 pictures: 0.2 MB at " in capsys.readouterr().err
