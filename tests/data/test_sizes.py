from __future__ import annotations

from collections import Counter
from functools import partial
from typing import Any

import numpy as np
import pytest

from spp_cls.data.plan import order_and_uniforms
from spp_cls.data.sizes import alternating, growing, per_batch, planned, single, uniform


def test_single() -> None:
    assert {single(seed, epoch, batch, size=224) for seed in (0, 1) for epoch in range(5) for batch in (0, 9)} == {224}


def test_alternating_takes_a_whole_epoch_at_each_size_in_turn() -> None:
    assert [alternating(0, epoch, 0, sizes=[180, 224]) for epoch in range(5)] == [180, 224, 180, 224, 180]
    assert [alternating(0, epoch, 0, sizes=[1, 2, 3]) for epoch in range(7)] == [1, 2, 3, 1, 2, 3, 1]
    assert {alternating(seed, 1, batch, sizes=[180, 224]) for seed in range(5) for batch in range(5)} == {224}
    assert alternating(0, 69, 0, sizes=[180, 224]) == alternating(0, 89, 0, sizes=[180, 224]) == 224


def test_uniform_draws_every_size_about_equally_often() -> None:
    # 4,500 epochs over the 45 sizes 180 … 224: 100 of each, standard deviation 10.
    sizes = [uniform(0, epoch, 0, low=180, high=224) for epoch in range(4500)]
    counts = Counter(sizes)
    assert sorted(counts) == list(range(180, 225))
    assert min(counts.values()) > 60 and max(counts.values()) < 140
    assert {type(size) for size in sizes} == {int}
    # No memory: the next epoch's size says nothing of this one's.
    assert abs(np.corrcoef(sizes[:-1], sizes[1:])[0, 1]) < 0.06


def test_uniform_is_one_size_an_epoch_and_the_same_each_time() -> None:
    first = [uniform(3, epoch, 0, low=180, high=224) for epoch in range(50)]
    assert [uniform(3, epoch, 17, low=180, high=224) for epoch in range(50)] == first
    assert [uniform(4, epoch, 0, low=180, high=224) for epoch in range(50)] != first
    assert uniform(0, 0, 0, low=200, high=200) == 200


def test_uniform_leaves_the_plan_its_numbers() -> None:
    # Drawn from another part of the stream: a size that followed from the first number of the permutation would tie
    # the size of an epoch to its order.
    order, _ = order_and_uniforms(0, 0, 1000)
    key = np.random.Generator(np.random.Philox(key=[0, 0]))
    beside = np.random.Generator(np.random.Philox(key=[0, 0], counter=[0, 0, 0, 1]))
    assert not np.array_equal(key.random(100), beside.random(100))
    uniform(0, 0, 0, low=180, high=224)
    assert np.array_equal(order_and_uniforms(0, 0, 1000)[0], order)


def test_planned_is_what_sizes_gives_up_to_the_region() -> None:
    sizes = partial(alternating, sizes=[180, 224])
    assert [planned(sizes, 0, epoch, 0, region=224) for epoch in range(2)] == [180, 224]


def test_planned_refuses_a_size_above_the_region() -> None:
    message = (
        r"^sizes gave 256 px for epoch 1, more than data.region=224: "
        r"raise data.region to 256 \(and data.resize with it\), or train at smaller sizes$"
    )
    with pytest.raises(ValueError, match=message):
        planned(partial(alternating, sizes=[180, 256]), 0, 1, 0, region=224)


@pytest.mark.parametrize("size", [180.0, "224", None, True, 0, -1, np.float64(180)])
def test_planned_refuses_what_is_no_size(size: Any) -> None:
    with pytest.raises(ValueError, match=r"^sizes gave .* for epoch 2: a training size is a whole number of px$"):
        planned(lambda seed, epoch, batch: size, 0, 2, 0, region=224)


def test_a_schedule_of_ones_own_may_depend_on_the_batch() -> None:
    def curriculum(seed: int, epoch: int, batch: int, *, low: int) -> int:
        return low + 16 * min(epoch, 2) + batch % 2

    sizes = partial(curriculum, low=180)
    assert [planned(sizes, 0, epoch, batch, 224) for epoch in range(4) for batch in range(2)] == [
        *(180, 181),
        *(196, 197),
        *(212, 213),
        *(212, 213),
    ]


def test_alternating_needs_a_size() -> None:
    with pytest.raises(ValueError, match=r"^sizes\.sizes=\[\]: give at least one"):
        alternating(0, 0, 0, sizes=[])


FOUR = [128, 160, 192, 224]


def test_per_batch_draws_each_size_about_equally_often_in_any_order() -> None:
    # 4,000 batches, over the blocks that are drawn at once: 1,000 of each, standard deviation 27.
    sizes = [per_batch(0, 0, batch, sizes=FOUR) for batch in range(4000)]
    assert all(880 < number < 1120 for number in Counter(sizes).values()) and set(sizes) == set(FOUR)
    assert abs(np.corrcoef(sizes[:-1], sizes[1:])[0, 1]) < 0.06
    assert sizes[:1000] != sizes[1024:2024]
    twice = [per_batch(0, 0, batch, sizes=[180, 224, 224]) for batch in range(3000)]
    assert 900 < twice.count(180) < 1100  # what stands twice is twice as likely


def test_per_batch_is_a_pure_function() -> None:
    first = {(s, e, b): per_batch(s, e, b, sizes=FOUR) for s in (0, 7) for e in (0, 3) for b in range(0, 3000, 7)}
    again = {(s, e, b): per_batch(s, e, b, sizes=FOUR) for s, e, b in reversed(first)}
    assert again == first
    runs = {
        tuple(size for (s, e, _), size in first.items() if (s, e) == run) for run in ((0, 0), (0, 3), (7, 0), (7, 3))
    }
    assert len(runs) == 4  # another seed or epoch, another order


def test_per_batch_draws_beside_the_others() -> None:
    ours = np.random.Generator(np.random.Philox(key=[0, 0], counter=[0, 0, 0, 3])).random(8)
    assert [per_batch(0, 0, batch, sizes=range(1000)) for batch in range(8)] == [int(u * 1000) for u in ours]


@pytest.mark.parametrize(
    ("epochs", "steps", "expected"),
    [
        (8, 4, [128, 128, 160, 160, 192, 192, 224, 224]),
        (6, 4, [128, 128, 160, 192, 192, 224]),
        (4, 4, [128, 160, 192, 224]),
        (3, 4, [128, 176, 224]),
        (2, 4, [128, 224]),
        (1, 4, [224]),
        (3, 1, [224, 224, 224]),
        (5, 2, [128, 128, 128, 224, 224]),
    ],
)
def test_growing_by_hand(epochs: int, steps: int, expected: list[int]) -> None:
    sizes = partial(growing, low=128, high=224, epochs=epochs, steps=steps)
    assert [planned(sizes, 0, epoch, 0, 224) for epoch in range(epochs)] == expected
    assert sizes(0, epochs + 5, 0) == 224  # a run that goes on further stays there
    assert {sizes(seed, 0, batch) for seed in range(3) for batch in range(3)} == {expected[0]}


def test_growing_never_shrinks_and_ends_at_the_top() -> None:
    for epochs in range(1, 40):
        for steps in range(1, 10):
            sizes = [growing(0, epoch, 0, low=96, high=224, epochs=epochs, steps=steps) for epoch in range(epochs)]
            assert sizes == sorted(sizes) and sizes[-1] == 224
            assert len(set(sizes)) == min(epochs, steps)


@pytest.mark.parametrize("wrong", [{"epochs": -1}, {"epochs": None}, {"steps": 0}, {"steps": 2.0}])
def test_growing_refuses(wrong: dict[str, Any]) -> None:
    (name,) = wrong
    with pytest.raises(ValueError, match=rf"^sizes\.{name}=.*: use a whole number of at least 1$"):
        growing(0, 0, 0, **{"low": 128, "high": 224, "epochs": 4, **wrong})


def test_per_batch_needs_a_size() -> None:
    with pytest.raises(ValueError, match=r"^sizes\.sizes=\[\]: give at least one"):
        per_batch(0, 0, 0, sizes=[])
