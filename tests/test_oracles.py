"""The fluid model against SimGrid's finish times of the same traffic (see tests/oracles/README.md)."""

import csv
import gzip
from pathlib import Path

import numpy as np
import pytest

from clustersim.physics.fluid import Fluid
from clustersim.physics.plain_fluid import PlainFluid
from clustersim.physics.replay import replay, replay_fluid
from clustersim.study.traffic import read_case

CASES = Path(__file__).parent / "oracles"

WAYS = {
    "at one go": replay_fluid,
    "step by step": lambda traffic: replay(traffic, Fluid(traffic.bandwidth)),
    "plain": lambda traffic: replay(traffic, PlainFluid(traffic.bandwidth)),
}


def answers(folder: Path) -> tuple[np.ndarray, np.ndarray]:
    """SimGrid's release and finish, s."""
    with gzip.open(folder / "simgrid.csv.gz", "rt", newline="") as lines:
        rows = list(csv.DictReader(lines))
    release, finish = (np.array([float(row[name]) for row in rows]) for name in ("release_us", "finish_us"))
    return release * 1e-6, finish * 1e-6


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", sorted(folder.name for folder in CASES.iterdir() if folder.is_dir()))
def test_the_fluid_model_gives_the_times_of_simgrid(name, way):
    release, finish = WAYS[way](read_case(CASES / name).traffic)
    expected_release, expected_finish = answers(CASES / name)
    assert finish == pytest.approx(expected_finish, rel=1e-6)
    assert finish - release == pytest.approx(expected_finish - expected_release, rel=1e-8)
