"""Arguments and options that several commands have."""

from __future__ import annotations

from pathlib import Path

import click

SCENARIO = click.argument("file", type=click.Path(path_type=Path))
SET = click.option(
    "--set", "overrides", multiple=True, metavar="KEY=VALUE",
    help="Override a key of the file, such as deployment.expert_parallel=8. May be repeated.",
)  # fmt: skip
SEED = click.option("--seed", type=click.IntRange(min=0), help="Replace the scenario's seed.")
JSON = click.option("--json", "as_json", is_flag=True, help="Print JSON alone on standard output.")
