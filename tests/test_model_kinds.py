"""Every kind of model as operators: what is called says what is computed; the catalogue can run."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pytest import approx
from scenarios import gpu, parallel, single_server, table, tiny, trace_of

from clustersim.plan.groups import layers_of
from clustersim.plan.layout import lay_out
from clustersim.plan.lowering import gated, lower
from clustersim.plan.memory import kv_bytes
from clustersim.plan.stepgraph import Operator, StepGraph
from clustersim.spec.batch import Piece, batch_of
from clustersim.spec.model import Model
from clustersim.spec.reading import read_catalogue, read_scenario, scenario_hash, to_toml
from clustersim.spec.scenario import Scenario


def entry(name: str) -> Model:
    model = read_catalogue("models")[name]
    assert isinstance(model, Model)
    return model


def on_four(model: Model, **box: Any) -> Scenario:
    """A model on four GPUs with all the memory it needs: TP 4, and EP 4 for experts."""
    deployment = parallel(tp=4) if model.experts else {"tensor_parallel": 4}
    values = {**model.model_dump(exclude_none=True), "mla": model.mla and model.mla.model_dump()}
    machine = single_server(4, **{"memory": "4 TiB", **box})
    return tiny(machine, deployment=deployment, model=values, workload={"sequences": 4})


def lowered(scenario: Scenario, phase: str, pieces: list[Piece]) -> StepGraph:
    layout = lay_out(scenario)
    batch = batch_of(phase, pieces, scenario.deployment.data_parallel, scenario.model.window)
    counts, distinct = gated(batch, scenario, layout, 0)
    return lower(batch, counts, layout, distinct)


def computed(op: Operator) -> Any:
    """FLOP by the columns of the call alone."""
    assert op.call is not None
    c = op.call.columns
    match op.call.kernel:
        case "gemm":
            return 2 * c["m"] * c["n"] * c["k"]
        case "expert_up":
            return 2 * c["counts"].sum(axis=1) * c["hidden"] * c["inter"] * (1 + c["gated"])
        case "expert_down":
            return 2 * c["counts"].sum(axis=1) * c["hidden"] * c["inter"]
        case "attention_prefill" | "attention_decode":
            return 4 * c["pairs"] * c["heads"] * c["head_dim"]
        case "mla_prefill":
            return 2 * c["pairs"] * c["heads"] * (c["nope_dim"] + c["rope_dim"] + c["v_dim"])
        case "mla_decode":
            return 2 * c["pairs"] * c["heads"] * (2 * c["kv_rank"] + c["rope_dim"])
    return np.zeros(len(op.flop))


PHASES = {"prefill": [Piece(0, 300, 0, 1), Piece(0, 7, 500, 0)], "decode": [Piece(0, 1, 600, 1)] * 3}


@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize("name", read_catalogue("models"))
def test_what_is_called_says_what_is_computed_and_moved(name: str, phase: str) -> None:
    for op in lowered(on_four(entry(name)), phase, PHASES[phase]).operators:
        if op.call is not None:
            assert computed(op) == approx(op.flop, rel=1e-12), op.name
            assert (op.bytes > 0).any() and (op.bytes >= 0).all(), op.name
            if "bytes" in op.call.columns:
                assert op.call.columns["bytes"] == approx(op.bytes)


@pytest.mark.parametrize("name", ["deepseek_v3", "gpt_oss_20b", "llama_3_1_8b", "qwen1_5_moe_a2_7b"])
def test_a_kind_of_model_runs_from_end_to_end(name: str) -> None:
    values = entry(name).model_dump(exclude_none=True) | {"layers": 4}
    steps = table(trace_of(on_four(Model.model_validate(values))), "steps")
    bounds = np.maximum(steps["bound_compute"], steps["bound_memory"])
    assert (steps["end"] - steps["start"] >= bounds).all() and (bounds > 0).all()


def test_a_model_without_experts_sends_nothing_to_any() -> None:
    graph = lowered(on_four(entry("llama_3_1_8b")), "decode", PHASES["decode"])
    exchanges = [op.exchange.kind for op in graph.operators if op.exchange is not None]
    assert exchanges == ["all_reduce"] * 2 * 32
    assert graph.choices == 0


def test_dense_layers_reduce_over_their_ranks_and_layers_with_experts_gather_slices() -> None:
    graph = lowered(on_four(entry("deepseek_v2_lite")), "decode", PHASES["decode"])
    by_layer: dict[int, list[str]] = {}
    for op in graph.operators:
        if op.exchange is not None:
            by_layer.setdefault(op.layer, []).append(op.name)
    assert by_layer[0] == ["attention_all_reduce", "ffn_all_reduce"]
    assert by_layer[1] == ["attention_all_reduce", "dispatch", "combine", "ffn_all_gather"]


def test_a_latent_model_expands_keys_in_prefill_and_absorbs_them_in_decode() -> None:
    scenario = on_four(entry("deepseek_v3"))
    attention = {}
    for phase, pieces in PHASES.items():
        names = [op.name for op in lowered(scenario, phase, pieces).operators if op.layer == 5]
        attention[phase] = names[: names.index("attention_output") + 1]
    first = ["attention_norm", "latents", "latent_norm", "query_up", "rotary"]
    assert attention["prefill"] == [*first, "kv_up", "attention", "attention_output"]
    assert attention["decode"] == [*first, "query_absorb", "attention", "value_up", "attention_output"]


def test_a_latent_cache_is_read_once_for_all_heads() -> None:
    # 601 tokens of 512 + 64 numbers, and per token and head the absorbed query and output; 2 bytes each.
    graph = lowered(on_four(entry("deepseek_v3")), "decode", [Piece(0, 1, 600, 1)])
    attention = next(op for op in graph.operators if op.name == "attention")
    assert attention.bytes.tolist() == [2 * (601 * 576 + 32 * (576 + 512))] * 4


def test_a_window_bounds_what_every_other_layer_reads() -> None:
    graph = lowered(on_four(entry("gpt_oss_20b")), "decode", [Piece(0, 1, 600, 1)])
    context = [op.call.columns["context"][0] for op in graph.operators if op.name == "attention" and op.call]
    assert context == [128, 601] * 12


@given(
    st.lists(st.tuples(st.integers(1, 40), st.integers(0, 40)), min_size=1, max_size=5), st.integers(1, 50)
)
def test_pairs_within_a_window_are_those_counted_singly(sizes: list[tuple[int, int]], window: int) -> None:
    batch = batch_of("prefill", [Piece(0, new, past, 1) for new, past in sizes], 1, window)
    seen = [[range(max(past + i + 1 - window, 0), past + i + 1) for i in range(new)] for new, past in sizes]
    assert batch.near_pairs[0] == sum(len(r) for one in seen for r in one)
    assert batch.near_context[0] == sum(len({t for r in one for t in r}) for one in seen)
    assert batch.sequences[0] == len(sizes)


@given(st.integers(1, 200), st.integers(1, 16))
def test_stages_take_all_layers_and_differ_by_one_at_most(layers: int, stages: int) -> None:
    if stages > layers:
        return
    cut = [layers_of(layers, stages, stage) for stage in range(stages)]
    assert [layer for stage in cut for layer in stage] == list(range(layers))
    assert max(map(len, cut)) - min(map(len, cut)) <= 1
    assert len(cut[-1]) == min(map(len, cut)), "the last one has the LM head besides"


@given(st.integers(1, 60), st.integers(0, 60), st.integers(1, 5), st.integers(0, 5))
def test_layers_of_a_kind_are_counted_as_they_are_told_apart(
    layers: int, dense: int, step: int, every: int
) -> None:
    shape = {
        "layers": layers,
        "dense_layers": dense,
        "moe_layer_step": step,
        "window": 8,
        "full_every": every,
    }
    model = entry("mixtral_8x7b").model_copy(update=shape)
    assert model.moe_layers == sum(map(model.has_experts, range(layers)))
    assert model.windowed_layers == sum(map(model.windowed, range(layers)))
    plain = model.model_copy(update={"window": 0, "experts": 0})
    assert not any(plain.has_experts(layer) or plain.windowed(layer) for layer in range(layers))
    assert plain.moe_layers == plain.windowed_layers == 0


def test_61_layers_are_cut_into_four_stages() -> None:
    # As vLLM cuts them: the one that is left over goes to the last stage but one.
    assert [len(layers_of(61, 4, stage)) for stage in range(4)] == [15, 15, 16, 15]


def test_weights_of_four_bits_are_read_as_such_and_multiplied_as_the_gpu_can() -> None:
    both = {"bf16": "1 TFLOP/s", "fp8": "2 TFLOP/s"}
    formats = {}
    for name, rates in (("hopper", both), ("blackwell", both | {"fp4": "4 TFLOP/s"})):
        scenario = on_four(entry("gpt_oss_20b"), flop_rate=rates)
        graph = lowered(scenario, "decode", PHASES["decode"])
        up = next(op for op in graph.operators if op.name == "expert_gemm_1")
        assert up.call is not None
        # 12 choices fall on experts of four ranks; a used one is read whole: 4.25 bits a number.
        used = (up.call.columns["counts"] > 0).sum(axis=1)
        weights, tokens = used * 2880 * 5760, up.call.columns["counts"].sum(axis=1)
        assert up.bytes == approx(17 / 32 * (weights + tokens * 2880) + 2 * tokens * 5760)
        formats[name] = up.call.format
    assert formats == {"hopper": "w4a16", "blackwell": "fp4"}


def test_what_is_not_a_quantised_matrix_stays_bf16() -> None:
    graph = lowered(on_four(entry("deepseek_v3")), "decode", PHASES["decode"])
    plain = {op.name for op in graph.operators if op.call is not None and op.call.format == "bf16"}
    quantised = {op.name for op in graph.operators if op.call is not None and op.call.format == "fp8_block"}
    assert {"gate", "lm_head", "attention", "query_absorb", "value_up", "embedding"} <= plain
    assert quantised == {
        *("latents", "query_up", "attention_output", "ffn_up", "ffn_down", "shared_up", "shared_down"),
        # The activation is a share of the measured layer, whose format is that of its matrices.
        *("expert_gemm_1", "expert_activation", "expert_gemm_2"),
    }


def test_a_cache_of_fp8_is_half_as_large() -> None:
    scenario = on_four(entry("deepseek_v3"))
    halved = scenario.model.model_copy(update={"kv_format": "fp8"})
    for tokens in (1, 1000):
        whole = kv_bytes(scenario.model, scenario.deployment, 0, tokens)
        assert kv_bytes(halved, scenario.deployment, 0, tokens) == whole / 2


@pytest.mark.parametrize("name", ["deepseek_v3", "gpt_oss_120b", "llama_4_maverick"])
def test_a_scenario_written_out_is_read_as_the_same(name: str, tmp_path: Any) -> None:
    scenario = on_four(entry(name), flop_rate=gpu()["flop_rate"])
    file = tmp_path / "again.toml"
    file.write_text(to_toml(scenario), "utf-8")
    again = read_scenario(file)
    assert again == scenario and scenario_hash(again) == scenario_hash(scenario)
