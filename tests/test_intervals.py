from __future__ import annotations

import math
import subprocess
import sys

import numpy as np
import numpy.typing as npt
import pytest
from scipy import stats

from spp_cls.intervals import (
    LEAST,
    STOPPED_LEVEL,
    Estimate,
    conclusion,
    mean_interval,
    more_seeds,
    over_images,
    paired,
    paired_over_images,
    signed,
)

# --- over seeds


def test_a_mean_worked_by_hand() -> None:
    found = mean_interval([1.0, 2.0, 3.0])
    assert (found.mean, found.n, found.level) == (2.0, 3, 0.95)
    assert found.half == pytest.approx(4.302653 / math.sqrt(3), rel=1e-6)  # t of 2 degrees, from its table
    assert (found.low, found.high) == pytest.approx((2 - found.half, 2 + found.half))


@pytest.mark.parametrize("level", [0.9, 0.95, 0.99])
def test_a_mean_as_scipy_has_it(level: float) -> None:
    values = np.random.default_rng(0).normal(30, 2, 7)
    low, high = stats.t.interval(level, 6, loc=values.mean(), scale=stats.sem(values))
    found = mean_interval(values.tolist(), level)
    assert (found.low, found.high) == pytest.approx((low, high))


def test_one_seed_and_none() -> None:
    one, none = mean_interval([3.0]), mean_interval([])
    assert (one.mean, one.n, none.n) == (3.0, 1, 0)
    assert all(math.isnan(value) for value in (one.low, one.high, one.half, none.mean, none.half))


def test_pairs_are_of_seeds_that_both_have() -> None:
    found = paired({0: 35.0, 1: 36.0, 2: 39.0, 7: 90.0}, {2: 37.0, 1: 35.0, 0: 35.0, 8: 10.0})
    assert found == mean_interval([0.0, 1.0, 2.0])
    assert paired({0: 1.0}, {1: 1.0}).n == 0


@pytest.mark.parametrize("values", [[1.0, math.nan], [math.inf]])
def test_a_value_that_is_no_number_is_refused(values: list[float]) -> None:
    with pytest.raises(ValueError, match="finite"):
        mean_interval(values)


@pytest.mark.parametrize("level", [95.0, 1.0, 0.05])
def test_a_level_that_is_no_share_is_refused(level: float) -> None:
    with pytest.raises(ValueError, match=f"level={level}"):
        mean_interval([1.0, 2.0], level)


# --- over seeds and images


def some_wrong(seeds: int, images: int, share: float = 0.3, seed: int = 0) -> npt.NDArray[np.bool_]:
    return np.random.default_rng(seed).random((seeds, images)) < share


def test_one_net_has_the_binomial_interval() -> None:
    wrong = np.zeros((1, 1000), np.bool_)
    wrong[0, :300] = True
    found = over_images(wrong)
    half = 1.96 * 100 * math.sqrt(0.3 * 0.7 / 1000)
    assert (found.mean, found.n) == (30.0, 1)
    assert (found.low, found.high) == pytest.approx((30 - half, 30 + half), abs=0.01)


def test_one_pair_has_the_normal_interval_of_its_differences() -> None:
    a, b = some_wrong(1, 2000, 0.3), some_wrong(1, 2000, 0.25, seed=1)
    difference = a[0].astype(float) - b[0]
    half = 1.96 * 100 * float(stats.sem(difference))
    found = paired_over_images(a, b)
    assert found.mean == pytest.approx(100 * difference.mean())
    assert (found.low, found.high) == pytest.approx((found.mean - half, found.mean + half), abs=0.01)


def test_images_that_all_fare_alike_leave_the_seeds() -> None:
    # Four nets, each wrong on all images or on none: the images cannot matter.
    wrong = np.repeat([[True], [False], [False], [True]], 50, axis=1)
    found, seeds = over_images(wrong), mean_interval([100.0, 0.0, 0.0, 100.0])
    assert found.mean == seeds.mean == 50
    assert (found.low, found.high) == (0, 100)  # an error can be no more
    other = paired_over_images(wrong, np.zeros_like(wrong))
    assert (other.low, other.high) == pytest.approx((seeds.low, seeds.high))


def test_seeds_that_all_fare_alike_leave_the_images() -> None:
    one = some_wrong(1, 800)
    alone, five = over_images(one), over_images(np.repeat(one, 5, axis=0))
    assert (five.low, five.high) == pytest.approx((alone.low, alone.high))
    assert five.n == 5


def test_two_seeds_and_two_images_by_hand() -> None:
    # Answers 1 0 / 0 0: mean 1/4; seeds 1/2, 0; images 1/2, 0; each rest ±1/4. Mean squares over S·N = 4: 1/16 each,
    # so the variance of the mean is 1/16, by 1 degree of freedom each: 1 / (1 + 1 + 1).
    found = paired_over_images(np.array([[True, False], [False, False]]), np.zeros((2, 2), np.bool_), level=0.9)
    half = 100 * stats.t.ppf(0.95, 1 / 3) / 4
    assert (found.mean, found.low, found.high) == pytest.approx((25, 25 - half, 25 + half))


def test_the_width_is_what_means_vary_by() -> None:
    generator, found, truth = np.random.default_rng(2), [], []
    for _ in range(400):
        hard, good, both = (
            generator.normal(size=80),
            generator.normal(size=(4, 1)) * 0.2,
            generator.normal(size=(4, 80)),
        )
        wrong = hard + good + both < 0
        interval = over_images(wrong, level=0.6827)
        found.append(interval.half)
        truth.append(interval.mean)
    # At the level of one standard deviation half of the interval is, on average, that of the means of 400 test sets.
    assert np.sqrt(np.mean(np.square(found))) == pytest.approx(np.std(truth), rel=0.2)


def test_the_order_of_images_and_of_seeds_changes_nothing() -> None:
    wrong, generator = some_wrong(3, 200), np.random.default_rng(9)
    shuffled = wrong[generator.permutation(3)][:, generator.permutation(200)]
    a, b = over_images(wrong), over_images(shuffled)
    assert (a.mean, a.low, a.high) == pytest.approx((b.mean, b.low, b.high))


def test_nets_that_never_err_have_no_width() -> None:
    found = over_images(np.zeros((3, 10), np.bool_))
    assert (found.mean, found.low, found.high) == (0, 0, 0)


def test_swapped_nets_turn_the_sign() -> None:
    a, b = some_wrong(4, 500), some_wrong(4, 500, 0.2, seed=2)
    there, back = paired_over_images(a, b), paired_over_images(b, a)
    assert there.mean == pytest.approx(-back.mean)
    assert there.mean == pytest.approx(over_images(a).mean - over_images(b).mean)
    assert (there.low, there.high) == pytest.approx((-back.high, -back.low))


def test_pairing_takes_out_what_both_find_hard() -> None:
    hard = np.random.default_rng(4).random(1000) < 0.4
    a, b = some_wrong(3, 1000, 0.01, 1) ^ hard, some_wrong(3, 1000, 0.01, 2) ^ hard
    assert paired_over_images(a, b).half < 0.5 * over_images(a).half


def test_intervals_over_images_cover_the_population() -> None:
    """Images of a drawn difficulty: the mean over seeds on one test set misses the error on others, this does not."""
    generator, hits, seeds_alone = np.random.default_rng(0), 0, 0
    for _ in range(1000):
        difficulty = generator.normal(size=300) * 2
        wrong = difficulty + 0.05 * generator.normal(size=(5, 1)) + generator.normal(size=(5, 300)) < -1
        truth = 100 * stats.norm.cdf(-1 / math.sqrt(4 + 1 + 0.05**2))
        found, over_seeds = over_images(wrong), mean_interval((100 * wrong.mean(1)).tolist())
        hits += found.low <= truth <= found.high
        seeds_alone += over_seeds.low <= truth <= over_seeds.high
    assert 0.93 <= hits / 1000 <= 0.97
    assert seeds_alone / 1000 < 0.8


@pytest.mark.parametrize(
    ("seeds", "of_seeds", "of_both"), [(5, 0.0, 1.0), (5, 0.2, 1.0), (18, 0.0, 1.0), (3, 0.2, 0.3)]
)
def test_intervals_of_differences_cover_nought(seeds: int, of_seeds: float, of_both: float) -> None:
    """Two ways that are equal, whatever makes single nets differ; a bootstrap covers 100 % of the first."""
    generator, hits = np.random.default_rng(1), 0
    for _ in range(500):
        hard = 2 * generator.normal(size=300)
        a, b = (
            hard + of_seeds * generator.normal(size=(seeds, 1)) + of_both * generator.normal(size=(seeds, 300)) < -0.7
            for _ in range(2)
        )
        found = paired_over_images(a, b)
        hits += found.low <= 0 <= found.high
    assert 0.925 <= hits / 500 <= 0.99


@pytest.mark.parametrize(
    ("seeds", "of_seeds", "of_both"), [(2, 0.05, 1.0), (2, 0.3, 0.5), (2, 0.5, 0.3), (3, 0.3, 0.5)]
)
def test_intervals_of_few_seeds_cover_and_are_never_narrower_than_over_seeds_alone(
    seeds: int, of_seeds: float, of_both: float
) -> None:
    generator, hits = np.random.default_rng(3), 0
    truth = 100 * stats.norm.cdf(-0.7 / math.sqrt(1 + of_seeds**2 + of_both**2))
    for _ in range(500):
        wrong = generator.normal(size=300) + of_seeds * generator.normal(size=(seeds, 1))
        wrong = wrong + of_both * generator.normal(size=(seeds, 300)) < -0.7
        found, over_seeds = over_images(wrong), mean_interval((100 * wrong.mean(1)).tolist())
        assert found.low <= max(0.0, over_seeds.low) + 1e-9 and found.high >= min(100.0, over_seeds.high) - 1e-9
        hits += found.low <= truth <= found.high
    assert 0.925 <= hits / 500 <= 0.99


@pytest.mark.parametrize(
    "wrong", [np.zeros((2, 3)), np.zeros(3, np.bool_), np.zeros((0, 3), np.bool_), np.zeros((2, 0), np.bool_)]
)
def test_what_is_no_table_of_answers_is_refused(wrong: npt.NDArray[np.bool_]) -> None:
    with pytest.raises(ValueError, match="bool of shape"):
        over_images(wrong)


def test_other_shapes_are_refused() -> None:
    with pytest.raises(ValueError, match=r"wrong_b: shape \(2, 4\)"):
        paired_over_images(some_wrong(2, 3), some_wrong(2, 4))


# --- what it says


def of(mean: float, sem: float, n: int = 5, level: float = 0.95) -> Estimate:
    half = float(stats.t.ppf((1 + level) / 2, n - 1)) * sem
    return Estimate(mean, mean - half, mean + half, n, level)


@pytest.mark.parametrize(
    ("difference", "paper", "kind", "holds", "text"),
    [
        (Estimate(-1.3, -2.2, -0.4, 6), -1.01, "better", True,
         "better by 1.30 points (0.40 to 2.20), n = 6: the paper's claim (−1.01) holds here"),
        (Estimate(-1.3, -2.2, -0.4, 6), 0.2, "better", False,
         "better by 1.30 points (0.40 to 2.20), n = 6: the paper's claim (+0.20) does not hold here"),
        (Estimate(1.3, 0.4, 2.2, 6), -1.01, "worse", False,
         "worse by 1.30 points (0.40 to 2.20), n = 6: the paper's claim (−1.01) does not hold here"),
        (Estimate(1.3, 0.4, 2.2, 6), None, "worse", None, "worse by 1.30 points (0.40 to 2.20), n = 6"),
        (Estimate(-0.2, -0.3, -0.1, 6), -1.01, "better", True,
         "better by 0.20 points (0.10 to 0.30), n = 6, which is less than 0.5: the paper's claim (−1.01) holds here"),
        (Estimate(0.0, -0.2, 0.2, 6), -1.01, "equal", False,
         "equal within 0.5 points: 0.00 (−0.20 to +0.20), n = 6: the paper's claim (−1.01) does not hold here"),
        (Estimate(0.0, -0.2, 0.2, 6), -0.08, "equal", None,
         "equal within 0.5 points: 0.00 (−0.20 to +0.20), n = 6: the paper's claim (−0.08) is no larger than that"),
        (Estimate(0.0, -0.2, 0.2, 6), 0.0, "equal", True,
         "equal within 0.5 points: 0.00 (−0.20 to +0.20), n = 6: the paper's claim (0.00) holds here"),
        (Estimate(-0.4, -0.4, math.nan, 0), -1.01, "not known", None, "not run yet"),
        (Estimate(-0.4, math.nan, math.nan, 1), -1.01, "not known", None, "not known yet: −0.40 points, one run each"),
        (Estimate(-0.5, -0.5, -0.5, 3), -1.01, "not known", None,
         "not known yet: all 3 seeds give −0.50 points, which says nothing of their spread"),
    ],
)  # fmt: skip
def test_what_a_difference_says(
    difference: Estimate, paper: float | None, kind: str, holds: bool | None, text: str
) -> None:
    found = conclusion(difference, paper, 0.5)
    assert (found.kind, found.holds, found.text) == (kind, holds, text)


def test_what_is_not_known_says_what_could_have_been_seen() -> None:
    # t of 4 degrees: 2.776445 at 0.975, 0.940965 at 0.8.
    found = conclusion(of(-0.4, 0.4), None, 0.5)
    assert found.seen == pytest.approx((2.776445 + 0.940965) * 0.4, rel=1e-5)
    assert found.text == (
        "not known yet: −0.40 points (−1.51 to +0.71), n = 5; a difference of 1.49 could have been seen"
    )
    assert conclusion(of(-0.4, 0.4), -1.01, 0.5).text == f"{found.text}, the paper's is −1.01"


@pytest.mark.parametrize(("level", "inner"), [(0.95, 0.9), (0.97, 0.94)])
def test_equal_is_two_one_sided_tests(level: float, inner: float) -> None:
    """The edge of "equal": both one-sided tests of a difference beyond the margin just reject at (1 − inner) / 2."""
    t = float(stats.t.ppf((1 + inner) / 2, 4))
    assert conclusion(of(0.1, 0.3999 / t, 5, level), None, 0.5).kind == "equal"
    assert conclusion(of(0.1, 0.4001 / t, 5, level), None, 0.5).kind == "not known"


def test_the_power_that_is_promised() -> None:
    """Differences as large as `seen` says for the true spread are found in about four tables of five."""
    generator, n = np.random.default_rng(0), 6
    size = (stats.t.ppf(0.975, n - 1) + stats.t.ppf(0.8, n - 1)) / math.sqrt(n)
    kinds = [conclusion(mean_interval(row.tolist()), None, 0.01).kind for row in generator.normal(-size, 1, (1500, n))]
    assert 0.75 <= kinds.count("better") / 1500 <= 0.85
    assert kinds.count("worse") == 0


@pytest.mark.parametrize("margin", [0.0, -1.0, math.nan])
def test_a_margin_has_to_be_above_nought(margin: float) -> None:
    with pytest.raises(ValueError, match="margin="):
        conclusion(of(0, 1), None, margin)


def test_signs() -> None:
    assert [signed(x) for x in (-1.005, 0.3, 0.0, -0.001)] == ["−1.00", "+0.30", "0.00", "0.00"]


# --- how many seeds


@pytest.mark.parametrize(
    ("half_widths", "n", "more"),
    [
        ([0.1], 2, True),  # fewer than the least
        ([0.1], 3, False),
        ([0.5, 0.5], 3, False),
        ([0.1, 0.51], 3, True),
        ([math.nan], 3, True),
        ([], 3, False),
        ([0.4, 0.0], 3, True),  # seeds that all give one number say nothing of their spread
        ([9.0], 8, False),  # the most
        ([math.nan], 9, False),
    ],
)
def test_when_to_stop(half_widths: list[float], n: int, more: bool) -> None:
    assert more_seeds(half_widths, n, least=3, most=8, precision=0.5) is more


@pytest.mark.parametrize(
    ("least", "most", "precision", "key"), [(1, 8, 0.5, "least=1"), (5, 4, 0.5, "most=4"), (3, 8, 0.0, "precision=0")]
)
def test_a_rule_that_cannot_be_is_refused(least: int, most: int, precision: float, key: str) -> None:
    with pytest.raises(ValueError, match=key):
        more_seeds([1.0], 3, least, most, precision)


@pytest.mark.parametrize(("precision", "mean"), [(0.6, 14.5), (1.0, 7.5), (1.5, 5.2)])  # in standard deviations
def test_intervals_cover_after_stopping(precision: float, mean: float) -> None:
    """With least = 5, 97 % intervals cover 95 % or more, whatever the truth is (less a point of chance)."""
    hits, stops = 0, []
    for row in np.random.default_rng(0).normal(0, 1, (1500, 20)).tolist():
        n = LEAST
        while more_seeds([mean_interval(row[:n], STOPPED_LEVEL).half], n, LEAST, 20, precision):
            n += 1
        found = mean_interval(row[:n], STOPPED_LEVEL)
        hits += found.low <= 0 <= found.high
        stops.append(n)
    assert 0.94 <= hits / 1500 <= 0.985
    assert np.mean(stops) == pytest.approx(mean, abs=1.5)


def test_it_loads_no_torch() -> None:
    code = "import sys, spp_cls.intervals; print(*{'torch', 'lightning'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []
