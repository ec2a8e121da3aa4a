"""The fit: finds what was put in, gives the same again, and is what the catalogue holds."""

from __future__ import annotations

import tomllib
from pathlib import Path

import numpy as np
import pytest
from pytest import approx

from clustersim.physics.startup import shape_of
from clustersim.spec.costs import fitted_tables
from clustersim.spec.hardware import Server
from clustersim.spec.reading import read_catalogue
from clustersim.study.collective_rows import READERS
from clustersim.study.collectives import COLLECTIVES
from clustersim.study.families import FAMILIES
from clustersim.study.fit import document, fitted, main
from clustersim.study.least_squares import Parameter, fit
from clustersim.study.measured import Table, measured, rows_of
from clustersim.study.validate import costs_of, predicted
from clustersim.units import parse

SIZES = np.logspace(3, 9, 40)


def line(values: dict[str, float]) -> np.ndarray:
    return values["start"] + SIZES / values["rate"]


LINE = {
    "start": Parameter(1e-6, 1e-8, 1e-3, "time"),
    "rate": Parameter(1e9, 1e6, 1e12, "bandwidth"),
    "unused": Parameter(3.5, 0.1, 10.0),
}


def test_the_fit_finds_what_was_put_in() -> None:
    found = fit(LINE, line, line({"start": 2e-5, "rate": 4e10}), np.repeat("a", 40))
    assert (found["start"].value, found["rate"].value) == ("20 us", "40 GB/s")
    assert found["rate"].residual == approx(0, abs=1e-3) and found["rate"].files == ("a",)
    assert 0 < found["rate"].rows < 40


def test_a_few_wild_rows_do_not_rule() -> None:
    times = line({"start": 2e-5, "rate": 4e10})
    times[::8] *= 5
    found = fit(LINE, line, times, np.repeat("a", 40))
    assert parse(found["rate"].value, "bandwidth") == approx(4e10, rel=0.05)


def test_what_nothing_speaks_about_stays_where_it_began() -> None:
    found = fit(LINE, line, line({"start": 2e-5, "rate": 4e10}), np.repeat("a", 40))
    assert (found["unused"].value, found["unused"].rows, found["unused"].files) == (3.5, 0, ())
    nothing = fit(LINE, lambda values: np.empty(0), np.empty(0), np.empty(0, dtype="str"))
    assert nothing["start"].value == "1 us" and nothing["start"].rows == 0


def a_subset() -> dict[str, Table]:
    table = measured("nccl_intranode")
    return {"nccl_intranode": rows_of(table, np.flatnonzero(table["gpu"] == "A100-SXM-80GB")[::3])}


def test_the_same_rows_give_the_same_file() -> None:
    first, again = (document("network", {"collectives": COLLECTIVES.fit(a_subset())}) for _ in range(2))
    assert first == again
    assert tomllib.loads(first)["collectives"]["ampere"]["launch"]["files"] == ["nccl_intranode"]


def test_a_third_of_the_rows_foretells_the_others() -> None:
    costs = COLLECTIVES.costs(COLLECTIVES.fit(a_subset()))
    table = measured("nccl_intranode")
    here = [
        abs(one.error)
        for one in COLLECTIVES.files["nccl_intranode"](table, costs)
        if one.what.startswith("A100") and one.row % 3
    ]
    assert np.median(here) < 0.06


@pytest.mark.parametrize("section", FAMILIES)
def test_the_catalogue_holds_what_the_fit_finds(section: str) -> None:
    family = FAMILIES[section]
    anew = predicted(family, family.costs(fitted(family)))
    held = predicted(family, costs_of(family))
    for file in family.files:
        assert [one.predicted for one in anew[file]] == approx(
            [one.predicted for one in held[file]], rel=0.02
        )


def test_every_parameter_says_where_it_comes_from() -> None:
    for section, groups in fitted_tables().items():
        for group, parameters in groups.items():
            for name, one in parameters.items():
                assert set(one) == {"value", "rows", "residual", "files"}, f"{section}.{group}.{name}"
                assert bool(one["files"]) == (one["rows"] > 0), f"{section}.{group}.{name}"


def test_no_row_that_the_fit_sees_has_more_than_two_servers_or_is_called_suspect() -> None:
    for file, reader in READERS.items():
        for row in reader(measured(file)):
            assert not row.fitted or row.shape.domains <= 2
            assert not row.fitted or row.shape.members <= 16
            assert not row.fitted or "vultr_b200_all_gather_16" not in row.what


@pytest.mark.parametrize(
    ("gpu", "server"),
    [("A100", "dgx_a100"), ("H100", "dgx_h100"), ("H200", "dgx_h200"), ("B200", "dgx_b200")],
)
def test_measured_machines_are_those_of_the_catalogue(gpu: str, server: str) -> None:
    entry = read_catalogue("servers")[server]
    assert isinstance(entry, Server)
    rows = [row for row in READERS["nccl_intranode"](measured("nccl_intranode")) if row.what.startswith(gpu)]
    for row in rows:
        expected = shape_of(entry, row.architecture, int(row.shape.members), 1)
        assert row.shape.nvlink_bandwidth == expected.nvlink_bandwidth
        assert row.shape.nvlink_latency == expected.nvlink_latency
        assert row.shape.network_latency == expected.network_latency
        assert row.shape.in_switch == (expected.in_switch if "half" in row.what else 0)


def test_only_known_fits_are_done(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["netwrok"]) == 2
    assert "usage" in capsys.readouterr().err
