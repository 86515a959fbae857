from __future__ import annotations

import json
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from spp_cls import build
from spp_cls.data import MultiSizeDataModule, Views
from spp_cls.data import mean_image as mean_image_module
from spp_cls.data.device import resize
from spp_cls.data.index import Index, make_index
from spp_cls.data.layouts import folder
from spp_cls.data.mean_image import digest, find_mean_image, mean_of_regions, read_mean_image
from spp_cls.data.sizes import alternating
from spp_cls.data.source import read_resized, resized_shape


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SPP_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def index(pictures: Path) -> Index:
    return make_index(pictures, folder)


def centre(index: Index, row: int, resize: int, region: int) -> np.ndarray:
    """The centre of the picture, as float64."""
    shape = resized_shape(int(index.widths[row]), int(index.heights[row]), resize)
    image = read_resized(index.path(row), shape, draft=True).permute(1, 2, 0).numpy()
    top, left = (image.shape[0] - region) // 2, (image.shape[1] - region) // 2
    return image[top : top + region, left : left + region].astype(np.float64)


def test_the_mean_of_the_centres_of_the_training_pictures_and_of_no_others(index: Index) -> None:
    expected = np.mean([centre(index, int(row), 36, 32) for row in index.rows("train")], axis=0)
    mean = mean_of_regions(index, 36, 32, progress=False)
    assert mean.shape == (32, 32, 3) and mean.dtype == np.float32
    np.testing.assert_allclose(mean, expected, rtol=1e-6)
    assert np.array_equal(mean, mean_of_regions(index, 36, 32, progress=False))


def test_of_many_pictures_some_evenly_spaced(index: Index, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mean_image_module, "AT_MOST", 3)
    monkeypatch.setattr(mean_image_module, "CHUNK", 2)
    rows = index.rows("train")
    assert len(rows) == 36
    expected = np.mean([centre(index, int(rows[i]), 36, 32) for i in (0, 17, 35)], axis=0)
    np.testing.assert_allclose(mean_of_regions(index, 36, 32, progress=False), expected, rtol=1e-6)


def test_train_is_computed_once_and_kept(cache: Path, index: Index, monkeypatch: pytest.MonkeyPatch) -> None:
    first = find_mean_image("train", index, 36, 32)
    assert first.shape == (3, 32, 32) and first.dtype == torch.float32
    np.testing.assert_array_equal(first.permute(1, 2, 0).numpy(), mean_of_regions(index, 36, 32, progress=False))
    monkeypatch.setattr(mean_image_module, "mean_of_regions", lambda *_: pytest.fail("computed again"))
    assert torch.equal(find_mean_image("train", index, 36, 32), first)
    (kept,) = cache.glob("mean_*.npy")
    assert not list(cache.glob("*.tmp"))
    # Whole or not at all: one that is broken is made again.
    kept.write_bytes(b"broken")
    with pytest.raises(pytest.fail.Exception, match="computed again"):
        find_mean_image("train", index, 36, 32)


def test_another_region_has_another_mean_image(cache: Path, index: Index) -> None:
    assert find_mean_image("train", index, 36, 32).shape == (3, 32, 32)
    assert find_mean_image("train", index, 36, 24).shape == (3, 24, 24)


def test_a_cache_that_cannot_be_written_costs_only_time(
    tmp_path: Path, index: Index, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setenv("SPP_CACHE", str(tmp_path / "file"))
    assert find_mean_image("train", index, 36, 32).shape == (3, 32, 32)


def test_files_of_a_mean_image(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (5, 7, 3), np.uint8)
    np.save(tmp_path / "a.npy", pixels / 2)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    expected = torch.from_numpy(pixels).permute(2, 0, 1).float()
    assert torch.equal(read_mean_image(tmp_path / "a.npy"), expected / 2)
    assert torch.equal(read_mean_image(tmp_path / "a.png"), expected)
    assert digest(read_mean_image(tmp_path / "a.png")) == digest(expected)
    assert digest(expected) != digest(expected + 1) != digest(expected.transpose(1, 2).contiguous() + 1)


def test_files_that_are_none(tmp_path: Path, index: Index) -> None:
    with pytest.raises(ValueError, match=r"^data\.mean_image=True: use train, a file, or null$"):
        find_mean_image(True, index, 36, 32)  # type: ignore[arg-type]
    with pytest.raises(
        ValueError, match=r"^data\.mean_image=.*no\.npy: cannot be read \(.*\); give train, a \.npy, or"
    ):
        read_mean_image(tmp_path / "no.npy")
    (tmp_path / "text.png").write_text("text")
    with pytest.raises(ValueError, match=r"^data\.mean_image=.*text\.png: cannot be read"):
        read_mean_image(tmp_path / "text.png")
    for pixels in (np.zeros((3, 5, 7)), np.full((4, 4, 3), -1.0), np.full((4, 4, 3), np.nan), np.full((4, 4, 3), "a")):
        np.save(tmp_path / "a.npy", pixels)
        with pytest.raises(
            ValueError, match=r"^data\.mean_image=.*a\.npy: holds .*; it must be \(H, W, 3\) of 0 … 255"
        ):
            read_mean_image(tmp_path / "a.npy")


# In batches and in runs


@pytest.mark.parametrize("loader", ["train_dataloader", "test_dataloader"])
def test_it_is_subtracted_from_what_the_net_is_given(pictures: Path, loader: str) -> None:
    def made(**options: Any) -> MultiSizeDataModule:
        sizes, views = partial(alternating, sizes=[26, 32]), Views("full_image")
        datamodule = MultiSizeDataModule(
            str(pictures), folder, sizes, views, 6, 32, 36, std=(1.0, 1.0, 1.0), num_workers=0, **options
        )
        datamodule.setup()
        return datamodule

    plain, ours = made(mean=(0.0, 0.0, 0.0)), made(mean_image="train")
    mean = find_mean_image("train", make_index(pictures, folder), 36, 32)
    shapes = set()
    for one, other in zip(*(getattr(datamodule, loader)() for datamodule in (plain, ours)), strict=True):
        without, less = (d.on_after_batch_transfer(b, 0)[0] for d, b in ((plain, one), (ours, other)))
        shape = (without.shape[-2], without.shape[-1])
        torch.testing.assert_close(less, without - resize(mean[None], shape)[0], rtol=0, atol=1e-4)
        shapes.add(shape)
    assert shapes == {(26, 26)} if loader == "train_dataloader" else len(shapes) > 3


@pytest.mark.slow
def test_a_run_with_a_mean_image_is_tested_used_and_goes_on(
    cache: Path, spp: Any, small: list[str], pictures: Path, tmp_path: Path
) -> None:
    np.save(tmp_path / "mean.npy", find_mean_image("train", make_index(pictures, folder), 36, 32).permute(1, 2, 0))
    answer = spp("train", *small, "data.mean_image=train")
    assert answer.code == 0, answer.err
    (run,) = (tmp_path / "runs" / "folder-tiny").iterdir()
    again = spp("train", *small, "data.mean_image=mean.npy", "name=again")
    assert again.code == 0, again.err
    (other,) = (tmp_path / "runs" / "again").iterdir()
    (tmp_path / "mean.npy").unlink()
    shutil.rmtree(cache)

    # The file and `train` are the same image; both checkpoints hold it.
    states = [torch.load(r / "checkpoints" / "last.ckpt", weights_only=True) for r in (run, other)]
    assert all(torch.equal(states[1]["state_dict"][k], v) for k, v in states[0]["state_dict"].items())
    classifier = build.load_classifier(run / "checkpoints" / "last.ckpt")
    assert classifier.identity["mean"].shape == (3, 32, 32)
    assert classifier.identity["mean_image"] == digest(classifier.identity["mean"])

    of_run = json.loads((other / "results.json").read_text())
    answer = spp("evaluate", f"run={other}", "views=full_image")
    assert answer.code == 0, answer.err
    assert spp("evaluate", f"run={other}").code == 0
    found = json.loads((other / "evaluations" / "test_center_crop_32" / "results.json").read_text())
    assert found["top1_error"] == pytest.approx(of_run["test/top1_error"])
    file = np.load(other / "evaluations" / "test_full_image_32" / "scores.npz")
    paths = [pictures / str(path) for path in file["paths"]]
    answer = spp("predict", f"run={other}", "views=full_image", "format=jsonl", "device=cpu", *paths)
    rows = [json.loads(line) for line in answer.out.splitlines()]
    assert [row["probability"] for row in rows] == pytest.approx(file["scores"].max(1).tolist(), abs=1e-5)

    answer = spp("export", f"run={run}", "format=torch")
    assert answer.code == 2 and answer.err.count("\n") == 1
    assert answer.err.startswith("spp export: data.mean_image: ")
    answer = spp("train", f"ckpt_path={run}", "trainer.max_epochs=3")
    assert answer.code == 0, answer.err
    before = {"mean_image": classifier.identity["mean_image"]}
    with pytest.raises(ValueError, match=r"its run has another data\.mean_image than this one; give the same, or"):
        build.differences_from(run, before, {"mean_image": "other"})
