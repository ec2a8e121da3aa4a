"""The command `dag`."""

from __future__ import annotations

from pathlib import Path

import click

from clustersim.cli.options import JSON, SCENARIO, SET
from clustersim.cli.output import print_json, print_lines, print_page


@click.command()
@SCENARIO
@SET
@click.option(
    "--level", default="expert", show_default=True, metavar="NAME",
    help="What a node is: model: a pipeline stage; stage: a layer's attention or experts; layer: "
    "an operator; expert: heads and experts one by one, too.",
)  # fmt: skip
@click.option("--full", is_flag=True, help="Every shard, head and expert instead of a sample of them.")
@click.option(
    "--layers", default="", metavar="LIST", help="Only these layers, such as 0,2-4; the others as one box."
)
@click.option(
    "--out", type=click.Path(path_type=Path, dir_okay=False), metavar="FILE",
    help="Write the drawing there: .dot, or .svg up to 2,000 nodes; left out, DOT goes to standard output.",
)  # fmt: skip
@click.option(
    "--check", is_flag=True, help="Check the drawing instead, and what documents claim of the deployment."
)
@JSON
def dag(
    file: Path, overrides: tuple[str, ...], level: str, full: bool, layers: str, out: Path | None,
    check: bool, as_json: bool,
) -> int:  # fmt: skip
    """Draw the deployment of the scenario in FILE, node by node, from the operators that it runs.

    \b
    clustersim dag workloads/moe_1024.toml --out moe_1024.svg
    clustersim dag workloads/large_ep.toml --layers 0 --out layer.svg
    clustersim dag workloads/moe_1024.toml --full --out all.dot
    clustersim dag workloads/baseline_tp8_pp2.toml --check

    One pass of the first step is drawn: ellipses are communication, boxes computation, parallelograms
    routing and aggregation; dashed arrows are what a gate has selected. Each node says on which GPUs it
    runs, and the sizes of its tensors: on one GPU / of all together. Of many heads and experts the first,
    middle and last are drawn, the rest as one box; shards are drawn together. --full draws every one, as
    DOT of any size.

    --check goes through the validation list: no cycles, connectivity, expert coverage, head decomposition,
    GPU assignment, communications, dimensions along every edge, and that what is drawn is what runs; of the
    seed deployments also which claims of their documents hold. With --full it looks at every node. Exit
    status 2 if the drawing fails a check.
    """
    from clustersim.study import dag as drawing

    deployment = drawing.load_deployment(file, overrides)
    wish = drawing.wish_of(level, full, layers, deployment)
    if check:
        found = drawing.check(deployment, wish)
        if as_json:
            print_json(found)
        else:
            from clustersim.report.dag import show_checks

            print_page(lambda console: show_checks(found, console))
        if out is not None:
            drawing.save(deployment, level, wish, out)
        return 0 if found["good"] else 2
    if out is not None:
        said = drawing.save(deployment, level, wish, out)
        if as_json:
            print_json(said)
        else:
            from clustersim.report.dag import show_drawn

            print_page(lambda console: show_drawn(said, console))
    elif as_json:
        print_json(drawing.as_json(deployment, level, wish))
    else:
        print_lines(drawing.dot(deployment, level, wish))
    return 0
