"""Tables of text, plain or compressed: read with every mistake told by its row, written whole or not at all.

A row is named by the number of its line in the file, so the first under the header is row 2. Quotes are
understood, but a field holds no line break.
"""

from __future__ import annotations

import csv
import gzip
import math
import os
import re
import sys
import tempfile
import zlib
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import IO, cast

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pyarrow import csv as arrow_csv

from clustersim.errors import Mistake, ResultError, ScenarioError, nearest
from clustersim.trace.record import Text

#: Text that is read of one file, bytes; a compressed file may promise any amount.
MOST_BYTES = 1 << 30
#: Rows, and ids in lists, that one file may hold: some gigabytes once they are numbers.
MOST_ROWS = 1 << 25
MOST_IDS = 1 << 26
#: Longest line, bytes.
_BLOCK = 1 << 24
_MOST_MISTAKES = 20
_SHOWN = 60
_PIECE = 1 << 22
#: Decimals to which a number is written where the rest of its digits are rounding.
_DECIMALS = 6
#: Tells zlib to write what gzip writes.
_GZIP = 31


@dataclass(frozen=True, eq=False, slots=True)
class Lists:
    """A column of lists of ids: row i holds `values[first[i]:first[i + 1]]`.

    first   int64[rows + 1]
    values  int64[all]
    """

    first: np.ndarray
    values: np.ndarray

    def rows(self) -> np.ndarray:
        """int64[all] the row that each value stands in."""
        return np.repeat(np.arange(len(self.first) - 1), np.diff(self.first))


@dataclass(eq=False, slots=True)
class Sheet:
    """The wanted columns of one file, and the mistakes found in them so far.

    columns   int64[rows] for "id", float64[rows] for "number", Lists for "ids", Text for "text"
    length    rows under the header
    header    names in the first line, wanted or not
    """

    path: Path
    columns: dict[str, np.ndarray | Text | Lists]
    length: int
    _content: bytearray
    header: list[str]
    mistakes: list[Mistake] = field(default_factory=list)

    def numbers(self, column: str) -> np.ndarray:
        """The column of an "id" or "number"."""
        found = self.columns[column]
        assert isinstance(found, np.ndarray)
        return found

    def text(self, column: str) -> Text:
        """The column of a "text"."""
        found = self.columns[column]
        assert isinstance(found, Text)
        return found

    def lists(self, column: str) -> Lists:
        """The column of "ids"."""
        found = self.columns[column]
        assert isinstance(found, Lists)
        return found

    def lines(self) -> list[tuple[int, bytes]]:
        """Number and content of the lines that are not empty, that of the header first."""
        return [(number, bytes(line)) for number, line in _lines(self._content)]

    def refuse(self, column: str, bad: np.ndarray, problem: Callable[[int], str]) -> None:
        """Notes a mistake if any row is bad; `check` raises it.

        bad      bool[rows] or int[bad] rows counted from 0
        problem  the first bad row → what is wrong with it
        """
        rows = np.flatnonzero(bad) if bad.dtype == bool else bad
        if len(rows):
            first, more = int(rows[0]), len(rows) - 1
            others = f" (and {more:,} more row{'s' if more > 1 else ''} like it)" if more else ""
            place = f"row {self.line(first)}, {column}"
            self.mistakes.append(Mistake(place, _one_line(problem(first)) + others))

    def check(self) -> None:
        """Raises ScenarioError if there are mistakes."""
        if self.mistakes:
            raise ScenarioError(named(self.path), self.mistakes)

    def line(self, row: int) -> int:
        """The number that a row, counted from 0 under the header, has as a line of the file."""
        return next(islice(_lines(self._content), row + 1, None))[0]

    def said(self, column: str, row: int) -> str:
        """A field as it stands in the file, cut to what can be shown."""
        line = next(islice(_lines(self._content), row + 1, None))[1]
        try:
            return shown(_fields(line)[self.header.index(column)])
        except (csv.Error, IndexError):
            # Arrow is content with some rows that the standard library does not take.
            return "what stands there"


def shown(text: str) -> str:
    """A field in quotes, cut to what can be shown."""
    return f'"{text}"' if len(text) <= _SHOWN else f'"{text[:_SHOWN]}..."'


def read_csv(path: Path, columns: Mapping[str, str]) -> Sheet:
    """Reads some columns of a file with a header, in whichever order they stand.

    columns  name → "id": a whole number; "number": finite; "ids": whole numbers between semicolons,
             possibly none; "text": anything
    Raises   ScenarioError with every row that is not of this form
    """
    content = _content(path)
    header = _header(path, content, columns)
    _check_size(path, content, MOST_ROWS)
    return _sheet(path, content, header, columns)


def read_known(path: Path, known: Collection[str], most_rows: int = MOST_ROWS) -> Sheet:
    """Reads as text the columns whose names are known; of the others only the lines are kept.

    known      names in small letters; a file may write them in large ones, with blanks around them
    most_rows  rows above which a file is refused
    Raises     ScenarioError for a file without known columns, with ragged rows, or of other than UTF-8
    """
    content = _content(path)
    header = _header(path, content, {})
    columns = {name: "text" for name in header if plain(name) in known}
    if not columns:
        near = next(filter(None, (nearest(name, known) for name in header[:_SHOWN])), "")
        raise _refused(
            path, f"has no column that is known here{near}; its first line is {shown(','.join(header))}"
        )
    _header(path, content, columns)
    _refuse_alike(path, columns)
    _check_size(path, content, most_rows)
    sheet = _sheet(path, content, header, columns)
    for number, line in _lines(content):
        try:
            line.decode("utf-8")
        except UnicodeDecodeError:
            raise ScenarioError(named(path), [Mistake(f"row {number}", "is not text in UTF-8")]) from None
    return sheet


def named(path: Path) -> str:
    """What a file is called in messages; "-" is standard input."""
    return "standard input" if str(path) == "-" else str(path)


def plain(name: str) -> str:
    """A column's name as names are compared."""
    return name.strip().casefold()


def _refuse_alike(path: Path, columns: Collection[str]) -> None:
    """Raises ScenarioError where two columns have one name, however they write it."""
    seen: dict[str, str] = {}
    for name in columns:
        if seen.setdefault(plain(name), name) != name:
            raise _refused(path, f'has a column "{seen[plain(name)]}" and a column "{name}"; which is meant?')


def _sheet(path: Path, content: bytearray, header: list[str], columns: Mapping[str, str]) -> Sheet:
    options = arrow_csv.ConvertOptions(
        include_columns=list(columns),
        column_types={name: _KINDS[kind].arrow for name, kind in columns.items()},
        null_values=[],
        strings_can_be_null=False,
    )
    try:
        table = arrow_csv.read_csv(
            pa.BufferReader(content),
            read_options=arrow_csv.ReadOptions(block_size=_BLOCK),
            convert_options=options,
        )
        found = {name: _KINDS[kind].read(table[name]) for name, kind in columns.items()}
    except (pa.ArrowException, ValueError) as error:
        raise _refusal(path, content, header, columns, str(error)) from None
    if content.count(b'"') and sum(1 for _ in _lines(content)) != table.num_rows + 1:
        raise ScenarioError(
            named(path), [Mistake("", "a field in quotes holds a line break; none is allowed")]
        )
    if not table.num_rows:
        raise ScenarioError(named(path), [Mistake("", "holds no row under its header")])
    sheet = Sheet(path, found, table.num_rows, content, header)
    for name in (name for name, kind in columns.items() if kind == "number"):
        _refuse_infinite(sheet, name)
    return sheet


def _refuse_infinite(sheet: Sheet, column: str) -> None:
    # Arrow takes "nan" and "inf" for numbers.
    bad = ~np.isfinite(sheet.numbers(column))
    sheet.refuse(column, bad, lambda row: _unlike(sheet.said(column, row), "number"))


def write_csv(path: Path, columns: Mapping[str, np.ndarray]) -> None:
    """Writes a table beside its place and moves it there when it is whole; compressed if named `.gz`.

    columns  name → numbers, all of one length
    Raises   ResultError if nothing can be written there
    """
    write_text(path, to_csv(columns))


def write_text(path: Path, content: bytes) -> None:
    """Writes a file beside its place and moves it there when it is whole; compressed if named `.gz`.

    Raises   ResultError if nothing can be written there
    """
    write_pieces(path, [content])


def write_pieces(path: Path, pieces: Iterable[bytes]) -> None:
    """As `write_text`, of a file that need not be in memory as a whole."""
    if path.suffix == ".gz":
        pieces = _compressed(pieces)
    try:
        if path.exists() and not path.is_file():
            # A pipe or a device is written to, not replaced.
            with path.open("wb") as file:
                file.writelines(pieces)
            return
        place = path.resolve()
        with tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=place.parent) as workplace:
            fresh = Path(workplace) / "fresh"
            with fresh.open("wb") as file:
                file.writelines(pieces)
            fresh.replace(place)
    except OSError as error:
        raise _unwritable(path, error) from error


def _compressed(pieces: Iterable[bytes]) -> Iterator[bytes]:
    """As gzip does it, without the time of day: the same content gives the same bytes."""
    packer = zlib.compressobj(3, wbits=_GZIP)
    for piece in pieces:
        yield packer.compress(piece)
    yield packer.flush()


def write_folder(folder: Path, tables: Mapping[str, Mapping[str, np.ndarray]]) -> None:
    """Writes `<table>.csv` for every table beside their place, and moves the folder there when it is whole.

    tables   name → column → values, all of one length
    Raises   ResultError if something else than such files lies there, or nothing can be written
    """
    check_folder(folder, tables)
    try:
        place = folder.resolve()
        with tempfile.TemporaryDirectory(prefix=f".{place.name}.", dir=place.parent) as workplace:
            fresh = Path(workplace) / "fresh"
            fresh.mkdir()
            for table, columns in tables.items():
                (fresh / f"{table}.csv").write_bytes(to_csv(columns))
            old = Path(workplace) / "old"
            if place.exists():
                place.rename(old)
            try:
                fresh.rename(place)
            except OSError:
                if old.exists():
                    old.rename(place)
                raise
    except OSError as error:
        raise _unwritable(folder, error) from error


def check_folder(folder: Path, tables: Collection[str]) -> None:
    """Raises ResultError if something else than such tables lies there, or the folder cannot be written."""
    if folder.is_dir():
        strange = sorted({path.name for path in folder.iterdir()} - {f"{table}.csv" for table in tables})
        if strange:
            raise ResultError(f"{folder}: holds {strange[0]}, which is no table of ours, and is not replaced")
    elif folder.exists():
        raise ResultError(f"{folder}: is a file; tables are written into a folder")
    check_place(folder.resolve().parent / f".{folder.name}")


def to_csv(columns: Mapping[str, np.ndarray]) -> bytes:
    """The table as text. Every number reads back to what it was, but for rounding in its last place."""
    arrays = [pa.array(_short(column)) for column in columns.values()]
    table = pa.Table.from_arrays(arrays, names=list(columns))
    sink = pa.BufferOutputStream()
    arrow_csv.write_csv(table, sink, arrow_csv.WriteOptions(include_header=False))
    rows: bytes = sink.getvalue().to_pybytes()
    return f"{','.join(columns)}\n".encode() + rows


def check_place(path: Path) -> None:
    """Raises ResultError if no file could be written there; leaves nothing behind."""
    if path.is_dir():
        raise ResultError(f"{path}: is a folder; name a file in it")
    try:
        if path.exists() and not path.is_file():
            if not os.access(path, os.W_OK):
                raise PermissionError("permission denied")
            return
        with tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.resolve().parent):
            pass
    except (OSError, RuntimeError) as error:
        raise _unwritable(path, error) from error


def _unwritable(path: Path, error: Exception) -> ResultError:
    return ResultError(f"{path}: cannot be written: {getattr(error, 'strerror', None) or error}")


def _short(column: np.ndarray) -> np.ndarray:
    """Without the digits that changing the unit of a short decimal has left behind."""
    if column.dtype != np.float64:
        return column
    short = np.round(column, _DECIMALS)
    near = np.abs(short - column) <= 2 * np.spacing(np.abs(column))
    chosen: np.ndarray = np.where(near, short, column)
    return chosen


# --- what stands in a file -----------------------------------------------------------------------


def _content(path: Path) -> bytearray:
    """All of a file, decompressed if its name ends in `.gz`."""
    content = bytearray()
    try:
        with _opened(path) as file:
            while piece := file.read(_PIECE):
                content += piece
                if len(content) > MOST_BYTES:
                    raise _refused(path, f"is too large; at most {MOST_BYTES:,} bytes of text are read")
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise _refused(path, f"is damaged, or not compressed by gzip: {error}") from None
    except OSError as error:
        raise _refused(path, f"cannot be read: {error.strerror or error}") from None
    if content.startswith(b"\xef\xbb\xbf"):
        del content[:3]
    return content


def _opened(path: Path) -> AbstractContextManager[IO[bytes]]:
    if str(path) == "-":
        return nullcontext(sys.stdin.buffer)
    return cast(IO[bytes], gzip.open(path, "rb")) if path.suffix == ".gz" else path.open("rb")


def _refused(path: Path, problem: str) -> ScenarioError:
    return ScenarioError(named(path), [Mistake("", _one_line(problem))])


def _header(path: Path, content: bytearray, columns: Mapping[str, str]) -> list[str]:
    """The names in the first line, in which each wanted one stands just once."""
    # Any line end counts; what follows the first two MiB is no header.
    first = next(_lines(content[: 1 << 21]), None)
    wanted = ",".join(columns) or "the names of its columns"
    if first is None:
        raise _refused(path, f"is empty; its first line should be {wanted}")
    try:
        header = _fields(first[1])
    except csv.Error as error:
        raise _refused(path, f"{error}; its first line should be {wanted}") from None
    known = bool(columns) and set(columns) <= set(header)
    if not known and ("\0" in "".join(header) or not _is_text("".join(header))):
        raise _refused(path, f"is not text in UTF-8; its first line should be {wanted}")
    mistakes = []
    for name in columns:
        if header.count(name) != 1:
            others = [other for other in header[:_SHOWN] if other not in columns]
            problem = (
                "stands in it twice" if name in header else f"is missing{_one_line(nearest(name, others))}"
            )
            mistakes.append(Mistake(f"row {first[0]}, column {name}", f"{problem}; there must be {wanted}"))
    if mistakes:
        raise ScenarioError(named(path), mistakes)
    return header


def _lines(content: bytearray) -> Iterator[tuple[int, bytearray]]:
    """Number and content of the lines that are not empty: the header and the rows."""
    return ((number, line) for number, line in enumerate(content.splitlines(), 1) if line)


def _fields(line: bytearray) -> list[str]:
    """The fields of a line; bytes that are no UTF-8 become surrogates."""
    text = line.decode("utf-8", errors="surrogateescape")
    # The standard library limits the length of a field, which a list of ids may well exceed.
    return next(csv.reader([text], strict=True)) if '"' in text else text.split(",")


def _check_size(path: Path, content: bytearray, most_rows: int) -> None:
    rows, ids = max(content.count(b"\n"), content.count(b"\r")), content.count(b";")
    for count, most, what in ((rows, most_rows, "rows"), (ids, MOST_IDS, "ids in lists")):
        if count > most:
            raise _refused(path, f"holds {count:,} {what}, too many for memory; at most {most:,} are allowed")


def _refusal(
    path: Path, content: bytearray, header: list[str], columns: Mapping[str, str], said: str
) -> ScenarioError:
    """What is wrong with the rows of a file that could not be read as a table."""
    found = list(islice(_wrong_rows(content, header, columns), _MOST_MISTAKES + 1))
    if len(found) > _MOST_MISTAKES:
        found[-1] = Mistake("", "there are more mistakes like these")
    return (
        ScenarioError(named(path), found) if found else _refused(path, f"cannot be read as a table: {said}")
    )


def _wrong_rows(content: bytearray, header: list[str], columns: Mapping[str, str]) -> Iterator[Mistake]:
    places = [(header.index(name), name, kind) for name, kind in columns.items()]
    for number, line in islice(_lines(content), 1, None):
        if len(line) > _BLOCK:
            yield Mistake(f"row {number}", f"has {len(line):,} bytes; at most {_BLOCK:,} are allowed")
            continue
        try:
            fields = _fields(line)
        except csv.Error as error:
            yield Mistake(f"row {number}", f"cannot be taken apart: {error}")
            continue
        if len(fields) != len(header):
            problem = f"has {len(fields)} field{'s' * (len(fields) != 1)}, but the header has {len(header)}"
            yield Mistake(f"row {number}", problem)
            continue
        for at, name, kind in places:
            if not _KINDS[kind].fits(fields[at]):
                yield Mistake(f"row {number}, {name}", _one_line(_unlike(shown(fields[at]), kind)))


def _unlike(said: str, kind: str) -> str:
    return f"{said} is not {_KINDS[kind].meaning}"


def _one_line(text: str) -> str:
    return "".join(letter if letter.isprintable() else repr(letter)[1:-1] for letter in text[:600])


# --- the kinds of columns ------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Kind:
    """What a column may hold.

    meaning  for a message
    arrow    type that Arrow reads it as
    read     Arrow's column → ours
    fits     whether a field is of this kind
    """

    meaning: str
    arrow: pa.DataType
    read: Callable[[pa.ChunkedArray], np.ndarray | Text | Lists]
    fits: Callable[[str], bool]


def _numbers(column: pa.ChunkedArray) -> np.ndarray:
    numbers: np.ndarray = column.to_numpy()
    return numbers


def _ids(column: pa.ChunkedArray) -> np.ndarray:
    numbers = _numbers(column)
    if len(numbers) and numbers.min() < 0:
        raise ValueError("negative id")
    return numbers


def _texts(column: pa.ChunkedArray) -> Text:
    whole = column.unify_dictionaries().combine_chunks()
    return Text(whole.indices.to_numpy(), tuple(whole.dictionary.to_pylist()))


def _lists(column: pa.ChunkedArray) -> Lists:
    whole = column.combine_chunks()
    lengths = pc.binary_length(whole).to_numpy()
    parts = pc.split_pattern(whole.filter(pa.array(lengths > 0)), ";")
    counts = np.zeros(len(lengths), dtype=np.int64)
    counts[lengths > 0] = pc.list_value_length(parts).to_numpy()
    values = _ids(parts.flatten().cast(pa.int64()))
    return Lists(np.concatenate([[0], np.cumsum(counts)]), values)


def _is_number(text: str) -> bool:
    form = r"\s*-?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?\s*"
    return bool(re.fullmatch(form, text, re.ASCII)) and math.isfinite(float(text))


def _is_text(text: str) -> bool:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _is_id(text: str) -> bool:
    return bool(re.fullmatch(r"\s*\d+\s*", text, re.ASCII)) and len(text) <= 100 and int(text) < 1 << 63


def _are_ids(text: str) -> bool:
    return not text or all(part == part.strip() and _is_id(part) for part in text.split(";"))


_KINDS = {
    "id": _Kind("a whole number of at least 0", pa.int64(), _ids, _is_id),
    "number": _Kind('a finite number, such as "12.5"', pa.float64(), _numbers, _is_number),
    "ids": _Kind('a list of ids between semicolons, such as "0;5"', pa.string(), _lists, _are_ids),
    "text": _Kind("text in UTF-8", pa.dictionary(pa.int32(), pa.string()), _texts, _is_text),
}
