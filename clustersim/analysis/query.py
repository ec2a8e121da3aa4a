"""SQL over the tables of a trace, straight from its Parquet files. The only door to DuckDB.

What is asked may come from a stranger, and so may the trace: a query reads files of the trace's folder and
nothing else, writes nothing, loads no extension, and has bounds on time, memory and rows. It runs in a
process of its own: DuckDB does not count long texts as memory and cannot stop while it makes one, but a
process can be limited and ended.
"""

from __future__ import annotations

import os
import re
import resource
import signal
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import get_context
from multiprocessing.connection import Connection
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from typing import Any

import duckdb

from clustersim.errors import ClustersimError, ResultError, nearest
from clustersim.trace.record import TABLES

#: What DuckDB may hold in memory; a query that needs more fails and writes nothing to disk.
MEMORY = "2GiB"
#: Bytes that the process of a query may hold in all, and that its answer may have.
_PROCESS, _ANSWER = 4 << 30, 1 << 30
#: Time that a query may take, s, unless the caller says otherwise.
SECONDS = 60.0
#: More threads than this bring little, and each holds memory.
_THREADS = 8
#: Rows that an answer has at most, unless the caller says otherwise.
MOST_ROWS = 1_000_000

_SETTINGS: dict[str, str | bool | int | float | list[str]] = {
    "autoinstall_known_extensions": "false",
    "autoload_known_extensions": "false",
    # Otherwise a name in a query could be that of a Python variable.
    "python_enable_replacements": "false",
    "memory_limit": MEMORY,
    "temp_directory": "",
    "threads": min(os.cpu_count() or 1, _THREADS),
}
_TYPES = {"int32": "INTEGER", "int64": "BIGINT", "float64": "DOUBLE", "text": "VARCHAR"}
_RESERVED = "end"


@dataclass(frozen=True, slots=True)
class Answer:
    """What a query gave.

    columns  names, in order
    types    of each column, as DuckDB calls them
    rows     values of Python's own types
    cut      whether there were more rows
    """

    columns: list[str]
    types: list[str]
    rows: list[tuple[Any, ...]]
    cut: bool


def query(folder: Path, sql: str, most_rows: int = MOST_ROWS, seconds: float = SECONDS) -> Answer:
    """The answer to one SELECT over the tables of a trace.

    folder     of the Parquet files; every table is a view of its name
    most_rows  how many rows are returned at most
    seconds    how long it may take
    Raises     ClustersimError for anything but one statement that reads, for mistakes in it, with the nearest
               names, and for one that needs too much time or memory; ResultError where a file is damaged
    """
    with _process(folder, sql, most_rows) as answers:
        try:
            # First that it has begun: loading DuckDB is not the query's time.
            answers.recv()
            if not answers.poll(seconds):
                raise ClustersimError(
                    f"sql: not answered within {seconds:g} s; ask for less, or allow more by --seconds"
                )
            found = answers.recv()
        except EOFError:
            # The system ends a process that cannot have the memory it needs.
            raise _too_much() from None
    if isinstance(found, ClustersimError):
        raise found
    if not isinstance(found, Answer):
        raise RuntimeError(found)
    return found


@contextmanager
def _process(folder: Path, sql: str, most_rows: int) -> Iterator[Connection]:
    """What a process that answers a query sends; the process is gone at the end, finished or not."""
    new = get_context("spawn")
    ours, theirs = new.Pipe(duplex=False)
    process = new.Process(target=_answer, args=(theirs, folder, sql, most_rows), daemon=True)
    # Ctrl-C goes to all processes of a terminal. The new one keeps it blocked: it is ended from here.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
    try:
        process.start()
        theirs.close()
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        yield ours
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        if process.pid is not None:
            process.kill()
            process.join()
        ours.close()


def _answer(answers: Connection, folder: Path, sql: str, most_rows: int) -> None:
    """Sends that it has begun, and then the Answer, the error that a user is told, or a text of another."""
    resource.setrlimit(resource.RLIMIT_DATA, (_PROCESS, resource.getrlimit(resource.RLIMIT_DATA)[1]))
    answers.send(None)
    try:
        # By this and not by `send`: so its size is known before it comes to the process that waits.
        sent = ForkingPickler.dumps(_asked(folder, sql, most_rows))
        if len(sent) > _ANSWER:
            raise ClustersimError(f"sql: the answer has more than {_ANSWER >> 30} GiB; ask for less at once")
        answers.send_bytes(sent)
    except ClustersimError as error:
        answers.send(error)
    except MemoryError:
        answers.send(_too_much())
    except Exception as error:
        answers.send(f"{type(error).__name__}: {error}")


def _too_much() -> ClustersimError:
    return ClustersimError(f"sql: the query needs more than {MEMORY} of memory; ask for less at once")


def _asked(folder: Path, sql: str, most_rows: int) -> Answer:
    """The answer, in this process."""
    with duckdb.connect(":memory:", config=_SETTINGS) as connection:
        tables = _views(connection, folder.resolve())
        try:
            _check_reads(sql)
            cursor = connection.execute(sql)
            columns = [(str(name), str(kind)) for name, kind, *_ in cursor.description or []]
            rows = cursor.fetchmany(most_rows + 1)
        except duckdb.Error as error:
            raise _ours(error, sql, tables) from None
    names, types = [name for name, _ in columns], [kind for _, kind in columns]
    return Answer(names, types, rows[:most_rows], len(rows) > most_rows)


def named_tables(sql: str) -> list[str]:
    """The tables of a trace that a query names."""
    words = set(re.findall(r"\w+", sql.casefold()))
    return [table for table in TABLES if table in words]


def _views(connection: duckdb.DuckDBPyConnection, folder: Path) -> list[str]:
    """Makes a view of every table, and then shuts everything else off. Returns the tables' names."""
    if re.search(r"[*?\[]", str(folder)):
        # DuckDB would look for it in folders that a query may not read.
        raise ClustersimError(f"sql: {folder}: DuckDB takes *, ? and [ for a pattern; rename the folder")
    connection.execute(f"SET allowed_directories = [{_quoted(str(folder))}]")
    connection.execute("SET enable_progress_bar = false")
    for table, columns in TABLES.items():
        path = folder / f"{table}.parquet"
        try:
            connection.execute(f"CREATE VIEW {table} AS {_source(connection, path, columns)}")
        except duckdb.Error as error:
            raise ResultError(f"{path}: damaged: {_first_line(error)}") from None
    connection.execute("SET enable_external_access = false")
    connection.execute("SET lock_configuration = true")
    return list(TABLES)


def _source(connection: duckdb.DuckDBPyConnection, path: Path, columns: Mapping[str, tuple[str, str]]) -> str:
    """What a view selects: the file, with NULL for tables and columns that an older trace lacks."""
    if not path.is_file():
        return f"SELECT {_nulls(columns, columns)} WHERE false"
    file = f"read_parquet({_quoted(str(path))})"
    there = {name for name, *_ in connection.execute(f"FROM {file} LIMIT 0").description or []}
    lacking = [name for name in columns if name not in there]
    return f"SELECT *{', ' if lacking else ''}{_nulls(columns, lacking)} FROM {file}"


def _nulls(columns: Mapping[str, tuple[str, str]], names: Iterable[str]) -> str:
    return ", ".join(f'NULL::{_TYPES[columns[name][0]]} AS "{name}"' for name in names)


def _quoted(text: str) -> str:
    return "'" + text.replace("'", "''") + "'"


def _check_reads(sql: str) -> None:
    """Raises ClustersimError for what is not one statement that only reads.

    Files in the allowed folder could be written by COPY, so the kind of statement is looked at.
    """
    statements = duckdb.extract_statements(sql)
    if len(statements) != 1:
        found = "nothing" if not statements else f"{len(statements)} statements"
        raise ClustersimError(f'sql: {found} to run; give one statement, such as "select * from steps"')
    if statements[0].type != duckdb.StatementType.SELECT:
        first = re.search(r"\w+", statements[0].query)
        what = first[0].upper() if first else "that"
        raise ClustersimError(f"sql: {what} is not allowed: a trace is only read; begin with SELECT or WITH")


def _ours(error: duckdb.Error, sql: str, tables: Iterable[str]) -> ClustersimError:
    """DuckDB's error in our words."""
    text = str(error)
    table = re.search(r"Table with name (\S+) does not exist", text)
    if table:
        near = nearest(table[1], tables)
        return ClustersimError(f'sql: there is no table "{table[1]}"{near}; there are {", ".join(tables)}')
    column = re.search(r'Referenced column "(.+?)" not found|does not have a column named "(.+?)"', text)
    if column:
        return ClustersimError(f"sql: {_no_column(column[1] or column[2], sql)}")
    if isinstance(error, duckdb.OutOfMemoryException):
        return _too_much()
    if isinstance(error, duckdb.PermissionException):
        return ClustersimError("sql: only files of this result's trace can be read; its tables have names")
    if isinstance(error, duckdb.IOException):
        return ResultError(f"the trace is damaged: {_first_line(error)}")
    if isinstance(error, duckdb.ParserException) and f'"{_RESERVED}"' not in sql and _says_end(sql):
        return ClustersimError(
            f"sql: {_first_line(error)}; {_RESERVED} is a word of SQL: as a column's name it "
            f'stands in double quotes, "{_RESERVED}"'
        )
    return ClustersimError(f"sql: {_first_line(error)}{_place(text)}{_meant(text)}")


def _no_column(name: str, sql: str) -> str:
    """That a column is missing, and what the tables that the query names have."""
    asked = {table: list(TABLES[table]) for table in named_tables(sql)}
    near = nearest(name, [column for columns in asked.values() for column in columns])
    has = "; ".join(f"{table} has {', '.join(columns)}" for table, columns in asked.items())
    return f'there is no column "{name}"{near}{"; " if has else ""}{has}'


def _says_end(sql: str) -> bool:
    return re.search(rf"(?<![\w.\"]){_RESERVED}(?![\w\"])", sql, re.IGNORECASE) is not None


def _first_line(error: Exception) -> str:
    """What DuckDB says, without what kind of error it calls it."""
    return str(error).splitlines()[0].partition(" Error: ")[2] or str(error).splitlines()[0]


def _meant(text: str) -> str:
    """The name that DuckDB takes for the nearest, if it says one."""
    found = re.search(r'^Did you mean "(.+?)"', text, re.M)
    return f' (did you mean "{found[1]}"?)' if found else ""


def _place(text: str) -> str:
    """The part of the query that DuckDB points at, if it does."""
    found = re.search(r"^LINE \d+: (.*)\n( *)(\^+)", text, re.M)
    if not found:
        return ""
    line = re.search(r"^LINE \d+: ", text, re.M)
    assert line is not None
    at = len(found[2]) - len(line[0])
    pointed = found[1][max(at, 0) : at + len(found[3])]
    return f' at "{pointed}"' if pointed.strip() and pointed not in text.splitlines()[0] else ""
