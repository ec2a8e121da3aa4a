"""Attention: laws of its formulas, judged by a simulation tile by tile, and by rows they have not seen."""

from heapq import heapify, heappop, heappush

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis.strategies import integers, lists, sampled_from, tuples

from clustersim.errors import ClustersimError
from clustersim.physics.attention import (
    KERNELS,
    KEYS,
    DecodeParameters,
    PrefillParameters,
    attention_least,
    decode_seconds,
    mixed_seconds,
    prefill_seconds,
)
from clustersim.spec.gpus import gpu_named
from clustersim.study.attention_rows import READERS, STARTS
from clustersim.study.kernel_fit import calls_of
from clustersim.study.least_squares import fit
from clustersim.study.measured import measured

GPUS = ("a100_sxm", "h100_sxm", "h20", "b200_sxm", "mi300x", "rtx_pro_6000")
HEADS = ((4, 1), (8, 8), (64, 8), (128, 2))
KERNEL = {kernel.name: kernel for kernel in KERNELS}


def batch(sequences, heads=32, kv_heads=8, head_dim=128, kv_bytes=2):
    """One call for sequences of (new tokens, earlier tokens)."""
    new, prior = np.array(sequences, dtype=float).T
    return {
        "sequences": np.array([float(len(new))]),
        "tokens": np.array([new.sum()]),
        "pairs": np.array([(new * (prior + (new + 1) / 2)).sum()]),
        "context": np.array([(new + prior).sum()]),
        "heads": np.array([float(heads)]),
        "kv_heads": np.array([float(kv_heads)]),
        "head_dim": np.array([float(head_dim)]),
        "kv_bytes": np.array([float(kv_bytes)]),
    }


def prefill(gpu, sequences, parameters=None, form="bf16", **model):
    parameters = parameters or PrefillParameters()
    return float(prefill_seconds(gpu_named(gpu), form, parameters, batch(sequences, **model))[0])


def decode(gpu, sequences, parameters=None, form="bf16", **model):
    parameters = parameters or DecodeParameters()
    calls = batch([(1, length - 1) for length in sequences], **model)
    return float(decode_seconds(gpu_named(gpu), form, parameters, calls)[0])


gpus = sampled_from(GPUS)
heads = sampled_from(HEADS)
sizes = integers(1, 64)


@given(gpu=gpus, h=heads, n=sizes, new=integers(1, 20_000), prior=integers(0, 50_000))
def test_a_longer_prompt_an_earlier_token_and_a_further_sequence_never_make_a_prefill_cheaper(
    gpu, h, n, new, prior
):
    model = {"heads": h[0], "kv_heads": h[1]}
    here = prefill(gpu, [(new, prior)] * n, **model)
    assert prefill(gpu, [(new + 1, prior)] * n, **model) >= here
    assert prefill(gpu, [(new, prior + 1)] * n, **model) >= here
    assert prefill(gpu, [(new, prior)] * (n + 1), **model) >= here


@given(gpu=gpus, h=heads, n=sizes, length=integers(1, 200_000))
def test_longer_kv_and_a_further_sequence_never_make_a_decode_step_cheaper(gpu, h, n, length):
    model = {"heads": h[0], "kv_heads": h[1]}
    here = decode(gpu, [length] * n, **model)
    assert decode(gpu, [length + 1] * n, **model) >= here * (1 - 1e-12)
    assert decode(gpu, [length] * (n + 1), **model) >= here * (1 - 1e-12)


@given(
    gpu=gpus, h=heads, n=sizes, new=integers(1, 20_000), prior=integers(0, 50_000), kv_bytes=integers(1, 2)
)
def test_no_formula_is_faster_than_the_data_sheet(gpu, h, n, new, prior, kv_bytes):
    model = {"heads": h[0], "kv_heads": h[1], "kv_bytes": kv_bytes}
    calls = batch([(new, prior)] * n, **model)
    least = attention_least(gpu_named(gpu), "bf16", calls)[0]
    assert prefill(gpu, [(new, prior)] * n, **model) >= least
    # What is in the L2 does not come from HBM, which the roofline asks of it.
    without_l2 = DecodeParameters(cached=1.0)
    least = attention_least(gpu_named(gpu), "bf16", batch([(1, prior)] * n, **model))[0]
    assert decode(gpu, [prior + 1] * n, without_l2, **model) >= least


@given(h=heads, n=sizes, new=integers(1, 20_000), prior=integers(0, 50_000))
def test_without_latencies_doubling_every_rate_halves_every_time(h, n, new, prior):
    slow = gpu_named("h100_sxm")
    fast = slow.model_copy(
        update={
            "flop_rate": {name: 2 * rate for name, rate in slow.flop_rate.items()},
            "memory_bandwidth": 2 * slow.memory_bandwidth,
            "boost_clock": 2 * slow.boost_clock,
        }
    )
    some, one = (batch([(length, prior)] * n, *h) for length in (new, 1))
    no_latency = PrefillParameters(launch=0.0, quantise=0.0, tile=0.0)
    times = [prefill_seconds(gpu, "bf16", no_latency, some)[0] for gpu in (slow, fast)]
    assert times[0] == pytest.approx(2 * times[1])
    latencies = ("launch", "lone_launch", "item", "lone_item", "gather", "merge", "regroup", "cold")
    times = [
        decode_seconds(gpu, "bf16", DecodeParameters(**dict.fromkeys(latencies, 0.0)), one)[0]
        for gpu in (slow, fast)
    ]
    assert times[0] == pytest.approx(2 * times[1])


def simulated(gpu, sequences, heads, tile_rows=128):
    """The same prefill tile by tile: each to the SM that is free first, those that walk farthest first.

    In keys times rows; a tile ends at its last row's diagonal, and half a step of keys beyond it.
    """
    tiles = [
        prior + min(end, new) + KEYS / 2
        for new, prior in sequences
        for end in range(tile_rows, new + tile_rows, tile_rows)
    ]
    sms = [0.0] * gpu.sms
    heapify(sms)
    for keys in sorted(tiles, reverse=True):
        for _ in range(heads):
            heappush(sms, heappop(sms) + keys * tile_rows)
    return max(sms)


def walked(gpu, sequences, heads):
    """The formula's part that simulated() reckons, in its units: best fill of the SMs, nothing else."""
    bare = PrefillParameters(launch=0, traffic=1e9, reach=1, softmax=0, tile=0, waves=0, longest=0)
    seconds = prefill_seconds(gpu, "bf16", bare, batch(sequences, heads, heads))[0]
    return seconds * gpu.flop_rate["bf16"] / gpu.sms / (4 * 128)


@settings(max_examples=50, deadline=None)
@given(new=integers(1, 40), prior=integers(0, 8000), n=integers(1, 6))
def test_equal_sequences_are_walked_as_a_simulation_tile_by_tile_walks_them(new, prior, n):
    gpu, sequences = gpu_named("h100_sxm"), [(new * 128, prior)] * n
    # 32 heads and more than one wave of tiles: what the best order cannot fill is at most the longest tile.
    told, seen = walked(gpu, sequences, 32), simulated(gpu, sequences, 32)
    longest = (new * 128 + prior + KEYS / 2) * 128
    assert told <= seen * (1 + 1e-6)
    assert seen <= (told + longest) * (1 + 1e-6)


@settings(max_examples=50, deadline=None)
@given(lists(tuples(integers(500, 8000), integers(0, 8000)), min_size=4, max_size=12))
def test_uneven_sequences_are_priced_by_their_sums_within_a_quarter(sequences):
    # Enough tiles for many waves: what the last one leaves idle is not the point here.
    gpu = gpu_named("h100_sxm")
    told, seen = walked(gpu, sequences, 64), simulated(gpu, sequences, 64)
    assert told == pytest.approx(seen, rel=0.25)


def test_a_batch_of_one_tile_per_sm_takes_the_time_of_one_tile():
    # H100: 132 SMs. 33 sequences of 128 tokens, 4 heads: 132 tiles, each of 128 rows and 128 + 64 keys.
    # A row and a key cost 4 * 128 FLOP at 989e12 / 132 FLOP/s and 1 / (16 * 1.83e9) s for the exponential.
    gpu = gpu_named("h100_sxm")
    bare = PrefillParameters(launch=0, traffic=1e9, reach=1, softmax=1, tile=1e-6, waves=1, longest=1)
    pair = 512 / (989e12 / 132) + 1 / (16 * gpu.boost_clock)
    seconds = prefill("h100_sxm", [(128, 0)] * 33, bare, heads=4, kv_heads=4)
    assert seconds == pytest.approx(128 * 192 * pair + 1e-6, rel=1e-6)
    # One more sequence: its tiles begin a second wave.
    assert prefill("h100_sxm", [(128, 0)] * 34, bare, heads=4, kv_heads=4) == pytest.approx(
        2 * seconds, rel=1e-6
    )


def test_a_prompt_in_chunks_takes_no_less_than_the_whole():
    whole = prefill("h100_sxm", [(8192, 0)])
    chunks = [prefill("h100_sxm", [(1024, prior)]) for prior in range(0, 8192, 1024)]
    assert sum(chunks) >= whole


def test_long_kv_of_few_sequences_is_cut_among_all_sms():
    cut, whole = DecodeParameters(), DecodeParameters(chunk=1e9)
    assert decode("h100_sxm", [131072], whole) > 3 * decode("h100_sxm", [131072], cut)
    # 132 sequences of 8 KV heads keep all SMs busy anyway.
    assert decode("h100_sxm", [8192] * 132, whole) == pytest.approx(
        decode("h100_sxm", [8192] * 132, cut), rel=0.05
    )


def test_a_narrow_kv_cache_halves_what_long_kv_costs():
    wide, narrow = (decode("h100_sxm", [32768] * 64, kv_bytes=width) for width in (2, 1))
    assert narrow == pytest.approx(wide / 2, rel=0.1)


def test_a_narrow_kv_cache_does_not_speed_up_the_products_of_a_gpu_without_fp8():
    long = [(32768, 0)]
    assert prefill("h100_sxm", long, kv_bytes=1) < 0.8 * prefill("h100_sxm", long)
    assert prefill("a100_sxm", long, kv_bytes=1) > 0.98 * prefill("a100_sxm", long)


@given(new=integers(1, 8000), prior=integers(0, 8000), others=integers(1, 200), length=integers(1, 10_000))
def test_new_tokens_in_the_call_of_a_chunk_cost_more_than_the_chunk_and_more_the_more_there_are(
    new, prior, others, length
):
    gpu, chunk = gpu_named("rtx_pro_6000"), batch([(new, prior)])

    def both(n):
        ones = {"decode_sequences": np.array([float(n)]), "decode_context": np.array([float(n * length)])}
        return mixed_seconds(gpu, "bf16", PrefillParameters(), {**chunk, **ones})[0]

    alone = prefill_seconds(gpu, "bf16", PrefillParameters(), chunk)[0]
    assert both(0) == pytest.approx(alone)
    # Short tiles that fill up the last wave shorten its mean tile: a part of one wave's saw-tooth.
    assert both(others) >= 0.95 * both(others - 1)
    assert both(others) >= 0.95 * alone


def all_rows():
    return [rows for file, reader in READERS.items() for rows in reader(measured(file), file)]


def test_every_measured_row_of_attention_is_read_once():
    count = {}
    for rows in all_rows():
        count[rows.file] = count.get(rows.file, 0) + len(rows)
    kind = measured("rtxpro6000_vllm_kernels")["kind"]
    expected = {file: len(measured(file)["gpu"]) for file in READERS}
    assert count == {**expected, "rtxpro6000_vllm_kernels": int((kind == "attention_mixed_batch").sum())}


def test_no_measured_row_is_under_the_roofline():
    for rows in all_rows():
        kernel = KERNEL[rows.kernel]
        for gpu in set(rows.gpu.tolist()):
            least = kernel.least(gpu_named(gpu), "bf16", rows.columns)
            assert (rows.measured >= least)[rows.gpu == gpu].all()


def test_no_two_shapes_share_coordinates():
    for rows in all_rows():
        kernel = KERNEL[rows.kernel]
        models = np.stack(
            [rows.columns[name] for name in ("heads", "kv_heads", "head_dim", "kv_bytes")], axis=1
        )
        assert len(np.unique(models, axis=0)) == len(np.unique(kernel.shape(rows.columns).round(6), axis=0))


def test_a_wrong_row_is_refused_with_its_line():
    table = {name: values[:3].copy() for name, values in measured("attn_decode").items()}
    table["kv_len"][1] = 0
    with pytest.raises(ClustersimError, match="line 3: kv_len = 0"):
        READERS["attn_decode"](table, "rows.csv")


def test_a_row_of_a_mixed_batch_with_nothing_in_it_is_refused_with_its_line():
    rows = measured("rtxpro6000_vllm_kernels")
    first = int(np.argmax(rows["kind"] == "attention_mixed_batch"))
    table = {name: values[first : first + 3].copy() for name, values in rows.items()}
    table["prefill_chunk"][2], table["n_decode"][2] = 0, 0
    with pytest.raises(ClustersimError, match="line 4: prefill_chunk and n_decode are both 0"):
        READERS["rtxpro6000_vllm_kernels"](table, "rows.csv")


def test_a_format_that_the_gpu_lacks_is_refused():
    with pytest.raises(ClustersimError, match='"fp8" has no flop_rate on'):
        attention_least(gpu_named("a100_sxm"), "fp8", batch([(128, 0)]))


def test_shapes_that_a_fit_has_not_seen_are_foretold_by_the_formula_alone():
    for key, calls in calls_of(all_rows()).items():
        kernel, gpu = KERNEL[key.kernel], gpu_named(key.gpu)
        _, shape = np.unique(kernel.shape(calls.columns)[:, :3].round(6), axis=0, return_inverse=True)
        shape = shape.ravel()
        if shape.max() < 2:
            continue  # one other shape says too little about a third
        ratio = np.empty(len(shape))
        for left_out in range(shape.max() + 1):
            seen = shape != left_out

            def model(values, at=seen, kernel=kernel, gpu=gpu, form=key.format, columns=calls.columns):
                some = {name: column[at] for name, column in columns.items()}
                return kernel.seconds(gpu, form, kernel.parameters(**values), some)

            found = fit(STARTS[key.kernel](key), model, calls.measured[seen], calls.files[seen])
            values = {name: float(one.value) for name, one in found.items()}
            ratio[~seen] = model(values, ~seen) / calls.measured[~seen]
        error = np.abs(ratio - 1)
        assert np.median(error) <= 0.08, key
        assert np.quantile(error, 0.9) <= 0.25, key
