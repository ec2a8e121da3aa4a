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
    folder: Path, question: str, work: Work, workers: int, resume: bool, silent: bool
) -> Iterator[At]:
    """A bench that keeps its cases in a folder, which is looked at first.

    question  of `study.stress.REPORTS`
    work      what is done with a scenario
    """
    from clustersim.study.cases import Bench
    from clustersim.study.stress import KEPT, check_folder

    check_folder(folder, question)
    with Bench(workers, folder / KEPT, resume, work) as bench, bar_and_lines(silent) as (tell, put):
        if resume:
            warn(f"{bench.resumed} cases are done already", silent)
        try:
            yield bench, put, tell
        except KeyboardInterrupt:
            warn(f"{bench.done} finished cases are kept in {folder}; --resume goes on")
            raise
