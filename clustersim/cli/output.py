"""What commands print: results on standard output, talk and bars on standard error."""

from __future__ import annotations

import io
import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from rich.console import Console


def print_json(value: Any) -> None:
    """A JSON value as a result, indented."""
    print_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def print_page(page: Callable[[Console], None]) -> None:
    """What a page draws on a console, as a result; plain text where the output is piped."""
    from rich.console import Console

    tty = sys.stdout.isatty()
    encoding = sys.stdout.encoding or "utf-8"
    # Drawn first and printed in one go: what can go wrong with standard output goes wrong in `print_text`.
    drawn = io.TextIOWrapper(io.BytesIO(), encoding=encoding, newline="", write_through=True)
    # Piped output is read by programs and in logs: keep its width the same everywhere.
    page(Console(file=drawn, force_terminal=tty, width=None if tty else 100, highlight=False))
    drawn.seek(0)
    print_text(drawn.read())


def print_text(text: str) -> None:
    """Results, on standard output."""
    try:
        click.echo(text, nl=False)
    except BrokenPipeError:
        # The reader has gone (`| head`); what it wanted it has, and nothing more shall be flushed to it.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except OSError as error:
        from clustersim.errors import ClustersimError

        raise ClustersimError(f"standard output: {error.strerror or error}") from error


def print_lines(lines: Iterable[str]) -> None:
    """Results of any length on standard output, as they come."""
    try:
        for line in lines:
            click.echo(line, nl=False)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


@contextmanager
def progress(silent: bool, what: str = "simulating") -> Iterator[Callable[[int, int], None]]:
    """A bar on standard error, where that is a terminal. `what` stands before it."""
    if silent or not sys.stderr.isatty():
        yield lambda done, all_: None
        return
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(what, total=None)
        yield lambda done, all_: bar.update(task, completed=done, total=all_)


@contextmanager
def bar_and_lines(
    silent: bool,
) -> Iterator[tuple[Callable[[int, int], None], Callable[[Callable[[Console], None]], None]]]:
    """A bar as in `progress`, and a way to print meanwhile; nothing of either where all is to be silent."""
    if silent:
        yield (lambda done, all_: None), (lambda page: None)
        return
    if not sys.stderr.isatty():
        yield (lambda done, all_: None), print_page
        return
    from rich.console import Console
    from rich.progress import Progress

    # The bar is taken away while a line is printed: both may be the same terminal.
    with Progress(console=Console(stderr=True), transient=True, redirect_stdout=False) as bar:
        task = bar.add_task("simulating", total=None)

        def put(page: Callable[[Console], None]) -> None:
            bar.stop()
            print_page(page)
            bar.start()

        yield (lambda done, all_: bar.update(task, completed=done, total=all_)), put


def warn(sentence: str, quiet: bool = False) -> None:
    """Says on standard error what one may wonder about."""
    if sentence and not quiet:
        click.echo(sentence, err=True)
