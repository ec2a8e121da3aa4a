"""A trace on disk of which only what is asked for is read: a table's columns, one by one.

A view of a large run needs a few columns of a few tables; a report reads most of them, and pays no more.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np

from clustersim.errors import ResultError
from clustersim.trace.files import read_facts, read_table, tables_of
from clustersim.trace.record import TABLES, Columns, Text, Trace

#: First and last bytes of every Parquet file.
_MAGIC = b"PAR1"


class StoredColumns(Mapping[str, np.ndarray | Text]):
    """The columns of one table, each read when it is first asked for and then kept."""

    def __init__(self, folder: Path, table: str, version: int) -> None:
        self._folder, self._table, self._version = folder, table, version
        self._held: dict[str, np.ndarray | Text] = {}

    def __getitem__(self, name: str) -> np.ndarray | Text:
        if name not in TABLES[self._table]:
            raise KeyError(name)
        if name not in self._held:
            self._held |= read_table(self._folder, self._table, [name], self._version)
        return self._held[name]

    def __iter__(self) -> Iterator[str]:
        return iter(TABLES[self._table])

    def __len__(self) -> int:
        return len(TABLES[self._table])


def open_trace(folder: Path) -> Trace:
    """The trace in a folder as `files.read` gives it, but read column by column as it is used.

    Raises   ResultError at once if a table is missing or cut short, or the trace is of another version;
             when a column is asked for, if that is damaged
    """
    version, facts = read_facts(folder)
    for table in tables_of(version):
        _check_whole(folder / f"{table}.parquet")
    tables: dict[str, Columns] = {table: StoredColumns(folder, table, version) for table in TABLES}
    return Trace(tables, facts)


def _check_whole(path: Path) -> None:
    """Raises ResultError where there is no file that begins and ends as Parquet does."""
    try:
        with path.open("rb") as file:
            begin = file.read(len(_MAGIC))
            file.seek(max(path.stat().st_size - len(_MAGIC), 0))
            end = file.read()
    except FileNotFoundError:
        raise ResultError(f"{path}: missing; the trace is not whole") from None
    except OSError as error:
        raise ResultError(f"{path}: damaged: {error.strerror or error}") from error
    if begin != _MAGIC or end != _MAGIC:
        raise ResultError(f"{path}: damaged: cut short, or not a Parquet file")
