"""What each kernel is asked by: the flags of `clustersim price`, which name the columns of lists, too.

What may be asked stands in the table FLAGS at the foot, and what a flag means in MEANINGS.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from clustersim.errors import ClustersimError, nearest
from clustersim.spec.model import FORMAT_BYTES
from clustersim.study.expert_loads import LOADS, known_load
from clustersim.study.kernel_families import rows_of_table
from clustersim.study.kernel_rows import FORMATS, KEPT, KV_KEPT, MOST, MOST_EXPERTS, kv_kept, size_problem

#: A GPU to name where the GPU plays no part.
BEST_KNOWN = "h100_sxm"
#: Flags whose values are words, with the words.
_WORDS: Mapping[str, Mapping[str, str]] = {"dtype": FORMATS, "kv-dtype": KV_KEPT, "weights-dtype": KEPT}

#: Flag → its one value.
One = Mapping[str, Any]


class Unfit(Exception):
    """Values of flags that are wrong, in a sentence that holds the flags in braces.

    A command line and a file call them otherwise: `said` fills them in.
    """

    def said(self, one: One, way: Callable[[str, str], str]) -> str:
        """The sentence.

        way   flag, value as text or "" for none → what people know it as
        """
        return str(self).format_map({flag: way(flag, said_value(value)) for flag, value in one.items()})


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

    def all(self) -> tuple[str, ...]:
        """Every flag, those that must be given first."""
        return (*self.wanted, *self.defaults)


def kernel_of(asked: str) -> str:
    """The kernel that is called under a name of FLAGS: "gemm" for a gate."""
    return "gemm" if asked in PRODUCTS else asked


def one_call(flags: Flags, one: One) -> Mapping[str, Any]:
    """Columns of the kernel for one value of each flag: a number each, or a list for counts.

    Raises   Unfit where the values do not fit one another
    """
    heads, kv_heads = one.get("heads"), one.get("kv-heads")
    if heads and kv_heads and heads % kv_heads:
        raise Unfit("{kv-heads} does not divide {heads}")
    return flags.columns(one)


def parsed(flags: Flags, flag: str, text: str) -> Any:
    """One value of a flag.

    Raises   Unfit that says what is wrong with the text, without braces
    """
    if flag in _WORDS:
        known = _WORDS[flag]
        if text.lower() not in known:
            raise Unfit(f"is no known dtype{nearest(text.lower(), known)}; there are {', '.join(known)}")
        return known[text.lower()]
    if flag == "distribution":
        if not known_load(text.lower()):
            raise Unfit(f"is no known load; there are {LOADS}")
        return text.lower()
    if flag in flags.lists:
        parts = text.replace(";", ",").split(",")
        if len(parts) > MOST_EXPERTS:
            raise Unfit(f"has {len(parts):,} experts; at most {MOST_EXPERTS:,} are allowed")
        try:
            return [_number(part, 0) for part in parts]
        except Unfit as error:
            raise Unfit(f'is no list of tokens of each expert, such as "12,0,7": one {error}') from None
    return _number(text, 0 if flag in flags.free else 1, MOST_EXPERTS if flag == "experts" else MOST)


def _number(text: str, least: int, most: int = MOST) -> float:
    try:
        value = float(text)
    except ValueError:
        value = float("nan")
    problem = size_problem(value, least, most)
    if problem:
        raise Unfit(problem)
    return value


def said_value(value: Any) -> str:
    """A flag's value as people write it; "" for none."""
    if value is None:
        return ""
    if isinstance(value, list | tuple):
        return ",".join(said_value(one) for one in value)
    return f"{value:.0f}" if isinstance(value, float) else str(value)


# ---- attention ------------------------------------------------------------------------------------


def _attention(one: One, tokens: float, pairs: float, context: float) -> dict[str, Any]:
    """tokens, pairs, context  of one sequence"""
    kv = one["kv-dtype"] or kv_kept(one["dtype"])
    return {
        "sequences": one["batch"],
        "tokens": one["batch"] * tokens,
        "pairs": one["batch"] * pairs,
        "context": one["batch"] * context,
        "heads": one["heads"],
        "kv_bytes": FORMAT_BYTES[kv],
    }


def _of_prompts(one: One, tokens: str = "isl") -> dict[str, Any]:
    new, prior = one[tokens], one["prior"]
    return _attention(one, new, new * (prior + (new + 1.0) / 2.0), prior + new)


def _of_steps(one: One) -> dict[str, Any]:
    return _attention(one, 1.0, one["kv-len"], one["kv-len"])


def _of_both(one: One) -> dict[str, Any]:
    """Chunks of prompts and new tokens of other sequences in one call."""
    others = one["decode-batch"]
    decode = {"decode_sequences": others, "decode_context": others * one["kv-len"]}
    return {**_of_prompts(one, "new"), **decode}


def _grouped(one: One) -> dict[str, Any]:
    return {"kv_heads": one["kv-heads"], "head_dim": one["head-dim"]}


def _latent(one: One) -> dict[str, Any]:
    return {name.replace("-", "_"): one[name] for name in _LATENT}


def _around(one: One) -> dict[str, Any]:
    """The projections of a module."""
    weights = FORMAT_BYTES[one["weights-dtype"]]
    return {"hidden": one["hidden"], "q_rank": one["q-rank"], "weight_bytes": weights}


# ---- experts --------------------------------------------------------------------------------------


def _experts(one: One) -> dict[str, Any]:
    """The rank that gets most of a load pattern, or the counts themselves."""
    if one["counts"] is None:
        return _pattern(one)
    _check_counts(one)
    total, held = sum(one["counts"]), len(one["counts"])
    if one["inter"] % one["tp"]:
        raise Unfit("{tp} does not divide {inter}")
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


def _check_counts(one: One) -> None:
    """Counts say a rank's load themselves; what is said beside them must agree."""
    total, held = sum(one["counts"]), len(one["counts"])
    of_all, tokens = one["experts"], one["tokens"]
    if not total:
        raise Unfit("{counts}: no expert has a token")
    if one["distribution"] != "balanced":
        raise Unfit("{distribution} and {counts} both say what the experts get; leave one out")
    if of_all and of_all != held * one["ep"]:
        raise Unfit(f"{{counts}} are {held} experts of a rank, but {{experts}} over {{ep}} are others")
    if of_all and one["top-k"] > of_all:
        raise Unfit(f"{{top-k}} is more than the {of_all:.0f} experts there are")
    if tokens and max(one["counts"]) > tokens:
        raise Unfit("{counts}: an expert gets no token twice, and {tokens} are fewer")
    slots = (tokens or 0.0) * one["top-k"]
    if tokens and (total > slots or (of_all == held and total != slots)):
        raise Unfit(f"{{counts}} sum to {total:.0f}, but {{tokens}} with {{top-k}} each give {slots:.0f}")


def _pattern(one: One) -> dict[str, Any]:
    """As the rows of benchmarks name it, by their reader: a flag and a row of a file cost the same."""
    for flag in ("tokens", "experts"):
        if one[flag] is None:
            raise Unfit(f"{{{flag}}} is missing, unless {{counts}} says what each expert of the rank gets")
    row = {
        "gpu": BEST_KNOWN,
        "dtype": "bf16",
        **{_FUSED[flag]: one[flag] for flag in _FUSED},
    }
    table = {name: np.array([value]) for name, value in row.items()}
    try:
        rows = rows_of_table(table, "sizes", "moe_kernels")
    except ClustersimError as error:
        # There is one row only, whose columns the user knows as flags.
        said = str(error).removeprefix("line 2: ").replace("{", "{{").replace("}", "}}")
        for flag, name in _FUSED.items():
            said = re.sub(rf'\b{name} = ("[^"]*"|\S+)', f"{{{flag}}}", said)
        raise Unfit(said) from error
    return {name: values[0] for name, values in rows[0].columns.items()}


# ---- the table ------------------------------------------------------------------------------------


def _moved(per_token: float) -> Flags:
    """A kernel that moves so many bytes per token and number of its width."""
    return Flags(
        ("tokens", "width"),
        lambda one: {"tokens": one["tokens"], "bytes": per_token * one["tokens"] * one["width"]},
        {"dtype": "bf16"},
    )


def _product(m: str, n: str, k: str) -> Flags:
    """A dense product whose sizes have names of their own."""
    return Flags((m, n, k), lambda one: {"m": one[m], "n": one[n], "k": one[k]}, {"dtype": "bf16"})


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

#: Dense products that people know by other names than gemm → their flags.
PRODUCTS: dict[str, Flags] = {
    "gate": _product("tokens", "experts", "hidden"),
    "lm_head": _product("tokens", "vocab", "hidden"),
}

FLAGS: dict[str, Flags] = {
    "gemm": _product("m", "n", "k"),
    **PRODUCTS,
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
    "attention_mixed": Flags(
        ("new", "decode-batch", "kv-len", "heads", "kv-heads"),
        lambda one: {**_of_both(one), **_grouped(one)},
        {"batch": 1.0, "head-dim": 128.0, "prior": 0.0, **_NUMBERS},
        free=("prior",),
    ),
    "mla_prefill": Flags(
        _PROMPT,
        lambda one: {**_of_prompts(one), **_latent(one)},
        {"prior": 0.0, **_LATENT, **_NUMBERS},
        free=("prior",),
    ),
    "mla_decode": Flags(_STEP, lambda one: {**_of_steps(one), **_latent(one)}, {**_LATENT, **_NUMBERS}),
    **dict.fromkeys(
        ("experts", "expert_up", "expert_activation", "expert_down"),
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

#: Flag → what it means.
MEANINGS: dict[str, str] = {
    "m": "tokens, the rows of a dense product [m, k] x [k, n]",
    "n": "columns of its weights",
    "k": "rows of its weights",
    "tokens": "tokens; for experts those of the whole group of `--ep` ranks",
    "hidden": "width of the residual stream",
    "vocab": "words of the vocabulary, or those of this rank",
    "width": "numbers of a token that the kernel reads",
    "batch": "sequences; of attention-mixed, those with new tokens of a prompt",
    "isl": "new tokens of each prompt",
    "new": "new tokens of each chunk of a prompt",
    "prior": "tokens of each prompt whose keys and values are there already",
    "decode-batch": "other sequences in the same call, with one new token each",
    "kv-len": "tokens that each new one attends to, itself among them",
    "heads": "query heads of this rank",
    "kv-heads": "key/value heads of this rank; they divide the query heads",
    "head-dim": "numbers of a head",
    "kv-rank": "latent numbers of a KV token (kv_lora_rank)",
    "rope-dim": "rotated numbers of a KV token (qk_rope_head_dim)",
    "nope-dim": "numbers of a head's key that are not rotated (qk_nope_head_dim)",
    "v-dim": "numbers of a head's value (v_head_dim)",
    "q-rank": "latent numbers of a query (q_lora_rank)",
    "weights-dtype": "format of the projections' weights",
    "inter": "inner width of a whole expert",
    "top-k": "experts of a token",
    "experts": "experts of a layer",
    "counts": "tokens of each expert of the rank, as in 12,0,7, instead of a load pattern",
    "ep": "ranks that share the experts",
    "tp": "ranks that share an expert",
    "distribution": f"load pattern of the busiest rank: {LOADS}",
    "dtype": "number format: bf16, fp8, fp8_block, fp4, or w4a16 for fp4 weights multiplied as bf16",
    "kv-dtype": "format of the KV cache, bf16 or fp8; left out, as wide as --dtype, but no narrower than fp8",
}
