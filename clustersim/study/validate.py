"""Predicted against measured times of exchanges, file by file: does the network model say what was timed?

A file is added in `study.families` (see `study.prediction` for the contract): its predictor turns
the rows of one measured table into `Prediction`s, and everything here follows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from functools import cache
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np

from clustersim.report.scatter import scatter
from clustersim.spec.costs import fitted_tables
from clustersim.study.expert_checks import checks, influences
from clustersim.study.families import FAMILIES
from clustersim.study.fit import fitted
from clustersim.study.least_squares import Fitted
from clustersim.study.measured import measured
from clustersim.study.prediction import (
    BANDWIDTH_RULES,
    Costs,
    Family,
    Prediction,
    quantile,
    save_predictions,
    spread,
)

#: What rules a row → (median, p90) of |relative error| that the rows of a file should keep within.
GOALS: dict[str, tuple[float, float | None]] = {"bandwidth": (0.10, 0.25), "latency": (0.15, None)}

#: (file, what rules) whose rows miss the goal → (median that must still be kept, p90, why it is missed).
MISSES: dict[tuple[str, str], tuple[float, float | None, str]] = {
    ("vidur_network", "latency"): (
        0.35,
        None,
        "medians of few calls with what a framework does around them: 2 kB take longer than 2 MB",
    ),
}

#: GPUs up to which a scale class goes, and its name.
_SCALES = ((2, "2"), (4, "3-4"), (8, "5-8"), (16, "9-16"), (32, "17-32"), (64, "33-64"), (1 << 30, "65+"))
_EXAMPLES = 3


def validate_network(leave_out: bool = True) -> dict[str, Any]:
    """Everything `clustersim validate network` prints.

    leave_out  whether to fit anew without each file in turn
    Returns    {boundary, goals, files: [...], leave_one_out: [...], foretold: [...], influences: [...],
               kept}; times in s. `kept` is false where errors are larger than GOALS and MISSES say, or
               leaving a file out moves the others by more than its own error
    """
    files = [
        _file(name, predictions, family)
        for family in FAMILIES.values()
        for name, predictions in predicted(family, costs_of(family)).items()
    ]
    without = [one for family in FAMILIES.values() for one in left_out(family)] if leave_out else []
    foretold = [{**asdict(one), "kept": one.kept} for one in checks()]
    moved = [{**asdict(one), "kept": one.kept} for one in influences()] if leave_out else []
    return {
        "boundary": BANDWIDTH_RULES,
        "goals": {ruled: {"median": median, "p90": p90} for ruled, (median, p90) in GOALS.items()},
        "files": files,
        "leave_one_out": without,
        "foretold": foretold,
        "influences": moved,
        "kept": all(one["kept"] for file in files for one in file["judged"])
        and all(one["holds"] for one in without)
        and all(one["kept"] for one in foretold + moved),
    }


def all_predictions() -> list[Prediction]:
    """Every row the models can speak about, with the parameters of the catalogue."""
    return [
        prediction
        for family in FAMILIES.values()
        for predictions in predicted(family, costs_of(family)).values()
        for prediction in predictions
    ]


def columns(predictions: Sequence[Prediction]) -> dict[str, np.ndarray]:
    """The predictions as columns, one entry each."""
    rows = [asdict(prediction) for prediction in predictions]
    return {name: np.array([row[name] for row in rows]) for name in rows[0]} if rows else {}


def save(folder: Path) -> None:
    """Writes every prediction as a row of predictions.parquet, and all of them drawn, predictions.svg.

    Raises   ClustersimError if the folder cannot be written
    """
    save_predictions(folder, columns(all_predictions()), drawing())


def drawing() -> str:
    """SVG of predicted / measured of every row, by file."""
    points: dict[str, list[tuple[float, float]]] = {}
    for one in all_predictions():
        points.setdefault(one.file, []).append((one.measured, one.predicted))
    return scatter(points)


@cache
def _catalogue(section: str) -> Costs:
    groups = fitted_tables().get(section, {})
    return FAMILIES[section].costs(
        {
            name: {key: Fitted(one["value"], one["rows"], one["residual"], ()) for key, one in group.items()}
            for name, group in groups.items()
        }
    )


def costs_of(family: Family) -> Costs:
    """What the catalogue holds for a family."""
    return _catalogue(family.section)


def predicted(family: Family, costs: Costs) -> dict[str, list[Prediction]]:
    """File → its predictions."""
    return {name: predictor(measured(name), costs) for name, predictor in family.files.items()}


def left_out(family: Family) -> list[dict[str, Any]]:
    """For each file: its errors when the fit has not seen it, and how far the others' predictions move."""
    whole = predicted(family, costs_of(family))
    found = []
    for name in family.files:
        others = predicted(family, family.costs(fitted(family, without=name)))
        moved = [
            abs(np.log(new.predicted / old.predicted))
            for file in family.files
            if file != name
            for new, old in zip(others[file], whole[file], strict=True)
        ]
        found.append(
            {
                "file": name,
                "all_files": errors(whole[name]),
                "without_it": errors(others[name]),
                "others_move": {
                    "median": quantile(np.array(moved), 0.5),
                    "p90": quantile(np.array(moved), 0.9),
                },
                "holds": _holds(moved, errors(others[name])),
            }
        )
    return found


def _holds(moved: Sequence[float], own: dict[str, Any]) -> bool:
    """Whether leaving a file out moves the other predictions by no more than its own error."""
    return not moved or not own["rows"] or bool(np.median(moved) <= own["median"])


def errors(predictions: Iterable[Prediction]) -> dict[str, Any]:
    """Rows, median and p90 of |relative error|, and the median ratio predicted / measured."""
    return spread(np.array([prediction.error for prediction in predictions], dtype=float))


def _file(name: str, predictions: list[Prediction], family: Family) -> dict[str, Any]:
    return {
        "file": name,
        "rows": len(measured(name)["source"]),
        "fitted": sum(one.fitted for one in predictions),
        "not_fitted": {which: why for (file, which), why in family.left_out.items() if file == name},
        "predicted": errors(predictions),
        "judged": [_judged(name, ruled, predictions) for ruled in GOALS],
        "classes": [
            {"kind": kind, "ruled": ruled, "gpus": scale, **errors(group)}
            for (kind, ruled, scale), group in _grouped(predictions, _class)
        ],
        "examples": [_example(one) for _, group in _grouped(predictions, _class) for one in _some(group)],
    }


def _judged(name: str, ruled: str, predictions: list[Prediction]) -> dict[str, Any]:
    found = errors(one for one in predictions if one.ruled == ruled)
    goal = GOALS[ruled]
    median, p90, why = MISSES.get((name, ruled), (*goal, ""))
    return {
        "ruled": ruled,
        **found,
        "met": _within(found, *goal),
        "kept": _within(found, median, p90),
        "why_missed": why,
    }


def _within(found: dict[str, Any], median: float, p90: float | None) -> bool:
    return not found["rows"] or (found["median"] <= median and (p90 is None or found["p90"] <= p90))


def _class(one: Prediction) -> tuple[str, str, str]:
    return one.kind, one.ruled, next(name for most, name in _SCALES if one.gpus <= most)


def _grouped(
    predictions: list[Prediction], key: Callable[[Prediction], tuple[str, ...]]
) -> list[tuple[tuple[str, ...], list[Prediction]]]:
    return [(name, list(group)) for name, group in groupby(sorted(predictions, key=key), key)]


def _some(group: list[Prediction]) -> list[Prediction]:
    """A few of a class, spread over its sizes."""
    by_size = sorted(group, key=lambda one: (one.size, one.row))
    places = np.unique(np.linspace(0, len(by_size) - 1, _EXAMPLES).round().astype(int))
    return [by_size[place] for place in places]


def _example(one: Prediction) -> dict[str, Any]:
    return {**asdict(one), "error": one.error}
