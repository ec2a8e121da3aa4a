"""Start-up and protocol costs of exchanges, as fitted to measurements: catalogue/network.toml and
catalogue/expert_exchange.toml.

The files are written by `python -m clustersim.study.fit`. Each parameter stands there with the
files and the number of rows that speak about it and what is left unexplained of them; the program
reads the value alone.
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from functools import cache
from importlib import resources
from typing import Any, TypeVar

from clustersim.errors import pick
from clustersim.spec.quantities import Value

Costs = TypeVar("Costs", bound=Value)

FILES = ("network.toml", "expert_exchange.toml")


@cache
def fitted_tables() -> Mapping[str, Mapping[str, Mapping[str, Any]]]:
    """Section → group (an architecture, a library) → parameter → {value, rows, residual, files}."""
    folder = resources.files("clustersim.catalogue")
    files = [folder.joinpath(name) for name in FILES]
    tables = [tomllib.loads(file.read_text("utf-8")) for file in files if file.is_file()]
    return {section: groups for table in tables for section, groups in table.items()}


def read_costs(section: str, form: type[Costs]) -> dict[str, Costs]:
    """Group → its parameters, validated.

    section  a top-level table of one of FILES
    form     the value whose fields are the parameters' names
    Raises   ClustersimError for a section that is not there
    """
    groups = pick(fitted_tables(), section, "section of catalogue/network.toml or expert_exchange.toml")
    return {name: from_values(plain(group), form) for name, group in groups.items()}


def plain(group: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """The values of a group's parameters, without where they come from."""
    return {name: parameter["value"] for name, parameter in group.items()}


def from_values(values: Mapping[str, Any], form: type[Costs]) -> Costs:
    """The parameters of one group; quantities as text with a unit, such as "4.1 us"."""
    return form.model_validate(dict(values))
