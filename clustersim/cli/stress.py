"""The command `stress`."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from clustersim.cli.benches import bench_in
from clustersim.cli.options import JSON, SCENARIO, SEED, SET
from clustersim.cli.output import print_json, print_page, warn

if TYPE_CHECKING:
    from clustersim.cli.benches import At
    from clustersim.study.cases import Base


@click.command()
@SCENARIO
@SET
@SEED
@click.option(
    "--slo", metavar="BOUND", default="",
    help='The bound that is to be kept, such as "p99 step < 60 ms" or "tokens/s > 400000"; by default the '
    "p99 step may take 1.2 times as long as under even load.",
)  # fmt: skip
@click.option(
    "--only", "parts", multiple=True, type=click.Choice(["suite", "breaking", "help"]),
    help="Answer just this part; may be repeated.",
)  # fmt: skip
@click.option(
    "--steps", type=click.IntRange(min=1), metavar="N",
    help="Decode steps per case; by default 8, or the file's if these are fewer.",
)  # fmt: skip
@click.option(
    "--map", "axes", metavar="ROWS,COLUMNS", default="",
    help="Instead, map where this deployment beats another, over two of skew, tokens, spare, slow_gpu and "
    "slow_link.",
)  # fmt: skip
@click.option(
    "--against", type=click.Path(path_type=Path), metavar="FILE2",
    help="With --map: the other deployment; by default what the file's claim is against.",
)  # fmt: skip
@click.option(
    "--set-b", "other", multiple=True, metavar="KEY=VALUE",
    help="With --map: override a key of the other deployment, which without --against is FILE itself.",
)  # fmt: skip
@click.option(
    "--workers", type=click.IntRange(min=1), metavar="N", help="Processes; by default one per core."
)  # fmt: skip
@click.option("--resume", is_flag=True, help="Take what an interrupted call finished as done.")
@click.option("--out", type=click.Path(path_type=Path, file_okay=False), help="The result folder itself.")
@JSON
def stress(
    file: Path, overrides: tuple[str, ...], seed: int | None, slo: str, parts: tuple[str, ...],
    steps: int | None, axes: str, against: Path | None, other: tuple[str, ...], workers: int | None,
    resume: bool, out: Path | None, as_json: bool,
) -> None:  # fmt: skip
    """Put the deployment in FILE under uneven load and slow hardware: what it costs, breaks and helps.

    \b
    clustersim stress workloads/large_ep.toml
    clustersim stress workloads/large_ep.toml --slo "p99 step < 14 ms" --only breaking
    clustersim stress workloads/large_ep.toml --map skew,tokens
    clustersim stress mine.toml --map skew,slow_gpu --set-b deployment.experts.policy=eplb

    The suite runs the scenario balanced, skewed, with hot experts and ranks, ragged sources, an idle rank,
    load that moves, slow GPUs and a slow link, and holds each against even load with the same random numbers.
    Then the breaking points: the smallest skew, the least slow GPU and the least thin link with which the
    bound is missed, by bisection. Then what would help: the same cases under other expert policies with up to
    two spare places per rank; a placement that does not fit into memory is told as such. Where the load
    moves, experts are also placed anew while it does, and the bill of that is told.

    Cases run on all cores. The folder is results/<name>-stress-<hash> unless --out names another; it holds
    stress.json, drawings, and cases.jsonl, in which every finished case is kept at once: after Ctrl-C
    --resume runs only what is missing, and what earlier calls of the same scenario answered stays in
    stress.json. The same call leaves the same bytes. A hundred cases of a large
    machine take long: --only, --steps 1 and --set network.tolerance=0.02 shorten that.
    """
    from clustersim.errors import ClustersimError
    from clustersim.study.cases import Base

    mine = Base(str(file), (*overrides, *(() if seed is None else (f"seed={seed}",))))
    if not axes and (against or other):
        raise ClustersimError("--against and --set-b: say with --map what is to be compared")
    if axes and (slo or parts):
        raise ClustersimError("--map: answers with a map alone; leave --slo and --only out")
    call = _StressCall(mine, steps or 0, workers or 0, resume, out, as_json)
    if axes:
        _map_regimes(call, axes, against, (*other, *mine.overrides[len(overrides) :]))
    else:
        _stress_suite(call, slo, parts)


@dataclass(frozen=True, slots=True)
class _StressCall:
    """What both questions of `stress` are asked with."""

    base: Base
    steps: int
    workers: int
    resume: bool
    out: Path | None
    as_json: bool


def _stress_suite(call: _StressCall, slo: str, parts: tuple[str, ...]) -> None:
    from clustersim.report import stress as shown
    from clustersim.study.slo import parse_slo
    from clustersim.study.stress import PARTS, Listener, Wish, about, earlier_parts, folder_of, prepared, save
    from clustersim.study.stress import stress as answer

    if slo:
        parse_slo(slo)
    asked = tuple(p for p in PARTS if p in parts) or PARTS
    wish = Wish(call.base, asked, slo, call.steps)
    scenario = prepared(wish)[1]
    folder = folder_of(scenario, call.out)
    with _bench(call, folder, about(scenario)) as (bench, put, tell):
        earlier, told = earlier_parts(wish, folder, bool(bench.outdated)) if call.resume else ((), "")
        warn(told)
        titles = dict(shown.TITLES)

        def row(kind: str, value: Any) -> None:
            if kind != "head" and kind not in asked:
                return
            title = titles.pop(kind, None)
            put(lambda console: shown.show_row(kind, title, value, console))

        found = answer(replace(wish, parts=(*asked, *earlier)), bench, Listener(row, tell))
        save(found, folder, shown.help_drawings(found))
    if call.as_json:
        print_json(found)
    else:
        print_page(lambda console: shown.show_end(found, console, folder, asked))


def _map_regimes(call: _StressCall, axes: str, against: Path | None, other: tuple[str, ...]) -> None:
    from clustersim.report.stress import map_drawing, show_map
    from clustersim.study.cases import Base
    from clustersim.study.regimes import MapWish, other_of, parse_axes, regime_map
    from clustersim.study.stress import Listener, Wish, about, folder_of, prepared, save

    rows, columns = parse_axes(axes)
    scenario = prepared(Wish(call.base, steps=call.steps))[1]
    alike = against is None and bool(other)
    theirs = call.base.file if alike else other_of(call.base.file, scenario, against)
    wish = MapWish(
        call.base, Base(theirs, (*call.base.overrides, *other) if alike else other), columns, rows, call.steps
    )
    other_scenario = prepared(Wish(wish.b, steps=call.steps))[1]
    folder = folder_of(scenario, call.out, folder_of(other_scenario, None).name, rows, columns)
    both = f"a map of {about(scenario)} against {about(other_scenario)}"
    with _bench(call, folder, both) as (bench, _, tell):
        found = regime_map(wish, bench, Listener(tell=tell))
        save(found, folder, {"map.svg": map_drawing(found)})
    if call.as_json:
        print_json(found)
    else:
        print_page(lambda console: show_map(found, console, folder))


def _bench(call: _StressCall, folder: Path, of: str) -> AbstractContextManager[At]:
    from clustersim.study.cases import figures_of

    return bench_in(folder, "stress", figures_of, call.workers, call.resume, call.as_json, of)
