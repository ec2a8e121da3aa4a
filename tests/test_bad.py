"""Broken scenarios, each with the exact lines a user reads."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest

from clustersim.errors import ScenarioError
from clustersim.spec.scenario import Scenario
from clustersim.study.run import load as load_scenario

BAD = Path(__file__).parent / "bad"


def load(path: Path) -> Scenario:
    """Everything that may refuse a scenario before it runs."""
    return load_scenario(path)


def messages(path: Path) -> list[str]:
    """What `load` complains of, with files as seen from their own folder."""
    with pytest.raises(ScenarioError) as caught:
        load(path)
    return [re.sub(f"^{re.escape(str(BAD) + os.sep)}", "", line) for line in caught.value.lines()]


@pytest.mark.parametrize("path", sorted(BAD.glob("*.toml")), ids=lambda path: path.stem)
def test_every_mistake_is_told_with_its_place_and_its_remedy(path: Path) -> None:
    assert messages(path) == path.with_suffix(".txt").read_text("utf-8").splitlines()


def test_every_expected_message_belongs_to_a_file() -> None:
    assert {path.stem for path in BAD.glob("*.txt")} == {path.stem for path in BAD.glob("*.toml")}
