"""The kernels of `clustersim measure` in PyTorch, timed on an NVIDIA GPU. Nothing else touches torch.

What the times mean is written in `study.measure`. PyTorch is the optional extra `measure`: it is imported
when a backend is opened, and whoever lacks it (or a GPU) is told which.
"""

from __future__ import annotations

import math
import subprocess
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from statistics import median
from typing import Any, TypeAlias

from clustersim.errors import ClustersimError
from clustersim.study.kernel_cases import (
    MLA_KV_RANK,
    MLA_NOPE,
    MLA_ROPE,
    MLA_V,
    VOCAB,
    Case,
    Decode,
    Elementwise,
    Experts,
    Gemm,
    MlaDecode,
    MlaPrefill,
    Prefill,
    copies,
    rank_counts,
    rotated,
)
from clustersim.study.measure import CannotRunError, Machine, Timing

#: A replay lasts so long at least, s: its two events are exact to half a microsecond.
REPLAY = 5e-4
#: Calls of one replay at most.
MOST_CALLS = 512
#: Replays that are timed: at least, at most, and the time after which there are no more, s.
LEAST_REPLAYS, MOST_REPLAYS, BUDGET = 5, 30, 0.2
#: Calls before anything is timed: libraries load kernels, compile and choose.
WARM_UP = 3
#: Where the driver does not say how large L2 is, bytes: a guess above that of any GPU so far but Blackwell's.
L2_GUESS = 64 << 20
#: First GPUs with fp8 units. Source: CUDA's table of compute capabilities.
FP8_CAPABILITY = (8, 9)

_INSTALL = "pip install 'clustersim[measure]'"
#: What is asked of nvidia-smi for machine.csv.
_FACTS = ("driver_version", "clocks.sm", "clocks.max.sm", "clocks.mem", "power.limit", "temperature.gpu")
#: What making the inputs of a case may raise: no room, or a torch that lacks a function or an argument.
_NOT_HERE = (RuntimeError, TypeError, AttributeError, ValueError)

Call: TypeAlias = Callable[[], Any]


@dataclass(frozen=True, slots=True)
class Way:
    """One way to run a case. Of several, the fastest is kept.

    name       what is called, for the row
    calls      one per set of inputs, each the same work
    context    what must be in force while it is called
    last       taken only where no way before it can run
    """

    name: str
    calls: Sequence[Call]
    context: Callable[[], AbstractContextManager[Any]] = nullcontext
    last: bool = False


def open_torch(device: int = 0) -> TorchBackend:
    """A backend on one GPU of this machine.

    device  as CUDA counts them
    Raises  ClustersimError that says whether PyTorch or the GPU is missing, and what to install
    """
    try:
        import torch
        import torch.nn.attention
    except ImportError as error:
        raise ClustersimError(
            f"clustersim measure needs PyTorch, which cannot be imported ({error}); {_INSTALL}"
        ) from error
    if getattr(torch.version, "hip", None):
        raise ClustersimError("clustersim measure knows NVIDIA GPUs only; this PyTorch is built for AMD's")
    if torch.version.cuda is None:
        raise ClustersimError(
            "clustersim measure needs PyTorch with CUDA; the one that is installed is built for CPUs. "
            "Install a CUDA build in its place"
        )
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if not count:
        raise ClustersimError(
            "clustersim measure needs an NVIDIA GPU; PyTorch is there, but finds none. "
            "Where there is one, see that nvidia-smi lists it and CUDA_VISIBLE_DEVICES does not hide it"
        )
    if not 0 <= device < count:
        raise ClustersimError(f"--device {device}: there are {count} GPUs, counted from 0")
    torch.cuda.set_device(device)
    return TorchBackend(torch)


class TorchBackend:
    """Times cases on the current CUDA device; fulfils `study.measure.Backend`.

    torch  the module
    """

    def __init__(self, torch: Any) -> None:
        self.torch = torch
        self.properties = torch.cuda.get_device_properties(torch.cuda.current_device())
        self.cache = float(getattr(self.properties, "L2_cache_size", 0) or L2_GUESS)
        self._kept: tuple[object, list[Any]] = (None, [])
        self._compiled: dict[str, Any] = {}
        self._awake = False
        self._last: type[Any] | None = None

    def machine(self) -> Machine:
        """The GPU and its libraries, with clocks as they are now."""
        t = self.torch
        # What earlier cases have left to torch's own pool is free as well.
        self._forget()
        free, _ = t.cuda.mem_get_info()
        facts = {
            "compute capability": ".".join(map(str, t.cuda.get_device_capability())),
            "SMs": str(self.properties.multi_processor_count),
            "CUDA": str(t.version.cuda),
            "cuDNN": str(t.backends.cudnn.version()),
            **self._asked(),
        }
        return Machine(str(self.properties.name), f"torch {t.__version__}", float(free), self.cache, facts)

    def run(self, case: Case) -> Timing:
        """The times of the fastest way to run a case."""
        self._wake()
        if type(case) is not self._last:
            # Weights are shared by cases of one kind; the next kind wants their room.
            self._forget()
            self._last = type(case)
        timings: list[Timing] = []
        reasons: list[str] = []
        with self.torch.no_grad(), warnings.catch_warnings():
            # Attention kernels that cannot run a case warn of every reason; ours go to cases.csv.
            warnings.simplefilter("ignore")
            try:
                for way in WAYS[type(case)](self, case, copies(case, self.cache)):
                    if not (way.last and timings):
                        self._try(way, timings, reasons)
            except _NOT_HERE as error:
                reasons.append(self._reason(error))
        if not timings:
            raise CannotRunError("; ".join(reasons))
        return min(timings, key=lambda timing: median(timing.seconds))

    def _try(self, way: Way, timings: list[Timing], reasons: list[str]) -> None:
        try:
            timings.append(self._time(way))
        except Exception as error:
            # Kernels and the compilers behind torch.compile raise kinds of their own. What failed is told if
            # no other way runs.
            reasons.append(f"{way.name}: {self._reason(error)}")

    def _reason(self, error: Exception) -> str:
        """The first line of what torch says; ClustersimError where nothing more can run on the GPU."""
        if isinstance(error, self.torch.cuda.OutOfMemoryError):
            self.torch.cuda.empty_cache()
            return "the GPU's memory is full"
        said = (str(error).strip() or type(error).__name__).splitlines()[0]
        if "CUDA error" in said:
            # After such an error the process cannot use the GPU any more.
            raise ClustersimError(f"the GPU has failed: {said}; start again with --resume") from error
        return said[:200]

    # --- time ----------------------------------------------------------------------------------

    def _time(self, way: Way) -> Timing:
        t = self.torch
        with way.context():
            stream = t.cuda.Stream()
            stream.wait_stream(t.cuda.current_stream())
            with t.cuda.stream(stream):
                for k in range(WARM_UP):
                    way.calls[k % len(way.calls)]()
            t.cuda.current_stream().wait_stream(stream)
            t.cuda.synchronize()
            once = self._between(way.calls[0], way.calls[-1])
            # Whole rounds, so that the first sets of a replay are as cold as the others.
            rounds = min(math.ceil(REPLAY / once / len(way.calls)), MOST_CALLS // len(way.calls))
            calls = list(way.calls) * max(1, rounds)
            try:
                graph = self._recorded(calls)
            except t.cuda.OutOfMemoryError:
                raise
            except RuntimeError:
                # Whatever cannot be recorded can still be called; what is broken breaks again.
                return Timing(self._repeated(partial(_each, calls), len(calls)), f"{way.name}, eager")
            return Timing(self._repeated(graph.replay, len(calls)), way.name)

    def _recorded(self, calls: Sequence[Call]) -> Any:
        graph = self.torch.cuda.CUDAGraph()
        with self.torch.cuda.graph(graph):
            _each(calls)
        return graph

    def _repeated(self, replay: Call, number: int) -> list[float]:
        """Seconds of a call, one for each replay of `number` calls."""
        replay()
        seconds: list[float] = []
        while len(seconds) < LEAST_REPLAYS or (
            len(seconds) < MOST_REPLAYS and sum(seconds) * number < BUDGET
        ):
            # The replay before keeps the GPU busy while the host hands over the one that is timed.
            seconds.append(self._between(replay, replay) / number)
        return seconds

    def _between(self, before: Call, call: Call) -> float:
        """Seconds that a call takes the GPU after another one."""
        start, end = (self.torch.cuda.Event(enable_timing=True) for _ in range(2))
        before()
        start.record()
        call()
        end.record()
        end.synchronize()
        return max(float(start.elapsed_time(end)) * 1e-3, 1e-9)

    def _wake(self) -> None:
        """Half a second of work before the first case: an idle GPU's clocks are low."""
        if self._awake:
            return
        self._awake = True
        side = self.normal(4096, 4096)
        busy = 0.0
        while busy < 0.5:
            busy += self._between(partial(self.torch.mm, side, side), partial(self.torch.mm, side, side))

    # --- memory --------------------------------------------------------------------------------

    def normal(self, *shape: int) -> Any:
        """Normal random numbers, bf16."""
        return self.torch.randn(*shape, device="cuda", dtype=self.torch.bfloat16)

    def kept(self, what: object, sets: int, make: Call) -> list[Any]:
        """`sets` of the same inputs as in the case before, if it had them; `make` makes one."""
        if self._kept[0] != what:
            self._forget()
            self._kept = (what, [])
        had = self._kept[1]
        had.extend(make() for _ in range(sets - len(had)))
        return had[:sets]

    def _forget(self) -> None:
        self._kept = (None, [])
        self.torch.cuda.empty_cache()

    # --- what is called ------------------------------------------------------------------------

    def compiled(self, name: str, function: Callable[..., Any]) -> Any:
        """The function as one kernel; compiled once for all sizes."""
        if name not in self._compiled:
            self._compiled[name] = self.torch.compile(function, dynamic=True)
        return self._compiled[name]

    def attention(self, kind: str) -> Callable[[], AbstractContextManager[Any]]:
        """The context in which scaled_dot_product_attention takes one kind of kernel and no other.

        kind  a name in torch.nn.attention.SDPBackend
        """
        module = self.torch.nn.attention
        return partial(module.sdpa_kernel, getattr(module.SDPBackend, kind))

    def _asked(self) -> dict[str, str]:
        uuid = getattr(self.properties, "uuid", None)
        which = f"--id=GPU-{uuid}" if uuid else f"--id={self.torch.cuda.current_device()}"
        command = ["nvidia-smi", which, f"--query-gpu={','.join(_FACTS)}", "--format=csv,noheader"]
        try:
            done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=30)
        except (OSError, subprocess.SubprocessError):
            # Only facts to explain times by; a container may lack the program.
            return {}
        return dict(zip(_FACTS, (cell.strip() for cell in done.stdout.split(",")), strict=False))


def _each(calls: Sequence[Call]) -> None:
    for call in calls:
        call()


# --- the ways to run each kind of case -----------------------------------------------------------

#: Kinds of attention kernels that are tried; "MATH" writes all scores to HBM, which nobody serves with.
_SDPA = ("FLASH_ATTENTION", "CUDNN_ATTENTION", "EFFICIENT_ATTENTION")


def _gemm(b: TorchBackend, case: Gemm, sets: int) -> Iterator[Way]:
    t = b.torch
    weights = b.kept(case_weights(case), sets, lambda: _numbers(b, case.format, case.n, case.k))
    inputs = [_numbers(b, case.format, case.m, case.k) for _ in range(sets)]
    if case.format == "bf16":
        linear = t.nn.functional.linear
        calls = [partial(linear, x, w) for x, w in zip(inputs, weights, strict=True)]
        yield Way("torch.nn.functional.linear", calls)
        return
    # Scales of 1 for each whole tensor; the quantisation of the inputs is not in the time.
    one = t.ones((), device="cuda")
    options = {"scale_a": one, "scale_b": one, "out_dtype": t.bfloat16, "use_fast_accum": True}
    calls = [partial(t._scaled_mm, x, w.t(), **options) for x, w in zip(inputs, weights, strict=True)]
    yield Way("torch._scaled_mm", calls)


def case_weights(case: Gemm) -> object:
    """What cases must agree in to share weights."""
    return ("gemm", case.format, case.n, case.k)


def _numbers(b: TorchBackend, fmt: str, *shape: int) -> Any:
    if fmt == "bf16":
        return b.normal(*shape)
    t = b.torch
    if fmt != "fp8":
        raise CannotRunError(f"{fmt}: plain PyTorch has no such product")
    if not hasattr(t, "_scaled_mm") or t.cuda.get_device_capability() < FP8_CAPABILITY:
        raise CannotRunError(f"{fmt}: this GPU or this PyTorch has no fp8 products")
    return b.normal(*shape).to(t.float8_e4m3fn)


def _prefill(b: TorchBackend, case: Prefill, sets: int) -> Iterator[Way]:
    shape = case.batch, case.length, case.heads, case.kv_heads, case.head_dim
    yield from _sdpa(b, sets, case.length, *shape, is_causal=True)


def _decode(b: TorchBackend, case: Decode, sets: int) -> Iterator[Way]:
    shape = case.batch, case.length, case.heads, case.kv_heads, case.head_dim
    yield from _sdpa(b, sets, 1, *shape)


def _sdpa(
    b: TorchBackend,
    sets: int,
    new: int,
    batch: int,
    length: int,
    heads: int,
    kv_heads: int,
    head_dim: int,
    **how: Any,
) -> Iterator[Way]:
    # Heads lie beside each other in a token, as projections leave them.
    queries = [b.normal(batch, new, heads, head_dim).transpose(1, 2) for _ in range(sets)]
    keys = [b.normal(batch, length, kv_heads, head_dim).transpose(1, 2) for _ in range(sets)]
    values = [b.normal(batch, length, kv_heads, head_dim).transpose(1, 2) for _ in range(sets)]
    if heads != kv_heads:
        how["enable_gqa"] = True
    function = b.torch.nn.functional.scaled_dot_product_attention
    calls = [partial(function, *qkv, **how) for qkv in zip(queries, keys, values, strict=True)]
    for kind in _SDPA:
        yield Way(f"scaled_dot_product_attention {kind.lower()}", calls, b.attention(kind))


def _mla_prefill(b: TorchBackend, case: MlaPrefill, sets: int) -> Iterator[Way]:
    function = b.torch.nn.functional.scaled_dot_product_attention
    wide = MLA_NOPE + MLA_ROPE

    def heads(width: int) -> list[Any]:
        return [b.normal(case.batch, case.length, case.heads, width).transpose(1, 2) for _ in range(sets)]

    queries, keys = heads(wide), heads(wide)
    for width, kinds in ((MLA_V, _SDPA), (wide, _SDPA[:1])):
        # Kernels that want keys and values of one width get values filled up to it, as engines do.
        note = "" if width == MLA_V else f", values padded to {wide}"
        qkv = zip(queries, keys, heads(width), strict=True)
        calls = [partial(function, *one, is_causal=True) for one in qkv]
        for kind in kinds:
            yield Way(f"scaled_dot_product_attention {kind.lower()}{note}", calls, b.attention(kind))


def _mla_decode(b: TorchBackend, case: MlaDecode, sets: int) -> Iterator[Way]:
    t = b.torch
    wide = MLA_KV_RANK + MLA_ROPE
    latents = [b.normal(case.batch, case.length, wide) for _ in range(sets)]
    queries = [b.normal(case.batch, case.heads, wide) * wide**-0.5 for _ in range(sets)]

    def products(query: Any, latent: Any) -> Any:
        scores = t.matmul(query, latent.transpose(1, 2))
        return t.matmul(t.softmax(scores, dim=-1), latent[..., :MLA_KV_RANK])

    def fused(query: Any, latent: Any) -> Any:
        # All heads share one key: they are rows of one head's query.
        q, kv = query.unsqueeze(1), latent.unsqueeze(1)
        attention = t.nn.functional.scaled_dot_product_attention
        return attention(q, kv, kv[..., :MLA_KV_RANK], scale=1.0).squeeze(1)

    pairs = list(zip(queries, latents, strict=True))
    yield Way("torch.matmul, softmax, torch.matmul", [partial(products, *pair) for pair in pairs])
    name = "scaled_dot_product_attention efficient_attention"
    yield Way(name, [partial(fused, *pair) for pair in pairs], b.attention("EFFICIENT_ATTENTION"))


def _experts(b: TorchBackend, case: Experts, sets: int) -> Iterator[Way]:
    t = b.torch
    counts = rank_counts(case)
    pairs, inner = int(counts.sum()), case.inter // case.tp
    weights = b.kept(
        ("experts", len(counts), case.hidden, inner),
        sets,
        lambda: (b.normal(len(counts), 2 * inner, case.hidden), b.normal(len(counts), case.hidden, inner)),
    )
    # The rank sees the tokens of the whole group and takes its own, as the measured layers do.
    inputs = [b.normal(case.tokens, case.hidden) for _ in range(sets)]
    # Neighbours go to one expert, so that none gets a token twice.
    token = t.arange(pairs, device="cuda") % case.tokens
    share = t.rand(pairs, 1, device="cuda", dtype=t.bfloat16)
    ends = t.tensor(counts.cumsum().tolist(), device="cuda", dtype=t.int32)
    held = enumerate(zip(counts, counts.cumsum(), strict=True))
    bounds = [(e, int(end - n), int(end)) for e, (n, end) in held if n]
    grouped_mm = getattr(t.nn.functional, "grouped_mm", None) or getattr(t, "_grouped_mm", None)

    def grouped(rows: Any, matrices: Any) -> Any:
        assert grouped_mm is not None
        return grouped_mm(rows, matrices.transpose(-2, -1), offs=ends)

    def one_by_one(rows: Any, matrices: Any) -> Any:
        linear = t.nn.functional.linear
        return t.cat([linear(rows[start:end], matrices[e]) for e, start, end in bounds])

    def layer(product: Callable[[Any, Any], Any], x: Any, up: Any, down: Any) -> Any:
        gate, value = product(x.index_select(0, token), up).chunk(2, dim=-1)
        out = product(t.nn.functional.silu(gate) * value, down)
        return t.zeros_like(x).index_add_(0, token, out * share)

    if grouped_mm is not None:
        calls = [partial(layer, grouped, x, *w) for x, w in zip(inputs, weights, strict=True)]
        yield Way("torch grouped_mm layer", calls)
    calls = [partial(layer, one_by_one, x, *w) for x, w in zip(inputs, weights, strict=True)]
    yield Way("torch linear per expert", calls, last=True)


def _elementwise(b: TorchBackend, case: Elementwise, sets: int) -> Iterator[Way]:
    function, inputs = _OPS[case.op](b, case)
    made = [inputs() for _ in range(sets)]
    yield Way("torch.compile", [partial(b.compiled(case.op, function), *one) for one in made])
    yield Way("torch", [partial(function, *one) for one in made])


_Made: TypeAlias = tuple[Callable[..., Any], Callable[[], tuple[Any, ...]]]


def _embedding(b: TorchBackend, case: Elementwise) -> _Made:
    t = b.torch
    table = b.kept(("embedding", case.width), 1, lambda: b.normal(VOCAB, case.width))[0]
    return t.nn.functional.embedding, lambda: (t.randint(VOCAB, (case.tokens,), device="cuda"), table)


def _norm(b: TorchBackend, case: Elementwise) -> _Made:
    t = b.torch
    scale = b.normal(case.width)

    def norm(x: Any, weight: Any) -> Any:
        return t.nn.functional.rms_norm(x, (x.shape[-1],), weight, 1e-6)

    return norm, lambda: (b.normal(case.tokens, case.width), scale)


def _rope(b: TorchBackend, case: Elementwise) -> _Made:
    t = b.torch
    head_dim = case.width // case.heads
    cos, sin = (b.normal(case.tokens, 1, head_dim // 2) for _ in range(2))

    def rope(x: Any, cos: Any, sin: Any) -> Any:
        first, second = x.chunk(2, dim=-1)
        return t.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)

    return rope, lambda: (b.normal(case.tokens, rotated(case) // head_dim, head_dim), cos, sin)


def _activation(b: TorchBackend, case: Elementwise) -> _Made:
    silu = b.torch.nn.functional.silu

    def activation(x: Any) -> Any:
        gate, value = x.chunk(2, dim=-1)
        return silu(gate) * value

    return activation, lambda: (b.normal(case.tokens, 2 * (case.expanded // case.tp)),)


def _add(b: TorchBackend, case: Elementwise) -> _Made:
    return b.torch.add, lambda: (b.normal(case.tokens, case.width), b.normal(case.tokens, case.width))


_OPS: dict[str, Callable[[TorchBackend, Elementwise], _Made]] = {
    "emb": _embedding,
    "input_layernorm": _norm,
    "post_attention_layernorm": _norm,
    "attn_rope": _rope,
    "mlp_act": _activation,
    "add": _add,
}

WAYS: dict[type[Any], Callable[[TorchBackend, Any, int], Iterator[Way]]] = {
    Gemm: _gemm,
    Prefill: _prefill,
    Decode: _decode,
    MlaPrefill: _mla_prefill,
    MlaDecode: _mla_decode,
    Experts: _experts,
    Elementwise: _elementwise,
}
