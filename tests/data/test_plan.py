from __future__ import annotations

import hashlib

import numpy as np
import pytest

from spp_cls.data.full_image import FullImage, cut
from spp_cls.data.plan import MicroBatch, Plan, order_and_uniforms, order_of_batches


def joined(rounds: list[list[MicroBatch]]) -> list[MicroBatch]:
    """Micro-batches of all ranks, in the order rank 0, rank 1 … of each micro-step, as global batches."""
    parts: dict[tuple[int, int], list[MicroBatch]] = {}
    for micro_step in zip(*rounds, strict=True):
        for micro in micro_step:
            parts.setdefault((micro.epoch, micro.batch), []).append(micro)
    return [
        MicroBatch(*position, np.concatenate([m.indices for m in micros]), np.concatenate([m.uniforms for m in micros]))
        for position, micros in parts.items()
    ]


def equal(a: list[MicroBatch], b: list[MicroBatch]) -> bool:
    return len(a) == len(b) and all(
        x[:2] == y[:2] and np.array_equal(x.indices, y.indices) and np.array_equal(x.uniforms, y.uniforms)
        for x, y in zip(a, b, strict=True)
    )


def test_order_and_uniforms_are_those_of_always() -> None:
    # Another hash means that no run of before can be repeated: numpy's Philox, permutation or random has changed.
    order, uniforms = order_and_uniforms(seed=7, epoch=3, num_images=1000)
    sha = hashlib.sha256(order.astype("<i8").tobytes() + uniforms.astype("<f4").tobytes())
    assert sha.hexdigest() == "2ec5795da5a3f8c4192a3c894ff240844bd44256ad3660537b8f305f3d3af361"
    assert order[:4].tolist() == [337, 448, 344, 896]


def test_a_permutation_and_eight_uniforms_for_each_image() -> None:
    order, uniforms = order_and_uniforms(seed=0, epoch=0, num_images=5000)
    assert order.dtype == np.int64 and np.array_equal(np.sort(order), np.arange(5000))
    assert uniforms.shape == (5000, 8) and uniforms.dtype == np.float32
    assert uniforms.min() >= 0 and uniforms.max() < 1
    # Mean of n uniforms: 1/2 ± 1 / sqrt(12 n); five of them is 0.02 here.
    assert np.abs(uniforms.mean(0) - 0.5).max() < 0.02
    assert np.abs(np.corrcoef(uniforms.T) - np.eye(8)).max() < 0.07


@pytest.mark.parametrize("other", [(1, 0), (0, 1), (1, 1), (2**40, 0), (0, 2**40)])
def test_another_seed_or_epoch_gives_another_table(other: tuple[int, int]) -> None:
    order, uniforms = order_and_uniforms(0, 0, 100)
    other_order, other_uniforms = order_and_uniforms(*other, 100)
    assert not np.array_equal(order, other_order)
    assert (uniforms == other_uniforms).mean() < 0.01


def test_every_image_at_most_once_an_epoch_and_only_the_short_batch_is_dropped() -> None:
    plan = Plan(num_images=1000, batch_size=64, seed=3)
    assert (plan.num_batches, len(plan)) == (15, 15)
    seen = np.concatenate([micro.indices for micro in plan.micro_batches(epoch=5)])
    assert len(seen) == len(set(seen.tolist())) == 960
    whole = Plan(num_images=960, batch_size=64, seed=3)
    seen = np.concatenate([micro.indices for micro in whole.micro_batches(epoch=5)])
    assert sorted(seen.tolist()) == list(range(960))


def test_uniforms_belong_to_the_image_not_to_its_place() -> None:
    _, uniforms = order_and_uniforms(3, 5, 200)
    for micro in Plan(200, 50, seed=3).micro_batches(5):
        assert np.array_equal(micro.uniforms, uniforms[micro.indices])


@pytest.mark.parametrize("accumulation", [1, 2, 4])
@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_any_split_over_ranks_and_micro_batches_gives_the_same_global_batches(ranks: int, accumulation: int) -> None:
    whole = list(Plan(1000, 64, seed=1).micro_batches(epoch=2))
    plans = [Plan(1000, 64, 1, rank, ranks, accumulation) for rank in range(ranks)]
    rounds = [list(plan.micro_batches(epoch=2)) for plan in plans]
    for plan, micros in zip(plans, rounds, strict=True):
        assert plan.micro_batch_size == 64 // (ranks * accumulation)
        assert {len(micro.indices) for micro in micros} == {plan.micro_batch_size}
        assert len(micros) == len(plan) == 15 * accumulation and plan.num_batches == 15
    assert equal(joined(rounds), whole)


@pytest.mark.parametrize("start", [0, 1, 7, 14, 15])
def test_start_goes_on_exactly(start: int) -> None:
    plan = Plan(1000, 64, seed=1, rank=1, world_size=2, accumulation=2)
    whole = list(plan.micro_batches(epoch=4))
    assert equal(list(plan.micro_batches(epoch=4, start=start)), whole[2 * start :])


@pytest.mark.parametrize("accumulation", [1, 3])
@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_a_short_batch_that_is_kept_is_divided_evenly_and_weighted_by_image(ranks: int, accumulation: int) -> None:
    # 100 = 3 · 24 + 28; 28 = 24 + 4
    whole = list(Plan(100, 24, seed=1, last_batch="keep").micro_batches(epoch=2))
    assert [len(micro.indices) for micro in whole] == [24, 24, 24, 24, 4]
    plans = [Plan(100, 24, 1, rank, ranks, accumulation, "keep") for rank in range(ranks)]
    rounds = [list(plan.micro_batches(epoch=2)) for plan in plans]
    assert equal(joined(rounds), whole)
    assert {len(plan) for plan in plans} == {len(micros) for micros in rounds} and plans[0].num_batches == 5
    for plan, micros in zip(plans, rounds, strict=True):
        assert max(len(micro.indices) for micro in micros) == plan.micro_batch_size
        assert [micro.last for micro in micros].count(True) == 5 and micros[-1].last
    last = [micro for micros in rounds for micro in micros if micro.batch == 4]
    sizes = [len(micro.indices) for micro in last]
    assert max(sizes) - min(sizes) <= 1
    # What Lightning makes of it: each mean loss divided by the accumulation, and averaged over the ranks.
    counted = [micro.weight / accumulation / ranks / len(micro.indices) for micro in last]
    assert counted == pytest.approx([1 / 4] * len(last))
    assert {micro.weight for micros in rounds for micro in micros if micro.batch < 4} == {1.0}


def test_fewer_images_than_a_batch_are_one_short_batch_if_it_is_kept() -> None:
    (micro,) = Plan(5, 24, last_batch="keep").micro_batches(0)
    assert sorted(micro.indices.tolist()) == list(range(5)) and len(Plan(5, 24, last_batch="keep")) == 1


CHANCE = np.random.default_rng(0)
WHOLE = cut(FullImage(224, 16).homes(CHANCE.integers(80, 900, 2000), CHANCE.integers(80, 900, 2000)), 64, 224, least=12)


@pytest.mark.parametrize("accumulation", [1, 3])
@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_whole_pictures_in_the_same_batches_for_any_split_over_ranks(ranks: int, accumulation: int) -> None:
    whole = list(Plan(2000, 64, seed=1, cut=WHOLE).micro_batches(epoch=2))
    assert sorted(i for micro in whole for i in micro.indices.tolist()) == list(range(2000))
    plans = [Plan(2000, 64, 1, rank, ranks, accumulation, cut=WHOLE) for rank in range(ranks)]
    rounds = [list(plan.micro_batches(epoch=2)) for plan in plans]
    assert equal(joined(rounds), whole)
    for micro_step in zip(*rounds, strict=True):  # all ranks at the same shape at each step
        assert len({(micro.shape, micro.batch, micro.last) for micro in micro_step}) == 1
    for plan, micros in zip(plans, rounds, strict=True):
        assert len(plan) == len(micros) == plan.num_batches * accumulation
        assert {micro.shape for micro in micros} == {(int(h), int(w)) for h, w in WHOLE.shapes}
        assert all(micro.shape == plan.shape(2, micro.batch) for micro in micros)
    for batch in range(len(whole)):
        parts = [micro for micros in rounds for micro in micros if micro.batch == batch]
        counted = [micro.weight / accumulation / ranks / len(micro.indices) for micro in parts]
        assert counted == pytest.approx([1 / len(whole[batch].indices)] * len(parts))


def test_batches_of_whole_pictures_come_in_another_order_and_with_others_in_each_epoch() -> None:
    plan = Plan(2000, 64, seed=1, cut=WHOLE)
    first, second = (list(plan.micro_batches(epoch)) for epoch in (0, 1))
    assert [micro.shape for micro in first] != [micro.shape for micro in second]
    assert sorted(len(micro.indices) for micro in first) == sorted(len(micro.indices) for micro in second)
    # A shape of which there is more than one batch is dealt anew; one that is rare has the same pictures again.
    sets = [{frozenset(micro.indices.tolist()) for micro in micros} for micros in (first, second)]
    assert 0 < len(sets[0] & sets[1]) < 0.7 * len(first)
    assert equal(list(plan.micro_batches(1, start=7)), second[7:])


def test_images_at_once_are_those_of_the_shape() -> None:
    plan = Plan(2000, 64, world_size=2, accumulation=2, cut=WHOLE)
    for shape in {(int(h), int(w)) for h, w in WHOLE.shapes}:
        most = max(n for n, s in zip(WHOLE.counts.tolist(), WHOLE.shapes.tolist(), strict=True) if tuple(s) == shape)
        assert plan.images_at_once(shape) == -(-most // 4)
    assert Plan(100, 24, accumulation=2).images_at_once((224, 224)) == 12


def test_order_of_batches_is_that_of_always() -> None:
    assert order_of_batches(7, 3, 12).tolist() == [3, 11, 9, 1, 8, 0, 2, 10, 5, 4, 6, 7]


def test_refused() -> None:
    with pytest.raises(ValueError, match=r"^seed=-1: use a whole number of at least 0$"):
        Plan(100, 10, seed=-1)
    message = (
        r"^data.batch_size=30 is the batch of one optimizer step and does not divide among "
        r"4 devices × 2 accumulated micro-batches$"
    )
    with pytest.raises(ValueError, match=message):
        Plan(100, 30, world_size=4, accumulation=2)
    with pytest.raises(ValueError, match=r"^data.batch_size=0: "):
        Plan(100, 0)
    with pytest.raises(ValueError, match=r"^data.batch_size=101 is more than the 100 training images: use less$"):
        Plan(100, 101)
    assert len(Plan(100, 100)) == 1
    with pytest.raises(ValueError, match=r"^data.last_batch='keeps': use one of drop, keep$"):
        Plan(100, 10, last_batch="keeps")
    with pytest.raises(ValueError, match=r"^data.last_batch=keep leaves a batch of 3 images for 4 devices: use drop"):
        Plan(103, 20, world_size=4, last_batch="keep")
    smallest = int(WHOLE.counts.min())
    with pytest.raises(
        ValueError, match=rf"^data.batch_size=64 gives batches of whole pictures of as few as {smallest},"
    ):
        Plan(2000, 64, world_size=smallest + 1, cut=WHOLE)
