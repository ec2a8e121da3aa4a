"""Every catalogue entry loads, says where it comes from, and has the size its publisher states."""

from __future__ import annotations

import pytest

from clustersim.errors import ScenarioError
from clustersim.spec import reading
from clustersim.spec.hardware import Gpu, Server
from clustersim.spec.model import Model
from clustersim.spec.reading import read_catalogue

CATALOGUES = {"gpus": Gpu, "servers": Server, "models": Model}

#: Billions of parameters as published, for the models whose dimensions are published, too.
PUBLISHED = {
    "mixtral_8x7b": 46.7,
    "mixtral_8x22b": 141.0,
    "olmoe_1b_7b": 6.9,
    "qwen3_30b_a3b": 30.5,
    "qwen3_235b_a22b": 235.0,
}


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
    assert parameters(model) == pytest.approx(PUBLISHED[name] * 1e9, rel=0.01)


@pytest.mark.parametrize("name", read_catalogue("models"))
def test_a_stated_size_is_near_the_computed_one_except_where_a_document_errs(name: str) -> None:
    model = read_catalogue("models")[name]
    assert isinstance(model, Model)
    if name == "moe_64x16":
        # "30B": 64 experts x 2 matrices x 4096 x 16384 x 16 layers alone are 137 billion.
        assert parameters(model) == pytest.approx(138.8e9, rel=0.001)
    elif model.stated_parameters:
        assert parameters(model) == pytest.approx(model.stated_parameters, rel=0.01)


def parameters(model: Model) -> int:
    """Attention (q, k, v, o), experts, gate, embedding and head; norms are too small to matter."""
    attention = model.hidden * model.head_dim * 2 * (model.heads + model.kv_heads)
    matrices = {"plain": 2, "gated": 3}[model.ffn_kind]
    experts = model.experts * matrices * model.hidden * model.ffn
    gate = model.hidden * model.experts
    vocabulary = model.vocab * model.hidden * (1 if model.tied_embeddings else 2)
    return model.layers * (attention + experts + gate) + vocabulary


def test_bandwidths_are_one_way_and_in_bytes() -> None:
    server = read_catalogue("servers")["dgx_h100"]
    assert isinstance(server, Server)
    # 400 Gb/s = 400e9 / 8 bytes/s; NVLink 4 is 900 GB/s both ways together.
    assert server.nic_bandwidth == 50e9
    assert server.nvlink_bandwidth == 450e9
    assert server.gpu.memory == 80 * 2**30
    assert server.gpu.flop_rate == {"bf16": 989e12, "fp8": 1978e12}
