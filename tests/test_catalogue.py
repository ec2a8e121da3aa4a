"""Every catalogue entry loads, says where it comes from, and has the size its publisher states."""

from __future__ import annotations

import pytest

from clustersim.errors import ScenarioError
from clustersim.plan.memory import kv_bytes
from clustersim.plan.parameters import active_parameters, total_parameters
from clustersim.spec import reading
from clustersim.spec.checks import check_model
from clustersim.spec.deployment import Deployment
from clustersim.spec.hardware import Gpu, Server
from clustersim.spec.model import Model
from clustersim.spec.reading import read_catalogue

CATALOGUES = {"gpus": Gpu, "servers": Server, "models": Model}

#: Billions of parameters as published, and how far from that the dimensions may be: 1 %, or what the
#: published number is rounded to.
PUBLISHED = {
    "mixtral_8x7b": (46.7, 0.01),
    "mixtral_8x22b": (141.0, 0.01),
    "olmoe_1b_7b": (6.9, 0.01),
    "qwen3_30b_a3b": (30.5, 0.01),
    "qwen3_235b_a22b": (235.0, 0.01),
    "qwen3_32b": (32.8, 0.01),
    "qwen1_5_moe_a2_7b": (14.3, 0.01),
    "deepseek_v2_lite": (15.7, 0.01),
    "deepseek_v2": (236.0, 0.01),
    "deepseek_v3": (671.0, 0.01),
    "deepseek_r1": (671.0, 0.01),
    "kimi_k2": (1000.0, 0.05),  # "1T": rounded to a tenth of a trillion
    "moonlight_16b_a3b": (16.0, 0.01),
    "gpt_oss_20b": (20.9, 0.01),
    "gpt_oss_120b": (116.8, 0.01),
    "glm_4_5": (355.0, 0.01),
    "glm_4_5_air": (106.0, 0.01),
    "minimax_m2": (230.0, 0.01),
    "llama_4_scout": (109.0, 0.015),  # with its vision part, which is not simulated
    "llama_4_maverick": (400.0, 0.01),
    "llama_3_1_8b": (8.03, 0.01),
    "llama_3_1_70b": (70.6, 0.01),
    "llama_3_1_405b": (405.9, 0.01),
}

#: Models of documents that leave their size open or err in it.
UNPUBLISHED = {"moe_64x16", "moe_16x16"}


@pytest.mark.parametrize("catalogue", CATALOGUES)
def test_every_entry_loads_under_its_own_name_with_a_source(catalogue: str) -> None:
    entries = read_catalogue(catalogue)
    assert entries
    for name, entry in entries.items():
        assert isinstance(entry, CATALOGUES[catalogue])
        assert entry.name == name
        assert len(entry.source) > 20


def test_no_source_names_a_path_of_somebodys_machine() -> None:
    for catalogue in CATALOGUES:
        for entry in read_catalogue(catalogue).values():
            assert not entry.source.startswith("/") and " /" not in entry.source.replace(" / ", "")


def test_an_entry_without_a_source_does_not_load(monkeypatch: pytest.MonkeyPatch) -> None:
    entry = {"name": "mine", "layers": 1}
    monkeypatch.setattr(reading, "catalogue_entries", lambda catalogue: {"mine": entry})
    with pytest.raises(ScenarioError, match=r"mine\.source: missing key"):
        read_catalogue("models")


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_model_has_its_published_number_of_parameters(name: str) -> None:
    model = read_catalogue("models")[name]
    assert isinstance(model, Model)
    published, tolerance = PUBLISHED[name]
    assert total_parameters(model) == pytest.approx(published * 1e9, rel=tolerance)
    assert model.stated_parameters == pytest.approx(published * 1e9)


def test_a_document_may_call_a_model_smaller_than_its_dimensions_are() -> None:
    entries = read_catalogue("models")
    assert set(entries) == {*PUBLISHED, *UNPUBLISHED}
    model = entries["moe_64x16"]
    assert isinstance(model, Model)
    # "30B": 64 experts x 2 matrices x 4096 x 16384 x 16 layers alone are 137 billion.
    assert total_parameters(model) == pytest.approx(138.8e9, rel=0.001)


@pytest.mark.parametrize("name", read_catalogue("models"))
def test_nothing_is_wrong_in_a_model_of_the_catalogue(name: str) -> None:
    model = read_catalogue("models")[name]
    assert isinstance(model, Model)
    assert not list(check_model(model))


@pytest.mark.parametrize(
    "name, active",
    [("mixtral_8x7b", 12.9), ("deepseek_v3", 37.0), ("qwen3_235b_a22b", 22.0), ("llama_4_maverick", 17.0)],
)
def test_a_token_passes_through_the_published_number_of_parameters(name: str, active: float) -> None:
    # Publishers differ in whether the embedding counts; of these models it is 1 to 3 %.
    model = read_catalogue("models")[name]
    assert isinstance(model, Model)
    assert active_parameters(model) == pytest.approx(active * 1e9, rel=0.02)


def test_latent_attention_caches_one_vector_for_all_heads() -> None:
    # 512 + 64 numbers of 2 bytes in 61 layers, whole on each of 8 TP ranks; Llama's 2 x 8 x 128 are divided.
    whole = {"tensor_parallel": 8}
    for name, numbers in (("deepseek_v3", 61 * (512 + 64)), ("llama_3_1_70b", 80 * 2 * 128)):
        model = read_catalogue("models")[name]
        assert isinstance(model, Model)
        assert kv_bytes(model, Deployment(**whole), 0, 1) == 2 * numbers


def test_a_layer_with_a_window_caches_no_more_than_the_window() -> None:
    # 18 of 36 layers keep 128 tokens, 18 keep all; 2 x 8 heads of 64, 2 bytes each.
    model = read_catalogue("models")["gpt_oss_120b"]
    assert isinstance(model, Model)
    for tokens in (100, 1000):
        kept = 18 * min(tokens, 128) + 18 * tokens
        assert kv_bytes(model, Deployment(), 0, tokens) == kept * 2 * 8 * 64 * 2


def test_bandwidths_are_one_way_and_in_bytes() -> None:
    server = read_catalogue("servers")["dgx_h100"]
    assert isinstance(server, Server)
    # 400 Gb/s = 400e9 / 8 bytes/s; NVLink 4 is 900 GB/s both ways together.
    assert server.nic_bandwidth == 50e9
    assert server.nvlink_bandwidth == 450e9
    assert server.gpu.memory == 80 * 2**30
    assert server.gpu.flop_rate == {"bf16": 989e12, "fp8": 1978e12}
