"""Intervals hold what they promise, warm-ups are found, and no digit is printed that is not supported."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from clustersim.analysis.statistics import (
    batch_means,
    difference_interval,
    digits,
    enough,
    mean_interval,
    percentile_interval,
    said_half_width,
    said_within,
    steady,
    student_t,
    warm_up,
)

#: Two-sided 95 % and 99 % quantiles by degrees of freedom.
#: Source: NIST/SEMATECH e-Handbook of Statistical Methods, section 1.3.6.7.2.
STUDENT = {
    1: (12.706, 63.657),
    2: (4.303, 9.925),
    3: (3.182, 5.841),
    5: (2.571, 4.032),
    9: (2.262, 3.250),
    10: (2.228, 3.169),
    19: (2.093, 2.861),
    30: (2.042, 2.750),
    60: (2.000, 2.660),
    100: (1.984, 2.626),
}


def autoregressive(rng: np.random.Generator, n: int, phi: float) -> np.ndarray:
    """Each value is phi times the one before it, plus noise; from its steady state on, mean 0."""
    noise = rng.normal(size=n)
    found = np.empty(n)
    found[0] = noise[0] / math.sqrt(1 - phi**2)
    for i in range(1, n):
        found[i] = phi * found[i - 1] + noise[i]
    return found


@pytest.mark.parametrize(("freedom", "quantiles"), STUDENT.items())
def test_students_quantiles_are_those_of_the_published_table(
    freedom: int, quantiles: tuple[float, float]
) -> None:
    assert (round(student_t(0.95, freedom), 3), round(student_t(0.99, freedom), 3)) == quantiles


def test_students_t_becomes_the_normal_distribution() -> None:
    assert student_t(0.95, 1e7) == pytest.approx(1.959964, abs=1e-5)


# The half-width of 2000 draws of a chance of 0.95 is 0.01; the seeds are fixed.


@pytest.mark.parametrize("n", [2, 5, 10])
def test_intervals_of_means_hold_the_true_one_as_often_as_they_say(n: int) -> None:
    rng = np.random.default_rng(1)
    held = [mean_interval(rng.normal(3.0, 2.0, n)).holds(3.0) for _ in range(2000)]
    assert 0.935 <= np.mean(held) <= 0.965


def test_intervals_of_differences_hold_the_true_one_as_often_as_they_say() -> None:
    rng = np.random.default_rng(2)
    held = [
        difference_interval(rng.normal(0.0, 1.0, 6), rng.normal(1.0, 4.0, 9)).holds(1.0) for _ in range(2000)
    ]
    assert 0.93 <= np.mean(held) <= 0.965


@pytest.mark.parametrize(("q", "n"), [(0.5, 20), (0.9, 200), (0.99, 500)])
def test_intervals_of_percentiles_hold_at_least_as_often_as_they_say_whatever_the_distribution(
    q: float, n: int
) -> None:
    rng = np.random.default_rng(3)
    true = -math.log(1 - q)
    held = [percentile_interval(rng.exponential(size=n), q).holds(true) for _ in range(2000)]
    assert np.mean(held) >= 0.94


@pytest.mark.parametrize("phi", [0.0, 0.5, 0.8])
def test_batch_means_hold_the_true_mean_of_values_that_depend_on_each_other(phi: float) -> None:
    rng = np.random.default_rng(4)
    series = [autoregressive(rng, 1000, phi) for _ in range(500)]
    assert np.mean([batch_means(one).holds(0.0) for one in series]) >= 0.92
    if phi:
        # As if they were independent, it would be far less: the test can fail.
        assert np.mean([mean_interval(one).holds(0.0) for one in series]) < 0.8


@pytest.mark.parametrize("q", [0.5, 0.9, 0.99])
def test_too_few_values_have_no_interval_of_a_percentile_and_it_says_how_many_are_needed(q: float) -> None:
    needed = enough(q)
    values = np.random.default_rng(5).normal(size=needed)
    assert percentile_interval(values, q).half_width is not None
    less = percentile_interval(values[1:], q)
    assert less.half_width is None
    assert f"{needed} are needed" in less.how


def test_how_many_values_a_p99_needs() -> None:
    # The largest of n lies below the p99 with probability 0.99^n: 0.99^367 = 0.02501, 0.99^368 = 0.0248.
    assert enough(0.99) == 368


def test_one_replication_is_exact_and_has_no_interval() -> None:
    found = mean_interval([0.1])
    assert (found.value, found.half_width) == (0.1, None)
    assert "exact" in found.how


def test_equal_replications_have_an_interval_without_width() -> None:
    found = mean_interval([0.1] * 7)
    assert (found.value, found.low, found.high) == (0.1, 0.1, 0.1)


def test_few_steps_have_no_interval_by_batch_means() -> None:
    assert batch_means(np.arange(19.0)).half_width is None
    assert batch_means(np.random.default_rng(6).normal(size=20)).half_width is not None


def test_batches_that_still_depend_on_each_other_are_told() -> None:
    series = autoregressive(np.random.default_rng(7), 200, 0.999)
    assert "too narrow" in batch_means(series).how


# ---- warm-up --------------------------------------------------------------------------------------------


def test_a_warm_up_is_cut_and_little_more() -> None:
    rng = np.random.default_rng(8)
    cuts = []
    for _ in range(50):
        series = rng.normal(size=500)
        series[:60] += 20.0
        found = warm_up(series)
        assert found.settled
        cuts.append(found.cut)
    assert min(cuts) >= 60
    assert np.median(cuts) <= 80


def test_nothing_is_cut_of_equal_values_nor_of_too_few() -> None:
    assert warm_up(np.full(100, 0.1)).cut == 0
    assert warm_up([5.0, 1.0, 1.0]).cut == 0
    assert "too few" in warm_up([5.0, 1.0, 1.0]).words


@given(st.lists(st.floats(1e-6, 1e3), min_size=1, max_size=120))
def test_never_more_than_half_is_cut_and_the_rest_is_what_is_told(series: list[float]) -> None:
    found = warm_up(series)
    assert found.cut <= len(series) / 2
    told = steady(series)
    assert told is not None
    assert told["mean"] == pytest.approx(np.mean(series[found.cut :]))


def test_what_goes_on_changing_is_called_unsettled() -> None:
    found = warm_up(np.arange(100.0))
    assert not found.settled and found.cut == 50
    assert "not settled" in found.words


def test_a_cut_does_not_depend_on_unit_or_offset() -> None:
    series = autoregressive(np.random.default_rng(9), 300, 0.5) + 10 * np.exp(-np.arange(300) / 20)
    assert warm_up(series).cut == warm_up(1e-6 * series + 1.0).cut > 0


# ---- digits ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "half_width", "text"),
    [
        (12.3456, 0.03, "12.35 ± 0.03 s"),
        (12.3456, 0.0151, "12.35 ± 0.02 s"),
        (12.3456, 0.096, "12.3 ± 0.1 s"),
        (0.0123456, 0.00003, "12.35 ± 0.03 ms"),
        (12.3456, None, "12.3456 s"),
        (12.3456, 0.0, "12.3456 s"),
        (0.0, None, "0 s"),
        (0.0, 9.6e-7, "0 ± 1 us"),
    ],
)
def test_a_quantity_has_as_many_digits_as_its_interval(
    value: float, half_width: float | None, text: str
) -> None:
    assert said_within(value, half_width, "time") == text


def test_large_values_are_rounded_too() -> None:
    assert digits(1234.5, 60.0) == "1,230"
    assert said_within(450123.0, 1234.0, "rate") == "450,000 ± 2,000 tokens/s"
    assert said_within(3818567.0, None, "rate") == "3,818,570 tokens/s"
    assert digits(1000.0, None) == "1,000"


@given(st.floats(-1e9, 1e9), st.floats(1e-9, 1e9))
def test_the_last_digit_printed_is_of_the_order_of_the_half_width(value: float, half_width: float) -> None:
    width = float(said_half_width(half_width).replace(",", ""))
    # Rounded up to one digit, and the value to that place.
    assert half_width * (1 - 1e-6) <= width <= 10 * half_width
    place = 10.0 ** math.floor(math.log10(width) + 1e-6)
    printed = float(digits(value, half_width).replace(",", ""))
    assert abs(printed - value) <= place / 2 * (1 + 1e-6) + 1e-15 * abs(value)
    assert printed / place == pytest.approx(round(printed / place), abs=1e-4, rel=1e-9)
