"""CSV files of measurements → the Parquet tables of the catalogue.

python -m clustersim.study.pack FOLDER

FOLDER holds `<name>.csv` for every name in `study.measured.MEASURED`. Columns keep their names and
order. Numbers become numbers, gaps in them NaN; all else stays text. The same CSV gives the same bytes.
"""

from __future__ import annotations

import csv
import sys
from pathlib import Path

import numpy as np

from clustersim.errors import ClustersimError
from clustersim.study.measured import FOLDER, MEASURED
from clustersim.trace.files import write_columns


def pack(source: Path, target: Path = FOLDER) -> list[Path]:
    """Writes every measured table; returns the files.

    source   folder of the CSV files
    Raises   ClustersimError naming a file that is missing, empty or ragged; nothing is written then
    """
    tables = {name: read_csv(source / f"{name}.csv") for name in MEASURED}
    target.mkdir(parents=True, exist_ok=True)
    written = []
    for name, columns in tables.items():
        written.append(target / f"{name}.parquet")
        write_columns(columns, written[-1])
    return written


def read_csv(path: Path) -> dict[str, np.ndarray]:
    """Columns of a CSV file with a heading.

    Raises   ClustersimError if it is missing, has no rows, or a row of another length
    """
    try:
        with path.open(newline="", encoding="utf-8") as file:
            head, *rows = list(csv.reader(file)) or [[]]
    except (OSError, UnicodeDecodeError) as error:
        raise ClustersimError(f"{path}: cannot be read: {error}") from error
    if not rows:
        raise ClustersimError(f"{path}: has no rows")
    for number, row in enumerate(rows, 2):
        if len(row) != len(head):
            raise ClustersimError(f"{path}:{number}: has {len(row)} fields, the heading has {len(head)}")
    return {name: _column([row[k] for row in rows]) for k, name in enumerate(head)}


def _column(texts: list[str]) -> np.ndarray:
    for kind in (np.int64, np.float64):
        try:
            # A gap is a NaN where all else is a number; a column of nothing but gaps stays text.
            if any(texts):
                return np.array([kind(text or "nan") for text in texts], dtype=kind)
        except ValueError:
            continue
    return np.array(texts, dtype="str")


def main(arguments: list[str]) -> int:
    """Exit status 0, or 2 for wrong input."""
    if len(arguments) != 1:
        print("usage: python -m clustersim.study.pack FOLDER", file=sys.stderr)
        return 2
    try:
        for path in pack(Path(arguments[0])):
            print(path, path.stat().st_size, file=sys.stderr)
    except ClustersimError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
