"""The command `report`: one page on what happened in a run, and why."""

from __future__ import annotations

from pathlib import Path

import click

from clustersim.cli.output import print_text


@click.command()
@click.argument("result", required=False, metavar="[RESULT]")
@click.option(
    "-o", "--out", type=click.Path(path_type=Path), metavar="FILE",
    help="The page; by default report.html in the result folder.",
)  # fmt: skip
@click.option(
    "--step", type=click.IntRange(min=0), metavar="N",
    help="The step whose timeline is drawn; by default the slowest.",
)  # fmt: skip
@click.option(
    "--gpu", "gpus", multiple=True, metavar="GPU",
    help="A rank or vertex of that timeline; may be repeated. By default those that explain the step.",
)  # fmt: skip
def report(result: str | None, out: Path | None, step: int | None, gpus: tuple[str, ...]) -> None:
    """Write one HTML page on what happened in a run, and why. Nothing is run.

    \b
    clustersim report                      of the newest result
    clustersim report moe_1024 -o moe.html
    clustersim report large_ep --step 7 --gpu 0 --gpu 3

    The page needs nothing else, no network either: numbers beside the claimed ones, latencies, where a
    step's time goes, GPUs and links over time, experts, a step GPU by GPU, bounds, how prices were found,
    and the scenario. RESULT is named as for `clustersim trace`.
    """
    from clustersim.study.inspecting import open_result, telling
    from clustersim.study.reporting import write_report

    opened = open_result(result)
    with telling(opened):
        place = write_report(opened, out, step, gpus)
    print_text(f"Report: {place} ({place.stat().st_size / 1e6:.1f} MB)\n")
