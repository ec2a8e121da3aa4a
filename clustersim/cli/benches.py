"""Cases side by side under a bar: what is done is kept in a folder, whatever interrupts it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from clustersim.cli.output import bar_and_lines, warn

if TYPE_CHECKING:
    from rich.console import Console

    from clustersim.study.cases import Bench, Work

    #: Workers, a way to print a page while the bar stands, and the bar.
    At = tuple[Bench, Callable[[Callable[[Console], None]], None], Callable[[int, int], None]]


@contextmanager
def bench_in(
    folder: Path, question: str, work: Work, workers: int, resume: bool, silent: bool, about: str = ""
) -> Iterator[At]:
    """A bench that keeps its cases in a folder, which is looked at first.

    question  of `study.stress.REPORTS`
    work      what is done with a scenario
    about     the scenario whose cases they are, in words: with `resume`, those of another are refused
    """
    from clustersim.study.cases import Bench
    from clustersim.study.stress import KEPT, begin_anew, check_folder, study_of

    check_folder(folder, question)
    kept = folder / KEPT
    study = study_of(question, about)
    with (
        Bench(workers, kept, resume, work, study, lambda: begin_anew(folder, question)) as bench,
        bar_and_lines(silent) as (tell, put),
    ):
        if resume:
            warn(_damage(bench, kept))
        try:
            yield bench, put, tell
        except KeyboardInterrupt:
            warn(f"{bench.done} finished cases are kept in {folder}; --resume goes on")
            raise
        if resume:
            warn(f"Of this call {bench.resumed} cases were done already, {bench.ran} were run", silent)


#: Numbers of damaged lines that are listed.
_LISTED = 10


def _damage(bench: Bench, kept: Path) -> str:
    """What of the kept cases cannot be used; empty if all can."""
    lines, told = bench.unreadable, []
    if lines:
        listed = ", ".join(map(str, lines[:_LISTED])) + (", ..." if len(lines) > _LISTED else "")
        one = len(lines) == 1
        told.append(
            f"{kept}: {len(lines)} line{'' if one else 's'} unreadable ({listed}): run again where asked for"
        )
    if bench.outdated:
        told.append(f"{kept}: {bench.outdated} cases are of another version of the program: not taken")
    return "\n".join(told)
