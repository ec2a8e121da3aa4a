"""The command `compare`, and what `run --seeds` does."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import click

from clustersim.cli.options import JSON, SEED, SET
from clustersim.cli.output import print_json, print_page, progress, warn

if TYPE_CHECKING:
    from clustersim.study.cases import Tell

#: A bound of --fail-if is broken: neither wrong input nor a fault of ours.
BROKEN = 3


@click.command()
@click.argument("names", nargs=-1, required=True, metavar="A B [C]...")
@click.option(
    "--seeds", type=click.IntRange(2, 1000), metavar="N",
    help="Run every scenario file with N seeds, the same on all sides: differences get intervals.",
)  # fmt: skip
@SET
@click.option(
    "--set-b", "others", multiple=True, metavar="KEY=VALUE",
    help="Override a key of all scenario files but the first; of one file alone, compare it with itself so.",
)  # fmt: skip
@SEED
@click.option(
    "--fail-if", "bounds", multiple=True, metavar="BOUND",
    help='Exit with status 3 if a ratio to A is beyond a bound, such as "step p99 > 1.05" or '
    '"throughput < 0.95". May be repeated.',
)  # fmt: skip
@click.option(
    "-o", "--out", type=click.Path(path_type=Path, dir_okay=False), metavar="PAGE",
    help="Write a report page there, such as compare.html.",
)  # fmt: skip
@JSON
def compare(
    names: tuple[str, ...], seeds: int | None, overrides: tuple[str, ...], others: tuple[str, ...],
    seed: int | None, bounds: tuple[str, ...], out: Path | None, as_json: bool,
) -> int:  # fmt: skip
    """Put results side by side, and say which causes their differences are made of.

    \b
    clustersim compare large_ep baseline_tp8_pp2
    clustersim compare workloads/large_ep.toml workloads/baseline_tp8_pp2.toml --seeds 10
    clustersim compare mine.toml --set-b deployment.experts.policy=eplb --seeds 10 -o compare.html
    clustersim compare main.toml change.toml --seeds 5 --fail-if "step p99 > 1.05"

    Each of A, B ... is a result folder, a scenario's name for its newest result, a folder of `clustersim run
    --seeds`, or a scenario file, which is run. All are held against A. The difference of a mean step is cut
    along its critical path into parts that add up to it. Runs with the same seed have the same random numbers
    on all sides, so with --seeds what is compared are pairs, and it is said whether a difference is more than
    noise. Exit status 3 if a bound of --fail-if is broken.
    """
    from clustersim.study.cases import write_whole
    from clustersim.study.compare import broken, parse_bound
    from clustersim.study.compare import compare as answer

    for bound in bounds:
        # Said before anything is run.
        parse_bound(bound)

    @contextmanager
    def bar(title: str) -> Iterator[Tell]:
        with progress(as_json, title) as tell:
            yield tell

    found = answer(names, bar, seeds or 0, overrides, others, seed)
    found["broken"] = broken(found, bounds)
    if out is not None:
        from clustersim.report.compare_page import compare_html

        write_whole(out, compare_html(found))
    if as_json:
        print_json(found)
    else:
        from clustersim.report.compare import show_comparison

        print_page(lambda console: show_comparison(found, console))
        warn(f"Page: {out}" if out is not None else "")
    for sentence in found["broken"]:
        warn(f"--fail-if: {sentence}")
    return BROKEN if found["broken"] else 0


def run_seeds(
    file: Path, overrides: tuple[str, ...], seed: int | None, count: int, out: Path | None,
    as_json: bool, quiet: bool,
) -> None:  # fmt: skip
    """What `clustersim run FILE --seeds N` does."""
    from clustersim.study.replications import done, planned, replicate

    plan = planned(file, overrides, seed, count, out)
    before = done(plan)
    warn(f"{before} replications are done already" if before else "", quiet or as_json)
    try:
        with progress(quiet or as_json, f"{count} seeds") as tell:
            found = replicate(plan, tell)
    except KeyboardInterrupt:
        kept = done(plan)
        if kept:
            warn(f"{kept} finished replications are kept in {plan.folder}; the same command goes on")
        else:
            warn("no replication was finished, so nothing is kept")
        raise
    if as_json:
        print_json(found)
    elif not quiet:
        from clustersim.report.compare import show_replications

        print_page(lambda console: show_replications(found, console, plan.folder))
