"""Searches for the breaking point, driven by formulas in place of runs."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from clustersim.study.breaking import Found, Probe, Range, as_json, breaking_point, together

GINI = Range(0.0, 0.9, 0.01, ratio=False)
FACTOR = Range(1.0, 64.0, 0.02, ratio=True)


def searched(
    over: Range, value: Callable[[float], float], limit: float, most: bool = True
) -> tuple[Found, list[float]]:
    """What is found where a run at x gives value(x), and every x that was run."""
    asked: list[float] = []

    def ask(pairs: Sequence[tuple[str, float]]) -> list[Probe]:
        asked.extend(at for _, at in pairs)
        return [Probe(at, value(at), value(at) > limit if most else value(at) < limit) for _, at in pairs]

    return together({"it": breaking_point(over, most)}, ask)["it"], asked


@given(threshold=st.floats(0.001, 0.899))
def test_a_planted_threshold_is_found_within_the_precision(threshold: float) -> None:
    found, _ = searched(GINI, lambda x: x, threshold)
    assert found.verdict == "breaks" and found.kept is not None and found.missed is not None
    assert found.kept <= threshold < found.missed <= found.kept + GINI.precision + 1e-9
    assert not found.doubts


@given(threshold=st.floats(1.001, 63.9))
def test_a_planted_factor_is_found_within_a_share_of_itself(threshold: float) -> None:
    found, _ = searched(FACTOR, lambda x: x, threshold)
    assert found.kept is not None and found.missed is not None
    assert found.kept <= threshold < found.missed <= found.kept * (1 + FACTOR.precision) + 1e-9


@given(threshold=st.floats(1.001, 63.9))
def test_a_bound_from_below_is_searched_as_well(threshold: float) -> None:
    found, _ = searched(FACTOR, lambda x: 1 / x, 1 / threshold, most=False)
    assert found.kept is not None and found.missed is not None
    assert found.kept <= threshold * 1.0001 and threshold <= found.missed * 1.0001
    assert not found.doubts


def test_no_value_is_run_twice_and_few_are_run() -> None:
    found, asked = searched(FACTOR, lambda x: x, 10.0)
    # Five scanned, then halvings of a quarter of ln 64 = 4.16 down to 0.02: six.
    assert len(asked) == len(set(asked)) == len(found.probes) == 11


def test_a_bound_that_is_never_missed_in_the_range_is_told_so() -> None:
    found, asked = searched(GINI, lambda x: 1.0, 2.0)
    assert (found.verdict, found.kept, found.missed) == ("never", 0.9, None)
    assert asked == GINI.scanned()


def test_a_bound_that_is_missed_at_the_mildest_is_told_so() -> None:
    found, _ = searched(GINI, lambda x: 3.0 + x, 2.0)
    assert (found.verdict, found.kept, found.missed) == ("always", None, 0.0)


def test_of_several_islands_the_first_is_found_and_the_others_are_told() -> None:
    # Missed from 0.2 to 0.3 and from 0.6 on: the scan sees 0.225 missed and 0.45 kept.
    found, _ = searched(GINI, lambda x: 2.0 if 0.2 <= x < 0.3 or x >= 0.6 else 0.0, 1.0)
    assert found.missed == pytest.approx(0.2, abs=0.01)
    assert any("kept again at 0.45" in doubt for doubt in found.doubts)
    assert any("not monotone" in doubt for doubt in found.doubts)


def test_small_noise_is_no_doubt() -> None:
    wobble = {0.0: 1.0, 0.225: 1.004, 0.45: 1.001, 0.675: 1.006, 0.9: 1.005}
    found, _ = searched(GINI, lambda x: wobble[x], 2.0)
    assert found.verdict == "never" and not found.doubts


def test_a_failed_run_ends_the_search_with_its_error() -> None:
    def ask(pairs: Sequence[tuple[str, float]]) -> list[Probe]:
        return [Probe(at, None, False, "stuck") if at > 0.5 else Probe(at, at, False) for _, at in pairs]

    found = together({"it": breaking_point(GINI)}, ask)["it"]
    assert found.verdict == "failed"
    assert [p["error"] for p in as_json(found)["probes"] if p["at"] > 0.5] == ["stuck", "stuck"]


def test_several_searches_share_rounds_and_do_not_disturb_each_other() -> None:
    rounds: list[int] = []

    def ask(pairs: Sequence[tuple[str, float]]) -> list[Probe]:
        rounds.append(len(pairs))
        limits = {"a": 0.3, "b": 20.0}
        return [Probe(at, at, at > limits[name]) for name, at in pairs]

    both = together({"a": breaking_point(GINI), "b": breaking_point(FACTOR)}, ask)
    assert both == {"a": searched(GINI, lambda x: x, 0.3)[0], "b": searched(FACTOR, lambda x: x, 20.0)[0]}
    assert rounds[0] == 10 and set(rounds[1:]) <= {1, 2}
