"""What the README shows is what happens."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import make
import pytest

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
PYTHON = re.findall(r"```python\n(.*?)```", README, re.S)
SHELL = re.findall(r"```sh\n(.*?)\n```", README, re.S)


def pieces(shown: list[str]) -> Iterator[list[str]]:
    """The lines between the marks of what was left out."""
    piece: list[str] = []
    for line in shown:
        if line == make.CUT:
            yield piece
            piece = []
        else:
            piece.append(line)
    yield piece


def test_every_shown_output_is_what_the_command_prints_and_cuts_are_marked(tmp_path: Path) -> None:
    commands = list(make.SHOWN.finditer(README))
    assert len(commands) >= 4
    for command in commands:
        printed = [make.timeless(line) for line in make.output_of(command["command"], tmp_path).splitlines()]
        shown = [make.timeless(line) for line in command["output"].splitlines()]
        at = 0
        for number, piece in enumerate(pieces(shown)):
            places = range(at, len(printed) - len(piece) + 1) if number else [0]
            found = next((n for n in places if printed[n : n + len(piece)] == piece), None)
            told = "\n".join(piece)
            assert found is not None, (
                f"{command['command']} no longer prints; run: python docs/make.py\n{told}"
            )
            at = found + len(piece)
        assert shown[-1:] == [make.CUT] or at == len(printed), f"{command['command']} prints more"


@pytest.mark.parametrize("code", PYTHON)
def test_python_examples_run(code: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "README.md", "exec"), {})


def test_there_is_a_python_example() -> None:
    assert PYTHON


def test_ci_runs_what_the_readme_says_tests_need() -> None:
    script = (ROOT / ".ci" / "run").read_text(encoding="utf-8").splitlines()
    assert script[-1] == SHELL[1]
    assert (ROOT / ".ci" / "run").stat().st_mode & 0o111


def test_the_first_command_installs_and_runs_the_main_example() -> None:
    assert SHELL[0].startswith("python3 -m venv ")
    assert SHELL[0].endswith("/clustersim run workloads/large_ep.toml")


@pytest.mark.parametrize("page", ["README.md", "ARCHITECTURE.md", "results/README.md"])
def test_links_between_pages_lead_somewhere(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", text):
        assert ((ROOT / page).parent / target).exists(), f"{page} leads to {target}"
