"""The trace on disk: one Parquet file per table, and facts.json. The only door to Parquet.

Measured tables of the catalogue come through the same door (`write_columns`, `read_columns`).

The same trace gives the same bytes: nothing in a file depends on when or where it was written.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping
from math import nan
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from clustersim.errors import ResultError
from clustersim.trace.plain import json_text, read_json
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

_ROW_GROUP = 1 << 20
_FACTS = "facts.json"
_UNIT = re.compile(r"(?:^|, )(s|bytes|bytes/s|token-seconds)(?:;|$)")
# Numbers and times mostly grow from row to row: differences and split bytes halve the file.
_ENCODINGS = {
    "int32": "DELTA_BINARY_PACKED",
    "int64": "DELTA_BINARY_PACKED",
    "float64": "BYTE_STREAM_SPLIT",
}


def write(trace: Trace, folder: Path) -> None:
    """Writes `<table>.parquet` for every table, and facts.json.

    folder   made if it is missing
    """
    folder.mkdir(parents=True, exist_ok=True)
    for table, expected in TABLES.items():
        pq.write_table(
            to_arrow(trace.tables[table], table),
            folder / f"{table}.parquet",
            row_group_size=_ROW_GROUP,
            compression="zstd",
            compression_level=1,
            use_dictionary=[column for column, (dtype, _) in expected.items() if dtype == "text"],
            column_encoding={
                column: _ENCODINGS[dtype] for column, (dtype, _) in expected.items() if dtype != "text"
            },
            write_page_checksum=True,
        )
    facts = {"trace_version": TRACE_VERSION, **trace.facts}
    (folder / _FACTS).write_text(json_text(facts), encoding="utf-8")


def read(folder: Path) -> Trace:
    """The trace that `write` wrote; its arrays are read-only.

    Raises   ResultError if a file is missing, damaged, or not of this version's form
    """
    version, facts = _read_facts(folder / _FACTS)
    return Trace({table: _read_table(folder / f"{table}.parquet", table, version) for table in TABLES}, facts)


def read_table(
    folder: Path, table: str, columns: Collection[str] | None = None, version: int = TRACE_VERSION
) -> dict[str, np.ndarray | Text]:
    """Some columns of one table of a trace, or all of them; its arrays are read-only.

    folder   that `write` wrote
    version  of the trace, from `read_facts`
    Raises   ResultError if the file is missing, damaged, or not of this version's form
    """
    return _read_table(folder / f"{table}.parquet", table, version, columns)


def read_facts(folder: Path) -> tuple[int, dict[str, Any]]:
    """Version of a trace, and its facts that belong to no row.

    Raises   ResultError if there is no trace, or one of a version that cannot be read
    """
    return _read_facts(folder / _FACTS)


def tables_of(version: int) -> list[str]:
    """The tables that a trace of a version has on disk."""
    return [table for table in TABLES if version >= TRACE_VERSION or table not in _ADDED_TABLES]


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


def _read_table(
    path: Path, table: str, version: int, columns: Collection[str] | None = None
) -> dict[str, np.ndarray | Text]:
    older = version < TRACE_VERSION
    chosen = {name: TABLES[table][name] for name in (TABLES[table] if columns is None else columns)}
    if older and table in _ADDED_TABLES:
        return {name: _empty(dtype) for name, (dtype, _) in chosen.items()}
    wanted = [name for name in TABLES[table] if not (older and (table, name) in _ADDED)]
    try:
        with pq.ParquetFile(path, page_checksum_verification=True) as file:
            schema, rows = file.schema_arrow, file.metadata.num_rows
            found = file.read([name for name in wanted if name in chosen]).combine_chunks()
    except FileNotFoundError:
        raise ResultError(f"{path}: missing; the trace is not whole") from None
    except (OSError, ValueError, pa.ArrowException) as error:
        raise ResultError(f"{path}: damaged: {error}") from error
    if schema.names != wanted:
        raise ResultError(f"{path}: its columns are not those of {table}: {', '.join(schema.names)}")
    _check_about(path, schema.metadata or {}, table, version)
    return {
        name: _column(found, name, dtype, path)
        if name in wanted
        else _filled(rows, _ADDED[table, name], dtype)
        for name, (dtype, _) in chosen.items()
    }


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


def _empty(dtype: str) -> np.ndarray | Text:
    return Text(np.empty(0, dtype="int32"), ()) if dtype == "text" else np.empty(0, dtype=dtype)


def _column(found: pa.Table, name: str, dtype: str, path: Path) -> np.ndarray | Text:
    field = found.schema.field(name)
    wanted = pa.dictionary(pa.int32(), pa.string()) if dtype == "text" else pa.from_numpy_dtype(dtype)
    if field.type != wanted or found[name].null_count:
        raise ResultError(f"{path}: column {name} holds {field.type}, not {wanted} without gaps")
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
