"""Prices of kernels whose sizes are given one by one: `clustersim price gemm --m 1,16,256 --n 4096 --k 7168`.

What may be asked stands in the table FLAGS at the foot; a kernel that is not in it is asked by its columns.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from typing import Any

import numpy as np

from clustersim.errors import ClustersimError, nearest, pick
from clustersim.physics.calibration import ORIGINS
from clustersim.physics.kernels import AUTO, KERNELS, Priced, price_calls
from clustersim.spec.gpus import gpu_named
from clustersim.spec.hardware import Gpu
from clustersim.spec.model import FORMAT_BYTES
from clustersim.study.kernel_families import rows_of_table
from clustersim.study.kernel_rows import FORMATS, KEPT
from clustersim.study.price import check_format

#: A GPU to name where the GPU plays no part.
BEST_KNOWN = "h100_sxm"
#: Prices of one command at most.
MOST_PRICES = 10_000
#: Flags whose values are words, with the words.
_WORDS: Mapping[str, Mapping[str, Any]] = {"dtype": FORMATS, "kv-dtype": KEPT, "weights-dtype": KEPT}

#: Flag → its one value.
One = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Flags:
    """What sizes of a kernel are called on the command line.

    wanted    flags that must be given
    columns   a value of each flag → columns of the kernel, one number each, or a list for counts
    defaults  flags that may be left out → what they are then
    free      flags that may be 0
    lists     flags whose value is one list
    """

    wanted: tuple[str, ...]
    columns: Callable[[One], Mapping[str, Any]]
    defaults: Mapping[str, Any] = field(default_factory=dict)
    free: tuple[str, ...] = ()
    lists: tuple[str, ...] = ()


def price_flags(kernel: str, gpus: str, given: Sequence[str], library: str = AUTO) -> dict[str, Any]:
    """Prices of one kernel at every combination of the values given.

    kernel   of KERNELS, with "-" for "_" if one likes
    gpus     names, between commas if several
    given    further words of the command line: --flag VALUES, several between commas, or 1..64 for all
             powers of two from 1 to 64
    Returns  {kernel, varies, prices: [{gpu, flags, seconds, origin, outside, roofline, basis}]}; times in s,
             outside in octaves, None where nothing was measured
    Raises   ClustersimError that says which flags there are
    """
    name = kernel.replace("-", "_")
    pick(KERNELS, name, "kernel")
    flags = flags_of(name)
    sizes = _values(name, flags, given)
    if not gpus:
        raise ClustersimError(
            f"{kernel}: --gpu missing; a name such as {BEST_KNOWN}, or several between commas"
        )
    values = {"gpu": _listed("gpu", gpus), **sizes}
    count = int(np.prod([len(one) for one in values.values()]))
    if count > MOST_PRICES:
        raise ClustersimError(
            f"these are {count:,} prices; at most {MOST_PRICES:,} are shown, a file may have more"
        )
    prices = []
    for combination in product(*values.values()):
        asked = dict(zip(values, combination, strict=True))
        prices.append(_priced(name, flags, asked, library))
    return {
        "kernel": name,
        "varies": [flag for flag, some in values.items() if len(some) > 1],
        "prices": prices,
    }


def flags_of(kernel: str) -> Flags:
    """The flags of a kernel: those of the table, else its columns."""
    if kernel in FLAGS:
        return FLAGS[kernel]
    names = {column.replace("_", "-"): column for column in KERNELS[kernel].columns}
    return Flags(
        tuple(names),
        lambda one: {column: one[flag] for flag, column in names.items()},
        {"dtype": "bf16"},
        lists=("counts",),
    )


def one_call(flags: Flags, one: One) -> Mapping[str, Any]:
    """Columns of the kernel for one value of each flag: a number each, or a list for counts.

    Raises   ClustersimError where the values do not fit one another
    """
    heads, kv_heads = one.get("heads"), one.get("kv-heads")
    if heads and kv_heads and heads % kv_heads:
        raise ClustersimError(f"{kv_heads:.0f} KV heads do not divide {heads:.0f} heads")
    return flags.columns(one)


def _values(kernel: str, flags: Flags, given: Sequence[str]) -> dict[str, list[Any]]:
    """Flag → its values, in the order of the table; defaults where nothing is given."""
    known = (*flags.wanted, *flags.defaults)
    words = _words(kernel, known, given)
    missing = [flag for flag in flags.wanted if flag not in words]
    if missing:
        raise ClustersimError(
            f"{kernel}: {', '.join(f'--{flag}' for flag in missing)} missing; it is asked by {_usage(flags)}"
        )
    return {
        flag: _parsed(flag, words[flag], flags) if flag in words else [flags.defaults[flag]] for flag in known
    }


def _words(kernel: str, known: Sequence[str], given: Sequence[str]) -> dict[str, str]:
    words: dict[str, str] = {}
    rest = list(given)
    while rest:
        word, is_, value = rest.pop(0).partition("=")
        flag = word.removeprefix("--").replace("_", "-")
        if not word.startswith("--") or flag not in known:
            near, all_ = nearest(flag, known), ", ".join(f"--{one}" for one in known)
            raise ClustersimError(f'{kernel}: "{word}" is no flag of it{near}; there are {all_}')
        if not is_ and not rest:
            raise ClustersimError(f"{kernel}: {word} has no value")
        if flag in words:
            raise ClustersimError(f"{kernel}: {word} is given twice; write several values as {word} 1,2")
        words[flag] = value if is_ else rest.pop(0)
    return words


def _usage(flags: Flags) -> str:
    wanted = " ".join(f"--{flag}" for flag in flags.wanted)
    return wanted + "".join(
        f" [--{flag} {default}]" if default is not None else f" [--{flag}]"
        for flag, default in flags.defaults.items()
    )


def _parsed(flag: str, text: str, flags: Flags) -> list[Any]:
    if flag in flags.lists:
        return [[_number(flag, part, free=True) for part in _listed(flag, text)]]
    if flag in _WORDS:
        return [_word(flag, part) for part in _listed(flag, text)]
    if flag == "distribution":
        return _listed(flag, text)
    return [number for part in _listed(flag, text) for number in _numbers(flag, part, flag in flags.free)]


def _listed(flag: str, text: str) -> list[str]:
    parts = [part.strip() for part in text.split(",")]
    if not all(parts):
        raise ClustersimError(f'--{flag} {text or "nothing"}: an empty value; several stand as in "1,16"')
    return parts


def _word(flag: str, text: str) -> str:
    return str(pick(_WORDS[flag], text.lower(), f"--{flag}"))


def _numbers(flag: str, text: str, free: bool) -> list[float]:
    low, dots, high = text.partition("..")
    first = _number(flag, low, free)
    if not dots:
        return [first]
    last = _number(flag, high, free)
    if not 1 <= first <= last:
        raise ClustersimError(f'--{flag} {text}: doubles from the first to the last, as in "1..64"')
    steps = int(np.floor(np.log2(last / first) + 1e-9))
    return [first * 2.0**step for step in range(steps + 1)]


def _number(flag: str, text: str, free: bool) -> float:
    try:
        value = float(text)
    except ValueError:
        value = float("nan")
    least = 0 if free else 1
    if not (least <= value <= 2**53 and value % 1 == 0):
        raise ClustersimError(f"--{flag} {text} is not a whole number from {least} on")
    return value


def _priced(kernel: str, flags: Flags, asked: dict[str, Any], library: str) -> dict[str, Any]:
    gpu, form = gpu_named(asked["gpu"]), asked["dtype"]
    check_format(gpu, form, f"--dtype {form}")
    columns = {name: np.array([value], dtype=float) for name, value in one_call(flags, asked).items()}
    priced = price_calls(KERNELS[kernel], gpu, form, columns, library)
    least = float(KERNELS[kernel].least(gpu, form, columns)[0])
    return {
        "gpu": gpu.name,
        "flags": {flag: value for flag, value in asked.items() if _counts(flag, asked)},
        "seconds": float(priced.seconds[0]),
        "origin": ORIGINS[int(priced.origin[0])],
        "outside": None if priced.basis is None else float(priced.outside[0]),
        "roofline": least,
        "basis": _basis(priced, gpu),
    }


def _counts(flag: str, asked: One) -> bool:
    """Whether a flag has a say: counts stand for a load pattern and what it is drawn from."""
    instead = ("ep", "distribution", "experts") if asked.get("counts") else ()
    return flag not in ("gpu", *instead) and asked[flag] is not None


def _basis(priced: Priced, gpu: Gpu) -> dict[str, Any] | None:
    if priced.basis is None:
        return None
    return {**priced.basis._asdict(), "relative": priced.basis.gpu != gpu.name}


# ---- what each kernel is asked by -----------------------------------------------------------------


def _attention(one: One, tokens: float, pairs: float, context: float) -> dict[str, Any]:
    """tokens, pairs, context  of one sequence"""
    kv = one["kv-dtype"] or one["dtype"]
    return {
        "sequences": one["batch"],
        "tokens": one["batch"] * tokens,
        "pairs": one["batch"] * pairs,
        "context": one["batch"] * context,
        "heads": one["heads"],
        "kv_bytes": FORMAT_BYTES[kv],
    }


def _of_prompts(one: One) -> dict[str, Any]:
    new, prior = one["isl"], one["prior"]
    return _attention(one, new, new * (prior + (new + 1.0) / 2.0), prior + new)


def _of_steps(one: One) -> dict[str, Any]:
    return _attention(one, 1.0, one["kv-len"], one["kv-len"])


def _grouped(one: One) -> dict[str, Any]:
    return {"kv_heads": one["kv-heads"], "head_dim": one["head-dim"]}


def _latent(one: One) -> dict[str, Any]:
    return {name.replace("-", "_"): one[name] for name in _LATENT}


def _around(one: One) -> dict[str, Any]:
    """The projections of a module."""
    weights = FORMAT_BYTES[one["weights-dtype"]]
    return {"hidden": one["hidden"], "q_rank": one["q-rank"], "weight_bytes": weights}


def _experts(one: One) -> dict[str, Any]:
    """The rank that gets most of a load pattern, or the counts themselves."""
    if one["counts"] is None:
        return _pattern(one)
    total = sum(one["counts"])
    if not total:
        raise ClustersimError("--counts: no expert has a token")
    if one["inter"] % one["tp"]:
        raise ClustersimError(f"--tp = {one['tp']:.0f} does not divide --inter = {one['inter']:.0f}")
    held = len(one["counts"])
    return {
        "counts": one["counts"],
        "hidden": one["hidden"],
        "inter": one["inter"] / one["tp"],
        "gated": 1.0,
        "top_k": one["top-k"],
        "experts_held": held,
        "tokens": one["tokens"] or total / one["top-k"],
        "even_rows": total / held,
    }


def _pattern(one: One) -> dict[str, Any]:
    """As the rows of benchmarks name it, by their reader: a flag and a row of a file cost the same."""
    missing = [flag for flag in ("tokens", "experts") if one[flag] is None]
    if missing:
        raise ClustersimError(
            f"--{missing[0]} missing, unless --counts says what each expert of the rank gets"
        )
    row = {
        "gpu": BEST_KNOWN,
        "dtype": "bf16",
        **{_FUSED[flag]: one[flag] for flag in _FUSED},
    }
    table = {name: np.array([value]) for name, value in row.items()}
    try:
        rows = rows_of_table(table, "--distribution", "moe_kernels")
    except ClustersimError as error:
        # There is one row only, whose columns the user knows as flags.
        said = str(error).removeprefix("line 2: ")
        for flag, name in _FUSED.items():
            said = said.replace(f"{name} =", f"--{flag} =")
        raise ClustersimError(said) from error
    return {name: values[0] for name, values in rows[0].columns.items()}


def _moved(per_token: float) -> Flags:
    """A kernel that moves so many bytes per token and number of its width."""
    return Flags(
        ("tokens", "width"),
        lambda one: {"tokens": one["tokens"], "bytes": per_token * one["tokens"] * one["width"]},
        {"dtype": "bf16"},
    )


#: Sizes of DeepSeek-V3's attention. Source: arXiv 2412.19437, section 4.2.
_LATENT = {"kv-rank": 512.0, "rope-dim": 64.0, "nope-dim": 128.0, "v-dim": 128.0}
_AROUND = {"hidden": 7168.0, "q-rank": 1536.0, "weights-dtype": "fp8"}
_NUMBERS = {"dtype": "bf16", "kv-dtype": None}
#: Flag → column of moe_kernels.
_FUSED = {
    "tokens": "num_tokens_global",
    "hidden": "hidden_size",
    "inter": "inter_size",
    "top-k": "topk",
    "experts": "num_experts",
    "ep": "moe_ep",
    "tp": "moe_tp",
    "distribution": "distribution",
}
_PROMPT, _STEP = ("batch", "isl", "heads"), ("batch", "kv-len", "heads")

FLAGS: dict[str, Flags] = {
    "gemm": Flags(
        ("m", "n", "k"), lambda one: {name: one[name] for name in ("m", "n", "k")}, {"dtype": "bf16"}
    ),
    "attention_prefill": Flags(
        (*_PROMPT, "kv-heads"),
        lambda one: {**_of_prompts(one), **_grouped(one)},
        {"head-dim": 128.0, "prior": 0.0, **_NUMBERS},
        free=("prior",),
    ),
    "attention_decode": Flags(
        (*_STEP, "kv-heads"),
        lambda one: {**_of_steps(one), **_grouped(one)},
        {"head-dim": 128.0, **_NUMBERS},
    ),
    "mla_prefill": Flags(
        _PROMPT,
        lambda one: {**_of_prompts(one), **_latent(one)},
        {"prior": 0.0, **_LATENT, **_NUMBERS},
        free=("prior",),
    ),
    "mla_decode": Flags(_STEP, lambda one: {**_of_steps(one), **_latent(one)}, {**_LATENT, **_NUMBERS}),
    **dict.fromkeys(
        ("experts", "expert_up", "expert_down"),
        Flags(
            ("hidden", "inter", "top-k"),
            _experts,
            {
                **dict.fromkeys(("tokens", "experts", "counts")),
                "ep": 1.0,
                "tp": 1.0,
                "distribution": "balanced",
                "dtype": "bf16",
            },
            lists=("counts",),
        ),
    ),
    "mla_prefill_module": Flags(
        _PROMPT,
        lambda one: {**_of_prompts(one), **_latent(one), **_around(one)},
        {"prior": 0.0, **_LATENT, **_AROUND, **_NUMBERS},
        free=("prior",),
    ),
    "mla_decode_module": Flags(
        _STEP,
        lambda one: {**_of_steps(one), **_latent(one), **_around(one)},
        {**_LATENT, **_AROUND, **_NUMBERS},
    ),
    # Bytes of a number of the width that are read and written: see physics.elementwise.
    "norm": _moved(4.0),
    "rotary": _moved(4.0),
    "activation": _moved(6.0),
    "residual": _moved(6.0),
    "embedding": _moved(4.0),
    "permute": _moved(4.0),
    "unpermute": _moved(4.0),
    "top_k": _moved(2.0),
    "sampling": _moved(8.0),
}
