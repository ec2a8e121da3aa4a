"""Rows of kernel calls as any CSV file states them: the checked way from its columns to calls of a family.

The readers of all families build on this: rows of the catalogue's measured tables and rows of a user
pass through the same checks, and whatever is wrong is told with the line of the CSV file it stands in.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import numpy as np

from clustersim.errors import ClustersimError, nearest
from clustersim.spec.references import catalogue_name, not_in_catalogue
from clustersim.study.measured import Table

Entry = TypeVar("Entry")

#: What the files call a number format → ours. Half precision runs at the rate of bf16 on all these GPUs.
FORMATS = {
    "bf16": "bf16",
    "bfloat16": "bf16",
    "fp16": "bf16",
    "float16": "bf16",
    "half": "bf16",
    "fp8": "fp8",
    "float8": "fp8",
    "fp8_e4m3": "fp8",
    "fp8_e4m3fn": "fp8",
    "float8_e4m3fn": "fp8",
    "fp8_e5m2": "fp8",
    "e4m3": "fp8",
    "fp8_static": "fp8",
    "fp8_ootb": "fp8",
    "fp8_block": "fp8_block",
    "fp8_blockwise": "fp8_block",
    "fp4": "fp4",
    "nvfp4": "fp4",
    "mxfp4": "fp4",
    "w4a16": "w4a16",
    "w4a16_mxfp4": "w4a16",
}
#: Formats of numbers that are only kept, by the same names.
KEPT = {name: ours for name, ours in FORMATS.items() if ours != "w4a16"}

#: What the files call the two ways to run a model.
PHASES = {"prefill": "prefill", "context": "prefill", "decode": "decode", "generation": "decode"}

#: No size of a kernel is larger: a slip of the pen, not a product.
MOST = 2**40
#: Nor are there more experts: their loads are kept one by one.
MOST_EXPERTS = 4096

#: Libraries whose files call them otherwise.
_LIBRARIES = {"tensorrt-llm": "trtllm", "tensorrt_llm": "trtllm", "tensorrt": "trtllm", "trt-llm": "trtllm"}
#: Letters of a wrong value that are shown.
_SHOWN = 60
#: Where a version begins: "vllm 0.24", "vllm==0.24", "sglang-v0.5".
_VERSION = re.compile(r"[\s=@/:(,]|[-_]v?\d")


class MissingColumn(ClustersimError):
    """A column without which rows cannot be read.

    names   of the column, or of several of which one would do
    header  the names there are
    """

    def __init__(self, *names: str, header: Iterable[str]) -> None:
        self.names = names
        there = [*header]
        near = next(filter(None, (nearest(name, there) for name in names)), "")
        wanted = " or ".join(f'"{name}"' for name in names)
        super().__init__(f"column {wanted} is missing{near}; there are {', '.join(there)}")


@dataclass(frozen=True, slots=True, eq=False)
class Rows:
    """Calls of one kernel that a file lists, and what they took where it says so.

    file      table of the catalogue, or the file as the user named it
    kernel    which kernel, e.g. "gemm"
    gpu       str[N] names in the catalogue
    library   str[N] whose kernel, e.g. "trtllm"; "" where the file does not say
    format    str[N] a key of flop_rate, or fp8_block
    columns   the kernel's columns: float64[N], or float64[N, g]
    measured  float64[N] s, NaN where the file states no time
    row       int64[N] row in the file, from 0; its line in the CSV file is row + 2
    left_out  str[N] why the fit never sees the row; "" if it does
    """

    file: str
    kernel: str
    gpu: np.ndarray
    library: np.ndarray
    format: np.ndarray
    columns: Mapping[str, np.ndarray]
    measured: np.ndarray
    row: np.ndarray
    left_out: np.ndarray

    def __len__(self) -> int:
        return len(self.row)


def taken(rows: Rows, chosen: np.ndarray) -> Rows:
    """The rows at which chosen, bool[N] or int[M], says so."""
    per_row = ("gpu", "library", "format", "measured", "row", "left_out")
    return replace(
        rows,
        columns={name: values[chosen] for name, values in rows.columns.items()},
        **{name: getattr(rows, name)[chosen] for name in per_row},
    )


def groups(rows: Rows) -> list[tuple[tuple[str, str, str], np.ndarray]]:
    """(GPU, format, library) → int64[M] its rows, in the order in which they first appear."""
    codes: dict[tuple[str, str, str], int] = {}
    triples = zip(rows.gpu.tolist(), rows.format.tolist(), rows.library.tolist(), strict=True)
    code = np.array([codes.setdefault(triple, len(codes)) for triple in triples])
    return [(triple, np.flatnonzero(code == place)) for triple, place in codes.items()]


def lines_of(table: Table) -> np.ndarray:
    """int64[N] every row of the table."""
    return np.arange(len(next(iter(table.values()))))


def column(table: Table, name: str, at: np.ndarray | None = None) -> np.ndarray:
    """A column as it stands in the file.

    at      int64[M] rows wanted; default all
    Raises  MissingColumn
    """
    if name not in table:
        raise MissingColumn(name, header=table)
    return table[name] if at is None else table[name][at]


def numbers(table: Table, name: str, at: np.ndarray | None = None) -> np.ndarray:
    """float64[M] a column of finite numbers, none missing.

    Raises  ClustersimError with line and value of the first that is none
    """
    values = column(table, name, at)
    if values.dtype.kind not in "iufb":
        values = np.array([_number(text) for text in values.tolist()])
    found: np.ndarray = values.astype(np.float64)
    _refuse(table, name, at, ~np.isfinite(found), "is not a number")
    return found


def positive(table: Table, name: str, at: np.ndarray | None = None) -> np.ndarray:
    """float64[M] a column of numbers above zero.

    Raises  ClustersimError with line and value of the first that is not, or is above MOST
    """
    found = numbers(table, name, at)
    _refuse(table, name, at, found <= 0, "is not above zero")
    return _not_above(MOST, table, name, at, found)


def whole(
    table: Table, name: str, at: np.ndarray | None = None, least: int = 1, most: int = MOST
) -> np.ndarray:
    """float64[M] a column of whole numbers from `least` to `most`.

    Raises  ClustersimError with line and value of the first that is not
    """
    found = numbers(table, name, at)
    _refuse(table, name, at, (found < least) | (found % 1 != 0), f"is not a whole number from {least} on")
    return _not_above(most, table, name, at, found)


def experts(table: Table, name: str) -> np.ndarray:
    """float64[M] a column of numbers of experts, as `whole`, up to MOST_EXPERTS."""
    return whole(table, name, most=MOST_EXPERTS)


def divides(parts: np.ndarray, by: str, amount: np.ndarray, name: str, at: np.ndarray | None = None) -> None:
    """Raises ClustersimError with the line of the first row where `parts` does not divide `amount`.

    by, name  what the columns of both are called, for the message
    at        int64[M] their rows; default all
    """
    wrong = amount % parts != 0
    if wrong.any():
        first = int(np.argmax(wrong))
        raise ClustersimError(
            f"line {line_of(first, at)}: {by} = {parts[first]:.0f} does not divide "
            f"{name} = {amount[first]:.0f}"
        )


def shares(parts: np.ndarray, by: str, amount: np.ndarray, name: str, at: np.ndarray | None = None) -> None:
    """As `divides`, for what is copied where there are more parts than pieces: either divides the other."""
    divides(np.minimum(parts, amount), by, np.maximum(parts, amount), name, at)


def enough(asked: np.ndarray, name: str, there: np.ndarray, at: np.ndarray | None = None) -> None:
    """Raises ClustersimError with the line of the first row that asks for more than there are."""
    wrong = asked > there
    if wrong.any():
        first = int(np.argmax(wrong))
        raise ClustersimError(
            f"line {line_of(first, at)}: {name} = {asked[first]:.0f} is more than "
            f"the {there[first]:.0f} there are"
        )


def line_of(place: int, at: np.ndarray | None) -> int:
    """The line of the CSV file of a row, counted among those at `at`."""
    return (place if at is None else int(at[place])) + 2


def entries(
    table: Table, name: str, known: Mapping[str, Entry], what: str, at: np.ndarray | None = None
) -> list[Entry]:
    """What a table of names holds for every text of a column, however it is capitalised.

    what    what the texts name, for the message: "GPU", "dtype"
    Raises  ClustersimError with line and value of the first unknown one, the nearest and all allowed
    """
    folded = {text.lower(): entry for text, entry in known.items()}
    texts = [str(text).strip() for text in column(table, name, at).tolist()]
    strange = np.array([text.lower() not in folded for text in texts], dtype=bool)
    if strange.any():
        first = texts[int(np.argmax(strange))]
        allowed = f"is no known {what}{nearest(first, known)}; there are {', '.join(known)}"
        _refuse(table, name, at, strange, allowed)
    return [folded[text.lower()] for text in texts]


def gpus(table: Table, at: np.ndarray | None = None, name: str = "gpu") -> np.ndarray:
    """str[M] names in the catalogue of the GPUs a column names, by whatever of their names.

    Raises  ClustersimError with the line of the first unknown one, the nearest and all there are
    """
    texts = [str(text) for text in column(table, name, at).tolist()]
    names = {text: catalogue_name("gpus", text) for text in dict.fromkeys(texts)}
    strange = np.array([names[text] is None for text in texts], dtype=bool)
    if strange.any():
        first = texts[int(np.argmax(strange))]
        _refuse(table, name, at, strange, f"is no GPU: {not_in_catalogue('gpus', first)}")
    return np.array([names[text] for text in texts], dtype=str)


def phases(table: Table) -> np.ndarray:
    """str[M] "prefill" or "decode", by column `phase`."""
    return np.array(entries(table, "phase", PHASES, "phase"), dtype=str)


def formats(table: Table, name: str = "dtype", at: np.ndarray | None = None) -> np.ndarray:
    """str[M] number formats a column names, in our words."""
    return np.array(entries(table, name, FORMATS, "dtype", at), dtype=str)


def kept_formats(
    table: Table, names: tuple[str, ...], default: np.ndarray, at: np.ndarray | None = None
) -> np.ndarray:
    """str[M] formats in which numbers are only kept, such as those of a KV cache.

    names    the column may have any of these
    default  str[M] where there is no such column, or nothing in it
    """
    name = next((name for name in names if name in table), None)
    if name is None:
        return default
    found = np.array(entries(table, name, {**KEPT, "": ""}, "dtype", at), dtype=str)
    return np.where(found == "", default, found)


def libraries(table: Table, at: np.ndarray | None = None) -> np.ndarray:
    """str[M] who is named in `framework`, without the version; "" without such a column."""
    if "framework" not in table:
        return np.full(_length(table, at), "", dtype=str)
    texts = column(table, "framework", at).tolist()
    words = {text: _VERSION.split(str(text).strip().lower(), maxsplit=1)[0] for text in dict.fromkeys(texts)}
    return np.array([_LIBRARIES.get(words[text], words[text]) for text in texts], dtype=str)


def seconds(table: Table, name: str = "time_us", at: np.ndarray | None = None) -> np.ndarray:
    """float64[M] s of a column in microseconds; NaN without such a column and in its gaps."""
    if name not in table:
        return np.full(_length(table, at), np.nan)
    values = column(table, name, at)
    if values.dtype.kind not in "iufb":
        # Rows to be priced may say anything here: what was measured plays no part in a price.
        values = np.array([_number(text) for text in values.tolist()])
    return values.astype(np.float64) * 1e-6


def doubts(table: Table, at: np.ndarray | None = None) -> np.ndarray:
    """str[M] what the source itself says against a row, column `suspect`; "" for nothing."""
    if "suspect" not in table:
        return np.full(_length(table, at), "", dtype=str)
    return np.array([str(text) for text in column(table, "suspect", at).tolist()], dtype=str)


def _length(table: Table, at: np.ndarray | None) -> int:
    return len(lines_of(table) if at is None else at)


def _not_above(most: int, table: Table, name: str, at: np.ndarray | None, found: np.ndarray) -> np.ndarray:
    _refuse(table, name, at, found > most, f"is more than {most:,}, which no kernel has")
    return found


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return float("nan")


def _refuse(table: Table, name: str, at: np.ndarray | None, wrong: np.ndarray, problem: str) -> None:
    """Raises ClustersimError that names the first wrong row, and how many more there are."""
    if not wrong.any():
        return
    line = line_of(int(np.argmax(wrong)), at)
    more = int(wrong.sum()) - 1
    told = f" (and {more} more)" if more else ""
    raise ClustersimError(f"line {line}: {name} = {shown(table[name][line - 2])} {problem}{told}")


def shown(entry: Any) -> str:
    """An entry of a table as its file says it, cut to what can be shown."""
    # A gap among numbers is NaN, and turns whole numbers beside it into others.
    text = f"{entry:.15g}" if isinstance(entry, float) else str(entry)
    return "nothing" if text in ("", "nan") else text[:_SHOWN]
