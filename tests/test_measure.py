"""`clustersim measure` without a GPU: plans, rows, and what sessions leave that were broken off."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis.strategies import integers, sampled_from

from clustersim.cli import main
from clustersim.errors import ClustersimError
from clustersim.plan.stepgraph import KERNELS as STEP_KERNELS
from clustersim.spec.model import Model
from clustersim.spec.reading import read_catalogue
from clustersim.study import elementwise_rows, gemm_rows, torch_timing
from clustersim.study.attention_rows import new_tokens, prompts
from clustersim.study.expert_layer_rows import fused_layers
from clustersim.study.kernel_cases import (
    FORMS,
    KERNELS,
    LOADS,
    MOST_COPIES,
    Case,
    Decode,
    Elementwise,
    Experts,
    Gemm,
    MlaDecode,
    MlaPrefill,
    Prefill,
    bytes_needed,
    bytes_per_copy,
    copies,
    form_of,
    key,
    least_seconds,
    rank_counts,
    row,
    title,
)
from clustersim.study.kernel_rows import Rows
from clustersim.study.measure import CannotRunError, Machine, Outcome, Timing, gpu_name, measure, summary
from clustersim.study.measure_plan import FULL, QUICK, Grid, plan
from clustersim.study.mla_rows import mla_rows
from clustersim.study.model_cases import model_cases, wished
from clustersim.study.pack import read_csv

#: The headings of the measured files whose forms are written. Source: the CSV files of the measurements.
HEADINGS = {
    "gemm.csv": "gpu,framework,kernel_source,dtype,m,n,k,time_us,tflops,source",
    "attn_prefill.csv": "gpu,framework,attn_dtype,kv_cache_dtype,batch_size,isl,num_heads,num_kv_heads,"
    "head_dim,time_us,tflops_causal,source",
    "attn_decode.csv": "gpu,framework,attn_dtype,kv_cache_dtype,batch_size,kv_len,num_heads,num_kv_heads,"
    "head_dim,time_us,kv_GBps,source",
    "mla.csv": "gpu,framework,kernel_source,scope,phase,mla_dtype,kv_cache_dtype,gemm_type,num_heads,"
    "batch_size,seq_len,time_us,source",
    "moe_kernels.csv": "gpu,framework,kernel_source,dtype,model,hidden_size,inter_size,topk,num_experts,"
    "moe_tp,moe_ep,distribution,num_tokens_global,time_us,source",
    "elementwise.csv": "gpu,model,op,tp,num_tokens,n_embd,n_expanded_embd,n_head,n_kv_head,time_us,source",
}
#: One case of every kind.
ONE_EACH: tuple[Case, ...] = (
    Gemm("bf16", 128, 4096, 1024),
    Prefill(2, 16384, 64, 8, 128),
    Decode(32, 16, 32, 32, 128),
    MlaPrefill(1, 512, 16),
    MlaDecode(8, 1024, 128),
    Experts("Qwen3-30B-A3B", 2048, 768, 8, 128, 1, 4, "balanced", 512),
    Elementwise("attn_rope", "Llama-2-7b-hf", 2, 64, 4096, 11008, 32, 32),
)
IDENTITY = {"gpu": "h100_sxm", "framework": "torch 2.9.0", "kernel_source": "fake", "source": "test"}
GIB = 2.0**30


def slow(case: Case) -> list[float]:
    """Seconds that beat no data sheet: ten times what an A100 needs at least."""
    least = 10 * least_seconds(case, 312e12, 2e12) + 5e-6
    return [1.1 * least, least, 1.3 * least]


@dataclass
class Fake:
    """A backend that only counts. `time` gives the seconds of a case's repetitions."""

    time: Callable[[Case], Sequence[float]] = slow
    framework: str = "torch 2.9.0"
    memory: float = 80 * GIB
    ran: list[Case] = field(default_factory=list)

    def machine(self) -> Machine:
        return Machine("NVIDIA H100 80GB HBM3", self.framework, self.memory, 50e6, {"clocks.sm": "1980 MHz"})

    def run(self, case: Case) -> Timing:
        self.ran.append(case)
        return Timing(self.time(case), "fake kernel")


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def told(reader: Callable[..., list[Rows]], folder: Path, name: str) -> list[str]:
    """The kernels that a reader finds in a file, one row each, of torch where the form names a library."""
    found = reader(read_csv(folder / f"{name}.csv"), name)
    assert [len(rows) for rows in found] == [1] * len(found)
    assert name == "elementwise" or {str(rows.library[0]) for rows in found} == {"torch"}
    return [rows.kernel for rows in found]


# --- the plan -----------------------------------------------------------------------------------


def test_the_plan_is_the_same_every_time_and_names_no_case_twice() -> None:
    cases = plan()
    assert cases == plan(tuple(reversed(KERNELS)))
    assert len(set(cases)) == len(cases)
    assert len({title(case) for case in cases}) == len(cases)


@pytest.mark.parametrize("quick", [False, True])
def test_every_kernel_is_planned_and_a_subset_is_that_part_of_the_whole(quick: bool) -> None:
    whole = plan(quick=quick)
    for name in KERNELS:
        part = plan([name], quick)
        assert part == [case for case in whole if form_of(case).kernel == name]
        assert part


def test_a_quick_plan_is_a_tenth_of_the_whole() -> None:
    assert 10 * len(plan(quick=True)) < 1.1 * len(plan())


@pytest.mark.parametrize("grid", [FULL, QUICK], ids=["full", "quick"])
def test_the_sizes_of_a_grid_rise(grid: Grid) -> None:
    for name in ("m", "sides", "tokens", "batches", "lengths"):
        sizes = getattr(grid, name)
        assert list(sizes) == sorted(set(sizes)), name


def test_no_two_rows_of_a_file_are_told_apart_by_nothing() -> None:
    keys = [(form_of(case).file, key(case)) for case in plan()]
    assert len(set(keys)) == len(keys)


def test_most_of_the_plan_fits_a_gpu_of_80_gib() -> None:
    fits = [bytes_needed(case, 50e6) < 60 * GIB for case in plan()]
    assert np.mean(fits) > 0.99


# --- models -------------------------------------------------------------------------------------


def test_a_model_is_measured_at_the_widths_of_its_layers() -> None:
    # Mixtral-8x7B at TP 2: 32 heads of 128, 8 KV heads, hidden 4096, vocabulary 32000.
    cases = model_cases("mixtral_8x7b", 2, 1, QUICK)
    sides = {(case.n, case.k) for case in cases["gemm"] if isinstance(case, Gemm)}
    assert sides == {((16 + 2 * 4) * 128, 4096), (4096, 2048), (8, 4096), (16000, 4096)}
    assert {
        (c.heads, c.kv_heads, c.head_dim) for c in cases["attention_decode"] if isinstance(c, Decode)
    } == {(16, 4, 128)}
    assert {
        (c.hidden, c.inter, c.top_k, c.experts, c.tp, c.ep)
        for c in cases["experts"]
        if isinstance(c, Experts)
    } == {(4096, 14336, 2, 8, 2, 1)}


@pytest.mark.parametrize("name", [n for n, m in read_catalogue("models").items() if isinstance(m, Model)])
def test_every_model_of_the_catalogue_can_be_planned(name: str) -> None:
    cases = wished("", True, name, 1, 1)
    assert len(set(cases)) == len(cases)
    assert {"gemm", "elementwise"} <= {form_of(case).kernel for case in cases}


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (("gem", False, None, 1, 1), '--kernel: "gem" is not known (did you mean "gemm"?)'),
        (("", False, "mixtral", 1, 1), '--model: "mixtral" is not known'),
        (("", False, None, 2, 1), "--tp and --ep say how a model is shared"),
        (("", False, "mixtral_8x7b", 1, 3), "--ep 3 does not divide the 8 experts"),
        (("", False, "mixtral_8x7b", 3, 1), "--tp 3"),
        (("mla_decode", False, "mixtral_8x7b", 1, 1), "calls no mla_decode"),
    ],
)
def test_a_wish_that_cannot_be_met_is_answered(
    options: tuple[str, bool, str | None, int, int], says: str
) -> None:
    with pytest.raises(ClustersimError) as error:
        wished(*options)
    assert says in str(error.value)


# --- loads of experts ---------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(
    tokens=integers(1, 9000),
    ep=sampled_from([1, 2, 8, 32]),
    top_k=integers(1, 8),
    load=sampled_from(sorted(LOADS)),
)
def test_the_measured_rank_serves_no_less_than_its_share_and_no_expert_a_token_twice(
    tokens: int, ep: int, top_k: int, load: str
) -> None:
    counts = rank_counts(Experts("x", 64, 64, top_k, 64, 1, ep, load, tokens))
    assert len(counts) == 64 // ep
    assert counts.min() >= 0
    assert counts.max() <= tokens
    assert counts.sum() * ep >= tokens * top_k
    if ep == 1:
        assert counts.sum() == tokens * top_k


def test_a_power_law_is_skewed_and_always_the_same_draw() -> None:
    case = Experts("x", 64, 64, 8, 128, 1, 8, "powerlaw_a1.2", 4096)
    even = dataclasses.replace(case, distribution="balanced")
    assert rank_counts(case).sum() > 1.2 * rank_counts(even).sum()
    assert (rank_counts(case) == rank_counts(case)).all()


# --- rows ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", ONE_EACH, ids=lambda case: form_of(case).kernel)
def test_a_row_has_the_heading_of_the_measured_file(case: Case) -> None:
    assert ",".join(row(case, 1e-3, IDENTITY)) == HEADINGS[form_of(case).file]


def test_every_kind_of_case_is_tried_here() -> None:
    assert {type(case) for case in ONE_EACH} == set(FORMS)


def test_times_are_written_in_microseconds_and_rates_follow_from_them() -> None:
    gemm = row(Gemm("bf16", 128, 4096, 1024), 10e-6, IDENTITY)
    assert gemm["time_us"] == 10
    assert gemm["tflops"] == pytest.approx(2 * 128 * 4096 * 1024 / 10e-6 / 1e12, rel=1e-4)
    # Rows of the measured files: 2 x 16384 with 64 heads in 10997 us is 799.85; 32 x 16 with 32 KV heads in
    # 17.824 us is 470.64.
    assert row(Prefill(2, 16384, 64, 8, 128), 10997e-6, IDENTITY)["tflops_causal"] == pytest.approx(
        799.85, abs=0.01
    )
    assert row(Decode(32, 16, 32, 32, 128), 17.824e-6, IDENTITY)["kv_GBps"] == pytest.approx(470.64, abs=0.01)


@pytest.mark.parametrize("case", ONE_EACH, ids=lambda case: form_of(case).kernel)
def test_inputs_are_so_many_that_each_has_left_the_cache_when_its_turn_comes(case: Case) -> None:
    cache = 50e6
    others = (copies(case, cache) - 1) * bytes_per_copy(case)
    assert others >= 2 * cache or copies(case, cache) == MOST_COPIES
    assert bytes_needed(case, cache) >= copies(case, cache) * bytes_per_copy(case)


def test_memory_of_an_expert_layer_counts_experts_that_nobody_asks_for() -> None:
    # One token: 8 of 256 experts are read, all 256 are held. 3 * 7168 * 2048 * 2 bytes each.
    case = Experts("DeepSeek-V3", 7168, 2048, 8, 256, 1, 1, "balanced", 1)
    one = 3 * 7168 * 2048 * 2
    assert bytes_per_copy(case) == 8 * one + 7168 * 2
    assert bytes_needed(case, 50e6) >= 2 * 256 * one


# --- a session ----------------------------------------------------------------------------------


def test_a_session_leaves_files_that_the_readers_of_measured_rows_take(tmp_path: Path) -> None:
    cases = [*ONE_EACH, Gemm("fp8", 16, 512, 512)]
    outcomes = measure(cases, Fake(), tmp_path, "h100_sxm")
    assert {outcome.result for outcome in outcomes} == {"measured"}
    assert set(files(tmp_path)) == {*HEADINGS, "cases.csv", "machine.csv"}
    for file, heading in HEADINGS.items():
        assert ",".join(read_csv(tmp_path / file)) == heading
    (gemm,) = gemm_rows.products(read_csv(tmp_path / "gemm.csv"))
    assert gemm.measured.tolist() == pytest.approx(
        [np.median(slow(cases[0])), np.median(slow(cases[-1]))], rel=1e-4
    )
    assert gemm.format.tolist() == ["bf16", "fp8"]
    assert gemm.library.tolist() == ["torch", "torch"]
    assert gemm.gpu.tolist() == ["h100_sxm", "h100_sxm"]
    assert told(elementwise_rows.READERS["vidur_elementwise_ops"], tmp_path, "elementwise") == ["rotary"]


def test_attention_and_expert_rows_are_read_as_kernels_of_torch(tmp_path: Path) -> None:
    measure(ONE_EACH, Fake(), tmp_path, "h100_sxm")
    assert told(prompts, tmp_path, "attn_prefill") == ["attention_prefill"]
    assert told(new_tokens, tmp_path, "attn_decode") == ["attention_decode"]
    assert told(mla_rows, tmp_path, "mla") == ["mla_prefill", "mla_decode"]
    assert told(fused_layers, tmp_path, "moe_kernels") == ["experts"]
    (layer,) = fused_layers(read_csv(tmp_path / "moe_kernels.csv"), "moe_kernels")
    case = next(case for case in ONE_EACH if isinstance(case, Experts))
    assert layer.columns["counts"].tolist() == [pytest.approx(rank_counts(case), abs=1)]


def test_the_same_measurement_leaves_the_same_bytes(tmp_path: Path) -> None:
    measure(ONE_EACH, Fake(), tmp_path / "a", "h100_sxm")
    measure(ONE_EACH, Fake(), tmp_path / "b", "h100_sxm")
    assert files(tmp_path / "a") == files(tmp_path / "b")


def test_an_interrupted_session_leaves_whole_files_and_is_resumed_to_the_same_rows(tmp_path: Path) -> None:
    cases = plan(["gemm", "mla_prefill", "mla_decode"], quick=True)
    measure(cases, Fake(), tmp_path / "whole", "h100_sxm")
    first = Fake()

    def until_the_user_has_enough(case: Case) -> Sequence[float]:
        if len(first.ran) == 97:
            raise KeyboardInterrupt
        return slow(case)

    first.time = until_the_user_has_enough
    with pytest.raises(KeyboardInterrupt):
        measure(cases, first, tmp_path / "parts", "h100_sxm")
    assert len(read_csv(tmp_path / "parts" / "gemm.csv")["m"]) == 90
    assert len(read_csv(tmp_path / "parts" / "mla.csv")["seq_len"]) == 6
    second = Fake()
    outcomes = measure(cases, second, tmp_path / "parts", "h100_sxm", resume=True)
    assert second.ran == cases[96:]
    assert [outcome.result for outcome in outcomes[:96]] == ["kept"] * 96
    assert files(tmp_path / "parts") == files(tmp_path / "whole")


def test_rows_of_other_shapes_stay_when_a_session_is_resumed(tmp_path: Path) -> None:
    measure([Gemm("bf16", 1, 512, 512)], Fake(), tmp_path, "h100_sxm")
    measure([Gemm("bf16", 2, 512, 512)], Fake(), tmp_path, "h100_sxm", resume=True)
    assert read_csv(tmp_path / "gemm.csv")["m"].tolist() == [1, 2]


def test_rows_that_lie_there_are_not_written_over(tmp_path: Path) -> None:
    measure(ONE_EACH, Fake(), tmp_path, "h100_sxm")
    before, again = files(tmp_path), Fake()
    with pytest.raises(ClustersimError, match=r"gemm\.csv: is there already; --resume"):
        measure(ONE_EACH, again, tmp_path, "h100_sxm")
    assert files(tmp_path) == before
    assert not again.ran


@pytest.mark.parametrize(
    ("gpu", "framework", "says"),
    [
        ("h200_sxm", "torch 2.9.0", 'row 2, gpu: .* "h100_sxm", this is "h200_sxm"'),
        ("h100_sxm", "torch 3.0", 'row 2, framework: .* "torch 2.9.0", this is "torch 3.0"'),
    ],
)
def test_rows_of_another_gpu_or_library_are_not_mixed_in(
    tmp_path: Path, gpu: str, framework: str, says: str
) -> None:
    measure(ONE_EACH, Fake(), tmp_path, "h100_sxm")
    before = files(tmp_path)
    with pytest.raises(ClustersimError, match=says):
        measure(ONE_EACH, Fake(framework=framework), tmp_path, gpu, resume=True)
    assert files(tmp_path) == before


def test_a_file_of_another_form_is_not_resumed(tmp_path: Path) -> None:
    (tmp_path / "gemm.csv").write_text("m,n,k\n1,2,3\n", encoding="utf-8")
    with pytest.raises(
        ClustersimError, match=r"gemm\.csv: cannot be resumed: its heading is not gpu,framework"
    ):
        measure(ONE_EACH, Fake(), tmp_path, "h100_sxm", resume=True)


def test_what_does_not_fit_is_not_tried_and_told_of(tmp_path: Path) -> None:
    small, large = Gemm("bf16", 1, 512, 512), Gemm("bf16", 16384, 16384, 16384)
    fake = Fake(memory=1 * GIB)
    outcomes = measure([small, large], fake, tmp_path, "h100_sxm")
    assert fake.ran == [small]
    assert outcomes[1].result == "no room"
    assert outcomes[1].why.endswith("GiB of 0.8 GiB") or outcomes[1].why.endswith("GiB of 0.9 GiB")
    log = read_csv(tmp_path / "cases.csv")
    assert log["result"].tolist() == ["measured", "no room"]
    assert read_csv(tmp_path / "gemm.csv")["m"].tolist() == [1]


def test_what_cannot_run_leaves_no_row_and_the_rest_goes_on(tmp_path: Path) -> None:
    def no_fp8(case: Case) -> Sequence[float]:
        if isinstance(case, Gemm) and case.format == "fp8":
            raise CannotRunError("no fp8 here")
        return slow(case)

    cases = [Gemm("fp8", 1, 512, 512), Gemm("bf16", 1, 512, 512)]
    outcomes = measure(cases, Fake(no_fp8), tmp_path, "h100_sxm")
    assert [(o.result, o.why) for o in outcomes] == [("cannot run", "no fp8 here"), ("measured", "")]
    assert read_csv(tmp_path / "gemm.csv")["dtype"].tolist() == ["bfloat16"]


@pytest.mark.parametrize("seconds", [[], [0.0, 0.0], [float("nan")], [-1.0]])
def test_a_time_that_is_none_is_no_row(tmp_path: Path, seconds: list[float]) -> None:
    (outcome,) = measure([Gemm("bf16", 1, 512, 512)], Fake(lambda case: seconds), tmp_path, "h100_sxm")
    assert outcome.result == "cannot run"
    assert not (tmp_path / "gemm.csv").exists()


def test_a_time_that_beats_the_data_sheet_is_no_row(tmp_path: Path) -> None:
    # 8192^3 at the H100's 989 TFLOP/s takes 1.11 ms; weights of 16384^2 bf16 at 3.35 TB/s 0.16 ms.
    cases = [Gemm("bf16", 8192, 8192, 8192), Gemm("bf16", 1, 16384, 16384)]
    outcomes = measure(cases, Fake(lambda case: [1e-4]), tmp_path, "h100_sxm")
    assert [outcome.result for outcome in outcomes] == ["too fast", "too fast"]
    assert "us, where the data sheet allows" in outcomes[0].why
    assert not (tmp_path / "gemm.csv").exists()


def test_a_gpu_that_nobody_knows_has_no_data_sheet_to_beat(tmp_path: Path) -> None:
    (outcome,) = measure([Gemm("bf16", 8192, 8192, 8192)], Fake(lambda case: [1e-9]), tmp_path, "my gpu")
    assert outcome.result == "measured"


def test_progress_is_told_up_to_the_end(tmp_path: Path) -> None:
    told: list[tuple[int, int]] = []
    measure(ONE_EACH, Fake(), tmp_path, "h100_sxm", tell=lambda done, all_: told.append((done, all_)))
    assert told == [(n, len(ONE_EACH)) for n in range(len(ONE_EACH) + 1)]


def test_the_log_holds_the_spread_and_the_machine_its_clocks(tmp_path: Path) -> None:
    measure([Gemm("bf16", 1, 512, 512)], Fake(lambda case: [3e-5, 1e-5, 2e-5]), tmp_path, "h100_sxm")
    log = {name: values.tolist() for name, values in read_csv(tmp_path / "cases.csv").items()}
    assert (log["fastest_us"], log["median_us"], log["slowest_us"]) == ([10], [20], [30])
    assert log["repetitions"] == [3]
    machine = read_csv(tmp_path / "machine.csv")
    facts = dict(zip(machine["fact"].tolist(), machine["value"].tolist(), strict=True))
    assert facts["clocks.sm, before"] == facts["clocks.sm, after"] == "1980 MHz"
    assert facts["device"] == "NVIDIA H100 80GB HBM3"


def test_a_summary_counts_every_case_once() -> None:
    cases = plan(["gemm", "experts"], quick=True)
    results = ["measured", "kept", "no room", "cannot run", "too fast"]
    outcomes = [
        Outcome(case, results[k % 5], "why", 3, 1e-6, 2e-6, (2 + k) * 1e-6) for k, case in enumerate(cases)
    ]
    found = summary(outcomes, Path("here"))
    assert sum(sum(counts.values()) for counts in found["kernels"].values()) == len(cases)
    assert sum(one["cases"] for one in found["missing"]) == sum(k % 5 > 1 for k in range(len(cases)))
    spreads = [one["spread"] for one in found["least_steady"]]
    assert spreads == sorted(spreads, reverse=True)


# --- names --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("device", "wished_name", "name"),
    [
        ("NVIDIA H200", "", "h200_sxm"),
        ("NVIDIA A100-SXM4-80GB", "", "a100_sxm"),
        ("NVIDIA H100 80GB HBM3", "", "h100_sxm"),
        ("NVIDIA H200", "H800", "h800_sxm"),
        ("NVIDIA Whatnot", "", "NVIDIA Whatnot"),
        ("NVIDIA H200", "our h200", "our h200"),
    ],
)
def test_a_gpu_is_written_as_the_catalogue_calls_it(device: str, wished_name: str, name: str) -> None:
    found, warning = gpu_name(device, wished_name)
    assert found == name
    assert bool(warning) == (name not in read_catalogue("gpus"))


@pytest.mark.parametrize("name", ["a,b", 'a"b', "a\nb"])
def test_a_name_that_would_break_a_row_is_refused(name: str) -> None:
    with pytest.raises(ClustersimError, match="--gpu"):
        gpu_name("NVIDIA H200", name)


# --- the command --------------------------------------------------------------------------------


def status(*arguments: str) -> object:
    with pytest.raises(SystemExit) as end:
        main(["measure", *arguments])
    return end.value.code


def test_a_dry_run_needs_no_gpu_and_writes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert status("--dry-run", "--quick") == 0
    shown = capsys.readouterr().out
    assert all(name in shown for name in KERNELS)
    assert not list(tmp_path.iterdir())


def test_the_command_measures_refuses_to_write_over_and_resumes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    fake = Fake()
    monkeypatch.setattr(torch_timing, "open_torch", lambda device: fake)
    wish = ("--quick", "--kernel", "mla_decode,gemm", "--out", "mine")
    assert status(*wish) == 0
    streams = capsys.readouterr()
    assert "mla_decode" in streams.out and "cases.csv tells" in streams.out
    assert streams.err == ""
    assert {path.name for path in Path("mine").iterdir()} == {
        "gemm.csv",
        "mla.csv",
        "cases.csv",
        "machine.csv",
    }
    assert set(read_csv(Path("mine") / "gemm.csv")["gpu"].tolist()) == {"h100_sxm"}
    assert status(*wish) == 2
    assert "--resume keeps its rows" in capsys.readouterr().err
    ran = len(fake.ran)
    assert status(*wish, "--resume", "--json") == 0
    assert json.loads(capsys.readouterr().out)["kernels"]["mla_decode"] == {"kept": 16}
    assert len(fake.ran) == ran


def test_an_interruption_ends_with_its_status_and_whole_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fake = Fake()

    def few(case: Case) -> Sequence[float]:
        if len(fake.ran) > 7:
            raise KeyboardInterrupt
        return slow(case)

    fake.time = few
    monkeypatch.setattr(torch_timing, "open_torch", lambda device: fake)
    assert status("--quick", "--out", str(tmp_path / "mine")) == 130
    assert capsys.readouterr().err.strip() == "interrupted"
    assert len(read_csv(tmp_path / "mine" / "gemm.csv")["m"]) == 7


def test_every_matrix_kernel_of_a_step_can_be_measured() -> None:
    named = {name for name in STEP_KERNELS if name.startswith(("gemm", "attention", "mla"))}
    assert named - {"mla_prefill_module", "mla_decode_module"} <= set(KERNELS)
