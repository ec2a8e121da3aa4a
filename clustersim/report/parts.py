"""How each part of `clustersim validate` is shown."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from rich.console import Console

from clustersim.report.kernel_validation import show_kernel_validation
from clustersim.report.page import put_line
from clustersim.report.validation import show_validation


def show_part(part: str, found: Mapping[str, Any], console: Console) -> None:
    """Prints what `study.parts.validate` gives; of several parts, one after the other."""
    if part in SHOWN:
        SHOWN[part](found, console)
        return
    for name, show in SHOWN.items():
        show(found[name], console)
        put_line(console, "")


def show_serving(found: Mapping[str, Any], console: Console) -> None:
    """Says that there is nothing to be held against measurements yet."""
    put_line(console, "serving: predicted against measured", "bold")
    put_line(console, "no measured serving run can be simulated yet: nothing to compare")


#: Part → how its errors are printed.
SHOWN: Mapping[str, Callable[[Mapping[str, Any], Console], None]] = {
    "kernels": show_kernel_validation,
    "network": show_validation,
    "serving": show_serving,
}
