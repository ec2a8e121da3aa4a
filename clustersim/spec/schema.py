"""JSON Schema of a scenario file as people write it, for editors."""

from __future__ import annotations

import re
from collections.abc import Collection
from inspect import cleandoc
from typing import Any

from clustersim.spec import deployment, hardware, model, workload
from clustersim.spec.quantities import Value
from clustersim.spec.references import GPU, MODEL, SERVER, TOPOLOGY, catalogue_entries
from clustersim.spec.scenario import Scenario

#: Tables that may be given by reference: definition → kind.
_REFERRED = {
    "Model": MODEL,
    "Server": SERVER,
    "Gpu": GPU,
    "SingleServer": TOPOLOGY,
    "RailFatTree": TOPOLOGY,
    "FatTree": TOPOLOGY,
    "Nvl72": TOPOLOGY,
    "Dragonfly": TOPOLOGY,
    "VertexByVertex": TOPOLOGY,
}

#: Tables that may be completed by the file that `extends` names.
_EXTENDED = ("Deployment", "Workload", "Gating", "Network", "TraceLevel", "Claimed")


#: Every table of a scenario file: definition → the value it becomes.
TABLES: dict[str, type[Value]] = {
    "Scenario": Scenario,
    **{
        name: value
        for module in (hardware, model, deployment, workload)
        for name, value in vars(module).items()
        if isinstance(value, type) and issubclass(value, Value) and value.__module__ == module.__name__
    },
}

_DESCRIBED = re.compile(r"(\w+(?:, \w+)*) {2,}(\S.*)")


def meanings(value: type[Value]) -> dict[str, str]:
    """Key → what it means, read from the lines `key  meaning` of a value's docstring."""
    return described(value.__doc__, value.model_fields)


def described(text: str | None, known: Collection[str]) -> dict[str, str]:
    """The same of any docstring, of the keys that are known."""
    found: dict[str, str] = {}
    keys: list[str] = []
    for line in cleandoc(text or "").splitlines():
        described = _DESCRIBED.fullmatch(line)
        if described:
            keys = [key for key in described[1].split(", ") if key in known]
            found.update(dict.fromkeys(keys, described[2]))
        elif line.startswith(" "):
            for key in keys:
                found[key] += f" {line.strip()}"
        else:
            keys = []
    return found


def json_schema() -> dict[str, Any]:
    """The schema: references are a name or a table with `from`, and `extends` frees from completeness.

    Returns  a draft 2020-12 schema as nested dictionaries
    """
    schema = Scenario.model_json_schema(mode="validation")
    definitions: dict[str, Any] = schema["$defs"]
    for name, value in TABLES.items():
        properties = (schema if name == "Scenario" else definitions[name])["properties"]
        for key, meaning in meanings(value).items():
            properties[key]["description"] = meaning
    required = {name: definitions[name].pop("required", []) for name in (*_REFERRED, *_EXTENDED)}
    for name, kind in _REFERRED.items():
        definitions[name]["properties"]["from"] = {"type": "string", "description": f"or {kind.wanted}"}
    for name in ("Gpu", "Server"):
        _by_name(definitions, name, _complete(required[name]))
    _by_name(definitions, "Model", {})
    topology = schema["properties"]["topology"]
    families = topology.pop("oneOf")
    topology.pop("discriminator", None)
    # Without `required`, a table may fit several families: "one of" would then refuse it.
    topology["anyOf"] = [{"type": "string", "description": TOPOLOGY.wanted}, *families]
    schema["properties"]["extends"] = {
        "type": "string",
        "pattern": r"\.toml$",
        "description": "a scenario file that this one is laid over",
    }
    schema["$schema"] = "https://json-schema.org/draft/2020-12/schema"
    schema["if"] = {"not": {"required": ["extends"]}}
    schema["then"] = {
        "required": schema.pop("required"),
        "properties": {
            "workload": {"required": required["Workload"]},
            "claimed": {"required": required["Claimed"]},
            "model": _complete(required["Model"]),
            "topology": {
                "anyOf": [
                    {"type": "string"},
                    {"required": ["from"]},
                    *(
                        {
                            "properties": {"family": definitions[name]["properties"]["family"]},
                            "required": required[name],
                        }
                        for name, kind in _REFERRED.items()
                        if kind is TOPOLOGY
                    ),
                ]
            },
        },
    }
    return schema


def _complete(keys: list[str]) -> dict[str, Any]:
    """A name, a table with `from`, or a table with all of these keys."""
    return {"anyOf": [{"type": "string"}, {"required": ["from"]}, {"required": keys}]}


def _by_name(definitions: dict[str, Any], name: str, condition: dict[str, Any]) -> None:
    """Let a name from the catalogue stand for the table."""
    kind = _REFERRED[name]
    named = {
        "type": "string",
        "description": kind.wanted,
        "examples": list(catalogue_entries(kind.catalogue)),
    }
    definitions[name] = {"anyOf": [named, definitions[name]], **({"allOf": [condition]} if condition else {})}
