from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch
from PIL import Image

from spp_cls.data.full_image import FullImage
from spp_cls.data.index import Index, make_index
from spp_cls.data.layouts import folder
from spp_cls.data.plan import CROP_X, CROP_Y, MicroBatch
from spp_cls.data.source import (
    Files,
    TrainBatch,
    TrainSource,
    ViewsSource,
    corners,
    read_resized,
    read_views,
    resized,
    resized_shape,
    resized_shapes,
)
from spp_cls.data.views import PROTOCOLS, Views

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
    uniforms = np.zeros((1, 8), np.float32)
    uniforms[:, CROP_X], uniforms[:, CROP_Y] = x, y
    return uniforms


def by_pillow(image: Image.Image, shape: tuple[int, int]) -> npt.NDArray[np.uint8]:
    return np.asarray(image.resize(shape[::-1], Image.Resampling.BILINEAR))


def pixels(image: torch.Tensor) -> npt.NDArray[np.uint8]:
    return image.permute(1, 2, 0).numpy()


def differ(a: npt.NDArray[np.uint8], b: npt.NDArray[np.uint8]) -> int:
    assert a.shape == b.shape and a.dtype == b.dtype == np.uint8
    return int(np.abs(a.astype(np.int16) - b).max())


@pytest.mark.parametrize(
    ("width", "height", "shape"),
    [
        (500, 375, (256, 341)),
        (375, 500, (341, 256)),
        (256, 256, (256, 256)),
        (100, 100, (256, 256)),
        (3000, 10, (256, 76800)),
        (333, 334, (257, 256)),
    ],
)
def test_resized_shape(width: int, height: int, shape: tuple[int, int]) -> None:
    assert resized_shape(width, height, 256) == shape


def test_resized_shape_has_exactly_the_shorter_side_and_both_ways_agree() -> None:
    sides = [(width, height) for width in range(1, 120, 7) for height in range(1, 120)]
    widths, heights = np.array(sides, np.int32).T
    for shorter in (26, 32, 206):
        one_by_one = [resized_shape(width, height, shorter) for width, height in sides]
        assert {min(shape) for shape in one_by_one} == {shorter}
        assert resized_shapes(widths, heights, shorter).tolist() == [list(shape) for shape in one_by_one]


# The folder


@pytest.mark.parametrize("size", [(500, 375), (375, 500), (256, 256), (300, 900), (90, 61), (640, 257), (257, 256)])
def test_read_resized_is_pillows_within_two_grey_levels(tmp_path: Path, size: tuple[int, int]) -> None:
    image, shape = photo(*size), resized_shape(*size, 256)
    image.save(tmp_path / "a.png")
    assert differ(pixels(read_resized(tmp_path / "a.png", shape)), by_pillow(image, shape)) <= 2
    image.save(tmp_path / "a.jpg", quality=90)
    decoded = Image.open(tmp_path / "a.jpg").convert("RGB")
    assert differ(pixels(read_resized(tmp_path / "a.jpg", shape)), by_pillow(decoded, shape)) <= 2


def test_draft_decodes_a_large_photo_at_a_reduced_size_and_stays_near(tmp_path: Path) -> None:
    image = photo(1200, 900)
    image.save(tmp_path / "a.jpg", quality=90)
    whole, reduced = (pixels(read_resized(tmp_path / "a.jpg", (256, 341), draft=draft)) for draft in (False, True))
    error = whole.astype(float) - reduced
    assert reduced.shape == (256, 341, 3) and np.abs(error).max() > 0
    assert 10 * np.log10(255**2 / (error**2).mean()) > 35  # dB
    small = photo(500, 375)
    small.save(tmp_path / "b.jpg", quality=90)  # a half would be less than is needed
    one, other = (read_resized(tmp_path / "b.jpg", (256, 341), draft=draft) for draft in (False, True))
    assert torch.equal(one, other)


def test_files_gives_each_picture_at_its_shape(index: Index) -> None:
    rows = index.rows("train")
    shapes = resized_shapes(index.widths[rows], index.heights[rows], 36)
    files = Files(index, rows, shapes)
    for position in (0, 7, 35):
        picture = Image.open(index.path(int(rows[position]))).convert("RGB")
        shape = tuple(shapes[position].tolist())
        assert differ(files[position], by_pillow(picture, shape)) <= 2


def test_a_file_that_changed_since_the_index_was_made_is_named(tmp_path: Path) -> None:
    for name in "ab":
        (tmp_path / name).mkdir()
        for i in range(3):
            photo(40, 30 + i).save(tmp_path / name / f"{i}.png")
    index = make_index(tmp_path, folder)
    rows = index.rows("train")
    files = Files(index, rows, resized_shapes(index.widths[rows], index.heights[rows], 36))
    path = index.path(int(rows[0]))
    photo(20, 50).save(path)
    with pytest.raises(
        ValueError,
        match=rf"^{path}: has \d+ bytes and 20×50 px, and had \d+ and 40×\d+ when the index was made: run spp check",
    ):
        files[0]


# Where regions are cut


def test_corners_anywhere_are_those_of_the_formula() -> None:
    chance = np.random.default_rng(0)
    uniforms = chance.random((500, 8), dtype=np.float32)
    shapes = chance.integers(32, 400, (500, 2)).astype(np.int32)
    for (top, left), row, (height, width) in zip(
        corners(uniforms, shapes, 32, "anywhere").tolist(), uniforms, shapes.tolist(), strict=True
    ):
        assert (left, top) == (int(row[CROP_X] * (width - 31)), int(row[CROP_Y] * (height - 31)))


@pytest.mark.parametrize("place", ["anywhere", "five"])
def test_the_region_reaches_every_border_and_leaves_none(place: str) -> None:
    shapes = np.array([(height, width) for height in (32, 33, 57, 4000) for width in (32, 90)], np.int32)
    for x in (0, BELOW_ONE):
        for y in (0, BELOW_ONE):
            places = corners(at(x, y).repeat(len(shapes), 0), shapes, 32, place)
            assert (places >= 0).all() and (places + 32 <= shapes).all()
            if place == "anywhere":
                assert (places == (shapes - 32) * [y > 0, x > 0]).all()


def test_every_place_is_drawn_about_equally_often() -> None:
    uniforms = np.random.default_rng(0).random((2500, 8), dtype=np.float32)
    counts = np.zeros((5, 5), int)
    np.add.at(counts, tuple(corners(uniforms, np.full((2500, 2), 36, np.int32), 32, "anywhere").T), 1)
    assert counts.sum() == 2500 and counts.min() > 60 and counts.max() < 140  # 100 each, standard deviation 10


def test_five_gives_exactly_the_centre_and_the_four_corners() -> None:
    for height, width in ((256, 341), (341, 256), (256, 256), (257, 300)):
        right, bottom = width - 224, height - 224
        expected = [(round(bottom / 2), round(right / 2)), (0, 0), (0, right), (bottom, 0), (bottom, right)]
        for uniform in (0.0, 0.19, 0.2, 0.39, 0.41, 0.59, 0.61, 0.79, 0.81, float(BELOW_ONE)):
            (place,) = corners(at(uniform, 0.3), np.array([(height, width)], np.int32), 224, "five").tolist()
            assert tuple(place) == expected[int(uniform * 5)]


# Batches


def source_of(index: Index, size: FullImage | int, place: str = "anywhere") -> TrainSource:
    rows = index.rows("train")
    widths, heights = index.widths[rows], index.heights[rows]
    shapes = size.homes(widths, heights) if isinstance(size, FullImage) else resized_shapes(widths, heights, size)
    return TrainSource(Files(index, rows, shapes), index.labels[rows], 32, place)


def test_a_train_batch_holds_the_regions_labels_and_uniforms_of_its_rows(index: Index) -> None:
    rows = index.rows("train")
    uniforms = np.random.default_rng(0).random((4, 8), dtype=np.float32)
    micro = MicroBatch(0, 0, np.array([30, 2, 17, 2]), uniforms, weight=0.5)
    batch = source_of(index, 36)[micro]
    assert isinstance(batch, TrainBatch) and (batch.shape, batch.weight) == ((32, 32), 0.5)
    assert batch.images.shape == (4, 3, 32, 32) and batch.images.dtype == torch.uint8
    assert batch.images.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(batch.uniforms, torch.from_numpy(uniforms))
    for i, row in enumerate(rows[micro.indices]):
        picture = Image.open(index.path(int(row))).convert("RGB")
        height, width = resized_shape(*picture.size, 36)
        left = int(uniforms[i, CROP_X] * (width - 31))
        top = int(uniforms[i, CROP_Y] * (height - 31))
        literal = by_pillow(picture, (height, width))[top : top + 32, left : left + 32]
        assert differ(pixels(batch.images[i]), literal) <= 2
        assert index.classes[batch.labels[i]] == index.path(int(row)).parent.name
    assert not torch.equal(batch.images[1], batch.images[3])  # the same picture, at two places


def test_whole_pictures_come_at_the_shape_that_is_planned(index: Index) -> None:
    source, shape = source_of(index, FullImage(32, 8)), (40, 32)
    homes = source.pictures.shapes.tolist()
    at_home = homes.index([40, 32])
    elsewhere = next(i for i, home in enumerate(homes) if home != [40, 32])
    micro = MicroBatch(0, 0, np.array([at_home, elsewhere]), np.zeros((2, 8), np.float32), shape)
    batch = source[micro]
    assert isinstance(batch, TrainBatch) and batch.shape == shape
    assert np.array_equal(pixels(batch.images[0]), source.pictures[at_home])
    # One that joined others goes there by way of its own shape, so that a cache gives the same.
    way = resized(torch.from_numpy(source.pictures[elsewhere]).permute(2, 0, 1), shape)
    assert torch.equal(batch.images[1], way)


def test_read_views_resizes_the_shorter_side_and_keeps_the_shape(tmp_path: Path) -> None:
    image = photo(60, 40)
    image.save(tmp_path / "wide.png")
    ((whole, windows),) = read_views(tmp_path / "wide.png", Views("full_image", 32), resize=36, region=32)
    assert windows is None and whole.shape == (1, 3, 36, 54)
    assert differ(pixels(whole[0]), by_pillow(image, (36, 54))) <= 2
    ((ten, _),) = read_views(tmp_path / "wide.png", Views("ten_crop", 26), resize=36, region=32)
    smaller = by_pillow(image, (29, 44))  # 26 · 36 / 32 = 29.25
    assert ten.shape == (10, 3, 26, 26)
    assert differ(pixels(ten[1]), smaller[:26, :26]) <= 2
    assert differ(pixels(ten[4]), smaller[-26:, -26:]) <= 2


@pytest.mark.parametrize("crops", PROTOCOLS)
@pytest.mark.parametrize("batch_size", [1, 4, 25])
def test_views_batches_hold_every_row_once_a_pass(index: Index, crops: str, batch_size: int) -> None:
    source = ViewsSource(index, Views(crops, 32), 36, 32)
    rows = index.rows("train")
    batches = source.batches(rows, batch_size)
    for number, one in enumerate(source.views.passes):
        own = [batch for turn, batch in batches if turn == number]
        assert sorted(np.concatenate(own).tolist()) == rows.tolist()
        if not one.whole:  # as they stand in the index
            views = one.num_views(one.shorter_side(32, 36, 32), 32)
            assert np.array_equal(np.concatenate(own), rows)
            assert len(own) == -(-len(rows) // max(1, batch_size // views))
            assert all(len(batch) * views <= max(batch_size, views) for batch in own)
    assert [turn for turn, _ in batches] == sorted(turn for turn, _ in batches)  # pass after pass


@pytest.mark.parametrize(
    "crops", ["full_image", "eight_crop_full", "ten_crop_maps", "multi_scale_full", "multi_scale_pixels"]
)
def test_views_batches_have_one_shape(several: Index, crops: str) -> None:
    source = ViewsSource(several, Views(crops, 32), 36, 32)
    rows = several.rows("train")
    found: Counter[tuple[int, ...]] = Counter()
    for number, batch in source.batches(rows, 36):
        one = source.views.passes[number]
        shorter = one.shorter_side(32, 36, 32)
        shapes = {resized_shape(int(several.widths[r]), int(several.heights[r]), shorter) for r in batch}
        out = source[number, batch]  # torch.stack takes them: one shape
        assert not isinstance(out, ValueError)
        if one.whole:
            (shape,) = shapes
            assert out.views.shape == (len(batch), 1 + one.mirrored, 3, *shape)
        else:
            assert out.views.shape[1:] == (one.num_views(shorter, 32), 3, 32, 32)
        assert (out.windows is not None) == one.on_maps
        assert np.array_equal(out.rows.numpy(), batch) and np.array_equal(out.labels.numpy(), several.labels[batch])
        found[len(batch)] += 1
    assert max(found) > 1


def test_large_scales_take_no_more_px_at_once_than_regions_do(several: Index) -> None:
    source = ViewsSource(several, Views("multi_scale", 32), 36, 32)
    batches = source.batches(several.rows("train"), 18)
    sizes = []
    for number, batch in batches:
        out = source[number, batch]
        assert not isinstance(out, ValueError)
        sizes.append((out.views[:, :, 0].numel(), len(batch)))
    assert all(px <= 18 * 32 * 32 or images == 1 for px, images in sizes)
    assert {images for _, images in sizes} == {1, 2, 3, 4, 5, 6}  # 60 × 80 px are fewer at once than 32 × 32


@pytest.fixture(scope="module")
def several(tmp_path_factory: pytest.TempPathFactory) -> Index:
    """Six pictures of 60 × 45 px, six of 45 × 60, six squares: each shape in both classes."""
    root = tmp_path_factory.mktemp("several")
    for i, (width, height) in enumerate([(60, 45), (45, 60), (50, 50)] * 6):
        (root / "train" / "ab"[i % 2]).mkdir(parents=True, exist_ok=True)
        photo(width, height).save(root / "train" / "ab"[i % 2] / f"{i}.png")
    for split in ("val", "test"):
        for name in "ab":
            (root / split / name).mkdir(parents=True)
            photo(50, 50).save(root / split / name / "0.png")
    return make_index(root, folder)


def test_a_broken_picture_comes_back_as_its_error(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        for i in range(4):
            photo(50, 40 + i).save(tmp_path / name / f"{i}.jpg")
    index = make_index(tmp_path, folder)
    rows = index.rows("train")
    broken = index.path(int(rows[1]))
    length = broken.stat().st_size
    broken.write_bytes(broken.read_bytes()[:300] + bytes(length - 300))
    micro = MicroBatch(0, 0, np.array([0, 1]), np.zeros((2, 8), np.float32))
    for error in (
        source_of(index, 36)[micro],
        ViewsSource(index, Views("center_crop", 32), 36, 32)[0, rows[:2]],
    ):
        assert isinstance(error, ValueError)
        assert str(error).startswith(f"{broken}: ") and "\n" not in str(error)
