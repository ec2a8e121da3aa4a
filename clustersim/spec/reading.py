"""A scenario file → one `Scenario`, or every mistake in it at once."""

from __future__ import annotations

import os
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

from pydantic import TypeAdapter, ValidationError

from clustersim.errors import Mistake, ScenarioError
from clustersim.spec.checks import Parts, check, gpu_count, gpu_of
from clustersim.spec.choices import laid_over, unused
from clustersim.spec.deployment import Deployment
from clustersim.spec.documents import (
    Document,
    DocumentError,
    Finding,
    KeyPath,
    Leaf,
    Node,
    Origin,
    dotted,
    origin_of,
    plain,
    read_document,
)
from clustersim.spec.hardware import Gpu, Server, TopologySpec
from clustersim.spec.labels import relabelled
from clustersim.spec.model import Model
from clustersim.spec.placements import NAMED, with_placement
from clustersim.spec.quantities import Value
from clustersim.spec.references import GPU, MODEL, SERVER, Kind, Resolver, catalogue_entries
from clustersim.spec.scenario import Scenario
from clustersim.spec.schema import json_schema
from clustersim.spec.wording import entry_sentences, sentences
from clustersim.spec.workload import Beside, Fault, Gating, Network, TraceLevel, Workload
from clustersim.spec.writing import scenario_hash, to_toml

__all__ = [
    "gpu_count",
    "gpu_of",
    "json_schema",
    "read_catalogue",
    "read_scenario",
    "read_topology",
    "scenario_hash",
    "to_toml",
]

#: A key path of the scenario, and what is wrong there.
Found: TypeAlias = tuple[KeyPath, str]

#: Mistakes that are listed; a file with more is not mended one by one.
MOST_MISTAKES = 50
#: Characters of a message. Two dozen names that may be chosen fit.
_LONGEST = 2000


def read_scenario(path: str | Path, overrides: Sequence[str] = ()) -> Scenario:
    """The scenario that a TOML file describes, with everything it refers to put in place.

    path       the file; what it extends or refers to lies in the folder above its own, or below
    overrides  "key.path=value" texts, laid over the file in turn; a value that is not TOML is text
    Raises     ScenarioError with every mistake, each with its file, line and key
    """
    try:
        return _read(str(path), overrides)
    except RecursionError:
        raise ScenarioError(str(path), [Mistake("", "is nested too deeply")]) from None


def _opened(shown: str) -> tuple[Path, Document, dict[str, Any]]:
    """A file as the user named it: where it is, what it is called in messages, what it says."""
    main = Path(os.path.abspath(shown)) if "\0" in shown else Path(os.path.realpath(shown))
    try:
        return main, *read_document(main, shown)
    except DocumentError as error:
        raise ScenarioError(shown, [Mistake("", error.problem, error.line)]) from None


def _read(shown: str, overrides: Sequence[str]) -> Scenario:
    main, document, values = _opened(shown)
    if "family" in values and "topology" not in values:
        problem = 'is a topology, not a scenario; a scenario names it: topology = "../topologies/mine.toml"'
        raise ScenarioError(shown, [Mistake("", problem)])
    resolver = Resolver(main)
    root = resolver.scenario(document, values)
    for text in overrides:
        root = _overridden(root, text, Document(shown, main.parent, command_line=True), resolver)
    root = resolver.replayed(with_placement(relabelled(root, document), resolver))
    scenario, found = _validated(plain(root), resolver.broken)
    if () not in resolver.broken:  # or a default would be taken for what the unread file chooses
        wrong = {place for place, _ in found}
        found += [(place, problem) for place, problem in unused(root) if place not in wrong]
    if NAMED in resolver.broken:  # told already
        found = [(place, problem) for place, problem in found if place != NAMED]
    findings = [*resolver.findings, *(Finding(origin_of(root, place), problem) for place, problem in found)]
    if scenario is None or findings:
        raise ScenarioError(shown, _mistakes(findings, shown))
    return scenario


def read_topology(path: str | Path, overrides: Sequence[str] = ()) -> TopologySpec:
    """The machine that a topology file describes, or the one of a scenario; nothing else of it is checked.

    path       the file, as for `read_scenario`
    overrides  "key.path=value" texts; keys of the topology, or of the scenario if the file is one
    Raises     ScenarioError with every mistake, each with its file, line and key
    """
    try:
        return _read_machine(str(path), overrides)
    except RecursionError:
        raise ScenarioError(str(path), [Mistake("", "is nested too deeply")]) from None


def _read_machine(shown: str, overrides: Sequence[str]) -> TopologySpec:
    main, document, values = _opened(shown)
    resolver = Resolver(main)
    is_scenario = any(key in values for key in ("topology", "extends", "model", "deployment", "workload"))
    root = resolver.scenario(document, values) if is_scenario else resolver.topology(document, values)
    for text in overrides:
        text = text if is_scenario or "=" not in text else f"topology.{text}"
        root = _overridden(root, text, Document(shown, main.parent, command_line=True), resolver)
    section = plain(root).get("topology")
    found: list[Found] = []
    machine = None
    try:
        machine = _Machine.model_validate({} if section is None else {"topology": section}).topology
        found += check(Parts(topology=machine))
    except ValidationError as error:
        found += sentences(error, resolver.broken)
    findings = [*resolver.findings, *(Finding(origin_of(root, place), problem) for place, problem in found)]
    if machine is None or findings:
        raise ScenarioError(shown, _mistakes(findings, shown))
    return machine


class _Machine(Value):
    """The one section of a scenario that is the machine."""

    topology: TopologySpec


def _validated(values: dict[str, Any], broken: set[KeyPath]) -> tuple[Scenario | None, list[Found]]:
    """The scenario if it is one, and what is wrong with the values or between them."""
    try:
        scenario = Scenario.model_validate(values)
    except ValidationError as error:
        found = sentences(error, broken)
        # With an unread `extends`, a default would be taken for what the other file says.
        return None, found if () in broken else found + check(_sound_parts(values, error))
    return scenario, check(Parts(**{name: getattr(scenario, name) for name in _SECTIONS}))


def _sound_parts(values: Mapping[str, Any], error: ValidationError) -> Parts:
    """Those sections of a broken scenario that are well-formed by themselves."""
    unsound = {detail["loc"][0] for detail in error.errors()}
    sound = [name for name in _SECTIONS if name in values and name not in unsound]
    return Parts(**{name: _SECTIONS[name].validate_python(_frozen(values[name])) for name in sound})


def _frozen(value: Any) -> Any:
    """TOML's lists are the scenario's tuples."""
    return tuple(value) if isinstance(value, list) else value


_SECTIONS: dict[str, TypeAdapter[Any]] = {
    "topology": TypeAdapter(TopologySpec),
    "model": TypeAdapter(Model),
    "deployment": TypeAdapter(Deployment),
    "workload": TypeAdapter(Workload),
    "gating": TypeAdapter(Gating),
    "beside": TypeAdapter(Beside | None),
    "network": TypeAdapter(Network),
    "trace": TypeAdapter(TraceLevel),
    "faults": TypeAdapter(tuple[Fault, ...]),
}


def _mistakes(findings: Iterable[Finding], main: str) -> list[Mistake]:
    """Findings with their lines: the scenario's own first, then other files', then options'."""
    located = [(finding, finding.line or finding.origin.line()) for finding in findings]
    located.sort(key=lambda pair: _order(pair[0].origin.document, pair[1], main))
    told = list(dict.fromkeys(_mistake(finding, line, main) for finding, line in located))
    more = len(told) - MOST_MISTAKES
    return told[:MOST_MISTAKES] + ([Mistake("", f"{more} more mistakes")] if more > 0 else [])


def _order(document: Document, line: int | None, main: str) -> tuple[bool, bool, str, int]:
    return document.command_line, document.shown != main, document.shown, line or 0


def _mistake(finding: Finding, line: int | None, main: str) -> Mistake:
    document = finding.origin.document
    problem = _one_line(finding.problem) + (" (from --set)" if document.command_line else "")
    file = None if document.shown == main else document.shown
    return Mistake(_one_line(dotted(finding.origin.path)), problem, line, file)


def _one_line(text: str) -> str:
    """Without line breaks and control characters, which a quoted value may hold, and not endless."""
    shown = "".join(char if char.isprintable() else repr(char)[1:-1] for char in text[:_LONGEST])
    return shown if max(len(shown), len(text)) <= _LONGEST else f"{shown[: _LONGEST - 10]} ..."


# --- options -------------------------------------------------------------------------------------


def _overridden(root: Node, text: str, options: Document, resolver: Resolver) -> Node:
    """The scenario with one "key.path=value" laid over it."""
    key, equals, value = text.partition("=")
    keys = [part.strip() for part in key.split(".")]
    if not equals or not all(keys):
        problem = f'"{text}" is not an override; write KEY=VALUE, such as deployment.tensor_parallel=4'
        resolver.findings.append(Finding(Origin(options, ()), problem))
        return root
    try:
        keys, content = _through_lists(root, keys, _option_value(value))
    except LookupError:
        resolver.findings.append(Finding(Origin(options, tuple(keys)), "there is no such list element"))
        return root
    for name in reversed(keys):
        content = {name: content}
    return laid_over(root, resolver.layer(options, content))


def _option_value(text: str) -> Any:
    """TOML where it is TOML, else the text itself: `400 Gb/s` needs no quotes."""
    try:
        values = tomllib.loads(f"v = {text}")
    except (ValueError, RecursionError):
        return text.strip()
    return values["v"] if len(values) == 1 else text.strip()


def _through_lists(root: Node, keys: list[str], value: Any) -> tuple[list[str], Any]:
    """A key path that leads into a list becomes the list's own path, with the changed list."""
    node = root
    for depth, key in enumerate(keys):
        if isinstance(node, Leaf):
            is_list = isinstance(node.value, list)
            return (keys[:depth], _changed(node.value, keys[depth:], value)) if is_list else (keys, value)
        if key not in node.children:
            break
        node = node.children[key]
    return keys, value


def _changed(old: Any, keys: Sequence[str], value: Any) -> Any:
    """A copy of a list or table in which the element at a key path is another."""
    if not keys:
        return value
    key, *rest = keys
    if isinstance(old, list):
        position = int(key) if key.isdecimal() else len(old)
        return [*old[:position], _changed(old[position], rest, value), *old[position + 1 :]]
    table = old if isinstance(old, dict) else {}
    return {**table, key: _changed(table.get(key), rest, value)}


# --- the catalogue -------------------------------------------------------------------------------


def read_catalogue(catalogue: str) -> dict[str, Model | Server | Gpu]:
    """Every entry of a catalogue, validated, by name.

    catalogue  "gpus", "servers" or "models"
    Raises     ScenarioError if an entry is broken, for instance has no source
    """
    kind, value = _CATALOGUES[catalogue]
    shown = f"catalogue/{catalogue}.toml"
    entries, findings = {}, []
    for name, entry in catalogue_entries(catalogue).items():
        origin = Origin(Document(shown, Path()), (name,))
        resolver = Resolver(Path(shown))
        try:
            entries[name] = value.model_validate(plain(resolver.entry(entry, origin, kind)))
        except ValidationError as error:
            findings += [Finding(origin.under(*path), problem) for path, problem in entry_sentences(error)]
        findings += resolver.findings
    if findings:
        raise ScenarioError(shown, _mistakes(findings, shown))
    return entries


_CATALOGUES: dict[str, tuple[Kind, type[Model] | type[Server] | type[Gpu]]] = {
    "gpus": (GPU, Gpu),
    "servers": (SERVER, Server),
    "models": (MODEL, Model),
}
