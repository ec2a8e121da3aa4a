"""Prices for the rows of a user's file, which keeps all its rows and columns: `clustersim price rows.csv`.

A file is read once and priced some thousand rows at a time, so that its size bounds the memory and not what
its rows describe. Nothing is written before every row has its price.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from clustersim.errors import ClustersimError, nearest
from clustersim.physics.calibration import ORIGINS
from clustersim.physics.kernels import AUTO, KERNELS, price_calls
from clustersim.spec.gpus import gpu_named
from clustersim.study.forms import forms_of, known_columns
from clustersim.study.kernel_families import rows_of_table
from clustersim.study.kernel_lists import LIST, is_list, list_columns, list_rows
from clustersim.study.kernel_rows import MissingColumn, Rows, groups, taken
from clustersim.study.measured import Table
from clustersim.study.price import check_format
from clustersim.trace.csv import Sheet, check_place, plain, read_known, write_text

#: Rows of one file at most; a million take about a gigabyte of memory.
MOST_ROWS = 2_000_000
#: s: a kernel that takes longer is a mistake in its sizes.
LONGEST = 1e6
#: Rows that are priced at a time.
BLOCK = 50_000

#: What is added to every row. A sum of several kernels has one more column for each.
ADDED = ("seconds", "origin")
#: Kernels of which a row may list several → what the column of its share is called after "seconds_".
PARTS = {"expert_up": "gate_up", "expert_down": "down"}
#: Origin of a row without a price.
SKIPPED = "skipped"
_NONE = -1

_LINE = re.compile(r"^line (\d+)")


@dataclass(slots=True, eq=False)
class PricedRows:
    """A file's rows with their prices.

    form     the measured table whose form the file has, or LIST
    lines    its lines as text, the header first
    seconds  float64[N], NaN where nothing prices the row
    origin   int8[N] index into ORIGINS, -1 where nothing prices the row; of a sum, the least trusted
    outside  float64[N] octaves beyond what was measured, the most of a sum
    parts    kernel → float64[N] s, where rows are sums of several
    calls    kernel → rows it has priced
    """

    form: str
    lines: list[str]
    seconds: np.ndarray
    origin: np.ndarray
    outside: np.ndarray
    parts: dict[str, np.ndarray] = field(default_factory=dict)
    calls: dict[str, int] = field(default_factory=dict)

    def csv(self) -> bytes:
        """The file's own lines with the prices behind them; a float reads back to what it was."""
        names = [*ADDED, *(f"seconds_{PARTS.get(kernel, kernel)}" for kernel in self.parts)]
        words = [*ORIGINS, SKIPPED]
        added = [_digits(self.seconds), [words[place] for place in self.origin.tolist()]]
        added += [_digits(part) for part in self.parts.values()]
        rows = map(",".join, zip(self.lines[1:], *added, strict=True))
        return "\n".join([",".join([self.lines[0], *names]), *rows, ""]).encode()


def price_file(path: Path, gpu: str = "", library: str = AUTO, skip: bool = False) -> PricedRows:
    """Prices every row of a file.

    gpu      prices all rows on this one, whatever the file says; "" for the column `gpu`
    library  whose kernels; AUTO for the column `framework`, or whoever was measured
    skip     leave rows without a price that no kernel speaks about, instead of refusing the file
    Raises   ClustersimError with the file's name and line for whatever is wrong
    """
    called = gpu_named(gpu).name if gpu else ""
    sheet = read_known(path, known_columns() | list_columns(), MOST_ROWS)
    lines = sheet.lines()
    header = lines[0][1].decode()
    try:
        _check_header(sheet, called)
        form = _form(sheet, called)
        found = PricedRows(form, [text.decode() for _, text in lines], *_nothing(sheet.length))
        for start in range(0, sheet.length, BLOCK):
            stop = min(start + BLOCK, sheet.length)
            _price_block(found, _table(sheet, start, stop, called), start, library)
        if not skip:
            _refuse_unpriced(found, sheet, header)
    except MissingColumn as error:
        # The readers see no column whose name they do not know, where a slip of the pen may stand.
        raise ClustersimError(
            f"{path}: line {lines[0][0]}: {MissingColumn(*error.names, header=sheet.header)}"
        ) from error
    except ClustersimError as error:
        raise ClustersimError(
            f"{path}: {_with_lines(str(error), [number for number, _ in lines])}"
        ) from error
    return found


def _nothing(rows: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    return np.full(rows, np.nan), np.full(rows, _NONE, dtype=np.int8), np.zeros(rows)


def _digits(seconds: np.ndarray) -> list[str]:
    return ["" if second != second else repr(second) for second in seconds.tolist()]


def _with_lines(message: str, lines: Sequence[int]) -> str:
    """The message with the line of the file, where empty lines stand between its rows."""
    # Readers count rows from line 2 on, as if no line were empty.
    return _LINE.sub(lambda found: f"line {lines[min(int(found[1]), len(lines)) - 1]}", message)


def _check_header(sheet: Sheet, gpu: str) -> None:
    header = [plain(name) for name in sheet.header]
    twice = [name for name in ADDED if name in header]
    if twice:
        raise ClustersimError(
            f'line 1: there is a column "{twice[0]}", which prices are written to; give it another name'
        )
    if not gpu and "gpu" not in header:
        near = nearest("gpu", sheet.header)
        raise ClustersimError(f'line 1: column "gpu" is missing{near}; name the GPU of all rows by --gpu')


def _form(sheet: Sheet, gpu: str) -> str:
    """The form by which the beginning of the file can be read."""
    first = _table(sheet, 0, min(BLOCK, sheet.length), gpu)
    if is_list(first):
        return LIST
    likely = forms_of([plain(name) for name in sheet.header])
    if len(likely) == 1:
        return likely[0]
    missing: list[str] = []
    for form in likely:
        try:
            _rows(first, form)
        except MissingColumn as error:
            missing += error.names
        except ClustersimError:
            continue
        else:
            return form
    if len(missing) == len(likely):
        raise MissingColumn(*dict.fromkeys(missing), header=first)
    # None reads it: the likeliest says why.
    return likely[0]


def _rows(table: Table, form: str) -> list[Rows]:
    return list_rows(table) if form == LIST else rows_of_table(table, form, form)


def _table(sheet: Sheet, start: int, stop: int, gpu: str) -> Table:
    """Some rows of a file as a reader takes them: numbers where all entries are numbers, else text."""
    table: dict[str, np.ndarray] = {}
    for name in sheet.columns:
        text = sheet.text(name)
        codes, back = np.unique(text.codes[start:stop], return_inverse=True)
        table[plain(name)] = _values([text.words[code].strip() for code in codes.tolist()])[back]
    if gpu:
        table["gpu"] = np.full(stop - start, gpu)
    return table


def _values(words: Sequence[str]) -> np.ndarray:
    """As the measured tables hold them: a gap is NaN among numbers, and "" among words."""
    for kind in (np.int64, np.float64):
        try:
            if any(words):
                return np.array([kind(word or "nan") for word in words], dtype=kind)
        except (ValueError, OverflowError):
            continue
    # Not of fixed width: one long entry would make all others as long.
    return np.array(words, dtype=object)


def _price_block(found: PricedRows, table: Table, start: int, library: str) -> None:
    try:
        for rows in _rows(table, found.form):
            _price(found, rows, start, library)
    except MissingColumn:
        raise
    except ClustersimError as error:
        raise ClustersimError(_LINE.sub(lambda place: f"line {int(place[1]) + start}", str(error))) from error


def _price(found: PricedRows, rows: Rows, start: int, library: str) -> None:
    """Adds the prices of one kernel to its rows."""
    if not len(rows):
        return
    kernel = KERNELS[rows.kernel]
    seconds, origin, outside = _nothing(len(rows))
    for (gpu_name, form, whose), chosen in groups(rows):
        gpu = gpu_named(gpu_name)
        few = taken(rows, chosen)
        check_format(gpu, form, f"line {few.row[0] + 2}")
        asked = whose or AUTO if library == AUTO else library
        with np.errstate(over="ignore", invalid="ignore"):
            priced = price_calls(kernel, gpu, form, few.columns, asked)
        _refuse_endless(priced.seconds, few)
        seconds[chosen], origin[chosen], outside[chosen] = priced.seconds, priced.origin, priced.outside
    at = rows.row + start
    found.calls[rows.kernel] = found.calls.get(rows.kernel, 0) + len(rows)
    if rows.kernel in PARTS and found.form != LIST:
        found.parts.setdefault(rows.kernel, np.full(len(found.seconds), np.nan))[at] = seconds
    before = np.where(found.origin[at] == _NONE, 0.0, found.seconds[at])
    found.seconds[at] = before + seconds
    found.origin[at] = np.maximum(found.origin[at], origin)
    found.outside[at] = np.maximum(found.outside[at], outside)


def _refuse_endless(seconds: np.ndarray, rows: Rows) -> None:
    endless = ~(seconds < LONGEST)
    if endless.any():
        row = int(rows.row[int(np.argmax(endless))])
        raise ClustersimError(f"line {row + 2}: would take more than {LONGEST:g} s; no kernel is so large")


def _refuse_unpriced(found: PricedRows, sheet: Sheet, header: str) -> None:
    missing = np.flatnonzero(found.origin == _NONE)
    if len(missing):
        row, more = int(missing[0]), len(missing) - 1
        told = f" (nor {more:,} more)" if more else ""
        raise ClustersimError(
            f"line {row + 2}: no kernel speaks about this row{told}: "
            f"{header} = {found.lines[row + 1][:200]}; --skip leaves such rows without a price"
        )


def check_out(path: Path, out: Path) -> None:
    """Raises ClustersimError if the prices cannot be written there, or would replace the rows."""
    check_place(out)
    if out.exists() and path.exists() and out.samefile(path):
        raise ClustersimError(f"--out {out}: is the file of the rows itself; name another")


def summary(found: PricedRows, path: Path, out: Path | None) -> dict[str, Any]:
    """What was priced, by kernel and by origin.

    Returns  {file, out, form, rows, kernels: {kernel: rows}, origins: {origin: {rows, share of the time}},
             outside: octaves at most}
    """
    total = float(np.nansum(found.seconds))
    origins = {}
    for place, name in enumerate((*ORIGINS, SKIPPED)):
        chosen = found.origin == (place if name != SKIPPED else _NONE)
        if chosen.any():
            share = float(np.nansum(found.seconds[chosen])) / total if total else 0.0
            origins[name] = {"rows": int(chosen.sum()), "share": share}
    return {
        "file": str(path),
        "out": None if out is None else str(out),
        "form": found.form,
        "rows": len(found.seconds),
        "kernels": found.calls,
        "origins": origins,
        "outside": float(found.outside.max(initial=0.0)),
    }


def as_json(found: PricedRows, path: Path) -> dict[str, Any]:
    """The summary, and seconds and origin of every row; None where nothing prices it."""
    words = [*ORIGINS, None]
    return {
        **summary(found, path, None),
        "seconds": [None if second != second else second for second in found.seconds.tolist()],
        "origin": [words[place] for place in found.origin.tolist()],
        **{
            f"seconds_{PARTS[kernel]}": [None if one != one else one for one in part.tolist()]
            for kernel, part in found.parts.items()
        },
    }


def write(found: PricedRows, out: Path) -> None:
    """Writes the rows with their prices, whole or not at all; compressed if named `.gz`.

    Raises   ResultError if nothing can be written there
    """
    write_text(out, found.csv())
