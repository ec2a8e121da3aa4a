"""The command `rebalance`."""

from __future__ import annotations

from pathlib import Path

import click

from clustersim.cli.options import JSON, SCENARIO, SEED, SET
from clustersim.cli.output import print_json, print_page, progress


@click.command()
@SCENARIO
@click.option(
    "--every", metavar="STEPS", default="",
    help="Steps from one planning to the next, such as 0,10,50; 0, never, is always tried.",
)  # fmt: skip
@click.option("--spare", metavar="PLACES", default="", help="Spare places per EP rank, such as 0,1,2.")
@click.option("--policy", metavar="NAME", default="", help="How experts are placed, such as eplb or packed.")
@SET
@SEED
@click.option("--workers", type=click.IntRange(min=1), help="Runs at the same time; one per core by default.")
@JSON
def rebalance(
    file: Path, every: str, spare: str, policy: str, overrides: tuple[str, ...], seed: int | None,
    workers: int | None, as_json: bool,
) -> None:  # fmt: skip
    """Find how often placing experts anew is worth it for the scenario in FILE.

    Simulates it for every interval and number of spare places, each time with the same tokens, the weights
    moving over the same links as the traffic. How they move, by which loads a plan goes and how long planning
    takes stands in [deployment.experts.rebalance], how popularity moves in [gating]. Left out, intervals are
    parts of the run, spare places 0, 1 and 2, and the policy is the scenario's own if it goes by load.
    """
    from clustersim.study.rebalancing import Asked, numbers
    from clustersim.study.rebalancing import rebalance as sweep

    asked = Asked(numbers(every, "--every"), numbers(spare, "--spare"), policy)
    laid_over = overrides if seed is None else (*overrides, f"seed={seed}")
    with progress(as_json) as tell:
        found = sweep(str(file), laid_over, asked, tell, workers or 0)
    if as_json:
        print_json(found)
        return
    from clustersim.report.rebalancing import show_rebalancing

    print_page(lambda console: show_rebalancing(found, console))
