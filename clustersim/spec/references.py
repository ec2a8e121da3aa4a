"""Names and files inside a scenario: `model = "mixtral_8x7b"`, `"config.json"`, `from = …`, `extends = …`.

What a reference names is put in its place, with its own references resolved first. Catalogue
entries count as written where they are named, because nobody can mend them in the catalogue; what
comes from a file keeps that file as its origin.
"""

from __future__ import annotations

import os
import re
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cache, partial
from importlib import resources
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

from clustersim.errors import nearest
from clustersim.spec import huggingface
from clustersim.spec.choices import changed, laid_over
from clustersim.spec.documents import (
    NO_FILE,
    Document,
    DocumentError,
    Finding,
    KeyPath,
    Leaf,
    Node,
    Origin,
    Table,
    overlay,
    read_bytes,
    read_document,
    read_json,
    tree,
)
from clustersim.spec.routing import NoSuchMeasurement, Routing, choose, packed, read_routing

#: Endings of files of measured counts.
COUNTS = (".csv", ".npz", ".npy", ".json", ".jsonl")

#: Files that may name one another in a row.
DEEPEST = 8


@dataclass(frozen=True, slots=True)
class Kind:
    """A table that may be given by reference.

    wanted      what its value may be, for messages
    catalogue   file of `clustersim/catalogue` with named entries, or "" where only files serve
    nested      tables inside it that may be given by reference, too
    config      a Hugging Face config.json serves as well
    """

    wanted: str
    catalogue: str = ""
    nested: Mapping[str, Kind] = field(default_factory=dict)
    config: bool = False


_CATALOGUED = "a name from the catalogue or a table"
GPU = Kind(_CATALOGUED, "gpus")
SERVER = Kind(_CATALOGUED, "servers", {"gpu": GPU})
MODEL = Kind("a name from the catalogue, a Hugging Face config.json or a table", "models", config=True)
TOPOLOGY = Kind(
    'a TOML file, such as "../topologies/mine.toml", or a table', "", {"server": SERVER, "gpu": GPU}
)
SCENARIO = Kind("a table", nested={"model": MODEL, "topology": TOPOLOGY})

#: Real paths of the files that led here, the scenario first.
Chain: TypeAlias = tuple[Path, ...]

#: What a file of numbers is read into.
Read = TypeVar("Read")

Reader: TypeAlias = Callable[[Path, str], tuple[Document, dict[str, Any]]]


@cache
def catalogue_entries(catalogue: str) -> Mapping[str, Mapping[str, Any]]:
    """The entries of one catalogue file as written, by name; read only.

    catalogue  "gpus", "servers" or "models"
    """
    text = resources.files("clustersim.catalogue").joinpath(f"{catalogue}.toml").read_text("utf-8")
    return {name: {"name": name, **entry} for name, entry in tomllib.loads(text).items()}


#: Who makes it, and remarks in files of measurements: "NVIDIA B200-SXM-180GB", "A100-80GB (DGX)".
_BESIDE = re.compile(r"^(nvidia|amd)\b|\([^()]*\)\s*$")


def catalogue_name(catalogue: str, name: str) -> str | None:
    """The entry that people call so, or None: by its name or one of its aliases.

    Large and small letters, blanks, "-" and "_" make no difference; a maker before the name and a
    remark in brackets after it are left out.

    catalogue  "gpus", "servers" or "models"
    """
    return name if name in catalogue_entries(catalogue) else _names(catalogue).get(_bare(name))


def not_in_catalogue(catalogue: str, name: str) -> str:
    """The sentence for a name that no entry has, with the nearest one."""
    entries = catalogue_entries(catalogue)
    aliases = [alias for entry in entries.values() for alias in entry.get("aliases", ())]
    near = nearest(name, entries) or nearest(name, aliases)
    return f'"{name}" is not in the catalogue{near}; there are {", ".join(entries)}'


@cache
def _names(catalogue: str) -> Mapping[str, str]:
    """Every name and alias, bare → the entry."""
    entries = catalogue_entries(catalogue).items()
    return {_bare(word): name for name, entry in entries for word in (name, *entry.get("aliases", ()))}


def _bare(name: str) -> str:
    return re.sub(r"[\s_-]", "", _BESIDE.sub("", name.strip().casefold()))


@dataclass(slots=True)
class Resolver:
    """Puts in place what references name, and notes which could not be.

    main      the scenario file, real path
    findings  references that led nowhere
    broken    key paths of the scenario below which keys may be missing for that reason
    """

    main: Path
    findings: list[Finding] = field(default_factory=list)
    broken: set[KeyPath] = field(default_factory=set)

    def scenario(self, document: Document, values: Mapping[str, Any]) -> Node:
        """The whole scenario with what it extends and refers to."""
        return self._extended(tree(values, Origin(document, ())), (self.main,))

    def topology(self, document: Document, values: Mapping[str, Any]) -> Table:
        """A topology file as the one section of a scenario, with what it refers to."""
        here = Origin(document, ())
        machine = self._resolved(tree(values, here), TOPOLOGY, ("topology",), (self.main,))
        return Table({"topology": machine}, here)

    def layer(self, document: Document, values: Mapping[str, Any]) -> Node:
        """A piece to be laid over a scenario, the references in it resolved."""
        return self._resolved(tree(values, Origin(document, ())), SCENARIO, (), (self.main,))

    def entry(self, values: Mapping[str, Any], origin: Origin, kind: Kind) -> Node:
        """One entry of a catalogue, the references in it resolved."""
        return self._resolved(tree(values, origin), kind, ("",), (self.main,))

    def _extended(self, root: Table, chain: Chain) -> Node:
        children = dict(root.children)
        reference = children.pop("extends", None)
        above = self._resolved(replace(root, children=children), SCENARIO, (), chain)
        if reference is None:
            return above
        found = self._file(reference, (), chain)
        return above if found is None else laid_over(self._extended(*found), above)

    def _resolved(self, node: Node, kind: Kind, path: KeyPath, chain: Chain) -> Node:
        """The node with every reference in it replaced by what it names."""
        if isinstance(node, Table):
            return self._resolved_table(node, kind, path, chain)
        return self._named(node, kind, path, chain) if isinstance(node.value, str) else node

    def _resolved_table(self, table: Table, kind: Kind, path: KeyPath, chain: Chain) -> Table:
        children = dict(table.children)
        reference = children.pop("from", None) if path else None
        for key, nested in kind.nested.items():
            if key in children:
                children[key] = self._resolved(children[key], nested, (*path, key), chain)
        written = replace(table, children=children)
        if reference is None:
            return written
        named = self._named(reference, kind, path, chain)
        merged = overlay(named, written)
        assert isinstance(merged, Table)
        return replace(merged, origin=table.origin, replaces=True)

    def _named(self, reference: Node, kind: Kind, path: KeyPath, chain: Chain) -> Table:
        """What a name or file name stands for; an empty table if it stands for nothing."""
        name = reference.value if isinstance(reference, Leaf) else None
        if kind.config and isinstance(name, str) and name.endswith(".json"):
            return self._configured(reference, path, chain)
        if kind.catalogue and isinstance(name, str) and not name.endswith(".toml"):
            return self._catalogued(name, reference.origin, kind, path, chain)
        found = self._file(reference, path, chain)
        if found is None:
            return Table({}, reference.origin, replaces=True)
        return replace(self._resolved_table(found[0], kind, path, found[1]), replaces=True)

    def _catalogued(self, name: str, origin: Origin, kind: Kind, path: KeyPath, chain: Chain) -> Table:
        found = catalogue_name(kind.catalogue, name)
        if found is None and kind.config and ("/" in name or "\\" in name):
            problem = (
                "is neither a name from the catalogue nor the path of a Hugging Face config.json, "
                "relative to the file that names it"
            )
            self._note(origin, f'"{name}" {problem}', path)
            return Table({}, origin, replaces=True)
        if found is None:
            self._note(origin, not_in_catalogue(kind.catalogue, name), path)
            return Table({}, origin, replaces=True)
        # `model = "x"` and `[model] from = "x"` both stand for the keys of `model`.
        origin = replace(origin, path=origin.path[:-1]) if origin.path[-1:] == ("from",) else origin
        table = self._resolved_table(
            tree(catalogue_entries(kind.catalogue)[found], origin), kind, path, chain
        )
        return replace(table, replaces=True)

    def _configured(self, reference: Node, path: KeyPath, chain: Chain) -> Table:
        """The model of a Hugging Face config; an empty table where it could not be read."""
        nothing = Table({}, reference.origin, replaces=True)
        found = self._opened(reference, path, chain, ".json", read_json)
        if found is None:
            return nothing
        document, values, file = found
        read, problems = huggingface.model_of(values)
        here = Origin(document, ())
        if problems:
            self.findings += [Finding(here.under(*key.split(".")), text) for key, text in problems]
            self.broken.add(path)
            return nothing
        # Many such files are called config.json: their folder says whose it is.
        own = file.stem if file.stem != "config" else file.parent.name
        said = {"name": own[:64], "source": f"{document.shown}, a Hugging Face config.json"}
        children: dict[str, Node] = {key: Leaf(value, here) for key, value in said.items()}
        for key, (value, config_key) in read.items():
            origin = here.under(*config_key.split("."))
            children[key] = tree(value, origin) if isinstance(value, dict) else Leaf(value, origin)
        return Table(children, here, replaces=True)

    def replayed(self, root: Node) -> Node:
        """The scenario with the content of the measured counts that its gatings name.

        Last of all, because an option may choose one of several measurements of a file that is named below.
        """
        for path in (("gating",), ("beside", "gating")):
            root = changed(root, path, partial(self._with_content, path=path))
        return root

    def _with_content(self, gating: Table, path: KeyPath) -> Table:
        """The gating with what is measured, unless it carries it already."""
        skew, named, carried = (_text(gating, key) for key in ("skew", "counts", "content"))
        if skew != "replayed" or not named or carried:
            return gating
        counts = gating.children["counts"]
        wished, content = gating.children.get("measurement"), ""
        try:
            content = packed(
                choose(self._measured(named, counts.origin.document), _text(gating, "measurement"))
            )
        except NoSuchMeasurement as error:
            self._note((wished or counts).origin, f'"{named}" {error.problem}', path)
        except DocumentError as error:
            at = f", line {error.line}" if error.line else ""
            self._note(counts.origin, f'"{named}"{at}: {error.problem}', path)
        return replace(gating, children={**gating.children, "content": Leaf(content, counts.origin)})

    def _measured(self, name: str, namer: Document) -> list[Routing]:
        """The measurements of a file of counts. Raises DocumentError."""
        suffix = os.path.splitext(name)[1]
        if suffix not in COUNTS:
            raise DocumentError(f"is no file of counts; they end in {', '.join(COUNTS)}")
        file = Path(os.path.realpath(namer.folder / name)) if "\0" not in name else Path()
        problem = _refused_name(name, suffix) or _refused_file(name, file, (self.main,))
        if problem:
            raise DocumentError(problem)
        try:
            return read_routing(file)
        except DocumentError as error:
            near = _near_file(file.parent, name) if error.problem == NO_FILE else ""
            raise DocumentError(f"{error.problem}{near}", error.line) from None

    def _file(self, reference: Node, path: KeyPath, chain: Chain) -> tuple[Table, Chain] | None:
        """The tree of a referenced file and the chain that leads on from it, or None."""
        found = self._opened(reference, path, chain, ".toml", read_document)
        if found is None:
            return None
        document, values, file = found
        return tree(values, Origin(document, ())), (*chain, file)

    def _opened(
        self, reference: Node, path: KeyPath, chain: Chain, ending: str, read: Reader
    ) -> tuple[Document, dict[str, Any], Path] | None:
        """What a referenced file says, and where it is; None, and a finding, where that is not to be had."""
        if not isinstance(reference, Leaf) or not isinstance(reference.value, str):
            self._note(reference.origin, 'must be the name of a TOML file, such as "other.toml"', path)
            return None
        name, namer = reference.value, reference.origin.document
        problem = _refused_name(name, ending)
        file = Path() if problem else Path(os.path.realpath(namer.folder / name))
        problem = problem or _refused_file(name, file, chain)
        if problem:
            self._note(reference.origin, f'"{name}" {problem}', path)
            return None
        shown = os.path.normpath(os.path.join(os.path.dirname(namer.shown), name))
        try:
            document, values = read(file, shown)
        except DocumentError as error:
            self._note_unreadable(reference.origin, name, Document(shown, file.parent), error, path)
            return None
        return document, values, file

    def data(
        self, named: Leaf, path: KeyPath, wanted: str, readers: Mapping[str, Callable[[bytes], Read]]
    ) -> tuple[Document, Read] | None:
        """What a file of numbers holds, under the rules for all files that are named.

        named    the file's name, relative to the file that it stands in
        path     key path of the scenario that it stands for
        wanted   what the file is, for messages
        readers  ending of the name → how its bytes are read; they may raise DocumentError
        Returns  None, and a finding is noted, where that is not to be had
        """
        name, namer = named.value, named.origin.document
        ending = os.path.splitext(name)[1]
        if "\0" in name or ending not in readers:
            self._note(named.origin, f'"{name}" is not the name of {wanted}: {", ".join(readers)}', path)
            return None
        file = Path(os.path.realpath(namer.folder / name))
        problem = _refused_name(name, ending) or _refused_file(name, file, (self.main,))
        if problem:
            self._note(named.origin, f'"{name}" {problem}', path)
            return None
        shown = os.path.normpath(os.path.join(os.path.dirname(namer.shown), name))
        try:
            text = read_bytes(file)
            document = Document(shown, file.parent, text if ending == ".toml" else b"")
            return document, readers[ending](text)
        except DocumentError as error:
            self._note_unreadable(named.origin, name, Document(shown, file.parent), error, path)
            return None

    def _note(self, origin: Origin, problem: str, path: KeyPath) -> None:
        self.findings.append(Finding(origin, problem))
        self.broken.add(path)

    def _note_unreadable(
        self, origin: Origin, name: str, document: Document, error: DocumentError, path: KeyPath
    ) -> None:
        """A file without readable text is the namer's mistake; one with broken text is its own."""
        if error.line is None:
            near = _near_file(document.folder, name) if error.problem == NO_FILE else ""
            self._note(origin, f'"{name}": {error.problem}{near}', path)
        else:
            self.findings.append(Finding(Origin(document, ()), error.problem, error.line))
            self.broken.add(path)


def _refused_name(name: str, ending: str) -> str:
    if "\0" in name or not name.endswith(ending):
        return 'is not the name of a TOML file, such as "other.toml"'
    if os.path.isabs(name):
        return "must be relative to the file that names it"
    return ""


def _refused_file(name: str, file: Path, chain: Chain) -> str:
    # A scenario may come from somebody else: it must not make us read (and quote) other files.
    if not file.is_relative_to(chain[0].parent.parent):
        return "lies outside the folder above the scenario's own"
    if file in chain:
        loop = " -> ".join(step.name for step in (*chain[chain.index(file) :], file))
        return f"leads back to itself: {loop}"
    if len(chain) > DEEPEST:
        return f"is too deep: more than {DEEPEST} files name one another in a row"
    return ""


def _near_file(folder: Path, name: str) -> str:
    try:
        names = sorted(file.name for file in folder.glob(f"*{Path(name).suffix}"))
    except OSError:
        return ""
    return nearest(os.path.basename(name), [other for other in names if other != os.path.basename(name)])


def _text(table: Table, key: str) -> str:
    """A text of a table; empty where it is not there, or is none: that is told where types are."""
    child = table.children.get(key)
    return child.value if isinstance(child, Leaf) and isinstance(child.value, str) else ""
