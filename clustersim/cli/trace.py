"""The command `trace`: views of a result folder. Nothing is run, and nothing but the folder is read."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import click

from clustersim.cli.export import export
from clustersim.cli.options import JSON
from clustersim.cli.output import print_json, print_page, print_text, warn
from clustersim.cli.why import bounds, why

#: Lines of a table, and of a slice, that are shown without being asked for more.
_TOP, _LINES, _ROWS = 20, 64, 100
#: Rows of an answer that are shown on a terminal; JSON and CSV have more.
_SHOWN = 100
_BINS = 60

Command = TypeVar("Command", bound=Callable[..., Any])


class _Views(click.Group):
    """Views by name, with the result before or after it: `trace moe_1024 gpus` is `trace gpus moe_1024`."""

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """The view that is meant, and its own arguments."""
        if args[0] not in self.commands and len(args) > 1 and args[1] in self.commands:
            args = [args[1], args[0], *args[2:]]
        if args[0] not in self.commands:
            raise self._unknown(args)
        return super().resolve_command(ctx, args)

    def _unknown(self, args: list[str]) -> Exception:
        from clustersim.errors import ClustersimError, nearest
        from clustersim.study.inspecting import is_result

        # Which of the two words is the view cannot be told where neither is one.
        result = next((word for word in args[:2] if is_result(word)), None)
        wrong = next((word for word in args[:2] if word != result), None)
        views = ", ".join(self.commands)
        if wrong is None or wrong.startswith("-"):
            return ClustersimError(f"trace: say what to look at in {result}: {views}")
        return ClustersimError(
            f'trace: there is no view "{wrong}"{nearest(wrong, self.commands)}; there are {views}'
        )


@click.group(cls=_Views, options_metavar="", subcommand_metavar="[RESULT] VIEW [OPTIONS]")
def trace() -> None:
    """Look at what happened in a run: VIEW of a result.

    \b
    clustersim trace gpus                          of the newest result
    clustersim trace moe_1024 links --over-time    of the scenario's newest result
    clustersim trace slice results/moe_1024-bb6ac02f8e60 --gpu 12 --from 1ms --to 2ms
    clustersim trace sql "select phase, count(*) from steps group by phase"

    A result is named by its folder, the folder's name in results/, or its scenario, before or after the
    view; without a name it is the newest in results/. Nothing but the folder is read, and nothing is run.
    What each key of --json means stands in docs/views.md.
    """


_RESULT = click.argument("result", required=False, metavar="[RESULT]")
_FROM = click.option("--from", "start", default="", metavar="TIME", help="Only from then on, such as 1ms.")
_TO = click.option("--to", "end", default="", metavar="TIME", help="Only up to then.")
_TOP_OPTION = click.option(
    "--top", type=click.IntRange(min=1), default=None, metavar="N",
    help=f"Lines shown; by default {_TOP}, of GPUs over time {_LINES}.",
)  # fmt: skip
_OVER_TIME = click.option(
    "--over-time", is_flag=True, help="Show lines that grow darker, from left to right."
)
_BINS_OPTION = click.option(
    "--bins", type=click.IntRange(1, 512), default=_BINS, show_default=True, metavar="N",
    help="With --over-time: in how many parts time is cut.",
)  # fmt: skip


def _timed(command: Command) -> Command:
    """Adds the options of views that can be over time."""
    for option in (_BINS_OPTION, _OVER_TIME, _TO, _FROM):
        command = option(command)
    return command


@trace.command()
@_RESULT
@JSON
def summary(result: str | None, as_json: bool) -> None:
    """The run in a page, as `clustersim run` printed it, and what was recorded."""
    from clustersim.study.inspecting import open_result, telling
    from clustersim.study.views import summary_view

    opened = open_result(result)
    found = summary_view(opened)
    if as_json:
        print_json(found)
        return
    from clustersim.report.views import show_summary

    with telling(opened):
        print_page(lambda console: show_summary(found, console))


@trace.command()
@_RESULT
@click.option(
    "--by", default="", metavar="GROUP", help="gpu, server, stage or shard: take these together, as a mean."
)
@click.option(
    "--state", default="", metavar="NAME",
    help="With --over-time: compute, exchange, wait, idle, or busy, the first two, the default.",
)  # fmt: skip
@_timed
@_TOP_OPTION
@JSON
def gpus(
    result: str | None, by: str, state: str, start: str, end: str, over_time: bool, bins: int,
    top: int | None, as_json: bool,
) -> None:  # fmt: skip
    """What every GPU did: computing, exchanging, waiting for others, idle; the worst first.

    Shares are of the run, or of the time between --from and --to. They are those of the stream on which a
    GPU computes; hand-overs to the next stage run beside it.
    """
    from clustersim.study.inspecting import open_result
    from clustersim.study.views import Times, gpus_view

    times = Times(start, end, bins if over_time else 0)
    found = gpus_view(open_result(result), by or ("" if over_time else "gpu"), state, times)
    if as_json:
        print_json(found)
        return
    from clustersim.report.views import show_gpus

    print_page(lambda console: show_gpus(found, console, top or (_LINES if over_time else _TOP)))


@trace.command()
@_RESULT
@click.option("--tier", default="", metavar="NAME", help="Only links of this tier, such as gpu-nic.")
@click.option(
    "--each", type=click.IntRange(min=0), default=0, metavar="N",
    help="With --over-time: also the N busiest links, each a line of its own.",
)  # fmt: skip
@_timed
@_TOP_OPTION
@JSON
def links(
    result: str | None, tier: str, each: int, start: str, end: str, over_time: bool, bins: int,
    top: int | None, as_json: bool,
) -> None:  # fmt: skip
    """What links carried: bytes and utilization, by tier and link by link, the busiest first."""
    from clustersim.study.inspecting import open_result
    from clustersim.study.views import Times, links_view

    times = Times(start, end, bins if over_time else 0)
    found = links_view(open_result(result), tier, times, each)
    if as_json:
        print_json(found)
        return
    from clustersim.report.views import show_links

    print_page(lambda console: show_links(found, console, top or _TOP))


@trace.command()
@_RESULT
@click.option("--layer", type=int, default=None, metavar="N", help="Only this layer.")
@click.option("--gpu", default="", metavar="GPU", help="Only copies on this GPU, a rank or a vertex.")
@click.option(
    "--sort", "order", default="", metavar="NAME",
    help="load, wait, service or behind: the most of it first; by default behind and service together.",
)  # fmt: skip
@_timed
@_TOP_OPTION
@JSON
def experts(
    result: str | None, layer: int | None, gpu: str, order: str, start: str, end: str, over_time: bool,
    bins: int, top: int | None, as_json: bool,
) -> None:  # fmt: skip
    """Load, queue length and wait of every layer's experts and of every expert copy.

    A token waits for those still to come that are served together with it, which is the senders' doing, and
    then behind other work of the rank. --from and --to are for --over-time: the tables are of the whole run.
    """
    from clustersim.errors import ClustersimError
    from clustersim.study.inspecting import open_result
    from clustersim.study.views import Times, experts_view

    if (start or end) and not over_time:
        raise ClustersimError("--from and --to: the tables of experts are of the whole run; add --over-time")
    times = Times(start, end, bins if over_time else 0)
    found = experts_view(open_result(result), layer, gpu, times, order)
    if as_json:
        print_json(found)
        return
    from clustersim.report.views import show_experts

    print_page(lambda console: show_experts(found, console, top or _TOP))


@trace.command()
@_RESULT
@click.option(
    "--operator", default="", metavar="NAME", help="Only waiting in this exchange, such as combine."
)
@_TOP_OPTION
@JSON
def stragglers(result: str | None, operator: str, top: int | None, as_json: bool) -> None:
    """Which ranks made the others wait: how long, at which operator and layer, and when.

    The one waited for is the last to come to an exchange. If it computes slower than its kernels are priced,
    or has more tokens than the mean of the ranks, that is said beside it; else it was itself held up.
    """
    from clustersim.study.inspecting import open_result
    from clustersim.study.views import stragglers_view

    found = stragglers_view(open_result(result), operator)
    if as_json:
        print_json(found)
        return
    from clustersim.report.views import show_stragglers

    print_page(lambda console: show_stragglers(found, console, top or _TOP))


@trace.command(name="slice")
@_RESULT
@click.option(
    "--gpu", "gpus_", multiple=True, required=True, metavar="GPU",
    help="A rank, or a vertex of the topology; may be repeated.",
)  # fmt: skip
@_FROM
@_TO
@click.option("--operator", default="", metavar="NAME", help="Only this operator.")
@click.option(
    "--rows", type=click.IntRange(min=1), default=_ROWS, show_default=True, metavar="N", help="Lines shown."
)
@JSON
def slice_(
    result: str | None, gpus_: tuple[str, ...], start: str, end: str, operator: str, rows: int, as_json: bool
) -> None:
    """What GPUs did from one time to another: time downwards, streams side by side."""
    from clustersim.study.inspecting import open_result
    from clustersim.study.views import Times, slice_view

    found = slice_view(open_result(result), gpus_, Times(start, end), operator)
    if as_json:
        print_json(found)
        return
    from clustersim.report.views import show_slice

    print_page(lambda console: show_slice(found, console, rows))


@trace.command()
@click.argument("words", nargs=-1, required=True, metavar="[RESULT] QUERY")
@click.option(
    "--rows", type=click.IntRange(min=1), default=None, metavar="N",
    help=f"Rows of the answer at most; by default {_SHOWN} on a terminal, a million as JSON or CSV.",
)  # fmt: skip
@click.option(
    "--seconds", type=click.FloatRange(0, 86400, min_open=True), default=60.0, show_default=True,
    metavar="S", help="How long the query may take.",
)  # fmt: skip
@click.option("--csv", "as_csv", is_flag=True, help="Print CSV alone on standard output.")
@JSON
def sql(words: tuple[str, ...], rows: int | None, seconds: float, as_csv: bool, as_json: bool) -> None:
    """Ask the tables of the trace in SQL, by DuckDB.

    \b
    clustersim trace sql "select operator, sum(busy) from sums group by operator order by 2 desc"
    clustersim trace sql moe_1024 'select rank, "end" - start as took from spans order by took desc limit 5'
    clustersim trace sql "describe spans"

    Every table of docs/trace.md is there by its name; end is a word of SQL and stands in double quotes. One
    statement that reads, over this result's files only; it ends after --seconds, and by Ctrl-C at once.
    """
    from clustersim.errors import ClustersimError
    from clustersim.study.inspecting import open_result
    from clustersim.study.views import sql_view

    if as_csv and as_json:
        raise ClustersimError("--csv and --json: both want standard output; choose one")
    result, query = _result_and_query(words)
    most = rows if rows is not None or as_csv or as_json else _SHOWN
    found = sql_view(open_result(result), query, most, seconds)
    for note in found["notes"]:
        warn(note)
    if found["cut"]:
        warn(f"cut after {len(found['rows']):,} rows; --rows says how many")
    if as_json:
        print_json(found)
        return
    from clustersim.report.views import show_answer, to_csv

    if as_csv:
        print_text(to_csv(found))
        return
    print_page(lambda console: show_answer(found, console))


def _result_and_query(words: tuple[str, ...]) -> tuple[str | None, str]:
    """The query is the word with blanks in it, or the last."""
    from clustersim.errors import ClustersimError

    if len(words) > 2:
        raise ClustersimError(
            f'sql: {len(words)} words; put the query in quotes, such as "select * from steps"'
        )
    if len(words) == 1:
        return None, words[0]
    first, last = words
    return (last, first) if " " in first.strip() and " " not in last.strip() else (first, last)


# Views that other modules hold.
trace.add_command(why)
trace.add_command(bounds)
trace.add_command(export)
