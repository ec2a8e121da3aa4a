"""Rows of a run that are too many for memory: written while it runs, read again when they are asked for."""

from __future__ import annotations

import shutil
import tempfile
import weakref
from contextlib import suppress
from pathlib import Path

import numpy as np

from clustersim.errors import ResultError
from clustersim.trace import files
from clustersim.trace.record import Columns, Text


class _Folder:
    """A folder that goes with the last who holds this, and at the latest with the program."""

    def __init__(self, place: Path | None) -> None:
        # The dot keeps `newest` and people from taking it for a result.
        self.path = Path(tempfile.mkdtemp(prefix=".clustersim.", dir=place))
        self.remove = weakref.finalize(self, shutil.rmtree, self.path, ignore_errors=True)


class Spill:
    """Tables of a running simulation that have grown long, in a folder that goes when nobody needs it.

    place  folder in which that folder is made, when the first table has grown long; None: where the
           system keeps such
    rows   of one table that are held before they are written; None: as many as a group has
    """

    def __init__(self, place: Path | None = None, rows: int | None = None) -> None:
        self.rows = rows or files.ROW_GROUP
        self._place = place
        self._folder: _Folder | None = None
        self._writers: dict[str, files.TableWriter] = {}
        self._written: dict[str, int] = {}

    def take(self, table: str, columns: Columns) -> Columns:
        """Writes the whole groups among these rows. Returns those behind them."""
        try:
            count = self._writer(table).write(columns)
        except OSError as error:
            raise self._unwritable(error) from error
        self._written[table] = self._written.get(table, 0) + count
        return {name: _own(column[count:]) for name, column in columns.items()}

    def finish(self, table: str, columns: Columns) -> Columns:
        """The whole table, given its last rows; one that has not grown long as it is."""
        if table not in self._writers:
            return columns
        try:
            count = self._writers.pop(table).write(columns, last=True)
        except OSError as error:
            raise self._unwritable(error) from error
        rows = self._written[table] + count
        return files.Stored(self._path(table), table, files.TRACE_VERSION, rows, keeps=self._folder)

    def discard(self) -> None:
        """Takes away all that was written."""
        for writer in self._writers.values():
            with suppress(OSError):
                writer.abandon()
        if self._folder is not None:
            self._folder.remove()

    def _writer(self, table: str) -> files.TableWriter:
        if table not in self._writers:
            if self._folder is None:
                self._folder = _Folder(self._place)
            self._writers[table] = files.TableWriter(self._path(table), table)
        return self._writers[table]

    def _path(self, table: str) -> Path:
        assert self._folder is not None
        return self._folder.path / f"{table}.parquet"

    def _unwritable(self, error: OSError) -> ResultError:
        place = self._folder.path if self._folder else self._place or tempfile.gettempdir()
        return ResultError(f"{place}: the trace cannot be written: {error.strerror or error}")


def _own(column: np.ndarray | Text) -> np.ndarray | Text:
    """A copy, so that what was written can be let go of."""
    return Text(column.codes.copy(), column.words) if isinstance(column, Text) else column.copy()
