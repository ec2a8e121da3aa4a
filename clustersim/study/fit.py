"""Fits the parameters of the network models to the measured tables and writes them to the catalogue.

python -m clustersim.study.fit network
python -m clustersim.study.fit expert_exchange
python -m clustersim.study.fit kernels

Run again, it writes the same file: nothing in it depends on chance, and values have three digits.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path

from clustersim.study.families import FAMILIES
from clustersim.study.kernel_fit import write_kernels
from clustersim.study.least_squares import inline
from clustersim.study.measured import FOLDER, Table, measured
from clustersim.study.prediction import Family, Groups

#: Families that have a file of their own, of their section's name; all others share network.toml.
OWN_FILE = ("expert_exchange",)

_HEAD = """\
# Start-up costs, protocol costs and reachable bandwidth of exchanges, fitted to measured/*.parquet.
# Written by `python -m clustersim.study.fit {name}`; do not edit it. What each parameter means stands
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


def document(name: str, sections: Mapping[str, Groups]) -> str:
    """catalogue/<name>.toml as text."""
    parts = [_HEAD.format(name=name)]
    for section, groups in sections.items():
        for group, parameters in groups.items():
            lines = [f"{name} = {inline(one)}" for name, one in parameters.items()]
            parts.append("\n".join([f"[{section}.{group}]", *lines, ""]))
    return "\n".join(parts)


def write(name: str, folder: Path = FOLDER.parent) -> Path:
    """Fits the families that stand in catalogue/<name>.toml and writes the file.

    name  network, or a name of OWN_FILE
    """
    sections = [s for s in FAMILIES if (s == name if name in OWN_FILE else s not in OWN_FILE)]
    target = folder / f"{name}.toml"
    target.write_text(document(name, {s: fitted(FAMILIES[s]) for s in sections}), encoding="utf-8")
    return target


def main(arguments: list[str]) -> int:
    """Exit status 0, or 2 for a wrong argument."""
    parts = ("network", *OWN_FILE, "kernels")
    if len(arguments) != 1 or arguments[0] not in parts:
        print(f"usage: python -m clustersim.study.fit {'|'.join(parts)}", file=sys.stderr)
        return 2
    if arguments[0] == "kernels":
        for line in write_kernels(FOLDER.parent):
            print(line, file=sys.stderr)
        return 0
    print(write(arguments[0]), file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
