"""Measured curves over formulas: laws of the grid, of what fills it, and of the prices that come of it."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pytest import approx

from clustersim.physics.calibration import (
    EXTRAPOLATED,
    FORMULA,
    INTERPOLATED,
    MEASURED,
    REACH,
    Kernel,
    lay,
)
from clustersim.physics.gemm import KERNELS as PRODUCTS
from clustersim.physics.kernels import KERNELS, LIBRARIES, ONLY_NAMED, basis_of, price_calls
from clustersim.plan import stepgraph
from clustersim.spec.gpus import gpu_named
from clustersim.spec.hardware import Gpu
from clustersim.spec.kernel_tables import (
    KernelTable,
    TableKey,
    fitted_parameters,
    kernel_table,
    packed,
)
from clustersim.study.kernel_fit import Calls, calls_of, document, fitted_calls, foretold, rising, table_of
from clustersim.study.kernel_rows import Rows
from clustersim.study.kriging import left_out, predict, surface
from clustersim.study.least_squares import Parameter

GEMM = PRODUCTS[0]
KEY = TableKey("gemm", "h100_sxm", "bf16", "trtllm")


def grid(far: float = 0.0) -> KernelTable:
    """Two coordinates, 0 to 2 and 0 to 4 octaves; the ratio is x + 10 y at the nodes."""
    axes = np.array([0.0, 1.0, 2.0]), np.array([0.0, 4.0])
    ratio = axes[0][:, None] + 10 * axes[1][None]
    return KernelTable(KEY, {}, axes, ratio, np.full(ratio.shape, far))


# ---- the grid -----------------------------------------------------------------------------------


def test_a_node_is_met_exactly_and_counts_as_measured() -> None:
    ratio, origin, outside = lay(grid(), np.array([[1.0, 4.0], [2.0, 0.0]]))
    assert ratio == approx([41.0, 2.0])
    assert origin.tolist() == [MEASURED, MEASURED] and outside.tolist() == [0, 0]


@given(x=st.floats(0, 2), y=st.floats(0.01, 3.99))
def test_between_nodes_the_ratio_is_linear_and_interpolated(x: float, y: float) -> None:
    ratio, origin, _ = lay(grid(), np.array([[x, y]]))
    assert ratio[0] == approx(x + 10 * y) and origin[0] == INTERPOLATED


@given(x=st.floats(-50, -0.1), y=st.floats(4.1, 60))
def test_outside_the_ratio_stays_that_of_the_edge(x: float, y: float) -> None:
    ratio, origin, outside = lay(grid(), np.array([[x, y]]))
    assert ratio[0] == approx(40.0) and origin[0] == EXTRAPOLATED
    assert outside[0] == approx(-x + y - 4)


def test_a_node_that_was_not_measured_is_no_measurement_and_one_far_from_any_is_extrapolated() -> None:
    at = np.array([[1.0, 4.0]])
    assert lay(grid(far=1.0), at)[1].tolist() == [INTERPOLATED]
    assert lay(grid(far=REACH + 0.1), at)[1].tolist() == [EXTRAPOLATED]


def test_a_coordinate_with_one_node_is_constant() -> None:
    table = replace(grid(), axes=(np.array([3.0]), np.array([0.0, 4.0])), ratio=np.array([[1.0, 2.0]]))
    table = replace(table, far=np.zeros((1, 2)))
    ratio, origin, outside = lay(table, np.array([[3.0, 2.0], [5.0, 4.0]]))
    assert ratio == approx([1.5, 2.0]) and outside == approx([0.0, 2.0])
    assert origin.tolist() == [INTERPOLATED, EXTRAPOLATED]


# ---- what fills it ------------------------------------------------------------------------------


def test_what_is_foretold_of_a_group_is_what_a_surface_without_it_predicts() -> None:
    rng = np.random.default_rng(1)
    at, values, groups = rng.normal(size=(20, 2)), rng.normal(size=20), np.arange(20) // 4
    scales = np.array([1.0, 2.0])
    told = left_out(surface(at, values, scales, 0.05), groups)
    for group in range(5):
        others = groups != group
        without = surface(at[others], values[others], scales, 0.05)
        assert told[~others] == approx(predict(without, at[~others]))


def test_a_surface_without_noise_goes_through_its_points_and_fades_far_away() -> None:
    at, values = np.array([[0.0], [1.0], [3.0]]), np.array([0.3, -0.1, 0.2])
    known = surface(at, values, np.array([2.0]), 0.0)
    assert predict(known, at) == approx(values)
    assert predict(known, np.array([[200.0]])) == approx([0.0], abs=1e-12)


def calls(m: list[float], measured: list[float], n: float = 512) -> Calls:
    columns = {"m": np.array(m), "n": np.full(len(m), n), "k": np.full(len(m), 512.0)}
    return Calls(KEY, columns, np.array(measured), np.full(len(m), "file"), np.arange(len(m)))


def test_times_that_fall_as_the_batch_grows_are_evened_out_and_others_stay() -> None:
    made = rising(GEMM, calls([8, 1, 2, 4], [9e-6, 4e-6, 1e-6, 5e-6]))
    assert made == approx([9e-6, 2e-6, 2e-6, 5e-6])


@settings(max_examples=50)
@given(st.lists(st.floats(1e-6, 1e-3), min_size=2, max_size=12))
def test_evened_times_rise_and_keep_their_mean_logarithm(times: list[float]) -> None:
    made = rising(GEMM, calls([2.0**i for i in range(len(times))], times))
    assert (np.diff(made) >= -1e-18).all()
    assert np.log(made).mean() == approx(np.log(times).mean())


@dataclass(frozen=True, slots=True)
class Straight:
    """One parameter: s per unit of m."""

    rate: float = 1.0


def straight(gpu: Gpu, form: str, p: Straight, c: dict[str, np.ndarray]) -> np.ndarray:
    return p.rate * c["m"]


def test_a_fit_goes_through_its_points_and_its_files_read_back(monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = Kernel("gemm", ("m", "n", "k"), Straight, straight, GEMM.least, GEMM.shape, GEMM.size)
    monkeypatch.setitem(KERNELS, "gemm", kernel)  # type: ignore[misc]
    m = np.tile(2.0 ** np.arange(8), 4)
    n = np.repeat([512.0, 1024.0, 2048.0, 4096.0], 8)
    measured = 1e-3 * m * np.where(n > 1000, 1.1, 0.9)
    rows = Rows(
        *("file", "gemm", np.full(32, "h100_sxm"), np.full(32, "trtllm"), np.full(32, "bf16")),
        *({"m": m, "n": n, "k": np.full(32, 512.0)}, measured, np.arange(32), np.full(32, "")),
    )
    known = calls_of([rows])[KEY]
    found = fitted_calls(known, gpu_named("h100_sxm"), {"rate": Parameter(1e-2, 1e-6, 1.0)})
    table = table_of(found, known.measured)
    rate = float(found.parameters["rate"].value)
    at = np.stack([np.log2(n), np.full(32, 9.0), np.log2(m)], axis=1)
    ratio, origin, _ = lay(table, at)
    assert rate * m * np.exp(ratio) == approx(measured, rel=1e-9)
    assert (origin == MEASURED).all()
    # A shape that the fit has not seen is told from its neighbours: not exactly.
    told = foretold(found, gpu_named("h100_sxm"), {"rate": Parameter(1e-2, 1e-6, 1.0)})
    error = np.abs(told / measured - 1)
    assert 0.001 < error[n == 512].max() < 0.3
    stored = packed(table)
    assert stored["gemm/h100_sxm/bf16/trtllm/ratio"] == approx(table.ratio, abs=1e-3)
    assert document(KEY, found.parameters).startswith("[gemm.h100_sxm.bf16.trtllm]\nrate = {")


# ---- prices -------------------------------------------------------------------------------------


def products(m: np.ndarray, n: float, k: float) -> dict[str, np.ndarray]:
    return {"m": np.asarray(m, float), "n": np.full(len(m), n), "k": np.full(len(m), k)}


def test_every_table_belongs_to_a_kernel_a_gpu_a_format_and_a_known_library() -> None:
    assert fitted_parameters()
    for key in fitted_parameters():
        table = kernel_table(key)
        assert gpu_named(key.gpu).name == key.gpu and key.library in (*LIBRARIES, *ONLY_NAMED), key
        assert set(table.parameters) <= set(KERNELS[key.kernel].parameters.__dataclass_fields__), key
        assert np.isfinite(table.ratio).all() and (table.far >= 0).all()
        assert table.ratio.shape == tuple(len(axis) for axis in table.axes)


def test_every_kernel_that_an_operator_calls_has_a_price() -> None:
    for name, columns in stepgraph.KERNELS.items():
        assert set(KERNELS[name].columns) >= set(columns) or set(KERNELS[name].columns) <= set(columns)
        assert set(KERNELS[name].columns) <= set(columns), name


@pytest.mark.parametrize("form", ["bf16", "fp8", "fp8_block", "fp4"])
@pytest.mark.parametrize("gpu", ["a100_sxm", "h100_sxm", "h200_sxm", "h20", "b200_sxm", "mi300x"])
def test_no_product_is_faster_than_its_roofline(gpu: str, form: str) -> None:
    card = gpu_named(gpu)
    if form not in ("bf16", *card.flop_rate) and not (form == "fp8_block" and "fp8" in card.flop_rate):
        pytest.skip(f"{gpu} has no {form}")
    rng = np.random.default_rng(3)
    c = {name: np.floor(2.0 ** rng.uniform(0, 16, 4000)) for name in ("m", "n", "k")}
    assert (price_calls(GEMM, card, form, c).seconds >= GEMM.least(card, form, c)).all()


#: A drop that one wave of tiles explains: between measured batches, where the formula climbs a step
#: while the measured ratio falls.
SAWTOOTH = 0.12


@pytest.mark.parametrize(
    "gpu, form",
    [
        *[("h100_sxm", form) for form in ("bf16", "fp8", "fp8_block")],
        *[("b200_sxm", form) for form in ("bf16", "fp8", "fp8_block", "fp4")],
        *[("a100_sxm", "bf16"), ("h200_sxm", "bf16"), ("mi300x", "fp8")],
    ],
)
def test_more_tokens_never_cost_less_than_a_sawtooth_allows(gpu: str, form: str) -> None:
    tokens = np.unique(np.round(2 ** np.linspace(0, 15, 241)))
    rng = np.random.default_rng(5)
    for n, k in (np.floor(2 ** rng.uniform(8, 15, (60, 2)) / 64) * 64).tolist():
        taken = price_calls(GEMM, gpu_named(gpu), form, products(tokens, n, k)).seconds
        assert (taken >= np.maximum.accumulate(taken) * (1 - SAWTOOTH)).all(), (n, k)


def test_a_gpu_without_tables_is_priced_by_its_relative_and_says_so() -> None:
    c = products(np.array([1.0, 4096.0]), 4096, 4096)
    own, other = (price_calls(GEMM, gpu_named(name), "bf16", c) for name in ("h100_sxm", "h200_sxm"))
    assert own.basis == other.basis and own.basis is not None
    assert (own.origin == MEASURED).all() and (other.origin == EXTRAPOLATED).all()
    # One row is ruled by reading weights, which the H200 does 4.8 / 3.35 times as fast; 4096 by FLOP.
    assert 1.15 < own.seconds[0] / other.seconds[0] < 4.8 / 3.35
    assert own.seconds[1] == approx(other.seconds[1], rel=0.05)


def test_a_gpu_of_a_measured_name_with_other_rates_is_not_the_measured_one() -> None:
    slower = gpu_named("h100_sxm").model_copy(update={"memory_bandwidth": 1e12})
    found = price_calls(GEMM, slower, "bf16", products(np.array([4096.0]), 4096, 4096))
    assert found.origin.tolist() == [EXTRAPOLATED]


def test_a_gpu_that_nobody_measured_is_priced_by_its_data_sheet() -> None:
    card = gpu_named("h100_sxm").model_copy(update={"name": "mine", "relative": None})
    c = products(np.array([1.0, 4096.0]), 4096, 4096)
    found = price_calls(GEMM, card, "bf16", c)
    assert found.basis is None and (found.origin == FORMULA).all()
    assert found.seconds == approx(GEMM.least(card, "bf16", c) + card.launch_latency)


def test_a_format_without_tables_takes_the_parameters_of_its_nearest_and_no_curve() -> None:
    key = basis_of(GEMM, gpu_named("b200_sxm"), "fp4")
    assert key is not None and key.format == "fp8"
    found = price_calls(GEMM, gpu_named("b200_sxm"), "fp4", products(np.array([4096.0]), 4096, 4096))
    assert found.origin.tolist() == [FORMULA]


def test_the_library_that_is_asked_for_is_taken_where_it_has_the_kernel() -> None:
    card = gpu_named("h100_sxm")
    assert [basis_of(GEMM, card, "bf16", lib).library for lib in ("auto", "vllm", "sglang")] == [  # type: ignore[union-attr]
        *("trtllm", "vllm", "trtllm")
    ]
