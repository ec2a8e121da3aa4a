"""The colours of pages, in light and in dark, by what they stand for.

The hues are those that Okabe and Ito chose to be told apart also by people who see no red or no green;
in dark they are lighter. What a colour says also stands in words beside it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

#: Begins the name of a colour in what is drawn; no printable text does.
MARK = "\x01"

#: What is drawn → its colour, by theme. The first group is paper and ink, then states of GPUs, then causes
#: (as far as they are no states), then where prices come from.
THEMES: Mapping[str, Mapping[str, str]] = {
    "light": {
        "paper": "#ffffff",
        "panel": "#f6f7f9",
        "ink": "#1b1f24",
        "muted": "#57606a",
        "rule": "#d0d7de",
        "grid": "#e6e9ed",
        "link": "#0b5c94",
        "compute": "#0072b2",
        "exchange": "#009e73",
        "wait": "#e69f00",
        "idle": "#9aa3ad",
        "launch": "#56b4e9",
        "startup": "#8fd9c4",
        "imbalance": "#d55e00",
        "slow_gpu": "#cc79a7",
        "queue": "#e3d21b",
        "bubble": "#8c8c8c",
        "admission": "#4d4d4d",
        "unrecorded": "#d9d9d9",
        "low": "#0072b2",
        "middle": "#eeeeee",
        "high": "#d55e00",
        "faint": "#f2f5f8",
        "compute_deep": "#00324f",
        "exchange_deep": "#00452f",
        "wait_deep": "#7a4b00",
        "idle_deep": "#3c434a",
        "a": "#0072b2",
        "b": "#d55e00",
        "c": "#009e73",
        "d": "#cc79a7",
        "e": "#8a6d00",
        "f": "#56b4e9",
    },
    "dark": {
        "paper": "#14171b",
        "panel": "#1d2126",
        "ink": "#e8eaed",
        "muted": "#a6afb9",
        "rule": "#3b424b",
        "grid": "#2a3037",
        "link": "#79c0ff",
        "compute": "#3f97dc",
        "exchange": "#3fca98",
        "wait": "#f2b134",
        "idle": "#6b7580",
        "launch": "#9db8ff",
        "startup": "#8fdcc4",
        "imbalance": "#ff8b45",
        "slow_gpu": "#e8a3c8",
        "queue": "#f3e766",
        "bubble": "#8f979f",
        "admission": "#5b636c",
        "unrecorded": "#3a4048",
        "low": "#3f97dc",
        "middle": "#2a3037",
        "high": "#ff8b45",
        "faint": "#20252b",
        "compute_deep": "#cfeaff",
        "exchange_deep": "#c4f7e4",
        "wait_deep": "#ffecc2",
        "idle_deep": "#e3e7eb",
        "a": "#3f97dc",
        "b": "#ff8b45",
        "c": "#3fca98",
        "d": "#e8a3c8",
        "e": "#e3c75a",
        "f": "#a5dbfa",
    },
}

#: Names of colours for lines that stand for nothing in particular, and their dashes.
LINES: Sequence[tuple[str, str]] = (
    ("a", "solid"),
    ("b", "dash"),
    ("c", "dot"),
    ("d", "dashdot"),
    ("e", "longdash"),
    ("f", "solid"),
)


def colour(name: str) -> str:
    """A colour by what it stands for; which one that is, the page decides where it is seen."""
    assert name in THEMES["light"], name
    return MARK + name


def ramp(state: str) -> list[list[object]]:
    """A colour scale from nothing to all of a state."""
    return [[0.0, colour("faint")], [0.65, colour(state)], [1.0, colour(f"{state}_deep")]]


def around(middle: float) -> list[list[object]]:
    """A colour scale whose neutral colour stands at a share of it."""
    inside = min(max(middle, 1e-3), 1.0 - 1e-3)
    return [[0.0, colour("low")], [inside, colour("middle")], [1.0, colour("high")]]


def variables() -> str:
    """The colours as CSS: light, and dark for who prefers it; paper is always light."""

    def said(theme: str) -> str:
        return "".join(f"--{name.replace('_', '-')}:{value};" for name, value in THEMES[theme].items())

    dark = f"@media screen and (prefers-color-scheme: dark){{:root{{{said('dark')}color-scheme:dark}}}}"
    return f":root{{{said('light')}color-scheme:light}}\n{dark}\n"
