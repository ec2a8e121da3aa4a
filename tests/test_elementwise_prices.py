"""Kernels that only move numbers: laws of their formula, their rows, and how well it foretells them."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis.strategies import floats, integers, sampled_from

from clustersim.physics.calibration import FORMULA, ORIGINS, coordinates, lay
from clustersim.physics.elementwise import KERNELS, MoveParameters, move_least, move_seconds
from clustersim.physics.kernels import KERNELS as ALL_KERNELS
from clustersim.physics.kernels import price_calls
from clustersim.spec.gpus import gpu_named
from clustersim.study import elementwise_rows
from clustersim.study.kernel_fit import calls_of, fitted_calls, foretold, table_of
from clustersim.study.measured import measured

GPUS = ("a100_sxm", "h100_sxm", "b200_sxm", "mi300x", "rtx_pro_6000")
#: As different as fits of measured kernels are.
FITS = (
    MoveParameters(),
    MoveParameters(launch=2e-6, row=6e9, bandwidth=0.33, near=1.5, resident=0.9),
    MoveParameters(launch=1e-5, row=1e12, bandwidth=0.97, near=3.0, resident=1.2),
)


def columns(tokens, bytes):
    return {
        "tokens": np.atleast_1d(np.asarray(tokens, float)),
        "bytes": np.atleast_1d(np.asarray(bytes, float)),
    }


def calls():
    return calls_of(
        [rows for name, read in elementwise_rows.READERS.items() for rows in read(measured(name))]
    )


@pytest.fixture(scope="module")
def fits():
    found = {}
    for key, some in calls().items():
        gpu, start = gpu_named(key.gpu), elementwise_rows.STARTS[key.kernel](key)
        found[key] = (fitted_calls(some, gpu, start), gpu, start)
    return found


@given(sampled_from(GPUS), sampled_from(FITS), integers(1, 100_000), floats(2, 1e6))
def test_more_rows_never_take_less_time(gpu, fit, tokens, width):
    few, more = move_seconds(
        gpu_named(gpu), "bf16", fit, columns([tokens, tokens + 1], [tokens * width, (tokens + 1) * width])
    )
    assert few <= more * (1 + 1e-12)


@given(sampled_from(GPUS), sampled_from(FITS), integers(1, 100_000), floats(2, 1e6))
def test_wider_rows_never_take_less_time(gpu, fit, tokens, width):
    narrow, wide = move_seconds(
        gpu_named(gpu), "bf16", fit, columns([tokens] * 2, [tokens * width, tokens * width * 1.01])
    )
    assert narrow <= wide * (1 + 1e-12)


@pytest.mark.parametrize("kernel", KERNELS, ids=lambda k: k.name)
@pytest.mark.parametrize("gpu", GPUS)
def test_no_price_undercuts_what_hbm_must_deliver(gpu, kernel):
    calls = columns(*(v.ravel() for v in np.meshgrid(2.0 ** np.arange(0, 18), 2.0 ** np.arange(1, 36))))
    priced = price_calls(kernel, gpu_named(gpu), "bf16", calls)
    assert (priced.seconds >= move_least(gpu_named(gpu), "bf16", calls)).all()
    # Far beyond L2, that is all bytes but those of two L2s.
    l2 = gpu_named(gpu).l2 or 0.0
    assert move_least(gpu_named(gpu), "bf16", columns(1, 1e12))[0] == pytest.approx(
        (1e12 - 2 * l2) / gpu_named(gpu).memory_bandwidth
    )


def test_what_nobody_measured_costs_the_rules_of_thumb():
    # 3 us, and 80 % of the B200's 7700 GB/s: 61.6 GB take 10 ms.
    for name in ("permute", "unpermute", "top_k"):
        priced = price_calls(ALL_KERNELS[name], gpu_named("b200_sxm"), "fp8", columns(32768, 61.6e9))
        assert priced.seconds[0] == pytest.approx(0.010003, rel=1e-6)
        assert priced.origin[0] == FORMULA
        assert priced.basis is None


def test_a_gpu_of_which_nothing_was_measured_keeps_to_its_data_sheet():
    gpu = gpu_named("b200_sxm").model_copy(update={"name": "mine", "relative": None, "launch_latency": 1e-6})
    size = 7700e9 * 0.01 + 2 * gpu.l2  # 10 ms beside what L2 spares
    priced = price_calls(ALL_KERNELS["norm"], gpu, "bf16", columns(32768, size))
    assert priced.seconds[0] == pytest.approx(0.010001, rel=1e-6)
    assert priced.origin[0] == FORMULA


def test_the_format_plays_no_part_for_bytes_are_given():
    gpu, some = gpu_named("a100_sxm"), columns([1, 512, 65536], [8e3, 4e6, 5e8])
    one, other = (price_calls(ALL_KERNELS["norm"], gpu, form, some) for form in ("bf16", "fp8"))
    assert one.seconds.tolist() == other.seconds.tolist()
    assert one.origin.tolist() == other.origin.tolist()


def test_what_lies_in_l2_moves_faster_than_hbm_allows_and_what_does_not_moves_at_its_share():
    gpu = gpu_named("h100_sxm")
    p = MoveParameters(launch=0.0, row=1e15, bandwidth=0.9, near=2.0, resident=1.0)
    small, large = gpu.l2 / 16, gpu.l2 * 64
    took = move_seconds(gpu, "bf16", p, columns([1e4, 1e4], [small, large]))
    assert small / took[0] == pytest.approx(2.0 * 0.9 * gpu.memory_bandwidth, rel=1e-3)
    assert large / took[1] == pytest.approx(0.9 * gpu.memory_bandwidth, rel=1e-3)


def test_a_few_rows_wait_for_one_thread_block_however_many_they_are():
    # 1 us to walk a row of 8 kB at 8 GB/s; ten rows at once are no slower: 80 kB take HBM 24 ns.
    p = MoveParameters(launch=2e-6, row=8e9, bandwidth=1.0, near=1.0, resident=1.0)
    one, ten = move_seconds(gpu_named("h100_sxm"), "bf16", p, columns([1, 10], [8e3, 8e4]))
    assert one == pytest.approx(3e-6, rel=1e-3)
    assert ten == pytest.approx(3e-6, rel=1e-3)


def test_a_measured_call_is_priced_as_it_was_measured(fits):
    for key, (found, gpu, _) in fits.items():
        table, kernel = table_of(found, found.calls.measured), ALL_KERNELS[key.kernel]
        ratio, origin, _ = lay(table, coordinates(kernel, found.calls.columns))
        computed = kernel.seconds(gpu, "bf16", kernel.parameters(**table.parameters), found.calls.columns)
        told = computed * np.exp(ratio)
        # Calls timed again with another result are no more than near what was measured.
        assert {ORIGINS[o] for o in origin} <= {"measured", "interpolated"}, key
        # Rows of one call, timed several times, are met in their geometric mean.
        at = np.round(coordinates(kernel, found.calls.columns), 6)
        _, which = np.unique(at, axis=0, return_inverse=True)
        for group in range(which.max() + 1):
            same = which.ravel() == group
            mean = np.exp(np.log(found.calls.measured[same]).mean())
            assert told[same] == pytest.approx(mean, rel=1e-6)


def test_widths_left_out_of_the_fit_are_foretold(fits):
    errors = {
        key: np.abs(foretold(f, gpu, start) / f.calls.measured - 1) for key, (f, gpu, start) in fits.items()
    }
    together = np.concatenate(list(errors.values()))
    assert np.median(together) <= 0.08
    assert np.quantile(together, 0.9) <= 0.25


def test_bytes_of_a_profile_are_those_of_its_models_widths():
    rows = {
        r.kernel: r
        for r in elementwise_rows.READERS["frontier_h800_ops_405b"](measured("frontier_h800_ops_405b"))
    }
    activation = rows["activation"]
    at = (activation.columns["tokens"] == 4096) & np.isclose(activation.measured, 89.568e-6)
    # TP8 of 53248 inner numbers: gate and up are read, their product written, 2 bytes each.
    assert activation.columns["bytes"][at].tolist() == [4096 * 3 * 2 * 53248 / 8]
    assert set(activation.library.tolist()) == {"frontier"}


def test_rows_that_say_nothing_about_the_kernel_are_left_out_with_a_reason():
    rows = [r for name, read in elementwise_rows.READERS.items() for r in read(measured(name))]
    reasons = [reason for some in rows for reason in some.left_out.tolist() if reason]
    # Look-ups of 2 to 16 rows: one on each of Vidur's 16 curves, two of Frontier's, four on each of vLLM's
    # three. The norms of Qwen3-32B's heads are 18 rows.
    assert sum("walks" in reason for reason in reasons) == 16 + 2 + 4 * 3
    assert sum("twice" in reason for reason in reasons) == 18
    for some in rows:
        coarse = np.char.find(some.left_out.astype(str), "timer") >= 0
        one_step = (some.measured <= 1e-6) & (some.file == "vidur_elementwise_ops")
        assert (coarse == one_step).all()


def test_rows_without_measured_times_are_read_as_well():
    table = {name: values for name, values in measured("vidur_elementwise_ops").items() if name != "time_us"}
    rows = elementwise_rows.READERS["vidur_elementwise_ops"](table, "mine.csv")
    assert sum(len(some) for some in rows) == 1056
    assert all(np.isnan(some.measured).all() for some in rows)
    assert {some.file for some in rows} == {"mine.csv"}
