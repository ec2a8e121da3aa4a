"""What the catalogue holds: GPUs, servers, models, costs of exchanges, measured tables, with all sources."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any, TypeAlias

import numpy as np

from clustersim.errors import ClustersimError, pick
from clustersim.physics.kernels import KERNELS
from clustersim.plan.parameters import active_parameters, total_parameters
from clustersim.spec.costs import fitted_tables
from clustersim.spec.expert_costs import ExpertKernel
from clustersim.spec.formats import formats_of
from clustersim.spec.hardware import Gpu, Server
from clustersim.spec.kernel_tables import TableKey, fitted_parameters, kernel_table
from clustersim.spec.library import ARCHITECTURES, FABRICS, FabricCosts, KernelCosts, LibraryCosts
from clustersim.spec.library import SECTION as COLLECTIVES
from clustersim.spec.model import Model
from clustersim.spec.quantities import Value
from clustersim.spec.reading import read_catalogue
from clustersim.spec.references import catalogue_entries, catalogue_name, not_in_catalogue
from clustersim.spec.schema import described, meanings
from clustersim.study.measured import FOLDER, MEASURED, Table, measured
from clustersim.study.origins import origin_of, remarks

#: A page of facts: names → numbers in SI units, texts, lists and further pages.
Page: TypeAlias = dict[str, Any]

#: Keys that say who an entry is, not what was found out about it.
_NAMES = ("name", "source")
#: Keys that this catalogue chose itself; no source could state them.
_CHOICES = ("aliases", "relative", "architecture", "gpu")


def listing(section: str = "") -> dict[str, list[Page]]:
    """Section → its entries, each with all its figures; of one section, or of all.

    Raises   ClustersimError with the nearest section
    """
    sections = SECTIONS if not section else {section: pick(SECTIONS, section, "catalogue")}
    return {name: rows() for name, (rows, _) in sections.items()}


def entry(section: str, name: str) -> Page:
    """One entry whole: `fields` holds every key with value, meaning and origin, guesses marked.

    Raises   ClustersimError with the nearest section or name
    """
    return pick(SECTIONS, section, "catalogue")[1](name)


# --- GPUs, servers, models -----------------------------------------------------------------------


def _gpus() -> list[Page]:
    return [_of_gpu(gpu) for gpu in read_catalogue("gpus").values() if isinstance(gpu, Gpu)]


def _of_gpu(gpu: Gpu) -> Page:
    own = [".".join(key) for key in fitted_parameters() if key.gpu == gpu.name]
    rows = _rows_by_table().get(gpu.name, {})
    return {**_plain(gpu), "formats": formats_of(gpu), "measured": rows, "kernels": own}


def _servers() -> list[Page]:
    return [_of_server(server) for server in read_catalogue("servers").values() if isinstance(server, Server)]


def _of_server(server: Server) -> Page:
    return {**_plain(server), "gpu": server.gpu.name}


def _models() -> list[Page]:
    return [_of_model(model) for model in read_catalogue("models").values() if isinstance(model, Model)]


def _of_model(model: Model) -> Page:
    stated = model.stated_parameters or None
    total = total_parameters(model)
    counted = {"total": total, "active": active_parameters(model), "stated": stated}
    return {**_plain(model), "parameters": counted}


def _named(section: str, name: str) -> Page:
    """One entry of a catalogue file, by its name or an alias."""
    found = catalogue_name(section, name)
    if found is None:
        raise ClustersimError(f"catalogue {section}: {not_in_catalogue(section, name)}")
    value = read_catalogue(section)[found]
    page = _ABOUT[section](value)
    return {"section": section, **page, "fields": _fields(section, found, value)}


_ABOUT: dict[str, Callable[[Any], Page]] = {"gpus": _of_gpu, "servers": _of_server, "models": _of_model}


def _fields(section: str, name: str, value: Value) -> list[Page]:
    """Key, value in SI units, text as the catalogue writes it, meaning and origin, of all keys."""
    written = catalogue_entries(section)[name]
    means = meanings(type(value))
    source = str(written["source"])
    fields = []
    for key in type(value).model_fields:
        if key in _NAMES:
            continue
        given = key in written
        origin = origin_of(key, source, remarks(section).get(name, {}).get(key, ""))
        chosen = "a choice of this catalogue" if key in _CHOICES else origin.text
        fields.append(
            {
                "key": key,
                "value": _plain(getattr(value, key)) if key != "gpu" else written[key],
                "text": said(written[key] if given else _plain(getattr(value, key))),
                "meaning": means.get(key, ""),
                "origin": chosen if given else "not stated",
                "remark": origin.remark,
                "guess": given and key not in _CHOICES and origin.guess,
            }
        )
    return fields


def _plain(value: Any) -> Any:
    """Values as dictionaries and lists; numbers stay in SI units."""
    if isinstance(value, Value):
        return {key: _plain(getattr(value, key)) for key in type(value).model_fields}
    if isinstance(value, Mapping):
        return {key: _plain(one) for key, one in value.items()}
    return [_plain(one) for one in value] if isinstance(value, (list, tuple)) else value


def said(value: Any) -> str:
    """A value of a catalogue file as people read it."""
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {said(one)}" for key, one in value.items())
    if isinstance(value, (list, tuple)):
        pairs = all(isinstance(one, (list, tuple)) for one in value)
        return ", ".join(" x ".join(map(str, one)) if pairs else said(one) for one in value) or "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "-" if value is None else f"{value:,}" if isinstance(value, int) else str(value)


# --- costs of exchanges --------------------------------------------------------------------------


def _network() -> list[Page]:
    return [
        _of_group(section, group, costs)
        for section, groups in fitted_tables().items()
        for group, costs in groups.items()
    ]


def _of_group(section: str, group: str, costs: Mapping[str, Mapping[str, Any]]) -> Page:
    """What was fitted for one library, architecture or kind of network."""
    spoken = [one for one in costs.values() if one["rows"]]
    return {
        "name": f"{section}.{group}",
        "parameters": len(costs),
        "without_rows": [key for key, one in costs.items() if not one["rows"]],
        "most_rows": max((one["rows"] for one in spoken), default=0),
        "residual": float(np.median([one["residual"] for one in spoken])) if spoken else None,
        "files": sorted({file for one in spoken for file in one["files"]}),
    }


def _network_named(name: str) -> Page:
    """One group of fitted costs, by `section.group` or by the group alone."""
    groups = {
        f"{section}.{group}": (section, group, costs)
        for section, groups in fitted_tables().items()
        for group, costs in groups.items()
    }
    alone = [full for full, (_, group, _) in groups.items() if group == name]
    section, group, costs = pick(groups, alone[0] if len(alone) == 1 else name, "catalogue network")
    fields = _fitted_fields(costs, meanings(_form_of(section, group)))
    return {"section": "network", **_of_group(section, group, costs), "fields": fields}


def _fitted_fields(costs: Mapping[str, Mapping[str, Any]], means: Mapping[str, str]) -> list[Page]:
    """Fitted parameters as fields: value, meaning, and the rows that speak about each."""
    return [
        {
            "key": key,
            "value": one["value"],
            "text": said(one["value"]),
            "meaning": means.get(key, ""),
            "origin": _fitted(one),
            "remark": "",
            "guess": not one["rows"],
            "rows": one["rows"],
            "residual": one["residual"],
            "files": one["files"],
        }
        for key, one in costs.items()
    ]


def _form_of(section: str, group: str) -> type[Value]:
    if section != COLLECTIVES:
        return ExpertKernel
    if group in ARCHITECTURES:
        return LibraryCosts
    return FabricCosts if group in FABRICS else KernelCosts


def _fitted(one: Mapping[str, Any]) -> str:
    if not one["rows"]:
        return "guess: no measured row speaks about it"
    return f"fitted to {one['rows']:,} rows of {', '.join(one['files'])}; median error {one['residual']:.1%}"


# --- measured tables -----------------------------------------------------------------------------


def _calibration() -> list[Page]:
    return [_of_table(name) for name in MEASURED] + fitted_kernels()


def fitted_kernels() -> list[Page]:
    """The fitted tables of kernels, each of one kernel, GPU, format and library."""
    return [_of_kernel(key) for key in fitted_parameters()]


def _of_kernel(key: TableKey) -> Page:
    """A formula's parameters and how many measured points are laid over it."""
    group = _of_group(key.kernel, ".".join(key[1:]), fitted_parameters()[key])
    points = int(np.count_nonzero(kernel_table(key).far == 0))
    return {"kind": "fitted", **key._asdict(), **group, "points": points}


def _kernel_named(name: str) -> Page:
    key = TableKey(*name.split("."))
    form = KERNELS[key.kernel].parameters if key.kernel in KERNELS else None
    parameters = fitted_parameters()[key]
    fields = _fitted_fields(parameters, described(form.__doc__ if form else None, parameters))
    return {"section": "calibration", **_of_kernel(key), "fields": fields}


@cache
def _of_table(name: str) -> Page:
    table = measured(name)
    source, licence = _provenance()[name]
    return {
        "kind": "measured",
        "name": name,
        "what": MEASURED[name],
        "rows": len(table["source"]),
        "gpus": _gpu_counts(table),
        "suspect": int(np.count_nonzero(table["suspect"] != "")) if "suspect" in table else 0,
        "licence": licence,
        "source": source,
    }


def _gpu_counts(table: Table) -> dict[str, int]:
    """Catalogue name, or the file's own where the catalogue has no such GPU → rows."""
    counts: Counter[str] = Counter()
    for name, rows in Counter(map(str, table.get("gpu", ()))).items():
        counts[catalogue_name("gpus", name) or name] += rows
    return dict(sorted(counts.items()))


@cache
def _rows_by_table() -> dict[str, dict[str, int]]:
    """GPU → measured table → rows."""
    found: dict[str, dict[str, int]] = {}
    for table in MEASURED:
        for gpu, rows in _of_table(table)["gpus"].items():
            found.setdefault(gpu, {})[table] = rows
    return found


@cache
def _provenance() -> dict[str, tuple[str, str]]:
    """Measured table → source and licence, as the table of measured/README.md tells them."""
    lines = (FOLDER / "README.md").read_text("utf-8").splitlines()
    rows = [
        [cell.strip() for cell in line.strip("| ").split(" | ")] for line in lines if line.startswith("| ")
    ]
    return {name: (source, licence) for name, _, source, licence in (row for row in rows if len(row) == 4)}


def _calibration_named(name: str) -> Page:
    """A measured table: what its columns hold, and where its rows come from; or a fitted one."""
    fitted = {".".join(key): "" for key in fitted_parameters()}
    pick({**MEASURED, **fitted}, name, "catalogue calibration")
    if name in fitted:
        return _kernel_named(name)
    table = measured(name)
    return {
        "section": "calibration",
        **_of_table(name),
        "columns": [_of_column(key, column) for key, column in table.items()],
        "sources": dict(sorted(Counter(map(str, table["source"])).items())),
    }


def _of_column(key: str, column: np.ndarray) -> Page:
    """What a column holds: numbers from least to most, or how many different words."""
    if column.dtype.kind not in "if":
        return {"column": key, "kind": "text", "different": len(set(column.tolist())), "gaps": _gaps(column)}
    return {
        "column": key,
        "kind": "whole numbers" if column.dtype.kind == "i" else "numbers",
        "different": len(np.unique(column[~np.isnan(column)])),
        "gaps": _gaps(column),
        "least": np.nanmin(column).item(),
        "most": np.nanmax(column).item(),
    }


def _gaps(column: np.ndarray) -> int:
    return int(np.count_nonzero(column == "" if column.dtype.kind == "U" else np.isnan(column)))


#: Section → all its entries, and one of them by name.
SECTIONS: dict[str, tuple[Callable[[], list[Page]], Callable[[str], Page]]] = {
    "gpus": (_gpus, lambda name: _named("gpus", name)),
    "servers": (_servers, lambda name: _named("servers", name)),
    "models": (_models, lambda name: _named("models", name)),
    "network": (_network, _network_named),
    "calibration": (_calibration, _calibration_named),
}
