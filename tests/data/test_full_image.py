from __future__ import annotations

from collections import defaultdict
from fractions import Fraction
from math import floor
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from spp_cls.data import full_image
from spp_cls.data.full_image import BOUND, SMALL, Cut, FullImage, cut, stretch


def pixels(*values: int) -> NDArray[np.int32]:
    return np.array(values, dtype=np.int32)


def homes_of(*groups: tuple[int, tuple[int, int]]) -> NDArray[np.int32]:
    """Home shapes of so many images each, mixed."""
    homes = np.concatenate([np.tile(pixels(*shape), (number, 1)) for number, shape in groups])
    return np.random.default_rng(0).permutation(homes)


def structure(made: Cut) -> list[tuple[int, tuple[int, int]]]:
    return [
        (count, (shape[0], shape[1])) for count, shape in zip(made.counts.tolist(), made.shapes.tolist(), strict=True)
    ]


def capacities(made: Cut, batch_size: int, size: int) -> NDArray[np.int64]:
    return np.maximum(1, batch_size * size**2 // made.shapes.astype(np.int64).prod(axis=1))


def batches(made: Cut, order: NDArray[np.int64]) -> list[NDArray[np.int64]]:
    return np.split(made.deal(order), made.ends[:-1])


def some_pictures(seed: int, number: int, spread: float) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """Widths and heights: half of them of five usual aspect ratios, the others of any."""
    chance = np.random.default_rng(seed)
    usual = chance.choice([2 / 3, 3 / 4, 1.0, 4 / 3, 3 / 2], number)
    ratios = np.where(chance.random(number) < 0.5, usual, np.exp(chance.normal(0, spread, number)))
    shorter = chance.integers(50, 900, number)
    widths, heights = shorter * np.maximum(ratios, 1), shorter / np.minimum(ratios, 1)
    return widths.astype(np.int32), heights.astype(np.int32)


CASES = [  # seed, images, spread of aspect ratios, batch size, size, multiple
    (0, 500, 0.3, 32, 224, 16),
    (1, 2000, 0.05, 32, 224, 16),
    (2, 300, 1.5, 32, 224, 32),
    (3, 50, 1.5, 64, 180, 16),
    (4, 400, 0.5, 7, 64, 1),
    (5, 100, 0.3, 1, 224, 16),
    (6, 700, 0.2, 128, 224, 224),
    (7, 9, 1.0, 200, 224, 16),
]


def made_for(case: tuple[int, int, float, int, int, int]) -> tuple[NDArray[np.int32], Cut]:
    seed, number, spread, batch_size, size, multiple = case
    homes = FullImage(size, multiple).homes(*some_pictures(seed, number, spread))
    return homes, cut(homes, batch_size, size)


def test_homes_by_hand() -> None:
    widths, heights = pixels(300, 200, 224, 50, 500, 1, 1000), pixels(200, 300, 224, 50, 333, 3000, 1)
    # 500 · 224 / 333 = 336.3; 3000 · 224 and 1000 · 224 are multiples.
    expected = [[224, 336], [336, 224], [224, 224], [224, 224], [224, 336], [672_000, 224], [224, 224_000]]
    homes = FullImage().homes(widths, heights)
    assert homes.tolist() == expected and homes.dtype == np.int32
    # The shorter side is rounded too, 180 / 16 = 11.25 and 200 / 32 = 6.25; longer: 270 / 16 = 16.9, 300 / 32 = 9.4.
    assert FullImage(180).homes(pixels(300), pixels(200)).tolist() == [[176, 272]]
    assert FullImage(200, 32).homes(pixels(300), pixels(200)).tolist() == [[192, 288]]
    assert FullImage(180, 1).homes(pixels(301), pixels(200)).tolist() == [[180, 271]]  # 270.9
    # A half goes up: 224 · 29 / 28 = 232 = 14.5 · 16; one px less on the longer side of 2,900 / 2,800 does not.
    assert FullImage().homes(pixels(29, 2899), pixels(28, 2800)).tolist() == [[224, 240], [224, 224]]
    assert FullImage(24, 16).homes(pixels(10), pixels(10)).tolist() == [[32, 32]]


def test_homes_are_those_of_exact_fractions() -> None:
    widths, heights = some_pictures(0, 300, 0.5)
    for size, multiple in ((224, 16), (180, 16), (97, 3)):
        for width, height, home in zip(
            widths.tolist(), heights.tolist(), FullImage(size, multiple).homes(widths, heights).tolist(), strict=True
        ):
            unit = Fraction(size, min(width, height) * multiple)
            assert home == [max(1, floor(side * unit + Fraction(1, 2))) * multiple for side in (height, width)]


@pytest.mark.parametrize("value", [0, -16, True, 16.0, "16", None])
@pytest.mark.parametrize("name", ["size", "multiple"])
def test_refused(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=rf"^sizes.{name}={value!r}: use a whole number of at least 1$"):
        FullImage(**{name: value})


def test_refused_if_the_size_is_less_than_one_multiple() -> None:
    with pytest.raises(
        ValueError, match=r"^sizes.size=15 is less than sizes.multiple=16: use a size of at least that$"
    ):
        FullImage(15, 16)
    assert FullImage(16, 16).homes(pixels(30), pixels(20)).tolist() == [[16, 32]]  # 24 / 16 = 1.5


def test_stretch_by_hand() -> None:
    shapes = np.array([[224, 224], [224, 224], [224, 448], [224, 336]], dtype=np.int32)
    found = stretch(pixels(100, 200, 100, 300), pixels(100, 100, 100, 200), shapes)
    assert found.tolist() == [0, 1, 1, 0]


# Capacities for batch_size=8, size=224: 224 × 224 holds 8, × 240: 7 (7.5), × 256: 7, × 288: 6 (6.2), × 448: 4,
# × 896: 2, × 2240: 1 (0.8). From the square the next three are 0.071, 0.143 and 0.286 away.
SQUARE, WIDER, WIDE, WIDEST = (224, 224), (224, 240), (224, 256), (224, 288)


def test_a_home_with_enough_images_has_batches_of_its_own() -> None:
    made = cut(homes_of((16, SQUARE), (12, WIDEST), (5, (288, 224))), 8, 224)
    assert structure(made) == [(5, (288, 224)), (8, SQUARE), (8, SQUARE), (6, WIDEST), (6, WIDEST)]
    assert len(made) == 5 and made.ends.tolist() == [5, 13, 21, 27, 33]


def test_what_is_left_over_is_filled_up_at_the_shape_that_stretches_least() -> None:
    # 5 + 3 at 224 × 224: 3 · 0.071 / 8 = 0.027 each. 5 + 2 at 224 × 240: 5 · 0.071 / 7 = 0.051.
    assert structure(cut(homes_of((5, SQUARE), (10, WIDER)), 8, 224)) == [(8, SQUARE), (7, WIDER)]
    # 2 + 6: 0.054; 2 + 5: 0.020.
    assert structure(cut(homes_of((2, SQUARE), (12, WIDER)), 8, 224)) == [(7, WIDER), (7, WIDER)]


def test_three_homes_in_one_batch() -> None:
    # 3 + 2 + 2 at the middle one: 240 / 224 − 1 = 0.071 and 256 / 240 − 1 = 0.067, at the ends one is twice as far.
    homes = homes_of((3, SQUARE), (2, WIDER), (2, WIDE))
    made = cut(homes, 8, 224)
    assert structure(made) == [(7, WIDER)]


def test_of_incomplete_batches_the_longest() -> None:
    # 288 / 256 − 1 = 0.125: the middle one reaches both others, and they do not reach each other.
    assert structure(cut(homes_of((2, SQUARE), (2, WIDE), (2, WIDEST)), 8, 224)) == [(6, WIDE)]


def test_none_is_joined_beyond_the_bound() -> None:
    assert BOUND < 0.28
    assert structure(cut(homes_of((3, SQUARE), (3, WIDEST)), 8, 224)) == [(3, SQUARE), (3, WIDEST)]
    assert structure(cut(homes_of((11, SQUARE), (9, WIDEST)), 8, 224)) == [
        (8, SQUARE),
        (3, SQUARE),
        (6, WIDEST),
        (3, WIDEST),
    ]


def test_a_small_batch_joins_its_neighbour_that_has_room() -> None:
    assert SMALL * 8 == 2
    assert structure(cut(homes_of((1, SQUARE), (3, WIDEST)), 8, 224)) == [(4, WIDEST)]
    assert structure(cut(homes_of((4, SQUARE), (1, WIDEST)), 8, 224)) == [(5, SQUARE)]
    assert structure(cut(homes_of((2, SQUARE), (3, WIDEST)), 8, 224)) == [(2, SQUARE), (3, WIDEST)]


def test_a_small_batch_joins_the_nearer_one() -> None:
    # 448 / 288 = 1.56 and 288 / 224 = 1.29, on whichever side.
    homes = homes_of((4, SQUARE), (1, WIDEST), (2, (224, 448)))
    assert structure(cut(homes, 8, 224)) == [(5, SQUARE), (2, (224, 448))]
    homes = homes_of((2, (448, 224)), (1, (288, 224)), (4, SQUARE))
    assert structure(cut(homes, 8, 224)) == [(2, (448, 224)), (5, SQUARE)]


def test_a_small_batch_and_a_full_one_are_divided_anew() -> None:
    # 1 + 6 are more than the 6 of 224 × 288. Every division stretches one image: the most even one is taken.
    assert structure(cut(homes_of((1, SQUARE), (6, WIDEST)), 8, 224)) == [(3, WIDEST), (4, WIDEST)]
    assert structure(cut(homes_of((8, SQUARE), (1, WIDEST)), 8, 224)) == [(4, SQUARE), (5, SQUARE)]


def test_small_ones_of_which_none_has_room_are_one() -> None:
    # 1 of 64, 1 of 12 and 1 of 6. Stretched to the middle one: 5 − 1 and 2 − 1; to the others: 4 + 9 and 9 + 1.
    homes = homes_of((1, (224, 2240)), (1, (224, 1120)), (1, SQUARE))
    assert structure(cut(homes, 64, 224)) == [(3, (224, 1120))]
    # 7 of 64 are small wherever they are divided from 4 of 6, and so are 11 of 64, but these are one batch.
    assert structure(cut(homes_of((7, SQUARE), (4, (224, 2240))), 64, 224)) == [(11, SQUARE)]


def test_extreme_pictures_are_batches_of_one() -> None:
    # Half a batch of one image is no less than a quarter: 224 × 896 holds 2, 224 × 2240 and wider 1.
    homes = homes_of((8, SQUARE), (1, (224, 896)), (3, (224, 2240)), (1, (67_200, 224)))
    assert structure(cut(homes, 8, 224)) == [
        (1, (67_200, 224)),
        (8, SQUARE),
        (1, (224, 896)),
        (1, (224, 2240)),
        (1, (224, 2240)),
        (1, (224, 2240)),
    ]


def test_one_shape_and_one_image() -> None:
    made = cut(homes_of((21, SQUARE)), 8, 224)
    assert structure(made) == [(8, SQUARE), (8, SQUARE), (5, SQUARE)]
    order = np.random.default_rng(1).permutation(21)
    assert np.array_equal(made.deal(order), order)
    made = cut(homes_of((17, SQUARE)), 8, 224)  # the last one alone would be small
    assert structure(made) == [(8, SQUARE), (4, SQUARE), (5, SQUARE)]
    made = cut(homes_of((1, (224, 336))), 8, 224)
    assert structure(made) == [(1, (224, 336))] and made.deal(np.array([0])).tolist() == [0]


@pytest.mark.parametrize("case", CASES)
def test_every_image_once_in_batches_that_hold_them(case: tuple[int, int, float, int, int, int]) -> None:
    homes, made = made_for(case)
    order = np.random.default_rng(9).permutation(len(homes))
    assert np.array_equal(np.sort(made.deal(order)), np.arange(len(homes)))
    most = capacities(made, case[3], case[4])
    assert (made.counts >= 1).all() and (made.counts <= most).all() and made.counts.sum() == len(homes)
    assert len(made) == 1 or (made.counts >= SMALL * most).all()
    for images, shape in zip(batches(made, order), made.shapes, strict=True):
        assert (homes[images] == shape).all(axis=1).any()  # of one of its images


@pytest.mark.parametrize("case", CASES)
def test_within_the_bound_unless_for_small_batches(
    case: tuple[int, int, float, int, int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(full_image, "SMALL", 0)
    homes, made = made_for(case)
    images = made.deal(np.random.default_rng(9).permutation(len(homes)))
    shapes = np.repeat(made.shapes, made.counts, axis=0)
    assert stretch(homes[images, 1], homes[images, 0], shapes).max() <= BOUND + 1e-9


@pytest.mark.parametrize("case", CASES)
def test_each_batch_is_the_best_of_all_that_begin_there(
    case: tuple[int, int, float, int, int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(full_image, "SMALL", 0)
    homes, made = made_for(case)
    _, _, _, batch_size, size, _ = case
    line = homes[made.deal(np.arange(len(homes)))]
    starts = made.ends - made.counts
    most = capacities(made, batch_size, size)
    for start, count, shape, capacity in zip(starts.tolist(), made.counts.tolist(), made.shapes, most, strict=True):
        complete = []  # mean stretch in every complete batch there could be
        for other in np.unique(line[start : start + batch_size * 2], axis=0):
            full = max(1, batch_size * size**2 // int(other.prod(dtype=np.int64)))
            images = line[start : start + full]
            far = stretch(images[:, 1], images[:, 0], np.tile(other, (len(images), 1)))
            if len(images) == full and far.max() <= BOUND and (images == other).all(axis=1).any():
                complete.append(far.mean())
        images = line[start : start + count]
        if count == capacity:
            far = stretch(images[:, 1], images[:, 0], np.tile(shape, (count, 1)))
            assert far.mean() <= min(complete) + 1e-12
        else:
            assert not complete


@pytest.mark.parametrize("case", CASES)
def test_deal_agrees_with_a_walk_through_lists(case: tuple[int, int, float, int, int, int]) -> None:
    homes, made = made_for(case)
    chance = np.random.default_rng(9)
    for order in (np.arange(len(homes)), chance.permutation(len(homes)), chance.permutation(len(homes))):
        queues: dict[tuple[int, int], list[int]] = defaultdict(list)
        for image in order.tolist():
            queues[homes[image, 0], homes[image, 1]].append(image)
        line = [image for home in sorted(queues, key=lambda home: home[1] / home[0]) for image in queues[home]]
        dealt = made.deal(order)
        assert dealt.tolist() == line and dealt.dtype == np.int64


def test_structure_is_that_of_the_counts_alone() -> None:
    homes, made = made_for(CASES[0])
    chance = np.random.default_rng(1)
    shuffled = chance.permutation(len(homes))
    other = cut(homes[shuffled], 32, 224)
    assert structure(other) == structure(made) and np.array_equal(other.places, made.places[shuffled])
    # However dealt, a batch has as many images of each home.
    first, second = (batches(made, chance.permutation(len(homes))) for _ in range(2))
    for a, b in zip(first, second, strict=True):
        assert np.array_equal(np.sort(made.places[a]), np.sort(made.places[b]))
    assert any(set(a.tolist()) != set(b.tolist()) for a, b in zip(first, second, strict=True))


def test_hardly_stretched_hardly_incomplete() -> None:
    widths, heights = some_pictures(0, 5000, 0.3)
    homes = FullImage().homes(widths, heights)
    made = cut(homes, 32, 224)
    images = made.deal(np.arange(5000))
    rounded = stretch(widths, heights, homes).mean()
    mean = stretch(widths[images], heights[images], np.repeat(made.shapes, made.counts, axis=0)).mean()
    assert rounded < 0.02 and mean < rounded + 0.005
    assert made.counts[made.counts < capacities(made, 32, 224)].sum() < 0.02 * 5000


def test_every_kind_of_count_is_cut() -> None:
    # All numbers of images of three homes, two within the bound and one beyond, up to two batches each.
    for a in range(0, 9):
        for b in range(0, 9):
            for c in range(1, 6):
                groups = [(number, shape) for number, shape in ((a, SQUARE), (b, WIDER), (c, WIDEST)) if number]
                made = cut(homes_of(*groups), 4, 224)
                most = capacities(made, 4, 224)
                assert made.counts.sum() == a + b + c and (made.counts <= most).all()
                assert len(made) == 1 or (made.counts >= SMALL * most).all()


@pytest.mark.parametrize("seed", range(30))
def test_no_batch_is_of_fewer_than_least(seed: int) -> None:
    chance = np.random.default_rng(seed)
    n, least, batch_size = int(chance.integers(20, 400)), int(chance.integers(1, 20)), int(chance.integers(4, 70))
    widths, heights = (chance.integers(30, 900, n, dtype=np.int32) for _ in range(2))
    found = cut(FullImage(64, 16).homes(widths, heights), batch_size, 64, least)
    assert found.counts.sum() == n and found.counts.min() >= min(n, least)
    capacities = np.maximum(least, batch_size * 64 * 64 // found.shapes.prod(1))
    assert (found.counts < capacities + 2 * least).all()
    assert sorted(found.deal(chance.permutation(n)).tolist()) == list(range(n))
