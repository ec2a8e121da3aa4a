"""The kernels that one model calls, as cases to be measured: read off its StepGraph, not reckoned anew."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import product

from clustersim.errors import ClustersimError, pick
from clustersim.plan.layout import lay_out
from clustersim.plan.lowering import gated, lower
from clustersim.plan.stepgraph import Call
from clustersim.spec.batch import Piece, batch_of
from clustersim.spec.checks import Parts, check
from clustersim.spec.hardware import Server
from clustersim.spec.model import Model
from clustersim.spec.reading import read_catalogue
from clustersim.spec.scenario import Scenario
from clustersim.study.kernel_cases import (
    LOADS,
    MLA_KV_RANK,
    MLA_NOPE,
    MLA_ROPE,
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
)
from clustersim.study.measure_plan import SHARED, Grid, grid_of, named, plan

#: The server whose GPUs hold the model while its calls are read; nothing of it is in them.
_SERVER = "dgx_h100"


def model_cases(name: str, tp: int, ep: int, grid: Grid) -> dict[str, list[Case]]:
    """Kernel → the cases of a model of the catalogue, at the grid's tokens, batches and lengths.

    tp       ranks that share attention, dense products and, if ep is 1, every expert
    ep       ranks that share the experts
    Raises   ClustersimError for an unknown model, and one that cannot be shared so
    """
    model = _model(name)
    if model.experts and model.experts % ep:
        raise ClustersimError(f"--ep {ep} does not divide the {model.experts} experts of {name}")
    calls = list(_calls(model, tp))
    by_kernel: dict[str, list[Case]] = {
        "gemm": list(_gemms(calls, grid)),
        "experts": list(_experts(model, tp if ep == 1 else 1, ep, grid)),
        "elementwise": list(_elementwise(model, tp, grid)),
    }
    for kernel, cases in _attentions(calls, grid):
        by_kernel.setdefault(kernel, []).extend(cases)
    return {kernel: list(dict.fromkeys(cases)) for kernel, cases in by_kernel.items()}


def wished(kernels: str, quick: bool, model: str | None, tp: int, ep: int) -> list[Case]:
    """The cases that the options of `clustersim measure` ask for.

    kernels  names with commas between them; "" is all
    model    a model of the catalogue, to measure its shapes alone, or None
    Raises   ClustersimError for unknown names, where the model cannot be shared so, and where nothing is
             left to be measured
    """
    names = named(kernels)
    if model is None:
        if (tp, ep) != (1, 1):
            raise ClustersimError("--tp and --ep say how a model is shared; name it with --model")
        return plan(names, quick)
    by_kernel = model_cases(model, tp, ep, grid_of(quick))
    cases = [case for name in names for case in by_kernel.get(name, [])]
    if not cases:
        raise ClustersimError(f"--model {model}: it calls no {' and no '.join(names)}")
    return cases


def _model(name: str) -> Model:
    found = pick(read_catalogue("models"), name, "--model")
    assert isinstance(found, Model)
    return found


def _calls(model: Model, tp: int) -> Iterator[Call]:
    """Every kernel call of a prefill and of a decode step on tp ranks of one server."""
    scenario = _scenario(model, tp)
    layout = lay_out(scenario)
    for phase, new, past in (("prefill", 64, 0), ("decode", 1, 64)):
        batch = batch_of(phase, [Piece(0, new, past, 1)], 1)
        counts, distinct = gated(batch, scenario, layout, 0)
        for operator in lower(batch, counts, layout, distinct).operators:
            if operator.call is not None:
                yield operator.call


def _scenario(model: Model, tp: int) -> Scenario:
    server = pick(read_catalogue("servers"), _SERVER, "server")
    assert isinstance(server, Server)
    way = "expert_tensor_parallel" if model.experts % tp else "expert_parallel"
    shared = {way: tp} if model.experts else {}
    scenario = Scenario.model_validate(
        {
            "name": "measure",
            "model": model,
            "topology": {"family": "single_server", "server": server.model_copy(update={"gpus": tp})},
            "deployment": {"tensor_parallel": tp, **shared},
            "workload": {"phase": "decode", "sequences": 1, "prompt_tokens": 64, "decode_steps": 1},
        }
    )
    wrong = check(Parts(model=scenario.model, deployment=scenario.deployment))
    if wrong:
        raise ClustersimError(f"--tp {tp}: {'; '.join(problem for _, problem in wrong)}")
    return scenario


def _gemms(calls: Sequence[Call], grid: Grid) -> Iterator[Case]:
    for call in calls:
        if call.kernel != "gemm":
            continue
        # Ranks may differ by a column, where a vocabulary does not divide: the widest is measured.
        n, k = (int(call.columns[name].max()) for name in ("n", "k"))
        for m in grid.m:
            yield Gemm(call.format, m, n, k)


def _attentions(calls: Sequence[Call], grid: Grid) -> Iterator[tuple[str, list[Case]]]:
    for call in calls:
        if call.kernel in _ATTENTIONS:
            sizes = {name: int(values.max()) for name, values in call.columns.items()}
            most = grid.decode_most if call.kernel.endswith("decode") else grid.prefill_most
            lengths = [(b, n) for b, n in product(grid.batches, grid.lengths) if b * n <= most]
            yield call.kernel, [_ATTENTIONS[call.kernel](b, n, sizes) for b, n in lengths]


def _latent(sizes: Mapping[str, int]) -> int:
    """Heads on this rank; ClustersimError where the columns of mla.csv cannot tell such an attention."""
    widths = tuple(sizes[name] for name in ("kv_rank", "rope_dim", "nope_dim", "v_dim"))
    told = (MLA_KV_RANK, MLA_ROPE, MLA_NOPE, MLA_V)
    if widths != told:
        raise ClustersimError(
            f"MLA of widths {widths}: the rows of mla.csv mean {told}, they cannot tell others"
        )
    return sizes["heads"]


_ATTENTIONS: Mapping[str, Callable[[int, int, Mapping[str, int]], Case]] = {
    "attention_prefill": lambda b, n, s: Prefill(b, n, s["heads"], s["kv_heads"], s["head_dim"]),
    "attention_decode": lambda b, n, s: Decode(b, n, s["heads"], s["kv_heads"], s["head_dim"]),
    "mla_prefill": lambda b, n, s: MlaPrefill(b, n, _latent(s)),
    "mla_decode": lambda b, n, s: MlaDecode(b, n, _latent(s)),
}


def _experts(model: Model, tp: int, ep: int, grid: Grid) -> Iterator[Case]:
    # The form means gated experts: gate and up are one product twice as wide.
    if not model.experts or model.ffn_kind != "gated":
        return
    for load, tokens in product(LOADS, grid.tokens):
        yield Experts(model.name, model.hidden, model.ffn, model.top_k, model.experts, tp, ep, load, tokens)


def _elementwise(model: Model, tp: int, grid: Grid) -> Iterator[Case]:
    told = [op for op in OPS if op != "attn_rope" or model.head_dim * model.heads == model.hidden]
    for op, tokens in product(told, grid.tokens):
        widths = model.hidden, model.ffn, model.heads, model.kv_heads or model.heads
        yield Elementwise(op, model.name, tp if op in SHARED else 1, tokens, *widths)
