from __future__ import annotations

from functools import partial

import pytest

from spp_cls.schedules import Schedule, constant, cosine, one_cycle, plateau, step


def near(value: float) -> object:
    return pytest.approx(value, rel=1e-12, abs=1e-15)


def test_constant() -> None:
    assert [constant(p, []) for p in (0.0, 0.3, 1.0)] == [1, 1, 1]
    assert [constant(p, [], warmup=0.2) for p in (0.0, 0.05, 0.1, 0.2, 1.0)] == [0, 0.25, 0.5, 1, 1]


def test_step_falls_at_each_milestone() -> None:
    drop = partial(step, milestones=(0.5, 0.75), factor=0.1)
    assert [drop(p, []) for p in (0.0, 0.499999)] == [1, 1]
    assert [drop(p, []) for p in (0.5, 0.749999)] == [0.1, 0.1]
    assert [drop(p, []) for p in (0.75, 1.0)] == [near(0.01)] * 2
    assert step(0.5, [], milestones=()) == 1
    assert [step(p, [], warmup=0.4) for p in (0.0, 0.1, 0.4, 0.6)] == [0, 0.25, 1, 0.1]


def test_cosine() -> None:
    assert [cosine(p, []) for p in (0.0, 1 / 3, 0.5, 2 / 3, 1.0)] == [near(f) for f in (1, 0.75, 0.5, 0.25, 0)]
    assert cosine(1.0, [], end=0.1) == near(0.1)
    assert cosine(0.5, [], end=0.1) == near(0.55)
    warm = [cosine(p, [], warmup=0.2) for p in (0.0, 0.1, 0.2, 0.6, 1.0)]
    assert warm == [near(f) for f in (0, 0.5, 1, 0.5, 0)]


def test_one_cycle() -> None:
    assert one_cycle(0.0, []) == near(1 / 25)
    assert one_cycle(0.15, []) == near((1 + 1 / 25) / 2)
    assert one_cycle(0.3, []) == near(1)
    assert one_cycle(0.65, []) == near((1 + 1 / 250_000) / 2)
    assert one_cycle(1.0, []) == near(1 / 250_000)
    assert [one_cycle(p, [], rise=0.5, start=0.2, end=0.1) for p in (0, 0.25, 0.75, 1)] == [
        near(f) for f in (0.2, 0.6, 0.55, 0.1)
    ]


@pytest.mark.parametrize("rise", [0.1, 0.3, 0.9])
def test_one_cycle_has_no_jump_at_its_height(rise: float) -> None:
    around = [one_cycle(rise + d, [], rise=rise) for d in (-1e-9, 0, 1e-9)]
    assert around == [pytest.approx(1, abs=1e-12)] * 3


@pytest.mark.parametrize("share", [0.0, 1.0])
@pytest.mark.parametrize("schedule", [partial(cosine), partial(constant), partial(one_cycle)])
def test_a_rise_over_nothing_or_over_all_ends_at_its_height(schedule: partial[float], share: float) -> None:
    name = "rise" if schedule.func is one_cycle else "warmup"
    assert schedule(share, [], **{name: share}) == 1


@pytest.mark.parametrize("schedule", [constant, step, cosine, one_cycle])
def test_the_errors_play_no_part(schedule: Schedule) -> None:
    assert [schedule(p / 10, []) for p in range(11)] == [schedule(p / 10, [90.0, 90.0] * 20) for p in range(11)]


# --- plateau: patience 2, a fall of 0.1 points counts


def factors(*errors: float, **arguments: float) -> list[float]:
    """The factor after each epoch."""
    schedule = partial(plateau, **{"patience": 2, **arguments})
    return [schedule(0.5, errors[: n + 1]) for n in range(len(errors))]


def test_plateau_divides_by_ten_exactly_twice() -> None:
    assert plateau(0.0, []) == 1
    found = factors(50, 50, 50, 50, 50, 50, 50, 50, 50)
    assert found == [1, 1, 0.1, 0.1, *[near(0.01)] * 5]


def test_plateau_waits_while_the_error_falls() -> None:
    assert factors(50, 49, 48, 47, 46) == [1] * 5
    assert factors(50, 51, 49, 50, 48, 49) == [1] * 6  # never two epochs in a row without a fall
    assert factors(50, 51, 51, 40, 41, 41, 41) == [1, 1, 0.1, 0.1, 0.1, near(0.01), near(0.01)]


def test_plateau_counts_a_fall_above_the_threshold_only_against_the_best() -> None:
    assert factors(50, 49.95, 49.9) == [1, 1, 0.1]  # 0.1 is not more than 0.1
    assert factors(50, 49.95, 49.8) == [1, 1, 1]
    assert factors(50, 49.75, 49.5, threshold=0.5) == [1, 1, 0.1]
    assert factors(50, 60, 55) == [1, 1, 0.1]  # better than the last, not than the best


def test_plateau_by_other_numbers() -> None:
    assert factors(5, 5, 5, 5, patience=1, factor=0.5, drops=3) == [1, 0.5, 0.25, 0.125]
    assert factors(5, 5, 5, 5, patience=1, drops=0) == [1] * 4
    assert [plateau(p, [5] * 6) for p in (0.0, 0.5, 1.0)] == [0.1] * 3  # 5 epochs after the first; progress is nothing
