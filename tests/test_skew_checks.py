"""What skew costs, measured and predicted: which rows make a ratio, and how far off it is said to be."""

from __future__ import annotations

import io
from collections.abc import Mapping

import numpy as np
import pytest
from pytest import approx
from rich.console import Console

from clustersim.report.kernel_validation import show_kernel_validation, skew_rows, skew_sentences
from clustersim.study.measured import measured
from clustersim.study.skew_checks import FELT, GOAL, RATIOS, _crossing, _pairs, skew_checks
from clustersim.study.validate_kernels import kernel_predictions, validate_kernels

WIDE = "wideep_moe_skew_trtllm_h100"


@pytest.fixture(scope="module")
def told() -> Mapping[str, np.ndarray]:
    return kernel_predictions(False)


def test_measurements_that_foretell_themselves_are_never_off(told: Mapping[str, np.ndarray]) -> None:
    found = skew_checks(told, "measured")
    assert found["kept"] and {one["name"] for one in found["ratios"]} == {ratio.name for ratio in RATIOS}
    assert all(one["median"] == one["p90"] == 0.0 and one["within"] == 1.0 for one in found["ratios"])
    assert found["crossings"] and all(one["octaves"] == one["one_sided"] == 0 for one in found["crossings"])


def test_what_is_wrong_on_both_sides_alike_is_no_error_and_on_one_side_it_is(
    told: Mapping[str, np.ndarray],
) -> None:
    alike = skew_checks({**told, "off": 3.0 * told["measured"]}, "off")
    assert all(one["median"] == approx(0.0, abs=1e-12) for one in alike["ratios"])
    wide = np.where(told["file"] == WIDE, 1.3, 1.0)
    off = skew_checks({**told, "off": wide * told["measured"]}, "off")
    for one in off["ratios"]:
        # Rows of the wide file stand on one side only where the other is of the fused layers.
        wrong = not one["kernels"]
        assert one["median"] == approx(0.3 if wrong else 0.0, abs=1e-12), one
        assert one["met"] != wrong and one["ratio"] == approx(1.3 if wrong else 1.0)
    assert not off["kept"]


def test_both_sides_of_a_ratio_are_of_the_same_layer_and_batch(told: Mapping[str, np.ndarray]) -> None:
    # EPLB without spare copies was timed at seven EP of ten batches each, with them at four.
    rows = {ratio.name: len(_pairs(told, ratio, "shipped")["measured"]) for ratio in RATIOS}
    assert rows["power law 1.2 / the same after EPLB without spare copies"] == 70
    assert rows["power law 1.2 / the same after EPLB with 32 spare copies"] == 40
    table = measured(WIDE)
    here = (table["ep"].astype(float) == 8) & (table["num_tokens_global"].astype(float) == 4096)

    def time(load: str, slots: int) -> float:
        row = here & (table["distribution"].astype(str) == load) & (table["num_slots"].astype(float) == slots)
        return float(table["time_us"][row].astype(float)[0])

    pairs = _pairs(told, RATIOS[1], "shipped")
    chosen = (pairs["ep"] == 8) & (pairs["tokens"] == 4096)
    assert pairs["measured"][chosen].tolist() == [
        approx(time("power_law_1.2", 256) / time("power_law_1.2_eplb", 256))
    ]


def test_every_pair_is_in_one_class_of_batches_and_one_of_groups(told: Mapping[str, np.ndarray]) -> None:
    found = skew_checks(told, "shipped")["ratios"]
    for ratio in RATIOS:
        mine = [one for one in found if one["name"] == ratio.name]
        rows = len(_pairs(told, ratio, "shipped")["measured"])
        assert sum(one["rows"] for one in mine if one["goal"]) == rows
        assert sum(one["rows"] for one in mine if not one["goal"]) == rows


def test_the_batch_from_which_on_skew_costs_lies_between_the_two_that_were_timed() -> None:
    tokens = np.array([1.0, 4.0, 16.0, 64.0])
    # From 0.9 to 1.1 * 1.1 / 0.9 FELT is half way in logarithms: at 8 tokens.
    assert _crossing(tokens, [0.5, 0.9, FELT**2 / 0.9, 2.0]) == approx(8.0)
    assert _crossing(tokens, [1.2, 1.3, 1.2, 2.0]) is None, "it costs at every batch"
    assert _crossing(tokens, [1.2, 1.0, 2.0, 1.0]) is None, "it does not at the largest"
    assert _crossing(tokens, [1.2, 0.9, FELT**2 / 0.9, 2.0]) == approx(8.0), "what comes back counts last"


def test_shipped_prices_foretell_what_skew_costs_and_the_report_says_how_well() -> None:
    found = validate_kernels(leave_out=False)
    assert found["skew"]["kept"] and found["skew"]["goal"] == GOAL == 0.15
    console = Console(width=300, record=True, file=io.StringIO())
    show_kernel_validation(found, console)
    said = console.export_text()
    assert "What skew costs" in said and "goal met" in said
    for row in skew_rows(found):
        assert row[0] in said
    assert len(skew_sentences(found)) > len(found["skew"]["remarks"]) > 0
