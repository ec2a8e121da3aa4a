"""What people read before a run: what a scenario is, what it needs, and what no step can beat."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import groupby
from typing import Any

from rich.console import Console
from rich.text import Text

from clustersim.report.page import (
    put_line,
    put_paragraph,
    put_section,
    put_title,
    said_count,
    said_ratio,
    said_share,
    said_size,
    said_time,
)
from clustersim.report.terminal import ordered_bounds, put_notes, said_algorithms
from clustersim.units import show as quantity

Preview = Mapping[str, Any]

#: Ranks of a group that are listed one by one; longer lists are told by their ends.
_RANKS_SHOWN = 8
_SCALES = ((1e9, "billion"), (1e6, "million"))


def show_preview(found: Preview, console: Console) -> None:
    """Prints a preview.

    found    what `study.preview.preview` gives: name, model, memory, memory_limit, gpu, groups,
             placement, topology, phases, notes
    """
    put_line(console, found["name"], "bold")
    for section in _SECTIONS:
        section(found, console)
    put_notes(found, console)


def _model(found: Preview, console: Console) -> None:
    model = found["model"]
    per_gpu = model["parameters_per_gpu"]
    least, most = _amount(min(per_gpu)), _amount(max(per_gpu))
    each = least if least == most else f"{least} to {most}"
    stated = model["stated_parameters"]
    said = "" if stated is None else f"; its source states {_amount(stated)}"
    same = model["same_in_catalogue"]
    if same is not None:
        known = same["stated_parameters"]
        said += f"; the same dimensions as {same['name']} of the catalogue"
        said += "" if known is None else f", whose source states {_amount(known)}"
    put_paragraph(
        console,
        "  ",
        f"{model['name']}: {_amount(model['total_parameters'])} parameters{said}; "
        f"{_amount(model['active_parameters'])} active per token; {each} on a GPU",
    )


def _memory(found: Preview, console: Console) -> None:
    limit, needs = found["memory_limit"], found["memory"]
    parts = list(needs[0]["parts"])
    rows = [
        [stages, *(said_size(need["parts"][part]) for part in parts), *_filled(need["total"], limit)]
        for stages, need in _runs(needs, lambda need: (need["parts"], need["total"]))
    ]
    title = f"Memory of a rank, of {said_size(limit)} that may be filled on {found['gpu']}"
    put_section(console, title, [*parts, "total", "of limit"], rows)
    for stages, need in _runs(needs, lambda need: (need["parts"], need["total"])):
        if need["total"] > limit:
            over = said_size(need["total"] - limit)
            put_line(console, f"  {stages}: does not fit, {over} too much; this scenario cannot run", "red")


def _filled(total: float, limit: float) -> tuple[str, str]:
    return said_size(total), said_share(total / limit)


def _groups(found: Preview, console: Console) -> None:
    rows = [
        [
            group["group"],
            f"{group['count']:,}",
            f"{group['size']:,}",
            f"{group['servers']:,}",
            Text(_ranks(group["first"])),
        ]
        for group in found["groups"]
    ]
    put_section(console, "Groups", ["count", "ranks", "servers", "the first of them"], rows)


def _placement(found: Preview, console: Console) -> None:
    """One sentence: how unevenly the expected popularity loads the ranks, and would elsewhere."""
    placement = found["placement"]
    if placement is None:
        return
    imbalance = dict(placement["imbalance"])
    own = imbalance.pop(placement["policy"])
    spare = f"{placement['spare']} spare slot{'s' if placement['spare'] > 1 else ''} a rank"
    others = ", ".join(f"{name} {said_ratio(value['mean'])}" for name, value in imbalance.items())
    said = f"{said_ratio(own['mean'])} the mean, {said_ratio(own['max'])} in the worst layer"
    put_title(console, "Expert placement: the busiest rank by expected popularity, here and elsewhere")
    put_paragraph(
        console,
        "  ",
        f"{placement['policy']}: {said}"
        + (f"; {others} ({spare} where the policy makes copies)" if others else ""),
    )


def _topology(found: Preview, console: Console) -> None:
    topology = found["topology"]
    put_title(console, "Topology")
    vertices = ", ".join(f"{count:,} {kind}" for kind, count in topology["vertices"].items())
    put_paragraph(
        console,
        "  ",
        f"servers: {topology['servers']:,}; vertices: {vertices}; "
        f"longest path: {topology['longest_path']} links",
    )
    rows = [
        [tier, f"{count:,}", quantity(total / count, "bandwidth"), quantity(total, "bandwidth")]
        for tier, count, total in _tiers(topology)
    ]
    put_section(console, "Links by tier, one way", ["links", "of each", "together"], rows)


def _tiers(topology: Preview) -> Iterator[tuple[str, int, float]]:
    """Tier, links, bytes/s together; a tier that equals its way back stands for both."""
    seen: dict[str, tuple[int, float]] = {}
    for tier, count in topology["links"].items():
        back = "-".join(reversed(tier.split("-")))
        told = (count, topology["bandwidth"][tier])
        if back == tier or seen.get(back) != told:
            yield tier, *told
        seen[tier] = told


def _phases(found: Preview, console: Console) -> None:
    for phase, step in found["phases"].items():
        flop = quantity(step["flop"], "flop rate").removesuffix("/s")
        parts = f"{step['microbatches']:,} microbatch{'es' if step['microbatches'] > 1 else ''}"
        put_title(console, f"The first {phase} step: {said_count(step['tokens'])} tokens, {parts}, {flop}")
        bounds = step["bounds"]
        ordered = ", ".join(f"{kind} {said_time(bounds[kind])}" for kind in ordered_bounds(bounds))
        put_paragraph(console, "  ", f"no such step is faster than: {ordered}")
        counts = _runs(step["operators_per_rank"], lambda count: count)
        put_paragraph(
            console,
            "  ",
            f"operators of a rank in one pass: {', '.join(f'{count} in {at}' for at, count in counts)}",
        )
        kinds = ", ".join(f"{name} {count}" for name, count in step["operators"].items())
        put_paragraph(console, "  ", f"operators of one pass: {kinds}")
        if step["algorithms"]:
            put_paragraph(console, "  ", f"exchanges: {said_algorithms(step['algorithms'])}")


def _runs(values: Sequence[Any], key: Callable[[Any], object]) -> Iterator[tuple[str, Any]]:
    """Stages in a row that look alike, as `stages 1-6`, and the first of them."""
    for _, run in groupby(enumerate(values), lambda entry: key(entry[1])):
        first, *others = run
        last = others[-1][0] if others else first[0]
        yield (f"stages {first[0]}-{last}" if others else f"stage {first[0]}"), first[1]


def _ranks(ranks: Sequence[int]) -> str:
    if len(ranks) > 2 and ranks[-1] - ranks[0] == len(ranks) - 1:
        return f"{ranks[0]}-{ranks[-1]}"
    if len(ranks) <= _RANKS_SHOWN:
        return ", ".join(map(str, ranks))
    return f"{ranks[0]}, {ranks[1]}, {ranks[2]} ... {ranks[-1]}"


def _amount(count: float) -> str:
    """A number of parameters to three digits: `35.7 billion`."""
    for scale, name in _SCALES:
        if count >= scale:
            return f"{float(f'{count / scale:.3g}'):,g} {name}"
    return said_count(count)


#: The sections in the order in which they are printed.
_SECTIONS: tuple[Callable[[Preview, Console], None], ...] = (
    _model,
    _memory,
    _groups,
    _placement,
    _topology,
    _phases,
)
