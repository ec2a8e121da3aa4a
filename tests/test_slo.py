"""Bounds as people write them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from clustersim.errors import ClustersimError
from clustersim.study.slo import LATENCIES, RATES, STATISTICS, Slo, default_slo, parse_slo

FIGURES = {
    "tokens_per_second": 1000.0,
    "latency": {"step": {"p99": 0.060, "mean": 0.05}, "tpot": None},
}


@pytest.mark.parametrize(
    ("text", "slo"),
    [
        ("p99 step < 60 ms", Slo("p99", "step", True, True, 0.06)),
        ("  mean   Token Batch<=1s ", Slo("mean", "token_batch", True, False, 1.0)),
        ("max TPOT < 2 us", Slo("max", "tpot", True, True, 2e-6)),
        ("tokens/s > 400000", Slo("", "tokens_per_second", False, True, 4e5)),
        ("tokens/s >= 4e5 tokens/s", Slo("", "tokens_per_second", False, False, 4e5)),
    ],
)
def test_a_bound_is_read_with_its_unit(text: str, slo: Slo) -> None:
    assert parse_slo(text) == slo


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("", "p99 step < 60 ms"),
        ("fast please", "not a bound"),
        ("p99 step = 60 ms", "not a bound"),
        ("p99 step < 60 ms < 70 ms", "not a bound"),
        ("p99 step < 60", "no unit"),
        ("p99 step < 60 GB", "is a size; a time is wanted"),
        ("p99 stp < 60 ms", 'did you mean "step"'),
        ("p98 step < 60 ms", "there are mean, p50, p90, p95, p99 or max"),
        ("step < 60 ms", "which step"),
        ("p99 tokens/s > 5", 'leave "p99" out'),
        ("tokens/s < 5", "write >"),
        ("p99 step > 5 ms", "write <"),
        ("tokens/s > many", "not a number"),
        ("tokens/s > 1e999", "not a number"),
        ("p99 step < -5 ms", "not negative"),
        ("__import__('os').system('true') < 5 ms", "not known"),
        ("p99 step < " + "9" * 1000 + " ms", "not a bound"),
    ],
)
def test_what_is_not_a_bound_is_refused_with_what_would_be(text: str, told: str) -> None:
    with pytest.raises(ClustersimError, match="--slo") as caught:
        parse_slo(text)
    assert told in str(caught.value)


@given(st.text(max_size=120))
def test_any_text_is_a_bound_or_a_told_mistake(text: str) -> None:
    try:
        parse_slo(text)
    except ClustersimError as error:
        assert "--slo" in str(error)


@given(
    statistic=st.sampled_from(STATISTICS),
    metric=st.sampled_from(sorted(LATENCIES.values())),
    strict=st.booleans(),
    limit=st.sampled_from([1e-6, 2.5e-3, 0.06, 12.0]),
)
def test_a_bound_that_is_said_reads_back_as_the_same(
    statistic: str, metric: str, strict: bool, limit: float
) -> None:
    slo = Slo(statistic, metric, True, strict, limit)
    assert parse_slo(slo.said()) == slo


def test_a_rate_that_is_said_reads_back_as_the_same() -> None:
    slo = Slo("", RATES["tokens/s"], False, True, 400000.0)
    assert parse_slo(slo.said()) == slo


def test_the_limit_itself_is_a_miss_only_where_the_bound_is_strict() -> None:
    assert parse_slo("p99 step < 60 ms").missed(0.06) and not parse_slo("p99 step <= 60 ms").missed(0.06)
    assert parse_slo("p99 step < 60 ms").missed(0.061) and not parse_slo("p99 step < 60 ms").missed(0.059)
    assert parse_slo("tokens/s > 5").missed(5.0) and parse_slo("tokens/s > 5").missed(4.0)
    assert not parse_slo("tokens/s > 5").missed(6.0)


def test_what_a_run_has_no_such_latency_for_has_no_value() -> None:
    assert parse_slo("p99 step < 60 ms").value(FIGURES) == 0.06
    assert parse_slo("tokens/s > 5").value(FIGURES) == 1000.0
    assert parse_slo("p99 TPOT < 60 ms").value(FIGURES) is None
    assert parse_slo("p99 step < 60 ms").value(None) is None


def test_the_default_bound_is_a_multiple_of_the_balanced_step_and_kept_by_it() -> None:
    slo = default_slo(FIGURES, 1.2)
    assert slo.limit == pytest.approx(0.072) and not slo.missed(0.06)
