"""Laws of expert layers: what skew costs, what is never undercut, and how loads are drawn."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clustersim.errors import ClustersimError
from clustersim.physics import experts
from clustersim.physics.calibration import ORIGINS
from clustersim.physics.experts import ExpertParameters
from clustersim.physics.kernels import KERNELS, price_calls
from clustersim.spec.gpus import gpu_named
from clustersim.study.expert_layer_rows import READERS, STARTS
from clustersim.study.expert_loads import (
    arriving,
    balanced_counts,
    block_counts,
    hot_rank_counts,
    random_counts,
    scaled_to_arrivals,
)
from clustersim.study.kernel_rows import taken
from clustersim.study.least_squares import fit
from clustersim.study.measured import measured, rows_of

H100 = gpu_named("h100_sxm")
PATTERNS = ["balanced", "powerlaw_a1.2", "power_law_1.01", "power_law_1.2_eplb"]
COUNTS = st.lists(st.integers(0, 3000), min_size=2, max_size=12).filter(any)


def layer(counts, hidden=4096, inter=1536, top_k=8, **more):
    counts = np.atleast_2d(np.asarray(counts, dtype=float))
    ones = np.ones(len(counts))
    known = {"hidden": hidden, "inter": inter, "gated": 1, "top_k": top_k, **more}
    return {"counts": counts, **{name: value * ones for name, value in known.items()}}


def price(columns, form="fp8_block", gpu=H100, seconds=experts.layer_seconds):
    return seconds(gpu, form, ExpertParameters(), columns)


@pytest.mark.parametrize("kernel", experts.KERNELS, ids=lambda k: k.name)
@pytest.mark.parametrize("form", ["bf16", "fp8", "fp8_block"])
@settings(deadline=None, max_examples=30)
@given(counts=COUNTS)
def test_no_product_of_experts_is_faster_than_the_data_sheet(kernel, form, counts):
    columns = layer(counts)
    assert price(columns, form, seconds=kernel.seconds) >= kernel.least(H100, form, columns)


@settings(deadline=None, max_examples=50)
@given(counts=COUNTS, more=st.integers(1, 300), at=st.integers(0, 11))
def test_more_tokens_for_an_expert_are_not_cheaper_while_the_tile_stays(counts, more, at):
    fuller = list(counts)
    fuller[at % len(counts)] += more
    before, after = price(layer([counts, fuller], even_rows=64.0))
    assert after >= before


@pytest.mark.parametrize(("experts_", "top_k"), [(256, 8), (8, 2), (60, 4)])
def test_an_even_load_grows_with_its_tokens_but_for_one_saw_tooth(experts_, top_k):
    tokens = np.unique(np.round(2 ** np.arange(0, 15, 0.125))).astype(int)
    loads = [balanced_counts(n, top_k, experts_, 1) for n in tokens.tolist()]
    seconds = price(layer(loads, top_k=top_k))
    assert (seconds >= 0.95 * np.maximum.accumulate(seconds)).all()


def test_an_expert_without_tokens_is_not_read():
    one, two = price(layer([[1, 0], [1, 1]]))
    # 3 matrices of 4096 x 1536 bytes at 0.9 of 3350 GB/s: 6.3 us more, less what arithmetic hides
    assert two - one == pytest.approx(3 * 4096 * 1536 / (0.9 * 3350e9), rel=0.1)


def test_the_order_of_experts_does_not_matter():
    first, second = price(layer([[5, 700, 0, 30], [700, 30, 5, 0]]))
    assert first == second


def test_skew_is_free_while_weights_are_read_anyway_and_costs_severalfold_at_large_batches():
    # A rank with 8 of 256 experts of DeepSeek-V3, 8 of 256 choices: 64 and 16384 tokens in the group.
    for tokens, low, high in ((64, 0.8, 1.2), (16384, 3.0, 6.0)):
        loads = [hot_rank_counts(tokens, 8, 256, 32, name) for name in ("balanced", "powerlaw_a1.2")]
        columns = layer(loads, hidden=7168, inter=2048, tokens=tokens, even_rows=tokens / 32)
        even, skewed = price(columns)
        assert low < skewed / even < high


def fitted_rows(library, form):
    """Rows of a library and format, and the formula's times for them with their models left out in turn."""
    rows = READERS["moe_kernels"](measured("moe_kernels"), "moe_kernels")[0]
    rows = taken(rows, (rows.gpu == "h100_sxm") & (rows.library == library) & (rows.format == form))
    rows = taken(rows, rows.left_out == "")
    models = measured("moe_kernels")["model"][rows.row]
    told = np.empty(len(rows))
    for model in sorted(set(models.tolist())):
        seen = taken(rows, models != model)

        def seconds(values, of=seen):
            return experts.layer_seconds(H100, form, ExpertParameters(**values), of.columns)

        found = fit(STARTS["experts"](None), seconds, seen.measured, np.full(len(seen), "moe_kernels"))
        values = {name: float(one.value) for name, one in found.items()}
        told[models == model] = seconds(values, rows)[models == model]
    return rows, told


@pytest.mark.parametrize(("library", "form"), [("trtllm", "fp8_block"), ("trtllm", "bf16"), ("vllm", "bf16")])
def test_the_formula_foretells_layers_of_models_it_has_not_seen(library, form):
    rows, told = fitted_rows(library, form)
    error = np.abs(told / rows.measured - 1.0)
    assert np.median(error) < 0.10
    assert np.quantile(error, 0.9) < 0.30


def test_measured_and_foretold_skew_cross_over_alike():
    rows, told = fitted_rows("trtllm", "fp8_block")
    table = rows_of(measured("moe_kernels"), rows.row)
    deepseek = (table["model"] == "DeepSeek-V3") & (table["moe_tp"] == 1) & (table["moe_ep"] == 32)
    skewed = deepseek & (table["distribution"] == "powerlaw_a1.2")
    even = deepseek & (table["distribution"] == "balanced")
    for tokens, low, high in ((64, 0.9, 1.1), (128, 0.9, 1.1), (16384, 3.0, 6.0)):
        here = table["num_tokens_global"] == tokens
        for seconds in (rows.measured, told):
            assert low < seconds[skewed & here][0] / seconds[even & here][0] < high


@settings(deadline=None, max_examples=25)
@given(
    counts=st.lists(st.integers(1, 5000), min_size=4, max_size=4),
    gpu=st.sampled_from(["h100_sxm", "b200_sxm"]),
)
def test_up_activation_and_down_add_up_to_the_measured_layer(counts, gpu):
    columns, card = layer(counts), gpu_named(gpu)
    whole = price_calls(KERNELS["experts"], card, "fp8_block", columns)
    parts = [
        price_calls(KERNELS[name], card, "fp8_block", columns)
        for name in ("expert_up", "expert_activation", "expert_down")
    ]
    # Only where a layer all but keeps its roofline, the products' own may ask for a little more.
    added_up = sum(part.seconds[0] for part in parts) / whole.seconds[0]
    assert 1.0 - 1e-9 < added_up < 1.06
    if whole.seconds[0] > 1.2 * KERNELS["experts"].least(card, "fp8_block", columns)[0]:
        assert added_up == pytest.approx(1.0, rel=1e-9)
    # Two matrices of three stand in the first product, with gates; nobody timed it by itself.
    assert parts[0].seconds[0] > parts[2].seconds[0]
    assert all(ORIGINS[part.origin[0]] != "measured" for part in parts)


@pytest.mark.parametrize("pattern", PATTERNS)
@settings(deadline=None, max_examples=20)
@given(tokens=st.integers(1, 20000), ep=st.sampled_from([1, 2, 8, 32]))
def test_the_hottest_rank_has_its_share_and_no_expert_a_token_twice(pattern, tokens, ep):
    counts = hot_rank_counts(tokens, 4, 32, ep, pattern)
    assert len(counts) == 32 // ep
    assert (counts >= 0).all() and (counts <= tokens).all()
    assert counts.sum() >= tokens * 4 / ep * (1 - 1e-9)
    if ep == 1:
        assert counts.sum() == pytest.approx(tokens * 4)


def test_balanced_tokens_take_experts_of_their_own_as_long_as_there_are_any():
    # 16 tokens x 8 experts = 128 of 128; 5 tokens use 40.
    assert balanced_counts(16, 8, 128, 1).tolist() == [1.0] * 128
    assert sorted(balanced_counts(5, 8, 128, 1).tolist()) == [0.0] * 88 + [1.0] * 40


def test_drawn_loads_bring_as_many_tokens_to_the_hottest_rank_as_were_counted():
    table = measured("wideep_moe_skew_trtllm_h100")
    error = []
    for tokens, ep, slots, pattern, came in zip(
        *(
            table[name].tolist()
            for name in (
                "num_tokens_global",
                "ep",
                "num_slots",
                "distribution",
                "tokens_arriving_at_hot_rank",
            )
        ),
        strict=True,
    ):
        if tokens >= 64:
            counts = hot_rank_counts(tokens, 8, 256, ep, pattern, slots, front=True)
            error.append(arriving(counts, tokens) / came - 1.0)
    # A single draw scatters around the mean of draws.
    assert abs(np.median(error)) < 0.03
    assert np.median(np.abs(error)) < 0.10
    assert np.quantile(np.abs(error), 0.9) < 0.40


def test_counts_scaled_to_arrivals_bring_just_those():
    counts = hot_rank_counts(4096, 8, 256, 32, "power_law_1.2")
    wanted = 0.8 * arriving(counts, 4096)
    assert arriving(scaled_to_arrivals(counts, 4096, wanted), 4096) == pytest.approx(wanted, rel=1e-3)


def test_random_choices_are_as_uneven_as_was_measured():
    # The coefficient of variation that frontier_a800_moe states for 256 tokens: 0.233 and 0.238.
    counts = random_counts(256, 8, 128)
    assert counts.sum() == pytest.approx(2048)
    assert counts.std() / counts.mean() == pytest.approx(0.235, rel=0.1)


def test_blocks_fill_experts_one_after_the_other():
    # 300 rows in blocks of 128 over 4 experts; 1100 are 8.6 blocks: two each and 0.6 more
    assert block_counts(300, 4).tolist() == [128, 128, 44, 0]
    assert block_counts(1100, 4).tolist() == pytest.approx([332, 256, 256, 256])


@pytest.mark.parametrize("name", READERS)
def test_a_file_reads_the_same_without_its_measured_column(name):
    table = measured(name)
    bare = {column: values for column, values in table.items() if column not in {"time_us", "gate_up_us"}}
    for whole, without in zip(READERS[name](table, name), READERS[name](bare, name), strict=True):
        assert without.columns.keys() == whole.columns.keys()
        for column, values in whole.columns.items():
            assert (without.columns[column] == values).all()


@pytest.mark.parametrize(
    ("column", "value", "told"),
    [
        ("distribution", "zipf", "line 3: distribution"),
        ("moe_ep", 3, "line 3: moe_ep = 3 does not divide num_experts"),
        ("num_tokens_global", -1, "line 3: num_tokens_global"),
        ("topk", 1000, "line 3: topk = 1000 is more than"),
    ],
)
def test_a_wrong_row_is_named_by_its_line(column, value, told):
    table = {name: values[:3].copy() for name, values in measured("moe_kernels").items()}
    table[column] = np.array([*table[column][:1].tolist(), value, *table[column][2:].tolist()])
    with pytest.raises(ClustersimError, match=told):
        READERS["moe_kernels"](table, "rows.csv")
