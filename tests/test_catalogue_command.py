"""`clustersim catalogue`: everything is listed, and every number of an entry has an origin."""

from __future__ import annotations

import json
from typing import Any

import pytest

from clustersim.cli import _status
from clustersim.spec.costs import fitted_tables
from clustersim.spec.hardware import Gpu, Server
from clustersim.spec.kernel_tables import fitted_parameters
from clustersim.spec.reading import read_catalogue
from clustersim.study.catalogue import SECTIONS, entry, listing, said
from clustersim.study.measured import MEASURED, measured
from clustersim.study.origins import keys_named, origin_of, remarks, says_guess

HARDWARE = [(section, name) for section in ("gpus", "servers") for name in read_catalogue(section)]

#: What identifies or judges; no source is asked for it.
NO_FIGURE = {"aliases", "relative", "architecture", "gpu"}


def printed(capsys: pytest.CaptureFixture[str], *arguments: str) -> Any:
    assert _status(["catalogue", *arguments, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_everything_is_listed(capsys: pytest.CaptureFixture[str]) -> None:
    found = printed(capsys)
    for section in ("gpus", "servers", "models"):
        assert [one["name"] for one in found[section]] == list(read_catalogue(section))
        assert all(one["source"] for one in found[section])
    groups = [f"{section}.{group}" for section, groups in fitted_tables().items() for group in groups]
    assert [one["name"] for one in found["network"]] == groups
    assert [one["name"] for one in found["calibration"]][: len(MEASURED)] == list(MEASURED)
    assert _status(["catalogue"]) == 0
    text = capsys.readouterr().out
    assert all(one["name"] in text for entries in found.values() for one in entries)


@pytest.mark.parametrize("section", SECTIONS)
def test_every_entry_of_a_section_can_be_shown_whole(
    section: str, capsys: pytest.CaptureFixture[str]
) -> None:
    for one in listing(section)[section]:
        found = json.loads(json.dumps(entry(section, one["name"])))
        assert found["section"] == section
        assert found["name"] == one["name"]
        assert all(field["meaning"] and field["origin"] for field in found.get("fields", ()))
    assert _status(["catalogue", section, one["name"]]) == 0
    assert one["name"] in capsys.readouterr().out


@pytest.mark.parametrize(("section", "name"), HARDWARE)
def test_every_figure_of_hardware_is_named_by_a_clause_of_its_source(section: str, name: str) -> None:
    value = read_catalogue(section)[name]
    figures = {key for key in type(value).model_fields if getattr(value, key) not in (None, (), "")}
    named = keys_named(value.source)
    assert named == figures - NO_FIGURE - {"name", "source"}
    # A clause that names nothing would be lost, and with it the word "guess".
    assert all(": " in part for part in value.source.split("; "))


def test_guesses_are_marked_where_the_source_says_so() -> None:
    guessed = {field["key"] for field in entry("gpus", "h200_sxm")["fields"] if field["guess"]}
    assert guessed == {"sms", "l2", "boost_clock", "launch_latency"}
    fields = {field["key"]: field for field in entry("gpus", "H100-SXM-80GB")["fields"]}
    assert not fields["memory_bandwidth"]["guess"] and not fields["relative"]["guess"]
    assert fields["memory_bandwidth"]["value"] == 3350e9
    assert fields["memory_bandwidth"]["text"] == "3350 GB/s"
    assert "systems/h100_sxm.yaml" in fields["memory_bandwidth"]["origin"]


def test_a_source_in_one_piece_flags_what_it_names_and_no_more() -> None:
    source = "the paper; top_k and vocab assumed"
    assert origin_of("vocab", source).guess and not origin_of("layers", source).guess
    assert origin_of("layers", source, "unverified").guess
    assert origin_of("layers", source).text == source
    assert origin_of("sms", "memory: sheet; sms, l2: guess, as X").text == "guess, as X"
    assert not says_guess("a guesstimate of nobody")


def test_remarks_beside_a_key_are_read_and_texts_with_hashes_are_none() -> None:
    assert remarks("servers")["dgx_a100"] == {"switch_reduces": "second-generation NVSwitch"}
    assert remarks("models")["moe_64x16"]["format"].startswith("assumption")
    assert "source" not in remarks("gpus").get("h100_sxm", {})


@pytest.mark.parametrize("name", MEASURED)
def test_measured_tables_are_told_with_rows_gpus_source_and_licence(name: str) -> None:
    found = entry("calibration", name)
    assert found["rows"] == len(measured(name)["source"]) == sum(found["sources"].values())
    assert found["source"] and found["licence"] and found["what"] == MEASURED[name]
    assert [one["column"] for one in found["columns"]] == list(measured(name))
    if "gpu" in measured(name):
        assert sum(found["gpus"].values()) == found["rows"]


def test_fitted_kernels_are_told_with_parameters_points_and_rows() -> None:
    fitted = [one for one in listing("calibration")["calibration"] if one["kind"] == "fitted"]
    assert [one["name"] for one in fitted] == [".".join(key) for key in fitted_parameters()]
    for one in fitted:
        found = entry("calibration", one["name"])
        assert found["points"] > 0 and len(found["fields"]) == one["parameters"]
        assert {field["key"] for field in found["fields"] if field["guess"]} == set(one["without_rows"])


def test_gpus_say_which_measured_rows_they_have() -> None:
    found = {one["name"]: one for one in listing("gpus")["gpus"]}
    assert found["h100_sxm"]["measured"]["gemm_trtllm"] == 6624
    assert "gemm_trtllm" not in found["h200_sxm"]["measured"]
    assert found["h100_sxm"]["formats"] == ["bf16", "fp8", "fp8_block"]


def test_models_have_counted_parameters_beside_the_stated_ones() -> None:
    found = entry("models", "Mixtral-8x7B")["parameters"]
    # Per layer: attention 4096 x 128 x 2 x (32 + 8), experts 8 x 3 x 4096 x 14336, gate 4096 x 8, two norms.
    layer = 4096 * 128 * 80 + 8 * 3 * 4096 * 14336 + 4096 * 8 + 2 * 4096
    assert found["total"] == 32 * layer + 2 * 32000 * 4096 + 4096
    assert found["active"] == found["total"] - 32 * 6 * 3 * 4096 * 14336
    assert found["stated"] == 46.7e9


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["gpu"], 'catalogue: "gpu" is not known (did you mean "gpus"?)'),
        (["gpus", "h100_sxn"], '"h100_sxn" is not in the catalogue (did you mean "h100_sxm"?)'),
        (["servers", "dgx_h10"], 'did you mean "dgx_h100"?'),
        (["models", "mixtral"], 'did you mean "mixtral_8x7b"?'),
        (["network", "hoper"], "there are collectives.ampere"),
        (["network", "collectives.hoper"], 'did you mean "collectives.hopper"?'),
        (["calibration", "gemm_trtlm"], 'did you mean "gemm_trtllm"?'),
    ],
)
def test_wrong_names_are_answered_with_the_nearest(
    arguments: list[str], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert _status(["catalogue", *arguments]) == 2
    out, err = capsys.readouterr()
    assert out == "" and told in err


def test_a_group_of_costs_is_found_without_its_section() -> None:
    found = entry("network", "hopper")
    assert found["name"] == "collectives.hopper"
    guessed = [field["key"] for field in found["fields"] if field["guess"]]
    assert guessed == found["without_rows"] and "step_simple" in guessed


def test_values_read_as_people_write_them() -> None:
    assert said({"bf16": "312 TFLOP/s", "fp8": "1 PFLOP/s"}) == "bf16 312 TFLOP/s, fp8 1 PFLOP/s"
    assert said([[64, 32], [64, 64]]) == "64 x 32, 64 x 64"
    assert said(["a", "b"]) == "a, b" and said([]) == "none"
    assert said(True) == "yes" and said(None) == "-" and said(4096) == "4,096"


def test_hardware_entries_are_gpus_and_servers() -> None:
    assert all(isinstance(gpu, Gpu) for gpu in read_catalogue("gpus").values())
    for server in read_catalogue("servers").values():
        assert isinstance(server, Server)
        assert server.gpu.name in read_catalogue("gpus")
        # What joins the GPUs of a box is no slower than the way to its cards, but for PCIe boxes.
        assert server.nvlink_bandwidth >= server.pcie_bandwidth
