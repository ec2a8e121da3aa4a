"""What people read about gating: measured loads beside fitted ones, and what a scenario's look like."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console

from clustersim.report.page import put_line, put_paragraph, put_section, said_share

_BARS = "▁▂▃▄▅▆▇█"
#: Layers of a scenario that are shown; all of them are in the JSON.
_SHOWN = 12
#: A Gini coefficient below this is a rounding.
_ALIKE = 1e-9
_ALIKE_WHY = {
    "even": "Choices are dealt out in turn; skew gini with gini = 0.2, say, makes some experts more popular.",
    "uniform": "Every token draws at random, so that counts differ by chance.",
}


def show_fits(found: Mapping[str, Any], console: Console) -> None:
    """Prints `study.gating_fit.summary`: every layer, measured beside fitted."""
    for one in found["measurements"]:
        k = f"top-{one['top_k']} of " if one["top_k"] else ""
        put_line(console, f"{one['name']}  {k}{one['experts']} expert{'s' * (one['experts'] != 1)}", "bold")
        rows = [
            [
                f"layer {row['layer']}",
                f"{row['measured']['gini']:.3f}",
                f"{row['fitted']['gini']:.3f}",
                f"{row['measured']['max_over_mean']:.2f}",
                f"{row['fitted']['max_over_mean']:.2f}",
                said_share(row["misplaced"]),
                f"{sparkline(row['measured']['rank_curve'])} {sparkline(row['fitted']['rank_curve'])}",
                "" if row["kept"] else "!",
            ]
            for row in one["layers"]
        ]
        columns = ("Gini", "fitted", "max/mean", "fitted", "misplaced", "by rank: measured, fitted", "")
        put_section(console, "Load of the experts", columns, rows)
        _put_remarks(one, found["within"], console)
        put_line(
            console,
            f"  worst: Gini off by {one['worst_gini_error']:.4f}, "
            f"max/mean by {said_share(one['worst_max_over_mean_error'])}, "
            f"{said_share(one['worst_misplaced'])} of the tokens at another rank of popularity",
            "" if one["kept"] else "red",
        )
        put_line(console, "")


def _put_remarks(one: Mapping[str, Any], within: Mapping[str, float], console: Console) -> None:
    if not one["kept"]:
        gini, peak = f"{within['gini']:g}", said_share(within["max_over_mean"])
        misplaced = said_share(within["misplaced"])
        put_line(console, f"  !  Gini off by more than {gini}, max/mean by more than {peak},", "red")
        put_line(console, f"     or more than {misplaced} of the tokens at another rank of popularity", "red")
        _put_chance([row for row in one["layers"] if not row["kept"]], within, console)
    again = one["named_again"]
    if again:
        rows = "1 row of the file names" if again == 1 else f"{again:,} rows of the file name"
        put_line(console, f"  {rows} an expert of a layer once more; such counts are added up")


def _put_chance(missed: Sequence[Mapping[str, Any]], within: Mapping[str, float], console: Console) -> None:
    """That so few tokens are mostly noise, where they are."""
    chance = max(row["chance_gini"] for row in missed)
    if chance <= within["gini"]:
        return
    said = (
        "So few tokens are mostly noise: experts that are all alike would show a Gini coefficient of some "
        f"{chance:.2f} by chance alone, and what is drawn cannot be more even. Count more tokens."
    )
    put_paragraph(console, "     ", said)


def show_gating(found: Mapping[str, Any], console: Console) -> None:
    """Prints `study.gating_fit.look`."""
    of = f"top-{found['top_k']} of {found['experts']}"
    head = f"{found['name']}  skew {found['skew']}, {found['motion']}, {of}"
    put_line(console, head, "bold")
    if all(row["gini"] < _ALIKE for row in found["layers"]):
        share = f"1/{found['experts']} of a layer's choices, {1 / found['experts']:.3g}"
        put_line(console, f"  Every expert of every layer is expected to get the same: {share}.")
        put_line(console, f"  {_ALIKE_WHY.get(found['skew'], '')}")
    else:
        _put_layers(found["layers"], console)
    for note in found["notes"]:
        put_paragraph(console, "  ", note)
    if len(found["steps"]) > 1:
        moved = [
            [
                f"step {row['step']:,}",
                f"{row['gini']:.3f}",
                f"{row['max_over_mean']:.2f}",
                f"{row['rank_correlation']:.2f}",
            ]
            for row in found["steps"]
        ]
        put_section(console, "How it moves", ("Gini", "max/mean", "rank correlation with step 0"), moved)


def _put_layers(layers: Sequence[Mapping[str, Any]], console: Console) -> None:
    some = layers if len(layers) <= _SHOWN else layers[:: -(-len(layers) // _SHOWN)]
    rows = [
        [
            f"layer {row['layer']}",
            f"{row['gini']:.3f}",
            f"{row['max_over_mean']:.2f}",
            str(row["busiest_expert"]),
            sparkline(row["rank_curve"]),
        ]
        for row in some
    ]
    columns = ("Gini", "max/mean", "busiest expert", "by rank")
    put_section(console, "Expected load of the experts", columns, rows)
    if len(some) < len(layers):
        put_line(console, f"  {len(some)} of {len(layers)} layers; --json has them all")


def sparkline(values: Sequence[float]) -> str:
    """Bars as high as the values, the largest full."""
    most = max([*values, 1e-300])
    return "".join(_BARS[min(int(value / most * len(_BARS)), len(_BARS) - 1)] for value in values)
