"""Hugging Face configs: every family gives the catalogue's model, and nothing is ever guessed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from pytest import approx
from test_catalogue import PUBLISHED

from clustersim.errors import ScenarioError
from clustersim.plan.layout import lay_out
from clustersim.plan.parameters import total_parameters
from clustersim.spec.huggingface import READERS, model_of
from clustersim.spec.model import Model
from clustersim.spec.reading import read_catalogue, read_scenario
from clustersim.spec.scenario import Scenario
from clustersim.study.preview import preview

CONFIGS = Path(__file__).parent / "configs"
NAMES = sorted(path.stem for path in CONFIGS.glob("*.json"))

SCENARIO = """
name = "of_a_config"
model = "config.json"

[topology]
family = "single_server"
server = "dgx_h100"

[deployment]
tensor_parallel = 8
expert_parallel = 8

[workload]
phase = "decode"
sequences = 8
prompt_tokens = 100
decode_steps = 1
"""


EIGHT_BITS = {"num_bits": 8, "type": "float", "strategy": "channel"}
FINE_BLOCKS = {"quant_method": "fp8", "weight_block_size": [64, 64]}


def config(name: str) -> dict[str, Any]:
    values = json.loads((CONFIGS / f"{name}.json").read_text("utf-8"))
    assert isinstance(values, dict)
    return values


def text_part(name: str) -> dict[str, Any]:
    values = config(name)
    return values.get("text_config", values)


def read(folder: Path, values: Any, scenario: str = SCENARIO) -> Scenario:
    """A scenario beside a config of these values (or of this text)."""
    (folder / "scenario.toml").write_text(scenario, "utf-8")
    text = values if isinstance(values, str) else json.dumps(values)
    (folder / "config.json").write_text(text, "utf-8")
    return read_scenario(folder / "scenario.toml")


def complaint(folder: Path, values: Any, scenario: str = SCENARIO) -> str:
    with pytest.raises(ScenarioError) as caught:
        read(folder, values, scenario)
    return "\n".join(line.replace(f"{folder}/", "") for line in caught.value.lines())


def of(values: dict[str, Any]) -> Model:
    found, problems = model_of(values)
    assert not problems
    return Model(name="x", source="test", **{key: value for key, (value, _) in found.items()})


@pytest.mark.parametrize("name", NAMES)
def test_a_config_gives_the_model_of_the_catalogue(name: str) -> None:
    entry = read_catalogue("models")[name]
    assert isinstance(entry, Model)
    apart = {"name", "source", "stated_parameters"}
    assert of(config(name)).model_dump(exclude=apart) == entry.model_dump(exclude=apart)


@pytest.mark.parametrize("name", NAMES)
def test_a_config_gives_the_published_number_of_parameters(name: str) -> None:
    published, tolerance = PUBLISHED[name]
    assert total_parameters(of(config(name))) == approx(published * 1e9, rel=tolerance)


def test_every_family_and_every_published_model_has_a_config_here() -> None:
    assert {text_part(name)["model_type"] for name in NAMES} == set(READERS)
    assert set(NAMES) == set(PUBLISHED)


@pytest.mark.parametrize("name", NAMES)
def test_what_a_family_needs_must_be_there(name: str) -> None:
    # Whatever is left out changes nothing, is a known way to say "no", or is named as missing.
    whole = of(config(name))
    may_go = {"architectures", "model_type", "tie_word_embeddings", "torch_dtype", "quantization_config"}
    may_go |= {"attention_bias", "use_qk_norm", "num_nextn_predict_layers", "n_group"}
    for key in set(text_part(name)) - may_go:
        values = config(name)
        del values.get("text_config", values)[key]
        _, problems = model_of(values)
        if problems:
            assert any(
                (place.endswith(key) and "missing" in text) or key == "layer_types"
                for place, text in problems
            ), key
        else:
            assert of(values) == whole, key


def test_a_scenario_names_a_config_by_its_path(tmp_path: Path) -> None:
    model = read(tmp_path, config("mixtral_8x7b")).model
    assert (model.layers, model.experts, model.ffn) == (32, 8, 14336)
    assert model.name == tmp_path.name[:64] and "config.json" in model.source


def test_a_key_may_be_laid_over_a_config(tmp_path: Path) -> None:
    over = SCENARIO.replace('model = "config.json"\n', "") + '[model]\nfrom = "config.json"\nformat = "fp8"\n'
    model = read(tmp_path, config("qwen3_30b_a3b"), over).model
    assert (model.format, model.hidden) == ("fp8", 2048)


def test_what_is_wrong_with_a_model_is_told_by_the_key_of_its_config(tmp_path: Path) -> None:
    values = config("mixtral_8x7b") | {"num_experts_per_tok": 9, "num_key_value_heads": 5}
    told = complaint(tmp_path, values)
    assert "config.json: num_experts_per_tok: 9 is more than the 8 experts" in told
    assert "config.json: num_key_value_heads: 5 does not divide 32 heads" in told


def without(name: str, key: str) -> dict[str, Any]:
    return {k: v for k, v in config(name).items() if k != key}


@pytest.mark.parametrize(
    "values, told",
    [
        (
            config("deepseek_v3") | {"model_type": "deepseek_v9"},
            'model_type: "deepseek_v9" is not read (did you mean "deepseek_v3"?); known are mixtral,',
        ),
        (without("mixtral_8x7b", "model_type"), "model_type: missing key; it says which family"),
        (without("deepseek_v3", "n_routed_experts"), "config.json: n_routed_experts: missing key"),
        (without("deepseek_v3", "q_lora_rank"), "q_lora_rank: missing key"),
        (without("qwen3_30b_a3b", "head_dim"), "head_dim: missing key"),
        (config("llama_3_1_8b") | {"hidden_size": "4096"}, "hidden_size: must be a whole number, not '4096'"),
        (config("llama_3_1_8b") | {"hidden_size": True}, "hidden_size: must be a whole number, not True"),
        (config("llama_3_1_8b") | {"num_hidden_layers": 0}, "num_hidden_layers: must be at least 1, not 0"),
        (config("llama_3_1_8b") | {"num_attention_heads": 33}, "33 does not divide hidden_size 4096"),
        (config("llama_3_1_8b") | {"torch_dtype": "float32"}, "torch_dtype: 'float32' is not read"),
        (
            config("llama_3_1_8b") | {"quantization_config": {"quant_method": "awq"}},
            "quantization_config.quant_method: 'awq' is not read; known are fp8, fbgemm_fp8, mxfp4",
        ),
        (
            config("deepseek_v3")
            | {"quantization_config": {"quant_method": "fp8", "weight_block_size": [64, 64]}},
            "quantization_config.weight_block_size: only [128, 128] is read, not [64, 64]",
        ),
        (config("qwen3_30b_a3b") | {"mlp_only_layers": [3]}, "mlp_only_layers: only leading layers are read"),
        (config("qwen3_32b") | {"use_sliding_window": True}, "use_sliding_window: is not read"),
        (
            config("gpt_oss_20b") | {"layer_types": ["full_attention"]},
            "layer_types: must name each of",
        ),
        ("{", "config.json:1: is not valid JSON"),
        ("[]", 'config.json": is JSON but not an object'),
    ],
)
def test_a_config_that_cannot_be_read_is_answered_with_file_and_key(
    tmp_path: Path, values: Any, told: str
) -> None:
    assert told in complaint(tmp_path, values)


def test_a_nested_key_is_named_with_the_part_it_stands_in(tmp_path: Path) -> None:
    values = config("llama_4_scout")
    del values["text_config"]["num_local_experts"]
    assert "config.json: text_config.num_local_experts: missing key" in complaint(tmp_path, values)


def test_a_config_that_is_not_there_is_the_mistake_of_who_names_it(tmp_path: Path) -> None:
    wrong = SCENARIO.replace("config.json", "confg.json")
    told = complaint(tmp_path, config("mixtral_8x7b"), wrong)
    assert told.startswith('scenario.toml:3: model: "confg.json": there is no such file')
    assert 'did you mean "config.json"?' in told
    outside = SCENARIO.replace("config.json", "../../../config.json")
    assert "lies outside the folder above the scenario's own" in complaint(tmp_path, {}, outside)


def test_latent_attention_has_no_use_for_the_head_dim_of_a_config() -> None:
    # transformers writes 64 there, which is the rotated part only.
    assert of(config("deepseek_v3") | {"head_dim": 64}) == of(config("deepseek_v3"))


def test_leading_dense_layers_and_sparse_steps_of_qwen_are_read() -> None:
    model = of(config("qwen3_30b_a3b") | {"mlp_only_layers": [0, 1], "decoder_sparse_step": 2})
    assert [layer for layer in range(6) if model.has_experts(layer)] == [3, 5]
    assert model.dense_ffn == 6144


def test_formats_are_those_of_the_released_weights() -> None:
    per_tensor = config("llama_3_1_405b") | {"quantization_config": {"quant_method": "fbgemm_fp8"}}
    assert (of(per_tensor).format, of(config("deepseek_v3")).format) == ("fp8", "fp8_block")
    packed = {"quant_method": "compressed-tensors", "config_groups": {"group_0": {"weights": EIGHT_BITS}}}
    assert of(config("qwen3_32b") | {"quantization_config": packed}).format == "fp8"
    oss = of(config("gpt_oss_120b"))
    assert (oss.format, oss.expert_numbers) == ("bf16", "fp4")


def test_a_preview_holds_the_count_of_a_config_against_the_catalogue(tmp_path: Path) -> None:
    scenario = read(tmp_path, config("qwen3_30b_a3b"))
    model = preview(scenario, lay_out(scenario))["model"]
    assert model["total_parameters"] == total_parameters(scenario.model)
    assert model["same_in_catalogue"] == {"name": "qwen3_30b_a3b", "stated_parameters": 30.5e9}


def test_an_option_may_name_a_config(tmp_path: Path) -> None:
    read(tmp_path, config("mixtral_8x7b"))
    (tmp_path / "other.json").write_text(json.dumps(config("qwen3_30b_a3b")), "utf-8")
    model = read_scenario(tmp_path / "scenario.toml", ["model=other.json"]).model
    assert (model.name, model.experts) == ("other", 128)


@pytest.mark.parametrize(
    ("named", "told"),
    [
        ("/etc/passwd", "is neither a name from the catalogue nor the path of a Hugging Face config.json"),
        ("../models", "is neither a name from the catalogue nor the path of a Hugging Face config.json"),
        ("folder.json", "is not a file"),
        ("list.json", "is JSON but not an object"),
    ],
)
def test_what_is_no_config_is_said_so_without_a_guess_at_another(
    tmp_path: Path, named: str, told: str
) -> None:
    (tmp_path / "folder.json").mkdir()
    (tmp_path / "list.json").write_text("[1]", "utf-8")
    (tmp_path / "lists.json").write_text("{}", "utf-8")
    said = complaint(tmp_path, config("mixtral_8x7b"), SCENARIO.replace("config.json", named))
    assert told in said and "did you mean" not in said and "\n" not in said


def test_a_model_that_could_not_be_read_contradicts_no_deployment(tmp_path: Path) -> None:
    dense = SCENARIO.replace("expert_parallel = 8\n", "")
    told = complaint(tmp_path, config("llama_3_1_8b") | {"model_type": "lama"}, dense)
    assert told.startswith("config.json: model_type") and "\n" not in told


def test_a_wrong_model_is_told_before_deployments_of_it(tmp_path: Path) -> None:
    told = complaint(tmp_path, config("mixtral_8x7b") | {"num_local_experts": 1, "vocab_size": 31})
    assert "num_experts_per_tok: 2 is more than the 1 experts" in told and "expert_parallel" not in told


def test_a_preview_says_that_fp4_is_multiplied_as_bf16(tmp_path: Path) -> None:
    scenario = read(tmp_path, config("gpt_oss_120b"))
    assert any("multiplied as bf16 (w4a16)" in note for note in preview(scenario, lay_out(scenario))["notes"])
    there = read(tmp_path, config("gpt_oss_120b"), SCENARIO.replace("dgx_h100", "dgx_b200"))
    assert not any("w4a16" in note for note in preview(there, lay_out(there))["notes"])
