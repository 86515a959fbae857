"""`spp cache`: the same settings as `spp train`; what there is by name."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from conftest import Spp


@pytest.mark.slow
def test_caches_are_made_and_listed_the_largest_first(spp: Spp, pictures: Path, tmp_path: Path) -> None:
    assert spp("cache", "list=true", "data.cache_folder=caches").out == "there are no caches\n"

    root = tmp_path / "gone"
    shutil.copytree(pictures, root)
    words = ["data=folder", f"data.root={root}", "data.region=32", "data.resize=36", "data.cache_folder=caches"]
    assert spp("cache", *words, "data.cache=raw").out.startswith("raw cache: 36 pictures, 0.2 MB in ")
    assert "another of these pictures, 0.2 MB: " in spp("cache", *words, "data.cache=jpeg").out
    shutil.rmtree(root)
    unfinished = tmp_path / "caches" / "other_raw_0123"
    unfinished.mkdir()
    (unfinished / "pictures.bin").write_bytes(bytes(10))

    *lines, last = spp("cache", "list=true", "data.cache_folder=caches").out.splitlines()
    assert last == "remove the folder of one that is not needed"
    raw, jpeg, half = lines
    assert raw.endswith(f"(raw, 36 pictures of {root}, which is not there)") and raw.split()[:2] == ["0.2", "MB"]
    assert f"(jpeg, 36 pictures of {root}" in jpeg
    assert half.split()[:3] == ["0.0", "MB", "caches/other_raw_0123"] and "unfinished" in half
