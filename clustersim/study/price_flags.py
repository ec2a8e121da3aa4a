"""Prices of kernels whose sizes are given one by one: `clustersim price gemm --m 1,16 --n 4096 --k 7168`."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from itertools import product
from typing import Any

import numpy as np

from clustersim.errors import ClustersimError, nearest, pick
from clustersim.physics.calibration import ORIGINS
from clustersim.physics.kernels import AUTO, KERNELS, Priced, price_calls
from clustersim.spec.gpus import gpu_named
from clustersim.spec.hardware import Gpu
from clustersim.study.kernel_flags import (
    BEST_KNOWN,
    FLAGS,
    MEANINGS,
    Flags,
    One,
    Unfit,
    kernel_of,
    one_call,
    parsed,
    said_value,
)
from clustersim.study.price import LONGEST, TOO_LONG, lacks_format
from clustersim.trace.csv import check_place, write_text

__all__ = ["MOST_PRICES", "check_place", "price_flags", "to_csv", "usage", "write_text"]

#: Prices of one command at most.
MOST_PRICES = 10_000


def price_flags(kernel: str, gpus: str, given: Sequence[str], library: str = AUTO) -> dict[str, Any]:
    """Prices of one kernel at every combination of the values given.

    kernel   of FLAGS, with "-" for "_" if one likes
    gpus     names, between commas if several
    given    further words of the command line: --flag VALUES, several between commas, or 1..64 for all
             powers of two from 1 to 64
    Returns  {kernel, library, varies, prices: [{gpu, flags, seconds, origin, outside, roofline, basis}],
             left_out}; times in s, outside in octaves, None where nothing was measured; left_out says which
             GPUs compute in none of the formats
    Raises   ClustersimError that says which flags there are, or that no GPU has the format
    """
    name = kernel.replace("-", "_")
    flags = pick(FLAGS, name, "kernel")
    sizes = _values(kernel, flags, given)
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
    prices, lacking = [], {}
    for combination in product(*values.values()):
        asked = dict(zip(values, combination, strict=True))
        gpu = gpu_named(asked["gpu"])
        why = lacks_format(gpu, asked["dtype"])
        if why:
            lacking[gpu.name, asked["dtype"]] = f"--dtype {asked['dtype']}: {why}"
        else:
            prices.append(_priced(name, flags, asked, gpu, library))
    if not prices:
        raise ClustersimError("\n".join(lacking.values()))
    return {
        "kernel": name,
        "library": library,
        "varies": [flag for flag, some in values.items() if len(some) > 1],
        "prices": prices,
        "left_out": list(lacking.values()),
    }


def to_csv(found: dict[str, Any]) -> bytes:
    """The prices as a list of kernels with `seconds,origin` behind it, so that it can be priced again."""
    names = [*dict.fromkeys(flag for one in found["prices"] for flag in one["flags"])]
    whose = {} if found["library"] == AUTO else {"framework": found["library"]}
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(
        ["kernel", "gpu", *whose, *(flag.replace("-", "_") for flag in names), "seconds", "origin"]
    )
    for one in found["prices"]:
        cells = [said_value(one["flags"].get(flag)).replace(",", ";") for flag in names]
        end = [repr(one["seconds"]), one["origin"]]
        writer.writerow([found["kernel"], one["gpu"], *whose.values(), *cells, *end])
    return text.getvalue().encode()


# ---- words of the command line --------------------------------------------------------------------


def _values(kernel: str, flags: Flags, given: Sequence[str]) -> dict[str, list[Any]]:
    """Flag → its values, in the order of the table; defaults where nothing is given."""
    words = _words(kernel, flags.all(), given)
    missing = [flag for flag in flags.wanted if flag not in words]
    if missing:
        meant = flags.all() if not given else missing
        said = [f"  --{flag}  {MEANINGS[flag]}" for flag in meant]
        absent = ", ".join(f"--{flag}" for flag in missing)
        raise ClustersimError(
            "\n".join([f"{kernel}: {absent} missing; it is asked by {usage(flags)}", *said])
        )
    return {
        flag: _parsed(flag, words[flag], flags) if flag in words else [flags.defaults[flag]]
        for flag in flags.all()
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
        if not is_ and (not rest or rest[0].startswith("--")):
            raise ClustersimError(f"{kernel}: {word} has no value")
        if flag in words:
            raise ClustersimError(f"{kernel}: {word} is given twice; write several values as {word} 1,2")
        words[flag] = value if is_ else rest.pop(0)
    return words


def usage(flags: Flags) -> str:
    """The flags in one line, those that may be left out in brackets with what they are then."""
    wanted = " ".join(f"--{flag}" for flag in flags.wanted)
    return wanted + "".join(
        f" [{f'--{flag} {said_value(default)}'.strip()}]" for flag, default in flags.defaults.items()
    )


def _parsed(flag: str, text: str, flags: Flags) -> list[Any]:
    if flag in flags.lists:
        return [_one(flag, text, flags)]
    return [value for part in _listed(flag, text) for value in _some(flag, part, flags)]


def _listed(flag: str, text: str) -> list[str]:
    parts = [part.strip() for part in text.split(",")]
    if not all(parts):
        raise ClustersimError(f'--{flag} {text or "nothing"}: an empty value; several stand as in "1,16"')
    return parts


def _some(flag: str, text: str, flags: Flags) -> list[Any]:
    """One value, or the doubles between two."""
    low, dots, high = text.partition("..")
    first = _one(flag, low if dots else text, flags)
    if not dots:
        return [first]
    last = _one(flag, high, flags)
    if isinstance(first, str) or not 1 <= first <= last:
        raise ClustersimError(f'--{flag} {text}: doubles from the first to the last, as in "1..64"')
    steps = int(np.floor(np.log2(last / first) + 1e-9))
    return [first * 2.0**step for step in range(steps + 1)]


def _one(flag: str, text: str, flags: Flags) -> Any:
    try:
        return parsed(flags, flag, text)
    except Unfit as error:
        raise ClustersimError(f"--{flag} {text[:60] or 'nothing'} {error}") from None


# ---- prices ---------------------------------------------------------------------------------------


def _priced(name: str, flags: Flags, asked: dict[str, Any], gpu: Gpu, library: str) -> dict[str, Any]:
    kernel, form = KERNELS[kernel_of(name)], asked["dtype"]
    try:
        call = one_call(flags, asked)
    except Unfit as error:
        said = error.said(asked, lambda flag, value: f"--{flag} {value}".strip())
        raise ClustersimError(f"{name.replace('_', '-')}: {said}") from None
    columns = {column: np.array([value], dtype=float) for column, value in call.items()}
    with np.errstate(over="ignore", invalid="ignore"):
        priced = price_calls(kernel, gpu, form, columns, library)
        least = float(kernel.least(gpu, form, columns)[0])
    if not priced.seconds[0] < LONGEST:
        raise ClustersimError(f"{_call_said(name, asked)}: {TOO_LONG}")
    return {
        "gpu": gpu.name,
        "flags": {flag: _plain(value) for flag, value in asked.items() if _counts(flag, asked)},
        "seconds": float(priced.seconds[0]),
        "origin": ORIGINS[int(priced.origin[0])],
        "outside": None if ORIGINS[int(priced.origin[0])] == "formula" else float(priced.outside[0]),
        "roofline": least,
        "basis": _basis(priced, gpu),
    }


def _call_said(name: str, asked: One) -> str:
    sizes = (f"--{flag} {said_value(value)}" for flag, value in asked.items() if _counts(flag, asked))
    return f"{name.replace('_', '-')} {' '.join(sizes)}"


def _plain(value: Any) -> Any:
    """Whole numbers as such."""
    if isinstance(value, list):
        return [_plain(one) for one in value]
    return int(value) if isinstance(value, float) else value


def _counts(flag: str, asked: One) -> bool:
    """Whether a flag has a say: counts stand for a load pattern and what it is drawn from."""
    instead = ("ep", "distribution", "experts") if asked.get("counts") else ()
    return flag not in ("gpu", *instead) and asked[flag] is not None


def _basis(priced: Priced, gpu: Gpu) -> dict[str, Any] | None:
    if priced.basis is None:
        return None
    return {**priced.basis._asdict(), "relative": priced.basis.gpu != gpu.name}
