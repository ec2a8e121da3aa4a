"""The trace on disk: one Parquet file per table, and facts.json. The only door to Parquet.

Measured tables of the catalogue come through the same door (`write_columns`, `read_columns`).

The same trace gives the same bytes: nothing in a file depends on when or where it was written.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from math import nan
from pathlib import Path
from shutil import copyfile
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from clustersim.errors import ResultError
from clustersim.trace.plain import check_regular, json_text, read_json
from clustersim.trace.record import TABLES, Columns, Text, Trace

#: Changed whenever a table or column changes its meaning.
TRACE_VERSION = 4
#: Versions that are read, the present one included: what an older one lacks is filled.
READABLE = (3, 4)

#: What version 4 added: (table, column) → what stands there in an older trace; tables are empty there.
_ADDED: dict[tuple[str, str], float | str] = {
    ("spans", "group"): -1,
    ("spans", "priced"): nan,
    ("prices", "launch"): nan,
    ("experts", "behind"): nan,
    ("rebalances", "outcome"): "unknown",
    ("rebalances", "wished"): nan,
}
_ADDED_TABLES = ("span_links", "link_use", "kv_use")

#: Rows of a group. What a file holds does not depend on how many rows are written at a time.
ROW_GROUP = 1 << 20
#: Rows of a table up to which columns that were read are kept: a table takes some hundred MB at most.
_HELD_ROWS = 1 << 22
_FACTS = "facts.json"
_UNIT = re.compile(r"(?:^|, )(s|bytes|bytes/s|token-seconds)(?:;|$)")
# Numbers and times mostly grow from row to row: differences and split bytes halve the file.
_ENCODINGS = {
    "int32": "DELTA_BINARY_PACKED",
    "int64": "DELTA_BINARY_PACKED",
    "float64": "BYTE_STREAM_SPLIT",
}


class TableWriter:
    """Writes one table as a Parquet file, some rows at a time, in groups of ROW_GROUP."""

    def __init__(self, path: Path, table: str) -> None:
        self._path = path
        self._table = table
        self._most_used: dict[str, int] = {}
        self._file: Any = None

    def write(self, columns: Columns, last: bool = False) -> int:
        """Writes whole groups, and at last what is left. Returns how many rows."""
        rows = length(columns)
        count = rows if last else rows - rows % ROW_GROUP
        for first in range(0, count, ROW_GROUP):
            self._group({name: c[first : min(first + ROW_GROUP, count)] for name, c in columns.items()})
        if last:
            self._close(columns)
        return count

    def _group(self, columns: Columns) -> None:
        table = to_arrow({name: self._used(name, c) for name, c in columns.items()}, self._table)
        self._open(table.schema).write_table(table, row_group_size=ROW_GROUP)

    def _used(self, name: str, column: np.ndarray | Text) -> np.ndarray | Text:
        """With the words that rows have had up to here: later ones are not known to whoever writes early."""
        if not isinstance(column, Text):
            return column
        most = max(int(column.codes.max()) + 1, self._most_used.get(name, 0))
        self._most_used[name] = most
        return Text(column.codes, column.words[:most])

    def _open(self, schema: pa.Schema) -> Any:
        if self._file is None:
            expected = TABLES[self._table].items()
            self._file = pq.ParquetWriter(
                self._path,
                schema,
                compression="zstd",
                compression_level=1,
                use_dictionary=[column for column, (dtype, _) in expected if dtype == "text"],
                column_encoding={
                    column: _ENCODINGS[dtype] for column, (dtype, _) in expected if dtype != "text"
                },
                write_page_checksum=True,
            )
        return self._file

    def _close(self, columns: Columns) -> None:
        # An empty table has no group that would have opened the file.
        self._open(to_arrow({name: c[:0] for name, c in columns.items()}, self._table).schema).close()

    def abandon(self) -> None:
        """Lets go of the file as it is."""
        if self._file is not None:
            self._file.close()


def length(columns: Columns) -> int:
    """Rows of a table, without reading any."""
    return columns.rows if isinstance(columns, Stored) else len(next(iter(columns.values())))


def write(trace: Trace, folder: Path) -> None:
    """Writes `<table>.parquet` for every table, and facts.json.

    folder   made if it is missing
    """
    folder.mkdir(parents=True, exist_ok=True)
    for table in TABLES:
        path, columns = folder / f"{table}.parquet", trace.tables[table]
        if isinstance(columns, Stored) and columns.version == TRACE_VERSION:
            columns.copy_to(path)
        else:
            TableWriter(path, table).write(dict(columns), last=True)
    facts = {"trace_version": TRACE_VERSION, **trace.facts}
    (folder / _FACTS).write_text(json_text(facts), encoding="utf-8")


def read(folder: Path) -> Trace:
    """The trace that `write` wrote; its columns are read when they are asked for, and read-only.

    Raises   ResultError if a file is missing, damaged, or not of a form that is known here; what is
             damaged inside a column is told when that is read
    """
    version, facts = _read_facts(folder / _FACTS)
    return Trace({table: _stored(folder / f"{table}.parquet", table, version) for table in TABLES}, facts)


class Stored(Mapping[str, "np.ndarray | Text"]):
    """The columns of a table on disk: each is read when it is asked for.

    rows     how many there are
    version  of the trace
    keeps    whatever must live as long as these columns are used
    """

    def __init__(
        self,
        path: Path,
        table: str,
        version: int,
        rows: int,
        keeps: object = None,
    ) -> None:
        self.path = path
        self.table = table
        self.version = version
        self.rows = rows
        self._keeps = keeps
        self._held: dict[str, np.ndarray | Text] = {}

    def __iter__(self) -> Iterator[str]:
        return iter(TABLES[self.table])

    def __len__(self) -> int:
        return len(TABLES[self.table])

    def __getitem__(self, name: str) -> np.ndarray | Text:
        if name not in TABLES[self.table]:
            raise KeyError(name)
        held = self._held.get(name)
        if held is None:
            held = self._read(name)
            if self.rows <= _HELD_ROWS:
                self._held[name] = held
        return held

    def _read(self, name: str) -> np.ndarray | Text:
        dtype = TABLES[self.table][name][0]
        if self.version < TRACE_VERSION:
            if self.table in _ADDED_TABLES:
                return Text(np.empty(0, dtype="int32"), ()) if dtype == "text" else np.empty(0, dtype=dtype)
            if (self.table, name) in _ADDED:
                return _filled(self.rows, _ADDED[self.table, name], dtype)
        with _opened(self.path) as file:
            found = file.read(columns=[name]).combine_chunks()
        column = _column(found, name, dtype, self.path)
        if len(column) != self.rows:
            raise ResultError(f"{self.path}: damaged: {len(column)} rows, not {self.rows}")
        return column

    def copy_to(self, path: Path) -> None:
        """Puts the same file at another place; what a run left there by itself is not copied but linked."""
        try:
            if self._keeps is not None and self.path.stat().st_nlink == 1:
                path.hardlink_to(self.path)
                return
        except OSError:
            # Another file system, or one without links.
            pass
        try:
            copyfile(self.path, path)
        except FileNotFoundError:
            raise ResultError(f"{self.path}: missing; the trace is not whole") from None


def read_facts(folder: Path) -> tuple[int, dict[str, Any]]:
    """Version of a trace, and its facts that belong to no row.

    Raises   ResultError if there is no trace, or one of a version that cannot be read
    """
    return _read_facts(folder / _FACTS)


def to_arrow(columns: Columns, table: str = "") -> pa.Table:
    """The columns as an Arrow table, without copying numbers; text columns become dictionaries.

    table    name in TABLES whose column descriptions go along as field metadata; "" for none
    """
    expected = TABLES.get(table, {})
    arrays = {name: _arrow_array(column) for name, column in columns.items()}
    fields = [
        pa.field(name, array.type, metadata=_field_metadata(columns[name], expected.get(name)))
        for name, array in arrays.items()
    ]
    about = {"trace_version": str(TRACE_VERSION), "table": table} if table else None
    return pa.Table.from_arrays(list(arrays.values()), schema=pa.schema(fields, metadata=about))


def _arrow_array(column: np.ndarray | Text) -> Any:
    if isinstance(column, Text):
        words = pa.array(column.words, type=pa.string())
        return pa.DictionaryArray.from_arrays(pa.array(column.codes), words)
    return pa.array(column)


def _field_metadata(column: np.ndarray | Text, expected: tuple[str, str] | None) -> dict[str, str] | None:
    if expected is None:
        return None
    metadata = {"doc": expected[1]}
    unit = _UNIT.search(expected[1])
    if unit is not None:
        metadata["unit"] = unit.group(1)
    if isinstance(column, Text) and not len(column):
        # A column without rows has no dictionary page that could keep its words.
        metadata["words"] = json.dumps(column.words)
    return metadata


def _read_facts(path: Path) -> tuple[int, dict[str, Any]]:
    """Version of the trace, and its facts."""
    facts = read_json(path, f"there is no trace here; {_FACTS} is missing")
    version = facts.pop("trace_version", None)
    if version not in READABLE:
        known = ", ".join(map(str, READABLE))
        raise ResultError(f"{path}: trace version {version!r} is not one of {known}; run the scenario again")
    return version, facts


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    check_regular(path)
    try:
        with pq.ParquetFile(path, page_checksum_verification=True) as file:
            yield file
    except FileNotFoundError:
        raise ResultError(f"{path}: missing; the trace is not whole") from None
    except (OSError, ValueError, pa.ArrowException) as error:
        raise ResultError(f"{path}: damaged: {error}") from error


def _stored(path: Path, table: str, version: int) -> Stored:
    """The columns of a file whose form is found to be right."""
    older = version < TRACE_VERSION
    if older and table in _ADDED_TABLES:
        return Stored(path, table, version, 0)
    with _opened(path) as file:
        schema, about = file.schema_arrow, file.metadata
        gaps = _gaps(about)
    wanted = [name for name in TABLES[table] if not (older and (table, name) in _ADDED)]
    if schema.names != wanted:
        raise ResultError(f"{path}: its columns are not those of {table}: {', '.join(schema.names)}")
    _check_about(path, schema.metadata or {}, table, version)
    for name in wanted:
        _check_type(path, schema.field(name), TABLES[table][name][0], name in gaps)
    return Stored(path, table, version, about.num_rows)


def _gaps(about: Any) -> set[str]:
    """Columns in which a value is missing, as far as the file's own statistics know."""
    chunks = (
        about.row_group(g).column(c) for g in range(about.num_row_groups) for c in range(about.num_columns)
    )
    return {one.path_in_schema for one in chunks if one.is_stats_set and one.statistics.null_count}


def _check_type(path: Path, field: Any, dtype: str, gaps: bool) -> None:
    wanted = pa.dictionary(pa.int32(), pa.string()) if dtype == "text" else pa.from_numpy_dtype(dtype)
    if field.type != wanted or gaps:
        raise ResultError(f"{path}: column {field.name} holds {field.type}, not {wanted} without gaps")


def _filled(rows: int, what: float | str, dtype: str) -> np.ndarray | Text:
    if isinstance(what, str):
        return Text(np.zeros(rows, dtype="int32"), (what,))
    return np.full(rows, what, dtype=dtype)


def _check_about(path: Path, about: Mapping[bytes, bytes], table: str, version: int) -> None:
    """Raises ResultError where a file says that it is another table's, or of another version."""
    said = tuple(about.get(key, b"").decode() for key in (b"table", b"trace_version"))
    # Version 3 wrote neither.
    if version >= 4 and said != (table, str(version)):
        raise ResultError(
            f'{path}: says that it is table "{said[0]}" of trace version "{said[1]}"; '
            f"here belongs {table} of version {version}"
        )


def _column(found: pa.Table, name: str, dtype: str, path: Path) -> np.ndarray | Text:
    field = found.schema.field(name)
    _check_type(path, field, dtype, found[name].null_count > 0)
    if dtype != "text":
        return _numbers(found[name], dtype)
    if not len(found):
        words = json.loads((field.metadata or {}).get(b"words", b"[]"))
        return Text(np.empty(0, dtype="int32"), tuple(words))
    chunk = found[name].unify_dictionaries().combine_chunks()
    return Text(_numbers(chunk.indices, "int32"), tuple(chunk.dictionary.to_pylist()))


def _numbers(array: Any, dtype: str) -> np.ndarray:
    numbers: np.ndarray = array.to_numpy() if len(array) else np.empty(0, dtype=dtype)
    return numbers


def write_columns(columns: Mapping[str, np.ndarray], path: Path) -> None:
    """One table of any columns as one compressed Parquet file; the same columns give the same bytes.

    columns  name → int64[N], float64[N] or str[N], all of one length
    """
    arrays = [pa.array(list(c) if c.dtype.kind == "U" else c) for c in columns.values()]
    pq.write_table(
        pa.Table.from_arrays(arrays, names=list(columns)), path, compression="zstd", compression_level=19
    )


def read_columns(path: Path) -> dict[str, np.ndarray]:
    """The columns that `write_columns` wrote: int64[N], float64[N] or str[N].

    Raises   ResultError if the file is missing or damaged
    """
    try:
        with pq.ParquetFile(path) as file:
            found = file.read().combine_chunks()
    except FileNotFoundError:
        raise ResultError(f"{path}: missing") from None
    except (OSError, ValueError, pa.ArrowException) as error:
        raise ResultError(f"{path}: damaged: {error}") from error
    return {
        name: np.array(found[name].to_pylist(), dtype="str")
        if pa.types.is_string(found.schema.field(name).type)
        else found[name].to_numpy()
        for name in found.column_names
    }
