"""The views `why` and `bounds` of `clustersim trace`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from clustersim.cli.options import JSON, SET
from clustersim.cli.output import print_json, print_page, progress

if TYPE_CHECKING:
    from clustersim.study.inspecting import Opened


@click.command()
@click.argument("names", nargs=-1, required=True, metavar="[RESULT] STEP|REQUEST")
@click.option(
    "--by", type=click.Choice(["cause", "operator", "layer"]),
    help="All parts with the same as one line, instead of the order of time.",
)  # fmt: skip
@click.option("--all", "whole", is_flag=True, help="Every part of the path on a line of its own.")
@JSON
def why(names: tuple[str, ...], by: str | None, whole: bool, as_json: bool) -> None:
    """Say why a step or a request took as long as it did.

    \b
    why 7           step 7; also step:7
    why request:3   request 3, from its arrival to its last token
    why slowest     the slowest step; also p99, median, fastest

    Prints its critical path: what was waited for at every moment, by cause. The parts add up to the latency.
    """
    from clustersim.study.explaining import path_as_json, path_of

    result, what = _split(names)
    path = path_of(result.trace, what)
    if as_json:
        print_json(path_as_json(path, by or "operator", whole))
        return
    from clustersim.report.why import show_path

    print_page(lambda console: show_path(path, by or "", whole, console))


@click.command()
@click.argument("name", required=False, metavar="[RESULT]")
@click.option("--check", is_flag=True, help="Run the result's scenario again without what is taken away.")
@SET
@JSON
def bounds(name: str | None, check: bool, overrides: tuple[str, ...], as_json: bool) -> None:
    """Say how much faster steps could be at most, were one thing away.

    No imbalance, no straggler, infinitely fast NVLink or network, no launch cost, perfect overlap: each by
    itself, reckoned over the recorded graph without running again. --check runs the scenario anew for each
    that a scenario can say, from its text with --set laid over, and holds the bound against it.
    """
    from clustersim.study.explaining import explained
    from clustersim.study.inspecting import open_result

    result = open_result(name)
    if check:
        _check(result, overrides, as_json)
        return
    found = explained(result.trace)
    if as_json:
        print_json(found.as_json())
        return
    from clustersim.report.why import show_bounds, show_shares

    def page(console: Any) -> None:
        show_bounds(found.bounds, found.unexplained, console)
        show_shares(found.shares, console)

    print_page(page)


def _check(result: Opened, overrides: tuple[str, ...], as_json: bool) -> None:
    from clustersim.report.why import show_checks
    from clustersim.study.bound_checks import check_bounds

    with progress(as_json) as tell:
        checks = check_bounds(Path(result.folder) / "scenario.toml", overrides, tell)
    if as_json:
        print_json(checks)
    else:
        print_page(lambda console: show_checks(checks, console))
    if not all(one["holds"] for one in checks):
        raise SystemExit(1)


def _split(names: tuple[str, ...]) -> tuple[Opened, str]:
    """The result and what of it, in either order; a word that is no step is the result."""
    from clustersim.errors import ClustersimError
    from clustersim.study.explaining import is_named
    from clustersim.study.inspecting import open_result

    if len(names) > 2:
        raise ClustersimError(f"why: {len(names)} words; name a result and a step or request, such as step:7")
    if len(names) == 1:
        return open_result(None), names[0]
    result, what = names if is_named(names[1]) or not is_named(names[0]) else names[::-1]
    return open_result(result), what
