"""The view `trace export`: a result as a file for other programs."""

from __future__ import annotations

from pathlib import Path

import click

from clustersim.cli.options import JSON
from clustersim.cli.output import print_json, print_page, warn


@click.command()
@click.argument("result", required=False, metavar="[RESULT]")
@click.option(
    "--format", "format_", default="", metavar="NAME",
    help="perfetto, chrome or csv; by default what the end of FILE says (.json is chrome), else perfetto.",
)  # fmt: skip
@click.option(
    "-o", "--output", type=click.Path(path_type=Path), metavar="FILE",
    help="Where; compressed if it ends in .gz. By default the result's name, in the folder you are in.",
)  # fmt: skip
@click.option("--from", "start", default="", metavar="TIME", help="Only from then on, such as 1ms.")
@click.option("--to", "end", default="", metavar="TIME", help="Only up to then.")
@click.option(
    "--gpus", multiple=True, metavar="LIST", help="Only these: ranks and vertices, such as 0-7,12 or gpu12."
)
@click.option("--steps", multiple=True, metavar="LIST", help="Only these, such as 0,4-7.")
@click.option(
    "--most", type=click.IntRange(min=1), default=1_000_000, show_default=True, metavar="N",
    help="Spans in the file; of more, those that start first.",
)  # fmt: skip
@JSON
def export(
    result: str | None, format_: str, output: Path | None, start: str, end: str, gpus: tuple[str, ...],
    steps: tuple[str, ...], most: int, as_json: bool,
) -> None:  # fmt: skip
    """Write a result as a timeline for Perfetto or Chrome, or its tables as CSV.

    \b
    clustersim trace export                          newest result, for https://ui.perfetto.dev
    clustersim trace moe_1024 export --steps 0 --gpus 0-15 -o first.pftrace.gz
    clustersim trace export --format csv -o tables   one file per table

    A timeline has a group per server, in it a track per stream of a GPU and per link: what ran when, waits
    before it, arrows from senders to receivers, and as counters the utilization of links, tokens in expert
    queues and KV memory. Times are rounded to whole nanoseconds. The file is written whole or not at all, and
    the same result gives the same bytes.
    """
    from clustersim.study.exporting import Wanted, export
    from clustersim.study.inspecting import open_result
    from clustersim.study.views import Times

    wanted = Wanted(format_, Times(start, end), gpus, steps, most)
    found = export(open_result(result), wanted, output)
    for note in found["notes"]:
        warn(note)
    if as_json:
        print_json(found)
        return
    from clustersim.report.views import show_export

    print_page(lambda console: show_export(found, console))
