"""The order of the house, read off the syntax trees: who imports whom, and how large things may get."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "clustersim"

#: Modules that everybody may import.
GROUND = ("units", "errors", "seeds")

#: Room → what it may import besides itself and the ground. Imports go down or within a room, never across.
ROOMS: dict[str, tuple[str, ...]] = {
    "spec": (),
    "trace": (),
    "plan": ("spec",),
    "serving": ("spec",),
    "physics": ("plan", "spec"),
    "engine": ("physics", "serving", "plan", "spec", "trace.record"),
    "analysis": ("trace",),
    "report": ("analysis", "trace"),
    "study": ("engine", "physics", "serving", "plan", "spec", "analysis", "report", "trace"),
    "cli": ("study", "report"),
    "__init__": ("study", "spec"),
    "units": (),
    "errors": (),
    "seeds": (),
    "catalogue": (),
}

#: (module, what it imports) beyond the table → why.
ALLOWED_ACROSS: dict[tuple[str, str], str] = {}

#: Dependency → the only places that may import it; "" is everywhere.
DOORS: dict[str, tuple[str, ...]] = {
    "numpy": ("",),
    "simpy": ("engine/",),
    "networkx": ("plan/",),
    "pygraphviz": ("plan/",),
    "numba": ("physics/", "plan/gating.py"),
    "pydantic": ("spec/",),
    "pydantic_core": ("spec/",),
    "tomllib": ("spec/",),
    "tree_sitter": ("spec/positions.py",),
    "tree_sitter_toml": ("spec/positions.py",),
    "pyarrow": ("trace/files.py", "trace/csv.py"),
    "duckdb": ("analysis/query.py",),
    "rich": ("report/", "cli/"),
    "plotly": ("report/html.py",),
    "click": ("cli/",),
    "polars": ("trace/tables.py",),
    "torch": ("study/torch_timing.py",),
}

#: (file, dependency) that may be named for the type checker only.
TYPES_ONLY = {("trace/tables.py", name) for name in ("pandas", "polars", "pyarrow")}

#: (file, what is imported inside a function; "" for anything) → why not at the head.
LAZY: dict[tuple[str, str], str] = {
    **{
        (f"cli/{file}.py", ""): "a command imports only what it needs, so that --help is quick"
        for file in sorted(path.stem for path in (PACKAGE / "cli").glob("*.py"))
    },
    ("trace/tables.py", "polars"): "not a dependency; whoever has it may use it",
    ("spec/positions.py", "tree_sitter"): "needed only where there is a mistake to be located",
    ("spec/positions.py", "tree_sitter_toml"): "as tree_sitter",
    ("study/torch_timing.py", "torch"): "an optional extra: only whoever measures needs it",
    ("study/torch_timing.py", "torch.nn.attention"): "as torch",
}

#: The user's own: never required, so never imported at the head of a module.
OPTIONAL = ("polars", "torch")

#: Importable, but not under their own name in pyproject.toml → why.
NOT_DECLARED = {
    "pydantic_core": "comes with pydantic",
    "polars": "the user's own, never required",
    "torch": "the optional extra `measure`",
}

MOST_LINES_OF_A_MODULE = 599
MOST_LINES_OF_A_FUNCTION = 70


@dataclass(frozen=True)
class Import:
    """One imported module, as seen from one file of the package."""

    file: str
    module: str
    line: int
    in_function: bool = False
    types_only: bool = False

    def __str__(self) -> str:
        return f"clustersim/{self.file}:{self.line} imports {self.module}"


def sources() -> list[str]:
    return sorted(path.relative_to(PACKAGE).as_posix() for path in PACKAGE.rglob("*.py"))


@cache
def tree(file: str) -> ast.Module:
    return ast.parse((PACKAGE / file).read_text(encoding="utf-8"))


def imports(file: str) -> Iterator[Import]:
    yield from _imports(tree(file), Import(file, "", 0))


def _imports(node: ast.AST, seen: Import) -> Iterator[Import]:
    for child in ast.iter_child_nodes(node):
        here = Import(
            seen.file,
            "",
            0,
            seen.in_function or isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef),
            seen.types_only or (isinstance(child, ast.If) and "TYPE_CHECKING" in ast.dump(child.test)),
        )
        for module in _modules(child):
            yield Import(seen.file, module, child.lineno, seen.in_function, seen.types_only)  # type: ignore[attr-defined]
        yield from _imports(child, here)


def _modules(node: ast.AST) -> list[str]:
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        return ["." * node.level + (node.module or "")]
    return []


def every_import() -> list[Import]:
    return [one for file in sources() for one in imports(file)]


def room_of(file: str) -> str:
    return Path(file).parts[0].removesuffix(".py")


def starts_with(module: str, allowed: str) -> bool:
    return f"{module}.".startswith(f"{allowed}.")


@pytest.mark.parametrize("file", sources())
def test_imports_go_down_or_stay_in_the_room(file: str) -> None:
    room = room_of(file)
    allowed = (*GROUND, *ROOMS[room], room)
    for one in imports(file):
        if not one.module.startswith("clustersim."):
            continue
        module = one.module.removeprefix("clustersim.")
        across = any(starts_with(module, to) for by, to in ALLOWED_ACROSS if by == room)
        assert across or any(starts_with(module, to) for to in allowed), str(one)


def test_the_table_of_rooms_has_no_circle() -> None:
    def below(room: str, above: tuple[str, ...] = ()) -> Iterator[str]:
        assert room not in above, " -> ".join((*above, room))
        for lower in ROOMS[room]:
            yield lower
            yield from below(lower.split(".")[0], (*above, room))

    for room in ROOMS:
        list(below(room))


@pytest.mark.parametrize("file", sources())
def test_nobody_goes_through_the_face_of_the_package_or_imports_everything(file: str) -> None:
    for node in ast.walk(tree(file)):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}:{node.lineno} is a relative import"
            assert node.module != "clustersim", f"{file}:{node.lineno} goes through the package's face"
            assert all(alias.name != "*" for alias in node.names), f"{file}:{node.lineno} imports *"
        if isinstance(node, ast.Import):
            assert all(alias.name != "clustersim" for alias in node.names), f"{file}:{node.lineno}"


@pytest.mark.parametrize("one", every_import(), ids=str)
def test_every_dependency_has_one_door(one: Import) -> None:
    top = one.module.split(".")[0]
    if top == "clustersim" or (top in sys.stdlib_module_names and top not in DOORS):
        return
    if one.types_only and (one.file, top) in TYPES_ONLY:
        return
    assert top in DOORS, f"{one}, which has no door yet"
    assert top not in OPTIONAL or one.in_function, f"{one}, which need not be installed"
    assert any(one.file.startswith(door) for door in DOORS[top]), f"{one}; its doors are {DOORS[top]}"


def test_what_is_imported_is_declared() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    declared = {re.split(r"[<>=\[ ]", line)[0].replace("-", "_") for line in project["dependencies"]}
    used = {one.module.split(".")[0] for one in every_import() if not one.types_only}
    needed = {name for name in used if name in DOORS and name not in sys.stdlib_module_names}
    assert needed - set(NOT_DECLARED) == declared


@pytest.mark.parametrize("one", [one for one in every_import() if one.in_function], ids=str)
def test_imports_inside_functions_have_a_reason(one: Import) -> None:
    assert (one.file, one.module) in LAZY or (one.file, "") in LAZY, str(one)


@pytest.mark.parametrize("file", sources())
def test_modules_and_functions_stay_small(file: str) -> None:
    lines = (PACKAGE / file).read_text(encoding="utf-8").count("\n")
    assert lines <= MOST_LINES_OF_A_MODULE, f"{file} has {lines} lines"
    for node in ast.walk(tree(file)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = (node.end_lineno or 0) - node.lineno + 1
            assert length <= MOST_LINES_OF_A_FUNCTION, f"{file}: {node.name} has {length} lines"


@pytest.mark.parametrize("file", sources())
def test_what_is_public_says_what_it_is(file: str) -> None:
    assert ast.get_docstring(tree(file)), f"{file} has no sentence at its head"
    for node in tree(file).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
            assert ast.get_docstring(node), f"{file}: {node.name} has no docstring"


# Put together here, so that this file passes its own test.
_FOLDERS = "|".join(("work", "tmp", "root", "home"))
MACHINE_PATH = re.compile(rf"(?<![\w.)\]}}-])/(?:{_FOLDERS})(?![\w-])")
REGISTRY = re.compile(
    "|".join(re.escape(".".join(host)) for host in (("pypi", "org"), ("pythonhosted", "org")))
)


def kept_files() -> list[Path]:
    """What git tracks or would track."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"],
        cwd=ROOT,
        capture_output=True,
        check=False,
    )
    if listed.returncode:
        pytest.skip("not a git checkout")
    names = listed.stdout.decode().split("\0")
    return [ROOT / name for name in names if name and (ROOT / name).is_file()]


@pytest.mark.parametrize("pattern", [MACHINE_PATH, REGISTRY], ids=["machine path", "registry host"])
def test_no_file_names_a_machine(pattern: re.Pattern[str]) -> None:
    found = [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()[:80]}"
        for path in kept_files()
        for number, line in enumerate(path.read_text("utf-8", errors="replace").splitlines(), 1)
        if pattern.search(line)
    ]
    assert not found, "\n".join(found)
