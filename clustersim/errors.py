"""The exceptions a user can meet, and how a wrong name is answered."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from typing import TypeVar

Entry = TypeVar("Entry")


class ClustersimError(Exception):
    """Anything the user can mend: wrong input, a damaged result folder, an impossible wish."""


class UnitError(ClustersimError):
    """A quantity whose text, unit or dimension is wrong."""


class ResultError(ClustersimError):
    """A result folder that is missing, damaged or not ours."""


class NotRecordedError(ResultError):
    """What a result does not hold because the run was not asked to record it, or an older version did not."""


class StuckError(ClustersimError):
    """A run that can never end: something waits for what will not come."""


@dataclass(frozen=True, slots=True)
class Mistake:
    """One thing that is wrong in an input file.

    place    dotted key path, e.g. "deployment.expert_parallel"; "" for the file as a whole
    problem  what is wrong and what would be allowed, in one sentence without a full stop
    line     1-based line in the file, or None where no line is to blame
    file     the file it stands in where that is not the one the user named, else None
    """

    place: str
    problem: str
    line: int | None = None
    file: str | None = None


class ScenarioError(ClustersimError):
    """Every mistake of one scenario (or topology, or model) at once.

    file      the file as the user named it
    mistakes  all of them, in file order
    """

    def __init__(self, file: str, mistakes: Iterable[Mistake]) -> None:
        self.file = file
        self.mistakes = tuple(mistakes)
        super().__init__("\n".join(self.lines()))

    def lines(self) -> list[str]:
        """One line per mistake: `file:line: key: problem`."""
        parts = [(self._where(m), m.place, m.problem) for m in self.mistakes]
        return [": ".join(part for part in line if part) for line in parts]

    def _where(self, mistake: Mistake) -> str:
        file = mistake.file or self.file
        return file if mistake.line is None else f"{file}:{mistake.line}"


def nearest(name: str, known: Iterable[str]) -> str:
    """` (did you mean "x"?)` where some known name is near, else the empty string."""
    near = get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f' (did you mean "{near[0]}"?)' if near else ""


def pick(table: Mapping[str, Entry], name: str, where: str) -> Entry:
    """The table's entry of that name.

    where    key path or option that named it, for the message
    Raises   ClustersimError that lists the names and the nearest one
    """
    if name in table:
        return table[name]
    raise ClustersimError(
        f'{where}: "{name}" is not known{nearest(name, table)}; there are {", ".join(table)}'
    )
