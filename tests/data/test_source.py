from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch
from PIL import Image

from spp_cls.data.index import Index, make_index
from spp_cls.data.layouts import folder
from spp_cls.data.plan import CROP_X, CROP_Y, MicroBatch
from spp_cls.data.reader import read_rgb
from spp_cls.data.source import TrainSource, ViewsSource, cut_region, read_views, resized_shape
from spp_cls.data.views import Views

BELOW_ONE = np.nextafter(np.float32(1), np.float32(0))


@pytest.fixture(scope="module")
def index(pictures: Path) -> Index:
    return make_index(pictures, folder)


def photo(width: int, height: int) -> Image.Image:
    """Smooth, with an edge and noise."""
    chance = np.random.default_rng(width * height)
    y, x = np.mgrid[0:height, 0:width]
    waves = [np.sin(x / 23 + y / 31), np.cos(x / 11 - y / 37), np.sin(y / 17)]
    pixels = 120 + 80 * np.stack(waves, 2) + 40 * (x > y)[:, :, None] + chance.normal(0, 12, (height, width, 3))
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def at(x: float, y: float) -> npt.NDArray[np.float32]:
    uniforms = np.zeros(8, np.float32)
    uniforms[CROP_X], uniforms[CROP_Y] = x, y
    return uniforms


def literal(image: Image.Image, left: int, top: int, resize: int, region: int) -> npt.NDArray[np.int16]:
    """The recipe word by word: the whole picture is resized, then cropped."""
    whole = image.resize(resized_shape(*image.size, resize), Image.Resampling.BILINEAR)
    return np.asarray(whole.crop((left, top, left + region, top + region))).astype(np.int16)


def differ(a: npt.NDArray[np.uint8], b: npt.NDArray[np.int16]) -> int:
    assert a.shape == b.shape
    return int(np.abs(a.astype(np.int16) - b).max())


@pytest.mark.parametrize(
    ("width", "height", "shape"),
    [
        (500, 375, (341, 256)),
        (375, 500, (256, 341)),
        (256, 256, (256, 256)),
        (100, 100, (256, 256)),
        (3000, 10, (76800, 256)),
        (333, 334, (256, 257)),
    ],
)
def test_resized_shape(width: int, height: int, shape: tuple[int, int]) -> None:
    assert resized_shape(width, height, 256) == shape


def test_resized_shape_has_exactly_the_shorter_side() -> None:
    for width in range(1, 120, 7):
        for height in range(1, 120):
            for shorter in (26, 32, 206):
                assert min(resized_shape(width, height, shorter)) == shorter


@pytest.mark.parametrize("size", [(500, 375), (375, 500), (256, 256), (300, 900), (90, 61), (640, 257), (257, 256)])
def test_cut_region_is_the_literal_recipe_within_two_grey_levels(size: tuple[int, int]) -> None:
    image, chance = photo(*size), np.random.default_rng(0)
    width, height = resized_shape(*size, 256)
    for _ in range(8):
        uniforms = chance.random(8, dtype=np.float32)
        left = int(float(uniforms[CROP_X]) * (width - 224 + 1))
        top = int(float(uniforms[CROP_Y]) * (height - 224 + 1))
        region = cut_region(image, uniforms, 256, 224, "anywhere")
        assert region.dtype == np.uint8
        assert differ(region, literal(image, left, top, 256, 224)) <= 2


@pytest.mark.parametrize("size", [(500, 375), (61, 90), (36, 36), (301, 300), (997, 131)])
@pytest.mark.parametrize("place", ["anywhere", "five"])
def test_the_region_reaches_every_border_and_leaves_none(size: tuple[int, int], place: str) -> None:
    # Pillow refuses a box that goes beyond the picture.
    image = photo(*size)
    width, height = resized_shape(*size, 36)
    for x in (0, BELOW_ONE):
        for y in (0, BELOW_ONE):
            region = cut_region(image, at(x, y), 36, 32, place)
            if place == "anywhere":
                assert differ(region, literal(image, (width - 32) * (x > 0), (height - 32) * (y > 0), 36, 32)) <= 2


def test_the_largest_uniform_never_gives_a_place_beyond_the_last() -> None:
    for places in range(1, 5000):
        assert int(BELOW_ONE * places) == places - 1


def test_every_place_is_drawn_about_equally_often() -> None:
    # A picture that is its own coordinates, resized by 1: the region's first pixel tells its place, 0 … 4 each way.
    y, x = np.mgrid[0:36, 0:36]
    image = Image.fromarray(np.stack([x, y, x], 2).astype(np.uint8))
    uniforms = np.random.default_rng(0).random((2500, 8), dtype=np.float32)
    places = [tuple(cut_region(image, row, 36, 32, "anywhere")[0, 0, :2].tolist()) for row in uniforms]
    counts = np.zeros((5, 5), int)
    for left, top in places:
        counts[left, top] += 1
    assert counts.sum() == 2500 and counts.min() > 60 and counts.max() < 140  # 100 each, standard deviation 10


@pytest.mark.parametrize("size", [(500, 375), (375, 500), (256, 256), (91, 60)])
def test_five_gives_exactly_the_centre_and_the_four_corners(size: tuple[int, int]) -> None:
    image = photo(*size)
    width, height = resized_shape(*size, 256)
    right, bottom = width - 224, height - 224
    places = [(round(right / 2), round(bottom / 2)), (0, 0), (right, 0), (0, bottom), (right, bottom)]
    for uniform in (0.0, 0.19, 0.2, 0.39, 0.41, 0.59, 0.61, 0.79, 0.81, float(BELOW_ONE)):
        left, top = places[int(uniform * 5)]
        region = cut_region(image, at(uniform, 0.3), 256, 224, "five")
        assert differ(region, literal(image, left, top, 256, 224)) <= 2


def test_a_train_batch_holds_the_regions_labels_and_uniforms_of_its_rows(index: Index) -> None:
    rows = index.rows("train")
    uniforms = np.random.default_rng(0).random((4, 8), dtype=np.float32)
    micro = MicroBatch(0, 0, np.array([30, 2, 17, 2]), uniforms)
    batch = TrainSource(index, rows, 36, 32, "anywhere")[micro]
    assert not isinstance(batch, ValueError)
    assert batch.images.shape == (4, 3, 32, 32) and batch.images.dtype == torch.uint8
    assert torch.equal(batch.uniforms, torch.from_numpy(uniforms))
    for i, row in enumerate(rows[micro.indices]):
        region = cut_region(read_rgb(index.path(row)), uniforms[i], 36, 32, "anywhere")
        assert np.array_equal(batch.images[i].permute(1, 2, 0).numpy(), region)
        assert index.classes[batch.labels[i]] == index.path(row).parent.name
    assert not torch.equal(batch.images[1], batch.images[3])  # the same picture, at two places


def test_read_views_resizes_the_shorter_side_and_keeps_the_shape(tmp_path: Path) -> None:
    image = photo(60, 40)
    image.save(tmp_path / "wide.png")
    whole = read_views(tmp_path / "wide.png", Views("full_image", 32), resize=36, region=32)
    assert whole.shape == (1, 3, 36, 54)
    expected = np.asarray(image.resize((54, 36), Image.Resampling.BILINEAR))
    assert np.array_equal(whole[0].permute(1, 2, 0).numpy(), expected)
    ten = read_views(tmp_path / "wide.png", Views("ten_crop", 26), resize=36, region=32)
    smaller = np.asarray(image.resize((44, 29), Image.Resampling.BILINEAR))  # 26 · 36 / 32 = 29.25
    assert ten.shape == (10, 3, 26, 26)
    assert np.array_equal(ten[1].permute(1, 2, 0).numpy(), smaller[:26, :26])
    assert np.array_equal(ten[4].permute(1, 2, 0).numpy(), smaller[-26:, -26:])


@pytest.mark.parametrize("crops", ["center_crop", "ten_crop", "full_image"])
@pytest.mark.parametrize("batch_size", [1, 4, 25])
def test_views_batches_hold_every_row_once(index: Index, crops: str, batch_size: int) -> None:
    source = ViewsSource(index, Views(crops, 32), 36, 32)
    rows = index.rows("train")
    batches = source.batches(rows, batch_size)
    assert sorted(np.concatenate(batches).tolist()) == rows.tolist()
    views = source.views.num_views
    assert all(len(batch) * views <= max(batch_size, views) for batch in batches)
    if crops != "full_image":
        assert np.array_equal(np.concatenate(batches), rows)
        assert len(batches) == -(-len(rows) // max(1, batch_size // views))


def test_views_batches_of_whole_images_have_one_shape(index: Index) -> None:
    source = ViewsSource(index, Views("full_image", 32), 36, 32)
    rows = index.rows("train")
    batches = source.batches(rows, 8)
    shapes = [
        {resized_shape(int(index.widths[r]), int(index.heights[r]), source.views.shorter_side(36, 32)) for r in batch}
        for batch in batches
    ]
    assert {len(shape) for shape in shapes} == {1} and max(len(batch) for batch in batches) > 1
    for batch, (shape,) in zip(batches, shapes, strict=True):
        out = source[batch]
        assert not isinstance(out, ValueError)
        assert out.views.shape == (len(batch), 1, 3, shape[1], shape[0])  # torch.stack took them: one shape
        assert np.array_equal(out.rows.numpy(), batch) and np.array_equal(out.labels.numpy(), index.labels[batch])


def test_a_broken_picture_comes_back_as_its_error(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        for i in range(4):
            photo(50, 40 + i).save(tmp_path / name / f"{i}.jpg")
    index = make_index(tmp_path, folder)
    rows = index.rows("train")
    broken = index.path(rows[1])
    broken.write_bytes(broken.read_bytes()[:300])
    micro = MicroBatch(0, 0, np.array([0, 1]), np.zeros((2, 8), np.float32))
    for error in (
        TrainSource(index, rows, 36, 32, "anywhere")[micro],
        ViewsSource(index, Views("center_crop", 32), 36, 32)[rows[:2]],
    ):
        assert isinstance(error, ValueError)
        assert str(error).startswith(f"{broken}: ") and "\n" not in str(error)
