from __future__ import annotations

import hashlib
import json
import math
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from spp_cls.data import shapes
from spp_cls.data.shapes import CLASSES, Scene, Thing, compose, draw, kept, make_shapes

LABELS = range(len(CLASSES))


def scenes(per_class: int = 20) -> list[tuple[str, Scene]]:
    return [
        (CLASSES[label], compose(label, np.random.default_rng([label, number])))
        for label in LABELS
        for number in range(per_class)
    ]


def small_set(root: Path, seed: int = 0) -> None:
    make_shapes(root, train_per_class=2, val_per_class=1, test_per_class=1, seed=seed)


def contents(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in sorted(root.rglob("*.jpg"))}


def area(thing: Thing) -> float:
    x, y = thing.corners.T
    return float(abs(x @ np.roll(y, 1) - y @ np.roll(x, 1)) / 2)


def test_classes_are_the_twelve_pairs_in_the_order_of_their_folders() -> None:
    assert len(CLASSES) == 3 * 2 + 3 * 2
    assert list(CLASSES) == sorted(set(CLASSES))


def test_the_class_says_what_is_above_what() -> None:
    for name, scene in scenes():
        above, below = name.split("_over_")
        if above in ("big", "small"):
            _, shape = below.split("_")
            assert scene.upper.shape == scene.lower.shape == shape
            ratio = scene.upper.diameter / scene.lower.diameter
            assert ratio >= shapes.RATIO if above == "big" else 1 / ratio >= shapes.RATIO
        else:
            assert (scene.upper.shape, scene.lower.shape) == (above, below)


def test_one_thing_lies_in_the_upper_half_and_one_in_the_lower() -> None:
    for _, scene in scenes():
        for thing, top, bottom in ((scene.upper, 0, scene.height / 2), (scene.lower, scene.height / 2, scene.height)):
            assert thing.box[0] >= 0 and thing.box[2] <= scene.width
            assert thing.box[1] >= top and thing.box[3] <= bottom
        assert scene.lower.box[1] - scene.upper.box[3] >= shapes.GAP * min(scene.width, scene.height) - 1e-6


def test_things_are_as_large_as_the_disc_of_their_diameter() -> None:
    for _, scene in scenes(5):
        for thing in (scene.upper, scene.lower):
            assert area(thing) == pytest.approx(math.pi / 4 * thing.diameter**2)
            share = thing.diameter / min(scene.width, scene.height)
            assert shapes.DIAMETER[0] <= share <= shapes.DIAMETER[1]


def test_where_shapes_differ_either_is_the_bigger_one() -> None:
    bigger_above = [s.upper.diameter > s.lower.diameter for _, s in scenes() if s.upper.shape != s.lower.shape]
    assert 0.3 < np.mean(bigger_above) < 0.7


def test_kept_is_what_the_worst_region_shows() -> None:
    # A region of 224 in 256 x 320 stands at 0..32 and 0..96 px. Of the box below it loses the left 12 of 40 px
    # when it stands at x = 32, and the upper 46 of 100 px when it stands at y = 96.
    low, high = np.array([20.0, 50.0]), np.array([60.0, 150.0])
    assert kept(low, high, 256, 320) == pytest.approx(28 / 40 * 54 / 100)
    # In the middle of a square nothing is lost; in a corner of less than 32 px, all.
    assert kept(np.array([100.0, 100.0]), np.array([150.0, 150.0]), 256, 256) == 1
    assert kept(np.array([0.0, 100.0]), np.array([30.0, 150.0]), 256, 256) == 0


def test_every_region_of_224_px_of_a_shorter_side_of_256_keeps_most_of_both_things() -> None:
    for _, scene in scenes(3):
        scale = 256 / min(scene.width, scene.height)
        for thing in (scene.upper, scene.lower):
            left, top, right, bottom = (scale * edge for edge in thing.box)
            shown = [
                max(0, min(right, x + 224) - max(left, x)) * max(0, min(bottom, y + 224) - max(top, y))
                for x in np.linspace(0, scale * scene.width - 224, 9)
                for y in np.linspace(0, scale * scene.height - 224, 9)
            ]
            assert min(shown) >= shapes.KEPT * (right - left) * (bottom - top) - 1e-6


def test_sizes_and_aspects_vary_within_their_range() -> None:
    sizes = np.array([(scene.width, scene.height) for _, scene in scenes()])
    shorter, aspect = sizes.min(axis=1), sizes[:, 0] / sizes[:, 1]
    assert shorter.min() >= shapes.SHORTER_SIDE[0] and shorter.max() <= shapes.SHORTER_SIDE[1]
    assert aspect.min() >= shapes.ASPECT[0] - 0.01 and aspect.max() <= shapes.ASPECT[1] + 0.01
    assert shorter.min() < 165 and shorter.max() > 280
    assert aspect.min() < 0.95 and aspect.max() > 1.25
    assert len(set(map(tuple, sizes.tolist()))) > 200


def test_things_are_painted_where_they_stand() -> None:
    # Against the same picture with two things of a pixel in a corner, it differs where the things are.
    scene = compose(CLASSES.index("disc_over_square"), np.random.default_rng(3))
    empty = Thing("disc", 0.0, np.full((3, 2), 0.5))
    with_things = np.asarray(shapes.paint(scene, np.random.default_rng(4))).astype(int)
    without = shapes.paint(Scene(scene.width, scene.height, empty, empty), np.random.default_rng(4))
    ys, xs = np.nonzero(abs(with_things - np.asarray(without)).max(axis=2) > 30)
    assert xs.min() == pytest.approx(min(scene.upper.box[0], scene.lower.box[0]), abs=2)
    assert ys.min() == pytest.approx(scene.upper.box[1], abs=2)
    assert xs.max() == pytest.approx(max(scene.upper.box[2], scene.lower.box[2]), abs=2)
    assert ys.max() == pytest.approx(scene.lower.box[3], abs=2)
    left, top, right, bottom = scene.upper.box
    inside = (xs > left - 1) & (xs < right + 1) & (ys > top - 1) & (ys < bottom + 1)
    half_a_pixel_of_rim = math.pi * scene.upper.diameter / 2
    assert inside.sum() == pytest.approx(area(scene.upper), abs=half_a_pixel_of_rim)


def test_things_stand_out_from_the_ground() -> None:
    for seed in range(100):
        brightness = shapes._colours(np.random.default_rng(seed)) @ [0.299, 0.587, 0.114]
        assert abs(brightness[1:] - brightness[0]).min() >= shapes.CONTRAST


def test_draw_is_pure() -> None:
    first, second = (draw(5, np.random.default_rng(7)) for _ in range(2))
    assert first.mode == "RGB" and first.tobytes() == second.tobytes()


def test_a_changed_drawing_needs_a_new_version() -> None:
    scene = compose(0, np.random.default_rng([0, 0, 0, 0]))
    assert shapes.VERSION == 1
    assert (scene.width, scene.height) == (240, 239)
    assert scene.upper.box == pytest.approx((137.61, 54.0, 184.29, 100.68), abs=0.01)


def test_make_shapes_writes_what_was_asked_for(tmp_path: Path) -> None:
    root = tmp_path / "new" / "shapes"
    make_shapes(root, train_per_class=3, val_per_class=1, test_per_class=2, seed=5)
    for split, count in (("train", 3), ("val", 1), ("test", 2)):
        assert sorted(path.name for path in (root / split).iterdir()) == list(CLASSES)
        for name in CLASSES:
            files = sorted((root / split / name).iterdir())
            assert [file.name for file in files] == [f"{number:04d}.jpg" for number in range(count)]
    with Image.open(root / "test" / CLASSES[4] / "0001.jpg") as image:
        image.load()
        scene = compose(4, np.random.default_rng([5, 2, 4, 1]))
        assert (image.format, image.mode, image.size) == ("JPEG", "RGB", (scene.width, scene.height))
    settings = {"version": 1, "seed": 5, "train_per_class": 3, "val_per_class": 1, "test_per_class": 2}
    assert json.loads((root / "shapes.json").read_text()) == settings
    assert [path.name for path in root.parent.iterdir()] == ["shapes"]


def test_the_seed_decides_and_no_picture_comes_twice(tmp_path: Path) -> None:
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        small_set(tmp_path / name, seed)
    a, b, c = (contents(tmp_path / name) for name in "abc")
    assert a == b
    assert a.keys() == c.keys() and len(a) == 4 * len(CLASSES)
    hashes = {hashlib.sha256(data).digest() for data in (*a.values(), *c.values())}
    assert len(hashes) == 2 * len(a)


def test_a_finished_set_is_left_as_it_is(tmp_path: Path) -> None:
    small_set(tmp_path / "set")
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    small_set(tmp_path / "set")
    assert before == {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}


def test_an_interrupted_drawing_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[int] = []

    def interrupted(label: int, rng: np.random.Generator) -> Image.Image:
        if len(drawn) == 5:
            raise KeyboardInterrupt
        drawn.append(label)
        return draw(label, rng)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(shapes, "draw", interrupted)
        small_set(tmp_path / "set")
    assert list(tmp_path.iterdir()) == []
    small_set(tmp_path / "set")
    assert len(contents(tmp_path / "set")) == 4 * len(CLASSES)


def test_two_may_draw_at_once(tmp_path: Path) -> None:
    with ThreadPoolExecutor(2) as pool:
        for future in [pool.submit(small_set, tmp_path / "set") for _ in range(2)]:
            future.result()
    assert [path.name for path in tmp_path.iterdir()] == ["set"]
    assert len(contents(tmp_path / "set")) == 4 * len(CLASSES)


def test_who_comes_second_takes_the_set_of_the_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = tmp_path / "set"

    def overtaken(label: int, rng: np.random.Generator) -> Image.Image:
        monkeypatch.setattr(shapes, "draw", draw)
        small_set(root)
        return draw(label, rng)

    monkeypatch.setattr(shapes, "draw", overtaken)
    small_set(root)
    assert [path.name for path in tmp_path.iterdir()] == ["set"]


def test_an_empty_folder_is_filled(tmp_path: Path) -> None:
    small_set(tmp_path)
    assert len(contents(tmp_path)) == 4 * len(CLASSES)


def test_other_settings_are_refused(tmp_path: Path) -> None:
    small_set(tmp_path / "set")
    with pytest.raises(ValueError, match=r"set' holds shapes of other settings \(seed=0\): delete it or name"):
        small_set(tmp_path / "set", seed=1)


@pytest.mark.parametrize("text", [None, "[]", "{", '{"version": 1}'])
def test_other_content_is_refused_and_kept(tmp_path: Path, text: str | None) -> None:
    (tmp_path / "holiday.jpg").write_bytes(b"mine")
    if text is not None:
        (tmp_path / "shapes.json").write_text(text)
    with pytest.raises(ValueError, match="is not a set of shapes: name a folder that is new or empty"):
        small_set(tmp_path)
    assert (tmp_path / "holiday.jpg").read_bytes() == b"mine"


def test_a_file_in_place_of_the_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "set").write_text("")
    with pytest.raises(ValueError, match="is not a set of shapes"):
        small_set(tmp_path / "set")


@pytest.mark.parametrize(("count", "seed"), [(0, 0), (1, -1)])
def test_senseless_settings_are_refused(tmp_path: Path, count: int, seed: int) -> None:
    with pytest.raises(ValueError, match=f"seed={seed} must be at least 0, the pictures per class at least 1"):
        make_shapes(tmp_path / "set", val_per_class=count, seed=seed)
