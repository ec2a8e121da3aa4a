"""GPUs by any name, the formats they compute in, and where each number of the catalogue comes from."""

from __future__ import annotations

from pathlib import Path

import pytest

from clustersim.errors import ClustersimError
from clustersim.spec.checks import Parts, check
from clustersim.spec.formats import SAME_RATE, flop_rate_of, formats_of
from clustersim.spec.gpus import gpu_named
from clustersim.spec.hardware import Gpu, Server, SingleServer
from clustersim.spec.reading import read_catalogue, read_topology
from clustersim.study.measured import MEASURED, measured

GPUS = {name: gpu for name, gpu in read_catalogue("gpus").items() if isinstance(gpu, Gpu)}

#: What stands in a `gpu` column and is none.
NO_GPU = {"all", "CX7 400G NIC", "Hopper (not stated)"}


@pytest.mark.parametrize("table", [name for name in MEASURED if "gpu" in measured(name)])
def test_every_gpu_of_the_measured_tables_has_an_entry(table: str) -> None:
    for name in set(measured(table)["gpu"]) - NO_GPU:
        assert gpu_named(name).name in GPUS


@pytest.mark.parametrize("name", GPUS)
def test_a_gpu_is_found_by_every_name_it_has_however_written(name: str) -> None:
    for word in (name, *GPUS[name].aliases):
        # Were a name two GPUs', one of them would be found by the name of the other.
        for written in (word, word.upper(), word.replace("-", " "), f"NVIDIA {word}", f"{word} (8 of them)"):
            assert gpu_named(written).name == name


@pytest.mark.parametrize(
    ("written", "name"),
    [
        ("H100-SXM-80GB", "h100_sxm"),
        ("H100 SXM", "h100_sxm"),
        ("NVIDIA H100 80GB HBM3", "h100_sxm"),
        ("H100 PCIe", "h100_pcie"),
        ("h800-sxm5", "h800_sxm"),
        ("A100", "a100_sxm"),
        ("GB200 NVL72", "gb200"),
        ("RTX PRO 6000 Blackwell Server 96GB", "rtx_pro_6000"),
        ("AMD Instinct MI300X", "mi300x"),
    ],
)
def test_names_that_people_write(written: str, name: str) -> None:
    assert gpu_named(written) is gpu_named(name)


@pytest.mark.parametrize(
    ("wrong", "near"), [("h100_sxn", '"h100_sxm"'), ("H100-SMX-80GB", '"H100-SXM-80GB"')]
)
def test_a_wrong_name_is_answered_with_the_nearest(wrong: str, near: str) -> None:
    with pytest.raises(ClustersimError, match=f'GPU: "{wrong}" is not in the catalogue .did you mean {near}'):
        gpu_named(wrong)


def test_scenarios_may_name_things_as_people_do(tmp_path: Path) -> None:
    file = tmp_path / "one.toml"
    file.write_text(
        'family = "single_server"\n[server]\nfrom = "DGX H100"\ngpu = "NVIDIA H200-SXM-141GB"\n', "utf-8"
    )
    machine = read_topology(file)
    assert isinstance(machine, SingleServer) and machine.server.gpu == GPUS["h200_sxm"]


def test_a_measured_relative_is_in_the_catalogue_and_has_none_itself() -> None:
    relatives = {gpu.relative for gpu in GPUS.values() if gpu.relative}
    assert relatives == {"a100_sxm", "h100_sxm", "b200_sxm", "rtx_pro_6000"}
    assert not any(GPUS[name].relative for name in relatives)
    seen = {gpu_named(name).name for name in set(measured("attn_decode")["gpu"])}
    assert seen <= relatives


def test_a_relative_that_is_not_in_the_catalogue_is_refused() -> None:
    server = read_catalogue("servers")["dgx_h100"]
    assert isinstance(server, Server)
    for key, value in (("relative", "h100_sxn"), ("flop_rate", {"bf16": 1.0, "fp8_block": 1.0})):
        mine = server.gpu.model_copy(update={key: value})
        machine = SingleServer(family="single_server", server=server.model_copy(update={"gpu": mine}))
        (found,) = check(Parts(topology=machine))
        assert found[0][:4] == ("topology", "server", "gpu", key)


@pytest.mark.parametrize("name", GPUS)
def test_formats_that_share_a_rate_are_not_listed_twice(name: str) -> None:
    gpu = GPUS[name]
    assert not set(SAME_RATE) & set(gpu.flop_rate)
    for fmt in formats_of(gpu):
        assert flop_rate_of(gpu, fmt) == gpu.flop_rate[SAME_RATE.get(fmt, fmt)]
    for fmt, other in SAME_RATE.items():
        assert (fmt in formats_of(gpu)) == (other in gpu.flop_rate)


@pytest.mark.parametrize("fmt", ["fp8", "fp8_block", "fp4"])
def test_a_format_the_gpu_lacks_is_told_with_those_it_has(fmt: str) -> None:
    with pytest.raises(ClustersimError, match=f'^"{fmt}" has no flop_rate on a100_sxm; it has bf16$'):
        flop_rate_of(GPUS["a100_sxm"], fmt)


@pytest.mark.parametrize("name", GPUS)
def test_narrower_formats_are_not_slower(name: str) -> None:
    rates = [GPUS[name].flop_rate[fmt] for fmt in ("bf16", "fp8", "fp4") if fmt in GPUS[name].flop_rate]
    assert rates == sorted(rates)


def test_data_sheets_agree_with_the_measured_table_of_them() -> None:
    table = measured("hw_specs")
    keys = {
        "bf16_dense_peak": (1e12, lambda gpu: gpu.flop_rate["bf16"]),
        "fp8_dense_peak": (1e12, lambda gpu: gpu.flop_rate["fp8"]),
        "fp4_dense_peak": (1e12, lambda gpu: gpu.flop_rate["fp4"]),
        "hbm_bandwidth": (1e9, lambda gpu: gpu.memory_bandwidth),
        "power": (1.0, lambda gpu: gpu.power),
        "sm_count": (1.0, lambda gpu: gpu.sms),
        "boost_clock": (1e6, lambda gpu: gpu.boost_clock),
        "l2_cache": (2.0**20, lambda gpu: gpu.l2),
    }
    compared = 0
    for name, parameter, value in zip(table["gpu"], table["parameter"], table["value"], strict=True):
        if name not in NO_GPU and parameter in keys:
            factor, of = keys[parameter]
            assert of(gpu_named(name)) == pytest.approx(factor * value), (name, parameter)
            compared += 1
    assert compared > 35
