"""How PyTorch is asked for times, with a torch made of counters: no GPU, no PyTorch."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
from numpy_torch import numpy_torch

from clustersim.cli import main
from clustersim.errors import ClustersimError
from clustersim.study import torch_timing
from clustersim.study.kernel_cases import (
    FORMS,
    MLA_KV_RANK,
    MLA_V,
    OPS,
    Case,
    Decode,
    Elementwise,
    Experts,
    Gemm,
    MlaDecode,
    MlaPrefill,
    Prefill,
    copies,
    title,
)
from clustersim.study.measure import CannotRunError
from clustersim.study.torch_timing import LEAST_REPLAYS, MOST_CALLS, WAYS, TorchBackend, Way, open_torch

CASE = Gemm("bf16", 16, 4096, 4096)


class OutOfMemoryError(RuntimeError):
    """As torch's, which is a RuntimeError, too."""


@dataclass
class Machine:
    """A GPU that runs one call after the other; `clock` in seconds. Recorded calls run at every replay."""

    clock: float = 0.0
    recording: list[Any] | None = None
    replays: int = 0
    log: list[str] = field(default_factory=list)

    def work(self, name: str, seconds: float) -> None:
        if self.recording is not None:
            self.recording.append((name, seconds))
            return
        self.clock += seconds
        self.log.append(name)


def fake_torch(machine: Machine, records: bool = True) -> Any:
    """What torch_timing asks of torch to time calls."""

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            self.at = 0.0

        def record(self) -> None:
            self.at = machine.clock

        def synchronize(self) -> None: ...

        def elapsed_time(self, end: Event) -> float:
            return (end.at - self.at) * 1e3

    class CUDAGraph:
        def __init__(self) -> None:
            self.calls: list[Any] = []

        def replay(self) -> None:
            machine.replays += 1
            for name, seconds in self.calls:
                machine.work(name, seconds)

    @contextmanager
    def graph(of: CUDAGraph) -> Iterator[None]:
        if not records:
            raise RuntimeError("operation not permitted when stream is capturing")
        machine.recording = of.calls
        try:
            yield
        finally:
            machine.recording = None

    stream = SimpleNamespace(wait_stream=lambda other: None)
    cuda = SimpleNamespace(
        Event=Event,
        CUDAGraph=CUDAGraph,
        graph=graph,
        Stream=lambda: stream,
        current_stream=lambda: stream,
        stream=lambda of: nullcontext(),
        synchronize=lambda: None,
        empty_cache=lambda: machine.log.append("emptied"),
        current_device=lambda: 0,
        get_device_properties=lambda device: SimpleNamespace(name="NVIDIA Fake", L2_cache_size=1 << 20),
        OutOfMemoryError=OutOfMemoryError,
    )
    return SimpleNamespace(
        cuda=cuda,
        no_grad=nullcontext,
        bfloat16="bf16",
        randn=lambda *shape, **how: shape,
        mm=lambda a, b: machine.work("mm", 0.1),
    )


def backend(machine: Machine, ways: Any, monkeypatch: pytest.MonkeyPatch, **how: Any) -> TorchBackend:
    monkeypatch.setitem(WAYS, Gemm, lambda b, case, sets: ways(b, sets))
    return TorchBackend(fake_torch(machine, **how))


def way(machine: Machine, name: str, seconds: float, sets: int, **more: Any) -> Way:
    return Way(name, [lambda k=k: machine.work(f"{name} {k}", seconds) for k in range(sets)], **more)


def test_a_time_is_that_of_one_call(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Machine()
    timing = backend(machine, lambda b, sets: [way(machine, "x", 3e-6, sets)], monkeypatch).run(CASE)
    assert len(timing.seconds) >= LEAST_REPLAYS
    assert timing.seconds == pytest.approx([3e-6] * len(timing.seconds))
    assert timing.kernel_source == "x"


@pytest.mark.parametrize("seconds", [1e-7, 3e-6, 1e-3, 0.2])
@pytest.mark.parametrize("sets", [1, 2, 7, 256])
def test_all_sets_of_inputs_are_used_equally_often(
    monkeypatch: pytest.MonkeyPatch, seconds: float, sets: int
) -> None:
    machine = Machine()
    backend(machine, lambda b, _: [way(machine, "x", seconds, sets)], monkeypatch).run(CASE)
    in_replays = [name for name in machine.log if name.startswith("x")][torch_timing.WARM_UP + 2 :]
    used = {name: in_replays.count(name) for name in set(in_replays)}
    assert len(used) == sets
    assert set(used.values()) == {len(in_replays) // sets}
    assert len(in_replays) / machine.replays <= MOST_CALLS


def test_of_several_ways_the_fastest_is_kept_and_one_that_fails_does_no_harm(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    machine = Machine()

    def fails() -> None:
        raise RuntimeError("No available kernel. Aborting execution.\nmore lines")

    def full() -> None:
        raise OutOfMemoryError("CUDA out of memory")

    def ways(b: TorchBackend, sets: int) -> Iterator[Way]:
        yield Way("broken", [fails])
        yield way(machine, "slow", 5e-6, sets)
        yield Way("full", [full])
        yield way(machine, "quick", 2e-6, sets)
        yield way(machine, "never needed", 1e-6, sets, last=True)

    assert backend(machine, ways, monkeypatch).run(CASE).kernel_source == "quick"
    assert not any(name.startswith("never") for name in machine.log)


def test_the_last_resort_is_taken_where_nothing_else_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Machine()

    def ways(b: TorchBackend, sets: int) -> Iterator[Way]:
        def fails() -> None:
            raise NotImplementedError("not for this GPU")

        yield Way("broken", [fails])
        yield way(machine, "loop", 1e-6, sets, last=True)

    assert backend(machine, ways, monkeypatch).run(CASE).kernel_source == "loop"


def test_a_case_that_nothing_runs_says_all_reasons_in_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails() -> None:
        raise RuntimeError("No available kernel.\nmore lines")

    def full() -> None:
        raise OutOfMemoryError("CUDA out of memory. Tried to allocate")

    ways = [Way("one", [fails]), Way("two", [full])]
    with pytest.raises(CannotRunError) as error:
        backend(Machine(), lambda b, sets: ways, monkeypatch).run(CASE)
    assert str(error.value) == "one: No available kernel.; two: the GPU's memory is full"


def test_a_gpu_that_has_failed_ends_the_session(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails() -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    with pytest.raises(ClustersimError, match=r"the GPU has failed: CUDA error.*--resume"):
        backend(Machine(), lambda b, sets: [Way("one", [fails])], monkeypatch).run(CASE)


def test_what_cannot_be_recorded_is_called_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Machine()
    timing = backend(
        machine, lambda b, sets: [way(machine, "x", 4e-6, sets)], monkeypatch, records=False
    ).run(CASE)
    assert timing.kernel_source == "x, eager"
    assert timing.seconds == pytest.approx([4e-6] * len(timing.seconds))
    assert machine.replays == 0


def test_weights_are_made_once_for_neighbours_and_let_go_for_others(monkeypatch: pytest.MonkeyPatch) -> None:
    machine, made = Machine(), []
    b = backend(machine, lambda b, sets: [], monkeypatch)

    def make() -> int:
        made.append(len(made))
        return made[-1]

    assert b.kept("a", 3, make) == [0, 1, 2]
    assert b.kept("a", 2, make) == [0, 1]
    assert b.kept("a", 4, make) == [0, 1, 2, 3]
    assert b.kept("b", 1, make) == [4]
    assert b.kept("a", 1, make) == [5]


def test_every_kind_of_case_has_ways() -> None:
    assert set(WAYS) == set(FORMS)


def test_the_backend_takes_as_many_sets_as_the_plan_reckons_with(monkeypatch: pytest.MonkeyPatch) -> None:
    machine, asked = Machine(), []

    def ways(b: TorchBackend, case: Case, sets: int) -> list[Way]:
        asked.append(sets)
        return [way(machine, "x", 1e-6, sets)]

    monkeypatch.setitem(WAYS, Gemm, ways)
    TorchBackend(fake_torch(machine)).run(CASE)
    assert asked == [copies(CASE, float(1 << 20))]


# --- what is called ------------------------------------------------------------------------------

#: One small case of every kind and operator → the shape of what comes out.
SMALL: dict[Case, tuple[int, ...]] = {
    Gemm("bf16", 16, 32, 48): (16, 32),
    Gemm("fp8", 16, 32, 48): (16, 32),
    Prefill(2, 8, 4, 2, 16): (2, 4, 8, 16),
    Decode(3, 8, 4, 1, 16): (3, 4, 1, 16),
    MlaPrefill(2, 8, 4): (2, 4, 8, MLA_V),
    MlaDecode(2, 8, 4): (2, 4, MLA_KV_RANK),
    Experts("x", 32, 16, 2, 8, 2, 2, "balanced", 3): (3, 32),
    Experts("x", 32, 16, 2, 8, 1, 4, "powerlaw_a1.2", 40): (40, 32),
    **{Elementwise(op, "x", 1, 6, 64, 96, 4, 2): shape for op, shape in {
        "emb": (6, 64), "input_layernorm": (6, 64), "post_attention_layernorm": (6, 64),
        "attn_rope": (6, 6, 16), "mlp_act": (6, 96), "add": (6, 64),
    }.items()},
}  # fmt: skip


def outputs(case: Case, sets: int = 2, **how: Any) -> dict[str, list[Any]]:
    """What every way to run a case gives, one for each set of inputs."""
    b = TorchBackend(numpy_torch(**how))
    return {one.name: [call() for call in one.calls] for one in WAYS[type(case)](b, case, sets)}


@pytest.mark.parametrize("case", SMALL, ids=title)
def test_every_way_to_run_a_case_gives_what_the_case_says(case: Case) -> None:
    for name, found in outputs(case).items():
        assert len(found) == 2, name
        for one in found:
            # Padded values come out padded.
            assert one.shape[:-1] == SMALL[case][:-1], name
            assert one.shape[-1] == SMALL[case][-1] or "padded" in name, name
            assert np.isfinite(one).all(), name
        assert not np.array_equal(found[0], found[1]), f"{name}: both sets of inputs are the same"


@pytest.mark.parametrize(
    "case", [MlaDecode(2, 8, 4), *(c for c in SMALL if isinstance(c, Experts))], ids=title
)
def test_the_ways_to_run_a_case_agree(case: Case) -> None:
    first, *others = outputs(case).values()
    assert others
    for other in others:
        for a, b in zip(first, other, strict=True):
            np.testing.assert_allclose(np.asarray(a), np.asarray(b), rtol=1e-9)


def test_every_operator_is_tried_here() -> None:
    assert {case.op for case in SMALL if isinstance(case, Elementwise)} == set(OPS)
    assert {type(case) for case in SMALL} == set(FORMS)


def test_a_gpu_without_fp8_says_so_and_formats_that_torch_lacks_are_refused() -> None:
    with pytest.raises(CannotRunError, match="no fp8 products"):
        outputs(Gemm("fp8", 16, 32, 48), capability=(8, 0))
    with pytest.raises(CannotRunError, match="fp8_block: plain PyTorch has no such product"):
        outputs(Gemm("fp8_block", 16, 32, 48))


# --- refusals -----------------------------------------------------------------------------------


def torch_module(
    monkeypatch: pytest.MonkeyPatch, cuda: str | None, gpus: int, hip: str | None = None
) -> None:
    """A torch that can be imported. cuda: the version it is built for."""
    modules = {name: ModuleType(name) for name in ("torch", "torch.nn", "torch.nn.attention")}
    modules["torch"].__dict__.update(
        version=SimpleNamespace(cuda=cuda, hip=hip),
        cuda=SimpleNamespace(is_available=lambda: gpus > 0, device_count=lambda: gpus),
        nn=modules["torch.nn"],
    )
    modules["torch.nn"].__dict__["attention"] = modules["torch.nn.attention"]
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)


def refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> str:
    """What `clustersim measure` says, having ended with status 2 and left nothing."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as end:
        main(["measure", "--quick"])
    assert end.value.code == 2
    assert not list(tmp_path.iterdir())
    streams = capsys.readouterr()
    assert not streams.out
    return streams.err


def test_without_pytorch_it_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    said = refused(tmp_path, monkeypatch, capsys)
    assert "needs PyTorch" in said
    assert "pip install 'clustersim[measure]'" in said


def test_without_a_gpu_it_says_that_pytorch_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    torch_module(monkeypatch, cuda="13.0", gpus=0)
    assert "needs an NVIDIA GPU; PyTorch is there, but finds none" in refused(tmp_path, monkeypatch, capsys)


def test_a_pytorch_for_cpus_or_for_amd_is_told_apart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    torch_module(monkeypatch, cuda=None, gpus=0)
    assert "built for CPUs" in refused(tmp_path, monkeypatch, capsys)
    torch_module(monkeypatch, cuda=None, gpus=1, hip="6.4")
    assert "NVIDIA GPUs only" in refused(tmp_path, monkeypatch, capsys)


def test_a_gpu_that_is_not_there_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    torch_module(monkeypatch, cuda="13.0", gpus=2)
    with pytest.raises(ClustersimError, match="--device 2: there are 2 GPUs, counted from 0"):
        open_torch(2)
