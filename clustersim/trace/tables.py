"""A trace for notebooks: tables by name, handed to Arrow, pandas or polars."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from clustersim.errors import ClustersimError, pick
from clustersim.trace.files import length, to_arrow
from clustersim.trace.record import TABLES, Columns, Trace

if TYPE_CHECKING:
    import pandas
    import polars
    import pyarrow


@dataclass(frozen=True, slots=True, eq=False)
class Table:
    """One table of a trace.

    name     a key of clustersim.trace.record.TABLES
    columns  column → NumPy array, or Text for columns of repeated words
    """

    name: str
    columns: Columns

    def __len__(self) -> int:
        return length(self.columns)

    def __repr__(self) -> str:
        return f"<Table {self.name}: {len(self)} rows of {', '.join(self.columns)}>"

    def describe(self) -> dict[str, str]:
        """Column → what it is, with its unit."""
        return {column: meaning for column, (_, meaning) in TABLES[self.name].items()}

    def to_arrow(self) -> pyarrow.Table:
        """The columns as they are, without copying numbers."""
        return to_arrow(self.columns, self.name)

    def to_pandas(self) -> pandas.DataFrame:
        """Raises ClustersimError where pandas is not installed."""
        try:
            return self.to_arrow().to_pandas()
        except ImportError as error:
            raise ClustersimError("to_pandas needs pandas: pip install pandas") from error

    def to_polars(self) -> polars.DataFrame:
        """Raises ClustersimError where polars is not installed."""
        try:
            import polars
        except ImportError as error:
            raise ClustersimError("to_polars needs polars: pip install polars") from error
        frame: Any = polars.from_arrow(self.to_arrow())
        return frame


class Tables(Mapping[str, Table]):
    """The tables of a trace by name."""

    def __init__(self, trace: Trace) -> None:
        self.raw = trace

    def __getitem__(self, name: str) -> Table:
        return Table(name, pick(self.raw.tables, name, "trace"))

    def __iter__(self) -> Iterator[str]:
        return iter(self.raw.tables)

    def __len__(self) -> int:
        return len(self.raw.tables)

    def __repr__(self) -> str:
        rows = ", ".join(f"{name}: {len(table)}" for name, table in self.items())
        return f"<Tables of rows: {rows}>"
