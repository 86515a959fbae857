from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from spp_cls.data import MultiSizeDataModule
from spp_cls.data.device import device_step
from spp_cls.data.layouts import folder
from spp_cls.data.sizes import single
from spp_cls.media import (
    choose,
    draw_confusion,
    draw_mistakes,
    encoded,
    first_batch,
    grid,
    keep_first_batch,
    keep_test,
    read_test,
)

MEAN, STD = (123.0, 116.0, 103.0), (58.0, 57.0, 56.0)


def test_half_are_the_most_confident_mistakes_and_the_rest_chance_among_the_others() -> None:
    labels = np.array([0, 1, 0, 1, 0, 1])
    scores = np.array([[0.9, 0.1], [0.6, 0.4], [0.2, 0.8], [0.3, 0.7], [0.4, 0.6], [0.95, 0.05]], np.float32)
    found = choose(labels, scores, 4)
    assert found["mistake"].tolist() == [5, 2]  # of 5 (0.95), 2 (0.8), 1 and 4 (0.6)
    assert len(found["random"]) == 2 and not set(found["random"].tolist()) & {5, 2}
    assert {kind: rows.tolist() for kind, rows in choose(labels, scores, 4).items()} == {
        kind: rows.tolist() for kind, rows in found.items()
    }
    assert sorted(np.concatenate(list(choose(labels, scores, 64).values())).tolist()) == list(range(6))
    assert [len(rows) for rows in choose(labels, scores, 0).values()] == [0, 0]
    right = choose(np.array([0, 0]), np.array([[1.0, 0.0], [0.9, 0.1]], np.float32), 2)
    assert len(right["mistake"]) == 0 and len(right["random"]) == 1


@pytest.mark.parametrize("with_image", [False, True])
def test_the_first_batch_is_shown_as_it_arrived_in_grey_levels(tmp_path: Path, with_image: bool) -> None:
    assert first_batch(tmp_path) is None
    pixels = torch.full((2, 3, 16, 16), 40, dtype=torch.uint8)
    pixels[1] = torch.tensor([200, 100, 50], dtype=torch.uint8)[:, None, None]
    mean = torch.rand(3, 20, 20) * 255 if with_image else MEAN
    arrived = device_step(pixels, torch.full((2, 8), 0.9), (8, 8), mean=mean, std=STD, flip=0.0, colour=0.0)
    keep_first_batch(tmp_path, arrived, mean, STD)
    path = first_batch(tmp_path)
    assert path is not None
    shown = np.asarray(Image.open(path)).astype(int)
    assert shown.shape == (8, 16, 3)
    for part, colour in ((shown[:, :8], (40, 40, 40)), (shown[:, 8:], (200, 100, 50))):
        assert abs(part.mean((0, 1)) - colour).max() < 3  # a JPEG


def test_tiles_lie_in_rows_with_room_for_captions() -> None:
    tiles = [np.full((10, 20, 3), 10 * i, np.uint8) for i in range(5)]
    out = grid(tiles)
    assert out.shape == (20, 60, 3)  # three across
    assert [int(out[y, x, 0]) for y, x in ((5, 10), (5, 50), (15, 10), (15, 50))] == [0, 20, 30, 255]
    assert grid(tiles, ["a\nb"] * 5).shape == (80, 60, 3)


@pytest.mark.parametrize("number", [3, 200])
def test_the_shade_of_a_cell_is_its_share_of_the_row(number: int) -> None:
    matrix = np.zeros((number, number), np.int64)
    matrix[0, 0], matrix[0, 1], matrix[1, 1] = 5, 5, 9
    out = draw_confusion(matrix, [f"class {i}" for i in range(number)])
    cell = 22 if number == 3 else 5
    margin = out.shape[0] - cell * number  # for names, where they fit
    assert out.shape[0] == out.shape[1] and (margin > 0) == (number == 3)
    middles = [
        [tuple(out[margin + cell * i + cell // 2, margin + cell * j + cell // 2]) for j in (0, 1)] for i in (0, 1)
    ]
    assert middles == [[(144, 178, 214), (216, 140, 149)], [(255, 255, 255), (33, 102, 172)]]
    assert encoded(out).startswith(b"\x89PNG")


def test_what_was_kept_of_a_test_is_read_back_for_the_step_that_it_was_made_at(pictures: Path, tmp_path: Path) -> None:
    data = MultiSizeDataModule(str(pictures), folder, single, region=32, resize=36)
    data.setup()
    assert data.index is not None
    rows = data.index.rows("test")
    labels = np.asarray(data.index.labels[rows], np.int64)
    scores = np.eye(3, dtype=np.float32)[(labels + (np.arange(9) < 2)) % 3] * 0.8 + 0.1  # two of nine wrong
    matrix = np.eye(3, dtype=np.int64)
    for step, number in ((7, 64), (8, 4)):
        keep_test(tmp_path, data.index, rows, labels, scores, matrix, [{"class": "a"}], number, step)
    assert read_test(tmp_path, 7) is None
    found = read_test(tmp_path, 8)
    assert found is not None and found.classes == ["a", "b", "c"] and found.per_class == [{"class": "a"}]
    assert np.array_equal(found.matrix, matrix)
    assert [each["kind"] for each in found.pictures] == ["mistake", "mistake", "random", "random"]
    assert [each["row"] for each in found.some(2)] == [int(rows[0]), found.pictures[2]["row"]]
    first = found.pictures[0]
    assert (first["path"], first["label"], first["answer"]) == (data.index.paths[int(rows[0])], "a", "b")
    assert (first["probability"], first["probability_of_label"]) == (0.9, 0.1)
    assert len(list((tmp_path / "media" / "test").iterdir())) == 4  # those of step 7 are gone
    with Image.open(found.file(first)) as kept, Image.open(pictures / first["path"]) as whole:
        assert kept.size == whole.size  # smaller than 224 px
    mistakes = draw_mistakes(found, 4)
    assert mistakes is not None and draw_mistakes(found, 0) is None

    # What somebody else's folder may hold.
    found.file(first).unlink()
    found.file(first).symlink_to(pictures / first["path"])
    again = read_test(tmp_path, 8)
    assert again is not None and len(again.pictures) == 3
    about = tmp_path / "media" / "test.json"
    for spoilt in ("{", "[]", json.dumps({"step": 8})):
        about.write_text(spoilt)
        assert read_test(tmp_path, 8) is None
