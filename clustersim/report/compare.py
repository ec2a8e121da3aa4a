"""Comparisons and replications, for people at a terminal."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from math import floor, isfinite, log10
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from clustersim.analysis.compare import BASES
from clustersim.analysis.critical_path import CAUSES
from clustersim.analysis.statistics import digits, said_within
from clustersim.report.page import (
    Cell,
    put_line,
    put_paragraph,
    put_section,
    put_table,
    put_title,
    said_share,
)
from clustersim.units import show

#: Keys that differ, and causes, that are shown at most.
_KEYS, _CAUSES = 24, 9
_WIDEST = 40
#: Digits of a value of one seed, of which it is not known how many mean something; --json has all.
_ONE_SEED = 4
#: Of a difference: what is less is not named in the sentence.
_WORTH_NAMING = 0.05

_WIDTH = re.compile(r" ± [\d.,]+%?")
_QUANTITY = re.compile(r"([-+]?[\d.]+(?:e[-+]?\d+)?) (s|B|B/s|FLOP/s|W|Hz)")
_DIMENSIONS = {
    "s": "time", "B": "size", "B/s": "bandwidth", "FLOP/s": "flop rate", "W": "power", "Hz": "frequency",
}  # fmt: skip


# ---- words that the terminal and the page share ---------------------------------------------------------


def said_runs(seeds: Sequence[int]) -> str:
    """Which seeds were run."""
    return f"seed {seeds[0]}" if len(seeds) == 1 else f"{len(seeds)} seeds, {seeds[0]} to {seeds[-1]}"


def said_interval(found: Mapping[str, Any] | None, dimension: str) -> str:
    """A value with its interval, or a dash; of one seed with four digits."""
    if found is None:
        return "-"
    value, half = found["value"], found["half_width"]
    return said_within(_rounded(value, value) if half is None else value, half, dimension)


def said_change(found: Mapping[str, Any], dimension: str, *sides: float) -> str:
    """A difference with its interval and sign; of one seed to the last digit that its sides have."""
    value, half = found["value"], found["half_width"]
    text = said_within(_rounded(value, *sides) if half is None else value, half, dimension)
    # What rounds to zero has no sign.
    return f"+{text}" if found["value"] > 0 and text.partition(" ")[0].strip("0.%") else text


def _rounded(value: float, *sides: float) -> float:
    """To the last of the four digits that the largest side is printed with."""
    largest = max(map(abs, sides), default=0.0)
    if not largest or not isfinite(largest) or not isfinite(value):
        return value
    place = floor(log10(largest)) - _ONE_SEED + 1
    # By a whole factor: a power below one has no exact form.
    found = round(value / 10.0**place) * 10.0**place if place > 0 else round(value, -place)
    # Zero has no sign.
    return found + 0.0


def sides_of(row: Mapping[str, Any], found: Mapping[str, Any]) -> list[float]:
    """The two values of a metric whose difference `found` is."""
    both = (
        row["values"][0],
        row["values"][1 + [one["side"] for one in row["differences"]].index(found["side"])],
    )
    return [one["value"] for one in both if one is not None]


def said_percent(found: Mapping[str, Any], ours: float) -> str:
    """A difference as a share of A, with as many digits as its interval supports."""
    if not ours or found["ratio"] is None:
        return ""
    share = 100 * found["value"] / abs(ours)
    half = found["half_width"]
    if half is None or not half:
        kept = float(f"{share:.3g}") if half is not None else round(float(f"{share:.3g}"), 2)
        return f"{kept:+,g}%" if kept else "0%"
    # Sign from the number: what rounds to zero has none.
    text = digits(share, 100 * half / abs(ours))
    return f"{'+' if share > 0 and text.strip('0.') else ''}{text}%"


def said_difference(row: Mapping[str, Any], found: Mapping[str, Any]) -> str:
    """What is to be said of a difference of a metric: better or worse, and whether that is noise."""
    if "lacking" in found:
        return str(found["lacking"])
    verdict = str(found["verdict"])
    if verdict not in ("more than noise", "one seed"):
        return verdict
    if found["half_width"] is None and not _rounded(found["value"], *sides_of(row, found)):
        return f"the same to {_ONE_SEED} digits, one seed"
    better = (found["value"] > 0) == (row["better"] == "more")
    return f"{'better' if better else 'worse'}, {verdict}"


def said_part(part: Mapping[str, Any]) -> str:
    """A part's share of the whole difference; nothing where there is none."""
    share = part["share"]
    return "" if share is None else said_share(share).replace("-0.0%", "0.0%")


def said_value(value: Any) -> str:
    """A value of a scenario: quantities in units that read well, what is not set as a dash."""
    if value is None:
        return "-"
    if isinstance(value, str):
        match = _QUANTITY.fullmatch(value)
        return show(float(match[1]), _DIMENSIONS[match[2]], 6) if match else value
    return "true" if value is True else "false" if value is False else str(value)


def said_explained(side: str, one: Mapping[str, Any]) -> str:
    """A phase's difference in a sentence, its largest causes named."""
    found, what = one["difference"], f"{one['phase']} step"
    one_seed = found["half_width"] is None
    value = _rounded(found["value"], one["a"], one["b"]) if one_seed else found["value"]
    if not value:
        about = f"to {_ONE_SEED} digits " if found["value"] else ""
        return f"A mean {what} takes {about}the same in {side} as in A, {show(one['a'], 'time', _ONE_SEED)}."
    way = "longer" if value > 0 else "less"
    whole = said_within(abs(value), found["half_width"], "time")
    percent = said_percent(found, one["a"]).lstrip("+-")
    parts = [
        f"{part['cause'].replace('_', ' ')} {said_change(part['difference'], 'time', part['a'], part['b'])}"
        for part in one["parts"]
        if abs(part["difference"]["value"]) >= _WORTH_NAMING * abs(found["value"])
    ][:4]
    about = f" ({percent})" if percent else ""
    noise = {"one seed": "", "no difference": ""}.get(found["verdict"], f", {found['verdict']}")
    return f"A mean {what} of {side} takes {whole}{about} {way} than A's{noise}: {', '.join(parts)}."


def said_seconds(seconds: float, part: Mapping[str, Any]) -> str:
    """Seconds of a side, with as many digits as the interval of the difference supports; four without one."""
    half = part["difference"]["half_width"]
    if not half or not seconds:
        return show(seconds, "time", _ONE_SEED)
    kept = max(1, min(6, round(log10(abs(seconds) / half)) + 1))
    return show(seconds, "time", kept)


# ---- a comparison ---------------------------------------------------------------------------------------


def show_comparison(found: Mapping[str, Any], console: Console) -> None:
    """Prints what `study.compare.compare` gives."""
    for side in found["sides"]:
        put_line(
            console, f"{side['side']}  {side['name']}  {said_runs(side['seeds'])}  {side['where']}", "bold"
        )
    letters = [side["side"] for side in found["sides"]]
    _show_metrics(found["metrics"], letters, console)
    for one in found["explained"]:
        for phase in one["phases"]:
            _show_explained(one["side"], phase, console)
    _show_differs(found["differs"], letters, console)
    notes = [*found.get("broken", ()), *found["notes"], *about_intervals(found)]
    if notes:
        put_title(console, "Notes")
    for note in notes:
        put_paragraph(console, "  - ", note)


def _show_metrics(metrics: Sequence[Mapping[str, Any]], letters: Sequence[str], console: Console) -> None:
    others = letters[1:]
    columns = [*letters]
    for letter in others:
        columns += [f"{letter} - A", "", ""]
    rows: list[list[Cell]] = []
    for row in metrics:
        cells: list[Cell] = [row["metric"]]
        cells += [said_interval(value, row["dimension"]) for value in row["values"]]
        for one in row["differences"]:
            cells += list(_difference_cells(row, one))
        rows.append(cells)
    put_section(console, "Side by side", columns, rows)


def _difference_cells(row: Mapping[str, Any], one: Mapping[str, Any]) -> Iterator[Cell]:
    if "lacking" in one:
        yield from ("-", "", Text(said_difference(row, one), "dim"))
        return
    said_ = said_difference(row, one)
    style = "green" if said_.startswith("better") else "red" if said_.startswith("worse") else "dim"
    yield said_change(one, row["dimension"], *sides_of(row, one))
    yield said_percent(one, row["values"][0]["value"])
    yield Text(said_, style)


def _show_explained(side: str, one: Mapping[str, Any], console: Console) -> None:
    put_title(console, f"Why a {one['phase']} step differs: {side} - A, by {BASES[one['basis']]}")
    put_paragraph(console, "  ", said_explained(side, one))
    parts = one["parts"]
    rows: list[list[Cell]] = [
        [
            part["cause"], said_seconds(part["a"], part), said_seconds(part["b"], part),
            said_change(part["difference"], "time", part["a"], part["b"]),
            said_part(part), Text(part["words"], "dim"),
        ]
        for part in parts[:_CAUSES]
    ]  # fmt: skip
    rows.append(
        [
            "all", said_seconds(one["a"], one), said_seconds(one["b"], one),
            said_change(one["difference"], "time", one["a"], one["b"]),
            said_share(1.0) if one["difference"]["value"] else "",
            Text("the parts add up to it", "dim"),
        ]
    )  # fmt: skip
    put_table(console, ["A", side, "difference", "share", ""], rows)
    some = [f"{s['explained']:,} of {s['all']:,}" for s in one["steps"] if s["explained"] < s["all"]]
    if some:
        put_line(console, f"  paths of {' and '.join(some)} steps", "dim")


def _show_differs(differs: Sequence[Mapping[str, Any]], letters: Sequence[str], console: Console) -> None:
    rows: list[list[Cell]] = [
        [one["key"], *(Text(_cut(said_value(value))) for value in one["values"])] for one in differs[:_KEYS]
    ]
    put_section(console, "What differs in the scenarios", list(letters), rows)
    if len(differs) > _KEYS:
        put_line(console, f"  and {len(differs) - _KEYS} keys more; --json and -o show all", "dim")
    if not differs:
        put_title(console, "What differs in the scenarios")
        put_line(console, "  nothing")


def _cut(text: str) -> str:
    return text if len(text) <= _WIDEST else f"{text[: _WIDEST - 1]}…"


def about_intervals(found: Mapping[str, Any]) -> Iterator[str]:
    """What intervals are, where there are any."""
    if any(len(side["seeds"]) > 1 for side in found["sides"]):
        yield (
            f"± is a {found['level']:.0%} interval over seeds, of pairs with the same random numbers where "
            "there are such; of twenty numbers that do not differ one will seem to."
        )


# ---- replications ---------------------------------------------------------------------------------------


def show_replications(found: Mapping[str, Any], console: Console, folder: Path) -> None:
    """Prints what `study.replications.replicate` gives."""
    seeds = found["seeds"]
    put_line(console, f"{found['name']}  seeds {seeds[0]} to {seeds[-1]}", "bold")
    rows: list[list[Cell]] = [
        [
            name, said_interval(one, one["dimension"]), *_extremes(one),
            Text(one["how"], "dim"),
        ]
        for name, one in found["metrics"].items()
    ]  # fmt: skip
    columns = ["", "smallest", "largest", f"± {found['level']:.0%}"]
    put_section(console, f"Mean over {len(seeds)} replications", columns, rows)
    for phase, one in found["warm_up"].items():
        _show_warm_up(phase, one, len(seeds), console)
    for phase, causes in found["paths"].items():
        _show_paths(phase, causes, console)
    put_line(console, "")
    put_line(console, f"Result: {folder}")


def _extremes(one: Mapping[str, Any]) -> tuple[str, str]:
    """The smallest and the largest, with as many digits as the mean has."""
    half = one["half_width"]
    if not half:
        return "", ""
    smallest, largest = (said_within(one[key], half, one["dimension"]) for key in ("min", "max"))
    return re.sub(_WIDTH, "", smallest), re.sub(_WIDTH, "", largest)


def _show_warm_up(phase: str, one: Mapping[str, Any], seeds: int, console: Console) -> None:
    least, most = min(one["cut"]), max(one["cut"])
    cut = f"{least}" if least == most else f"{least} to {most}"
    settled = (
        "" if one["settled"] == seeds else f"; {seeds - one['settled']} of {seeds} have not settled by half"
    )
    put_title(console, f"Warm-up of {phase}")
    put_paragraph(
        console, "  ",
        f"{cut} of {one['steps']} steps cut by MSER-5{settled}; the others take "
        f"{said_interval(one['mean'], 'time')} in the mean, p99 {said_interval(one['p99'], 'time')}",
    )  # fmt: skip


def _show_paths(phase: str, causes: Mapping[str, Any] | None, console: Console) -> None:
    if causes is None:
        return
    rows: list[list[Cell]] = [
        [cause, said_interval(one, "time"), Text(CAUSES.get(cause, ""), "dim")]
        for cause, one in sorted(causes.items(), key=lambda item: -item[1]["value"])
    ]
    put_section(console, f"The mean {phase} step's critical path", ["time", ""], rows)
