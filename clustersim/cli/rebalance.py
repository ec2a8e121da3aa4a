"""The command `rebalance`."""

from __future__ import annotations

from pathlib import Path

import click

from clustersim.cli.benches import bench_in
from clustersim.cli.options import JSON, SCENARIO, SEED, SET
from clustersim.cli.output import print_json, print_page


@click.command()
@SCENARIO
@click.option(
    "--every", metavar="STEPS", default="",
    help="Steps from one planning to the next, such as 0,10,50; 0, never, is always tried.",
)  # fmt: skip
@click.option("--spare", metavar="PLACES", default="", help="Spare places per EP rank, such as 0,1,2.")
@click.option("--policy", metavar="NAME", default="", help="How experts are placed, such as eplb or packed.")
@click.option(
    "--seeds", type=click.IntRange(min=1), metavar="N",
    help="Run everything with N seeds, from the scenario's on; 3 by default. One says nothing of how sure "
    "a gain is.",
)  # fmt: skip
@SET
@SEED
@click.option("--workers", type=click.IntRange(min=1), help="Runs at the same time; one per core by default.")
@click.option("--resume", is_flag=True, help="Take what an interrupted call finished as done.")
@click.option("--out", type=click.Path(path_type=Path, file_okay=False), help="The result folder itself.")
@JSON
def rebalance(
    file: Path, every: str, spare: str, policy: str, seeds: int | None, overrides: tuple[str, ...],
    seed: int | None, workers: int | None, resume: bool, out: Path | None, as_json: bool,
) -> None:  # fmt: skip
    """Find how often placing experts anew is worth it for the scenario in FILE.

    \b
    clustersim rebalance workloads/drift.toml
    clustersim rebalance workloads/drift.toml --every 8,16 --spare 0,1 --seeds 5

    Simulates it for every interval and number of spare places, the weights moving over the same links as the
    traffic; with a seed, the same tokens choose the same experts in every row. How weights move, by which
    loads a plan goes and how long planning takes stands in [deployment.experts.rebalance], how popularity
    moves in [gating]. Left out, intervals are parts of the run, spare places 0, 1 and 2, and the policy is
    the scenario's own if it goes by load, else packed.

    Gains are tokens per second against the best row that never moves anything, with their 95 % confidence
    interval over the seeds. The best of many rows is picked by the same runs, so that its gain is on the high
    side where rows are close. Latencies are those between two output tokens of a sequence, stops included.

    The folder is results/<name>-rebalance-<hash> unless --out names another; it holds rebalance.json and
    cases.jsonl, in which every finished run is kept at once. Ctrl-C prints the table so far; --resume then
    runs only what is missing.
    """
    from clustersim.report.rebalancing import show_head, show_rebalancing
    from clustersim.study.rebalancing import Asked, answer, bill_of, folder_for, numbers, question
    from clustersim.study.stress import about, save

    wish = Asked(numbers(every, "--every"), numbers(spare, "--spare"), policy, seeds or 0)
    laid_over = overrides if seed is None else (*overrides, f"seed={seed}")
    asked = question(str(file), laid_over, wish)
    folder = folder_for(asked, out)
    outcomes = {}
    of = about(asked.scenario)
    with bench_in(folder, "rebalance", bill_of, workers or 0, resume, as_json, of) as (bench, put, tell):
        put(lambda console: show_head(asked.head, asked.notes, console))
        try:
            for position, outcome in bench.run(asked.cases, tell):
                outcomes[position] = outcome
        except KeyboardInterrupt:
            so_far = answer(asked, outcomes)
            put(lambda console: show_rebalancing(so_far, console))
            raise
        found = answer(asked, outcomes)
        save(found, folder, {}, "rebalance")
    if as_json:
        print_json(found)
    else:
        print_page(lambda console: show_rebalancing(found, console, folder))
