"""What a model says about measured rows: the contract between a model, its fit and the validation.

A *family* is one model with the measured files it speaks about. To add a file to a family, write a
predictor for it and add a line to the family's `files`; to add a family, write its `Family` and add
a line to `study.families.FAMILIES`. Fit, validation, leave-one-out errors and docs follow from that.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np

from clustersim.errors import ClustersimError
from clustersim.study.least_squares import Fitted
from clustersim.study.measured import Table
from clustersim.trace.files import write_columns

#: A row is ruled by bandwidth where its busiest port is busy at the data sheet's rate for at least
#: this share of the measured time: half of the about 80 % of NVLink that libraries reach.
BANDWIDTH_RULES = 0.4


@dataclass(frozen=True, slots=True)
class Prediction:
    """One measured row and what the model says.

    file       measured table
    row        its row there, from 0
    kind       what was done, in the file's words: all_reduce, dispatch, ...
    what       hardware and software, for people
    gpus       how many took part; servers: over how many boxes (a rack counts as one)
    size       bytes as the file states them (payload per rank of an expert exchange)
    measured   s; predicted: s
    ruled      by which the row is judged, see `ruled_by`
    fitted     whether the fit sees the row; else it is foretold only
    choice     the algorithm the model took, "" where there is one only
    """

    file: str
    row: int
    kind: str
    what: str
    gpus: int
    servers: int
    size: float
    measured: float
    predicted: float
    ruled: Literal["latency", "bandwidth"]
    fitted: bool
    choice: str = ""

    @property
    def error(self) -> float:
        """Relative error of the prediction, signed: 0.1 is 10 % too slow."""
        return self.predicted / self.measured - 1.0


#: group (an architecture, a library) → parameter → value with its origin. What a section of
#: catalogue/network.toml holds.
Groups: TypeAlias = Mapping[str, Mapping[str, Fitted]]

#: What a family's model reads: group → its value of clustersim.spec.
Costs: TypeAlias = Mapping[str, Any]

#: (rows of a file, costs) → predictions, one per row the model can speak about, in row order.
Predictor: TypeAlias = Callable[[Table, Costs], list[Prediction]]


@dataclass(frozen=True, slots=True)
class Family:
    """One model of exchanges with the measured files it speaks about.

    section  its table in catalogue/network.toml
    files    measured table → predictor
    fit      (file → rows) of some or all of `files` → groups of parameters. Must do with any file
             left out: parameters no row speaks about keep their starting values
    costs    groups → what the predictors read
    left_out (file, which rows) → why they are predicted at most, never fitted
    """

    section: str
    files: Mapping[str, Predictor]
    fit: Callable[[Mapping[str, Table]], Groups]
    costs: Callable[[Groups], Costs]
    left_out: Mapping[tuple[str, str], str]


def ruled_by(port_seconds: float, measured: float) -> Literal["latency", "bandwidth"]:
    """What rules a row.

    port_seconds  s its busiest port is busy at the data sheet's bandwidth, payload only
    """
    return "bandwidth" if port_seconds >= BANDWIDTH_RULES * measured else "latency"


def values(groups: Groups) -> dict[str, dict[str, Any]]:
    """Group → parameter → value alone, ready for `spec.costs.from_values`."""
    return {name: {key: one.value for key, one in group.items()} for name, group in groups.items()}


def spread(errors: np.ndarray) -> dict[str, Any]:
    """Rows, median and p90 of |relative error|, and the median ratio predicted / measured.

    errors  float64[N] signed; NaN where nothing is predicted
    """
    known = errors[np.isfinite(errors)]
    return {
        "rows": len(known),
        "median": quantile(np.abs(known), 0.5),
        "p90": quantile(np.abs(known), 0.9),
        "ratio": quantile(1.0 + known, 0.5),
    }


def quantile(values: np.ndarray, share: float) -> float | None:
    """None where there are no values."""
    return float(np.quantile(values, share)) if len(values) else None


def save_predictions(folder: Path, columns: Mapping[str, np.ndarray], drawing: str) -> None:
    """Writes every prediction as a row of predictions.parquet, and all of them drawn, predictions.svg.

    Raises   ClustersimError if the folder cannot be written
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_columns(columns, folder / "predictions.parquet")
        (folder / "predictions.svg").write_text(drawing, encoding="utf-8")
    except OSError as error:
        raise ClustersimError(f"--out {folder}: {error.strerror or error}") from error
