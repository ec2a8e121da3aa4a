"""Fits the parameters of the network models to the measured tables and writes them to the catalogue.

python -m clustersim.study.fit network

Run again, it writes the same file: nothing in it depends on chance, and values have three digits.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path

from clustersim.study.families import FAMILIES
from clustersim.study.least_squares import Fitted
from clustersim.study.measured import FOLDER, Table, measured
from clustersim.study.prediction import Family, Groups

TARGET = FOLDER.parent / "network.toml"

_HEAD = """\
# Start-up costs, protocol costs and reachable bandwidth of exchanges, fitted to measured/*.parquet.
# Written by `python -m clustersim.study.fit network`; do not edit it. What each parameter means stands
# in the docstrings of clustersim/spec/; measured/README.md says where the measurements come from.
#
# rows      how many measured rows speak about the parameter
# residual  median |log(predicted / measured)| of these rows
# files     the measured tables they stand in; none: no row speaks about it
"""


def fitted(family: Family, without: str | None = None) -> Groups:
    """The family's parameters.

    without  a file to be left out of the fit, for judging what the others foretell about it
    """
    tables: dict[str, Table] = {name: measured(name) for name in family.files if name != without}
    return family.fit(tables)


def document(sections: Mapping[str, Groups]) -> str:
    """catalogue/network.toml as text."""
    parts = [_HEAD]
    for section, groups in sections.items():
        for group, parameters in groups.items():
            lines = [f"{name} = {_inline(one)}" for name, one in parameters.items()]
            parts.append("\n".join([f"[{section}.{group}]", *lines, ""]))
    return "\n".join(parts)


def _inline(one: Fitted) -> str:
    value = f'"{one.value}"' if isinstance(one.value, str) else repr(one.value)
    files = ", ".join(f'"{file}"' for file in one.files)
    return f"{{ value = {value}, rows = {one.rows}, residual = {one.residual!r}, files = [{files}] }}"


def network(target: Path = TARGET) -> Path:
    """Fits all families and writes the file."""
    target.write_text(document({s: fitted(family) for s, family in FAMILIES.items()}), encoding="utf-8")
    return target


def main(arguments: list[str]) -> int:
    """Exit status 0, or 2 for a wrong argument."""
    if arguments != ["network"]:
        print("usage: python -m clustersim.study.fit network", file=sys.stderr)
        return 2
    print(network(), file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
