from __future__ import annotations

import hashlib

import numpy as np
import pytest

from spp_cls.data.plan import MicroBatch, Plan, order_and_uniforms


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


def test_refused() -> None:
    with pytest.raises(ValueError, match=r"^seed=-1: use a whole number of at least 0$"):
        Plan(100, 10, seed=-1)
    message = (
        r"^data.batch_size=30 is the batch of one optimizer step and does not divide among "
        r"4 devices × 2 accumulated micro-batches$"
    )
    with pytest.raises(ValueError, match=message):
        Plan(100, 30, world_size=4, accumulation=2)
    with pytest.raises(ValueError, match=r"^data.batch_size=0 "):
        Plan(100, 0)
    with pytest.raises(ValueError, match=r"^data.batch_size=101 is more than the 100 training images: use less$"):
        Plan(100, 101)
    assert len(Plan(100, 100)) == 1
