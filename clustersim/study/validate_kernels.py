"""Predicted against measured kernels: what are prices worth for shapes that nobody has timed?

Every measured call is priced three times: by the formula alone, by the curves that are shipped (which go
through it), and by a fit that has not seen its shape. The last is what goals are set for. Files and kernels
come from `study.kernel_families`; a file added there is judged here.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from clustersim.physics.calibration import ORIGINS, Columns
from clustersim.physics.kernels import KERNELS, basis_of, computed_by, price_calls, priced_by
from clustersim.report.scatter import scatter
from clustersim.spec.gpus import gpu_named
from clustersim.spec.kernel_tables import TableKey, fitted_parameters
from clustersim.study.kernel_families import STARTS, measured_rows
from clustersim.study.kernel_fit import calls_of, fitted_calls, foretold
from clustersim.study.kernel_rows import Rows, groups, taken
from clustersim.study.measured import measured
from clustersim.study.prediction import save_predictions, spread
from clustersim.study.skew_checks import skew_checks

#: Kernel → what it is judged as; all others only move numbers.
OPERATORS = {
    "gemm": "gemm",
    "attention_prefill": "attention",
    "attention_decode": "attention",
    "attention_mixed": "attention",
    "mla_prefill": "mla",
    "mla_decode": "mla",
    "mla_prefill_module": "mla",
    "mla_decode_module": "mla",
    "experts": "moe",
    "expert_up": "moe",
    "expert_activation": "moe",
    "expert_down": "moe",
}
MOVES = "elementwise"

#: Operator → (median, p90) of |relative error| that calls of shapes left out should keep within. Small
#: operators have none: most of them are a launch, and together they are a few percent of a pass.
GOALS: dict[str, tuple[float, float] | None] = {
    "gemm": (0.08, 0.25),
    "attention": (0.08, 0.25),
    "mla": (0.08, 0.25),
    "moe": (0.10, 0.30),
    MOVES: None,
}

#: (file, operator, load) whose calls miss the goal → (median, p90) that must still be kept, why it is missed.
MISSES: dict[tuple[str, str, str], tuple[float, float, str]] = {
    ("frontier_a800_moe", "moe", "balanced"): (
        0.10,
        0.55,
        "of two shapes one was timed with large batches only, which foretell the small ones of the other",
    ),
}

#: Measured times up to which a size class goes, s, and its name.
SIZES = ((10e-6, "up to 10 us"), (100e-6, "10 to 100 us"), (1e-3, "0.1 to 1 ms"), (np.inf, "over 1 ms"))

#: What the predictions are told by: "left_out" or, without fits, "shipped".
Told = dict[str, np.ndarray]


def validate_kernels(leave_out: bool = True) -> dict[str, Any]:
    """Everything `clustersim validate kernels` prints.

    leave_out  whether to fit anew without each shape in turn; otherwise goals are held against the prices
               that have seen the calls, which are no forecast
    Returns    {judged_by, goals, judged, keys, classes, transfer, not_fitted, skew, kept}; `kept` is false
               where errors are larger than GOALS and MISSES say, or the ratios of study.skew_checks are off
    """
    told = kernel_predictions(leave_out)
    by = "left_out" if leave_out else "shipped"
    judged = list(_judged(told, by))
    skew = skew_checks(told, by)
    return {
        "judged_by": by,
        "goals": {name: goal and {"median": goal[0], "p90": goal[1]} for name, goal in GOALS.items()},
        "judged": judged,
        "keys": [_key(told, key, chosen) for key, chosen in _split(told, *_KEY)],
        "classes": {what: _classes(told, by, what) for what in ("kernel", "gpu", "library", "size", "load")},
        "transfer": list(_transfer()),
        "not_fitted": list(_not_fitted()),
        "skew": skew,
        "kept": skew["kept"] and all(one["kept"] for one in judged),
    }


@cache
def kernel_predictions(leave_out: bool) -> Told:
    """Every measured call that is not left out for a reason, as columns.

    Returns  file, row, kernel, operator, gpu, format, library, load, size: str or int64[N]; measured,
             formula, shipped, least, left_out: float64[N] s, the last NaN without fits; seen: bool[N]
             whether a table was made of it; origin: str[N]. Worked out once, not to be changed
    """
    parts = [_told(rows, key, chosen) for rows, key, chosen in _calls()]
    told = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]} if parts else {}
    # No fit sees calls that are too few for a table of their own: their prices are forecasts as they are.
    told["left_out"] = np.where(told["seen"], np.nan, told["shipped"])
    if leave_out:
        place = {name: at for at, name in enumerate(_names(told["kernel"], told["file"], told["row"]))}
        for key, calls in calls_of(_tables()).items():
            gpu, start = gpu_named(key.gpu), STARTS[key.kernel](key)
            seconds = foretold(fitted_calls(calls, gpu, start), gpu, start)
            kernels = np.full(len(seconds), key.kernel)
            here = [place[name] for name in _names(kernels, calls.files, calls.row)]
            told["left_out"][here] = seconds
    return told


def drawing(told: Told) -> str:
    """SVG of predicted / measured of every call, by kernel."""
    predicted = np.where(np.isfinite(told["left_out"]), told["left_out"], told["shipped"])
    points: dict[str, Sequence[tuple[float, float]]] = {}
    for (operator, kernel), at in _split(told, "operator", "kernel"):
        label = MOVES if operator == MOVES else kernel
        pairs = zip(told["measured"][at].tolist(), predicted[at].tolist(), strict=True)
        points[label] = [*points.get(label, ()), *pairs]
    return scatter(points)


def save_kernels(folder: Path, leave_out: bool = True) -> None:
    """Writes every call as a row of predictions.parquet, and all of them drawn, predictions.svg."""
    told = kernel_predictions(leave_out)
    save_predictions(folder, told, drawing(told))


# ---- calls ----------------------------------------------------------------------------------------

_KEY = ("kernel", "gpu", "format", "library")
_tables = cache(measured_rows)


def _calls() -> Iterator[tuple[Rows, TableKey, Columns]]:
    """Rows of one kernel, GPU, format and library, and their columns; rows left out are not in."""
    for table in _tables():
        seen = taken(table, (table.left_out == "") & np.isfinite(table.measured))
        for (gpu, form, library), chosen in groups(seen):
            rows = taken(seen, chosen)
            yield rows, TableKey(rows.kernel, gpu, form, library), rows.columns


def _told(rows: Rows, key: TableKey, columns: Columns) -> Told:
    kernel, gpu = KERNELS[key.kernel], gpu_named(key.gpu)
    priced = price_calls(kernel, gpu, key.format, columns, key.library)
    least = kernel.least(gpu, key.format, columns)
    formula = priced.seconds
    if priced.basis is not None:
        formula = np.maximum(computed_by(priced.basis, kernel, gpu, key.format, columns), least)
    size = np.searchsorted([most for most, _ in SIZES[:-1]], rows.measured)
    return {
        "file": np.full(len(rows), rows.file),
        "row": rows.row,
        **{name: np.full(len(rows), word) for name, word in key._asdict().items()},
        "operator": np.full(len(rows), OPERATORS.get(key.kernel, MOVES)),
        "load": _loads(rows),
        "size": np.array([name for _, name in SIZES])[size],
        "measured": rows.measured,
        "formula": formula,
        "shipped": priced.seconds,
        "least": least,
        "seen": np.full(len(rows), key in fitted_parameters()),
        "origin": np.array(ORIGINS)[priced.origin],
    }


def _loads(rows: Rows) -> np.ndarray:
    """str[N] of an expert layer whether its experts are equally loaded, else ""."""
    if OPERATORS.get(rows.kernel) != "moe":
        return np.full(len(rows), "")
    table = measured(rows.file)
    if "distribution" not in table:
        return np.full(len(rows), "balanced")
    skewed = np.char.startswith(table["distribution"][rows.row], "power")
    return np.where(skewed, "power law", "balanced")


def _names(*columns: np.ndarray) -> list[tuple[Any, ...]]:
    return list(zip(*(column.tolist() for column in columns), strict=True))


def _split(told: Told, *by: str) -> list[tuple[tuple[str, ...], np.ndarray]]:
    """Names in some columns → int64[M] rows that have them, ordered by name."""
    rows: dict[tuple[str, ...], list[int]] = {}
    for place, name in enumerate(_names(*(told[column] for column in by))):
        rows.setdefault(name, []).append(place)
    return [(name, np.array(rows[name])) for name in sorted(rows)]


# ---- errors ---------------------------------------------------------------------------------------


def _errors(told: Told, by: str, chosen: np.ndarray) -> dict[str, Any]:
    return spread(told[by][chosen] / told["measured"][chosen] - 1.0)


def _classes(told: Told, by: str, what: str) -> list[dict[str, Any]]:
    """Errors by operator and what else; sizes from small to large."""
    order = {name: place for place, (_, name) in enumerate(SIZES)}
    found = [
        {"operator": operator, what: name, **_errors(told, by, chosen)}
        for (operator, name), chosen in _split(told, "operator", what)
    ]
    return sorted(found, key=lambda one: (one["operator"], order.get(one[what], 0)))


def _key(told: Told, key: tuple[str, ...], chosen: np.ndarray) -> dict[str, Any]:
    return {
        **dict(zip(_KEY, key, strict=True)),
        "rows": len(chosen),
        "seen": bool(told["seen"][chosen[0]]),
        "files": sorted(dict.fromkeys(told["file"][chosen].tolist())),
        "formula": _errors(told, "formula", chosen),
        "left_out": _errors(told, "left_out", chosen),
        "shipped": _errors(told, "shipped", chosen),
        "under_roofline": int((told["measured"][chosen] < told["least"][chosen]).sum()),
    }


def _judged(told: Told, by: str) -> Iterator[dict[str, Any]]:
    """Every file by operator and load, and every operator by load over all files."""
    for (operator, load), chosen in _split(told, "operator", "load"):
        yield _held(_errors(told, by, chosen), "", operator, load)
    for (file, operator, load), chosen in _split(told, "file", "operator", "load"):
        yield _held(_errors(told, by, chosen), file, operator, load)


def _held(found: dict[str, Any], file: str, operator: str, load: str) -> dict[str, Any]:
    """The errors, whether they meet the goal, and whether they keep what is stated where they do not."""
    goal = GOALS[operator]
    median, p90, why = MISSES.get((file, operator, load), (*(goal or (np.inf, np.inf)), ""))
    return {
        "file": file,
        "operator": operator,
        "load": load,
        **found,
        "goal": goal is not None,
        "met": goal is None or _within(found, *goal),
        "kept": _within(found, median, p90),
        "why_missed": why,
    }


def _within(found: Mapping[str, Any], median: float, p90: float) -> bool:
    return not found["rows"] or (found["median"] <= median and found["p90"] <= p90)


def _transfer() -> Iterator[dict[str, Any]]:
    """Calls of one GPU by the tables of another, as those of a GPU that nobody has timed are priced."""
    found: dict[tuple[str, str, str, str, str], list[np.ndarray]] = {}
    for rows, key, columns in _calls():
        kernel = KERNELS[key.kernel]
        for other in _measured_gpus(kernel.name, kernel.table):
            by = basis_of(kernel, gpu_named(other), key.format, key.library)
            if other == key.gpu or by is None or (by.gpu, by.format) != (other, key.format):
                continue
            told = priced_by(by, kernel, gpu_named(key.gpu), key.format, columns).seconds
            name = (OPERATORS.get(key.kernel, MOVES), key.kernel, key.format, key.gpu, other)
            found.setdefault(name, []).append(told / rows.measured - 1.0)
    for name in sorted(found):
        words = dict(zip(("operator", "kernel", "format", "of", "by"), name, strict=True))
        relative = gpu_named(words["of"]).relative == words["by"]
        yield {**words, "relative": relative, **spread(np.concatenate(found[name]))}


def _measured_gpus(*kernels: str) -> list[str]:
    return sorted(dict.fromkeys(key.gpu for key in fitted_parameters() if key.kernel in kernels))


def _not_fitted() -> Iterator[dict[str, Any]]:
    """Rows that the fit never sees, with the reason."""
    found: dict[tuple[str, str, str], int] = {}
    for rows in _tables():
        for why in rows.left_out.tolist():
            if why:
                name = (rows.file, rows.kernel, why)
                found[name] = found.get(name, 0) + 1
    for (file, kernel, why), count in sorted(found.items()):
        yield {"file": file, "kernel": kernel, "rows": count, "why": why}
