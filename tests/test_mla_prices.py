"""Laws of latent attention's formulas and readers, whatever their parameters are fitted to."""

from __future__ import annotations

import numpy as np
import pytest

from clustersim.errors import ClustersimError
from clustersim.physics.mla import KERNELS, DecodeParameters, PrefillParameters
from clustersim.spec.gpus import gpu_named
from clustersim.spec.kernel_tables import TableKey
from clustersim.study.measured import measured, rows_of
from clustersim.study.mla_rows import MODULE_SIZES, STARTS, call_columns, infersim_mla_rows, mla_rows

KERNEL = {kernel.name: kernel for kernel in KERNELS}
GPUS = ("h100_sxm", "h20", "b200_sxm")
BATCHES = 2.0 ** np.arange(11)
LENGTHS = 2.0 ** np.arange(5, 18)
HEADS = 2.0 ** np.arange(8)


def grid(name, kv_bytes=2.0):
    """Calls float64[heads, batches, lengths], flat; and their shape."""
    heads, batch, length = (a.ravel() for a in np.meshgrid(HEADS, BATCHES, LENGTHS, indexing="ij"))
    columns = call_columns("prefill" if "prefill" in name else "decode", heads, batch, length, kv_bytes)
    module = {**MODULE_SIZES, "weight_bytes": 1.0} if name.endswith("_module") else {}
    columns |= {column: np.full(len(heads), size) for column, size in module.items()}
    return columns, (len(HEADS), len(BATCHES), len(LENGTHS))


def prices(name, gpu, form, columns):
    kernel = KERNEL[name]
    return kernel.seconds(gpu_named(gpu), form, kernel.parameters(), columns)


@pytest.mark.parametrize("form", ["bf16", "fp8"])
@pytest.mark.parametrize("gpu", GPUS)
@pytest.mark.parametrize("name", KERNEL)
def test_more_sequences_longer_ones_or_more_heads_never_cost_less(name, gpu, form):
    columns, shape = grid(name, 1.0 if form == "fp8" else 2.0)
    taken = prices(name, gpu, form, columns).reshape(shape)
    for axis in range(3):
        assert (np.diff(taken, axis=axis) >= 0).all()


@pytest.mark.parametrize("form", ["bf16", "fp8"])
@pytest.mark.parametrize("gpu", GPUS)
@pytest.mark.parametrize("name", ["mla_prefill", "mla_prefill_module", "mla_decode_module"])
def test_nothing_is_faster_than_the_roofline(name, gpu, form):
    columns, _ = grid(name, 1.0 if form == "fp8" else 2.0)
    assert (prices(name, gpu, form, columns) >= KERNEL[name].least(gpu_named(gpu), form, columns)).all()


@pytest.mark.parametrize("name", KERNEL)
def test_no_measured_call_is_below_the_roofline(name):
    for rows in measured_calls():
        if rows.kernel != name:
            continue
        for gpu in np.unique(rows.gpu):
            for form in np.unique(rows.format):
                at = (rows.gpu == gpu) & (rows.format == form)
                columns = {column: values[at] for column, values in rows.columns.items()}
                assert (
                    rows.measured[at] >= KERNEL[name].least(gpu_named(str(gpu)), str(form), columns)
                ).all()


def test_earlier_kv_costs_a_chunk_its_reading_and_its_pairs():
    # The second half of a prompt: as many new tokens as the first, three times its pairs, twice its KV.
    half = call_columns("prefill", np.array([16.0]), np.array([4.0]), np.array([4096.0]), 2.0)
    second = {**half, "pairs": half["pairs"] * 3, "context": half["context"] * 2}
    whole = call_columns("prefill", np.array([16.0]), np.array([4.0]), np.array([8192.0]), 2.0)
    one, two, both = (prices("mla_prefill", "h100_sxm", "bf16", c)[0] for c in (half, second, whole))
    assert one < two < both
    assert one + two > both


def test_decode_reads_a_row_once_for_all_heads():
    # H100, 2^24 KV tokens of 576 bf16 numbers: 19.3 GB, 5.77 ms at 3.35 TB/s. One head or 16: all reading.
    few, many = (
        call_columns("decode", np.array([heads]), np.array([1024.0]), np.array([16384.0]), 2.0)
        for heads in (1.0, 16.0)
    )
    one, sixteen = (prices("mla_decode", "h100_sxm", "bf16", c)[0] for c in (few, many))
    assert one > 5.77e-3
    assert sixteen < 1.05 * one


def test_with_128_heads_decode_on_an_h800_reaches_what_flashmla_states():
    # README of FlashMLA: 660 TFLOP/s where arithmetic rules, 3000 GB/s where memory does.
    columns = call_columns("decode", np.array([128.0, 8.0]), np.full(2, 256.0), np.full(2, 65536.0), 2.0)
    taken = prices("mla_decode", "h800_sxm", "bf16", columns)
    flop = 2 * 128 * 256 * 65536 * (576 + 512)
    assert flop / taken[0] == pytest.approx(660e12, rel=0.2)
    assert 256 * 65536 * 576 * 2 / taken[1] == pytest.approx(3000e9, rel=0.2)


def test_rows_still_in_the_l2_are_forgotten_when_many_more_are_read():
    cold, warm = DecodeParameters(resident=1e-7), DecodeParameters(resident=1e-5)
    columns, shape = grid("mla_decode")
    kernel, gpu = KERNEL["mla_decode"], gpu_named("h100_sxm")
    gain = (kernel.seconds(gpu, "bf16", cold, columns) / kernel.seconds(gpu, "bf16", warm, columns)).reshape(
        shape
    )
    assert (gain >= 1).all()
    assert gain.max() > 1.1
    assert gain[:, -1, -1].max() < 1.001


def test_a_host_that_launches_slowly_sets_the_price_of_small_modules_alone():
    kernel, gpu = KERNEL["mla_prefill_module"], gpu_named("h100_sxm")
    columns, _ = grid("mla_prefill_module")
    fast, slow = (kernel.parameters(host=host) for host in (1e-6, 1e-3))
    without, taken = (kernel.seconds(gpu, "bf16", p, columns) for p in (fast, slow))
    assert (taken >= 1e-3).all()
    assert (taken[without > 1e-2] < 1.01 * without[without > 1e-2]).all()


# ---- readers --------------------------------------------------------------------------------------


def measured_calls():
    return [
        *mla_rows(measured("mla"), "mla"),
        *infersim_mla_rows(measured("infersim_h800_mla"), "infersim_h800_mla"),
    ]


def test_every_row_of_the_measured_files_becomes_one_call():
    rows = measured_calls()
    assert sum(map(len, rows)) == len(measured("mla")["gpu"]) + len(measured("infersim_h800_mla")["gpu"])
    for found in rows:
        assert set(found.columns) == set(KERNEL[found.kernel].columns)
        assert (found.measured > 0).all()


def test_the_one_row_that_takes_longer_than_twice_its_tokens_is_left_out():
    found = [
        (rows.row[at] + 2, rows.measured[at])
        for rows in measured_calls()
        for at in np.flatnonzero(rows.left_out)
    ]
    assert found == [(1847, pytest.approx(2049.7e-6))]


def test_rows_without_times_are_read_to_be_priced():
    table = {name: values for name, values in measured("mla").items() if name not in ("time_us", "source")}
    for timed, bare in zip(mla_rows(measured("mla"), "mla"), mla_rows(table, "user.csv"), strict=True):
        assert np.isnan(bare.measured).all()
        assert (bare.left_out == "").all()
        for name, values in timed.columns.items():
            np.testing.assert_array_equal(bare.columns[name], values)


@pytest.mark.parametrize(
    ("column", "value", "said"),
    [("num_heads", -16, "num_heads = -16"), ("phase", "prefil", "prefill"), ("gpu", "H1000", "H1000")],
)
def test_a_wrong_row_is_named_by_its_line(column, value, said):
    table = dict(rows_of(measured("mla"), np.arange(5)))
    table[column] = np.array([*table[column][:3].tolist(), value, table[column][4].item()])
    with pytest.raises(ClustersimError, match="line 5") as error:
        mla_rows(table, "user.csv")
    assert said in str(error.value)


@pytest.mark.parametrize("name", STARTS)
def test_every_parameter_has_a_start_within_its_bounds(name):
    starts = STARTS[name](TableKey(name, "h100_sxm", "bf16", "trtllm"))
    assert set(starts) == set(KERNEL[name].parameters.__dataclass_fields__)
    assert all(one.low <= one.start <= one.high for one in starts.values())


def test_prefill_waits_for_its_longest_tile():
    # One sequence of one tile row per head: an H100 has 132 SMs, and 16 heads leave most idle.
    p, kernel, gpu = PrefillParameters(), KERNEL["mla_prefill"], gpu_named("h100_sxm")
    columns = call_columns("prefill", np.array([16.0]), np.array([1.0]), np.array([2048.0]), 2.0)
    flop = 2 * columns["pairs"] * 16 * 320
    assert kernel.seconds(gpu, "bf16", p, columns)[0] > 1.5 * flop[0] / (p.arithmetic * gpu.flop_rate["bf16"])
