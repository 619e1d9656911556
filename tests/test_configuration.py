"""Promises of the configurations: an error names the field, and what is saved comes back."""

from __future__ import annotations

import json

import numpy as np
import pytest
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    BertConfig,
    LlamaConfig,
    T5Config,
)

from codd_hf import CoDDConfig, CoDDHead, CoDDHeadConfig, CoDDModel, CoDDScheduler
from tiny import head_config, tiny_backbone, tiny_model


def text_config() -> LlamaConfig:
    return tiny_backbone().config


@pytest.mark.parametrize("field", ["vocab_size", "num_latents", "window_length"])
@pytest.mark.parametrize("value", [0, -3, 2.5, "8"])
def test_bad_size_is_an_error_that_names_the_field_and_the_value(field, value):
    with pytest.raises((ValueError, TypeError), match=field) as error:
        CoDDHeadConfig(**({"vocab_size": 12} | {field: value}))
    assert str(value) in str(error.value)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("num_latents", True),
        ("window_length", 10**9),
        ("copy_length", 2**31),
        ("alpha", "1"),
        ("alpha", float("nan")),
        ("alpha", -1.0),
        ("tie_emissions", "yes"),
        ("evidence_size", "all"),
        ("evidence_temperature", "cold"),
        ("evidence_temperature", 0.0),
        ("mask_token_id", 1.0),
        ("forbidden_token_ids", "123"),
        ("forbidden_token_ids", ["1"]),
        ("conditioning", "latent"),
        ("base_model_name_or_path", 3),
    ],
)
def test_value_of_the_wrong_kind_is_an_error_that_names_the_field(field, value):
    with pytest.raises(ValueError, match=f"^`{field}` must be .*got .*\\.$"):
        CoDDHeadConfig(**{"vocab_size": 12, "context_size": 16, field: value})


def test_head_without_vocabulary_size_is_an_error_that_names_it():
    with pytest.raises(TypeError, match=r"Missing required field - .vocab_size"):
        CoDDHeadConfig(num_latents=4)


@pytest.mark.parametrize("ids", [{"mask_token_id": 12}, {"forbidden_token_ids": [3, -1]}])
def test_token_beyond_the_vocabulary_is_an_error(ids):
    with pytest.raises(ValueError, match=r"must lie in \[0, 12\)"):
        CoDDHeadConfig(vocab_size=12, **ids)


def test_head_of_a_later_format_is_an_error_that_says_to_upgrade():
    with pytest.raises(ValueError, match=r"`format_version` is 3.*upgrade"):
        CoDDHeadConfig(vocab_size=12, format_version=3)


def test_missing_backbone_configuration_is_an_error_that_names_the_field():
    with pytest.raises(ValueError, match=r"`text_config` must be .*, got None"):
        CoDDConfig()


@pytest.mark.parametrize("name", ["text_config", "head_config"])
@pytest.mark.parametrize("value", [[], "llama", 3])
def test_nested_configuration_that_is_none_is_an_error_that_names_the_field(name, value):
    with pytest.raises(ValueError, match=f"`{name}` must be a configuration or a dict, got"):
        CoDDConfig(**{"text_config": text_config(), name: value})


@pytest.mark.parametrize("nested", [{"vocab_size": 12}, {"model_type": "not-a-model"}])
def test_unknown_backbone_type_is_an_error_that_names_the_field(nested):
    with pytest.raises(ValueError, match=r"`text_config.model_type` must be"):
        CoDDConfig(text_config=nested)


def test_head_configuration_of_another_model_is_an_error_that_names_the_field():
    with pytest.raises(ValueError, match=r"`head_config.model_type` must be .*'bert'"):
        CoDDConfig(text_config=text_config(), head_config=BertConfig().to_dict())


def test_unknown_head_field_values_in_a_model_configuration_name_the_field():
    with pytest.raises(TypeError, match=r"Missing required field - .vocab_size"):
        CoDDConfig(text_config=text_config(), head_config={"num_latents": 4})


def test_unsupported_backbone_family_is_an_error_that_names_the_field():
    with pytest.raises(ValueError, match=r"`text_config.model_type` is 't5'.*llama, qwen2"):
        CoDDModel(CoDDConfig(text_config=T5Config()))


def test_unknown_coupling_is_an_error_that_lists_the_known_ones():
    with pytest.raises(ValueError, match="`coupling` must be one of none, marginal, latent"):
        CoDDConfig(text_config=text_config(), coupling="joint")


def test_configuration_comes_back_from_disk_as_it_was(tmp_path):
    head = head_config(num_latents=5, tie_emissions=False, alpha=0.5, forbidden_token_ids=[0])
    config = CoDDConfig(text_config=text_config(), head_config=head, coupling="marginal")
    config.save_pretrained(tmp_path)
    loaded = CoDDConfig.from_pretrained(tmp_path)
    assert isinstance(loaded.text_config, LlamaConfig)
    assert isinstance(loaded.head_config, CoDDHeadConfig)
    assert loaded.to_dict() == config.to_dict()


def test_mask_and_forbidden_tokens_are_the_heads_unless_given():
    head = head_config(forbidden_token_ids=[0, 3])
    config = CoDDConfig(text_config=text_config(), head_config=head)
    assert (config.mask_token_id, config.forbidden_token_ids) == (2, [0, 3])
    config = CoDDConfig(
        text_config=text_config(), head_config=head, mask_token_id=4, forbidden_token_ids=[]
    )
    assert (config.mask_token_id, config.forbidden_token_ids) == (4, [])


def test_sizes_are_the_backbones():
    config = CoDDConfig(text_config=text_config())
    assert (config.vocab_size, config.hidden_size) == (12, 16)
    assert (config.eos_token_id, config.pad_token_id) == (1, 0)


def test_numbers_of_numpy_are_numbers_and_are_saved(tmp_path):
    ids = {"mask_token_id": np.int64(2), "forbidden_token_ids": [np.int32(3)]}
    config = CoDDHeadConfig(vocab_size=np.int64(12), alpha=np.float32(0.5), **ids)
    config.save_pretrained(tmp_path)
    loaded = CoDDHeadConfig.from_pretrained(tmp_path)
    assert (loaded.vocab_size, loaded.alpha, loaded.forbidden_token_ids) == (12, 0.5, [3])
    assert CoDDModel.from_backbone(tiny_backbone(), **ids).config.mask_token_id == 2


def test_field_is_checked_whenever_it_is_set():
    config = CoDDHeadConfig(vocab_size=12)
    with pytest.raises(ValueError, match=r"^`num_latents` must be of type int, got 'x'\.$"):
        config.num_latents = "x"
    assert config.num_latents == 1024


PLACED = {"mask_token_id": 12, "forbidden_token_ids": [-1]}


@pytest.mark.parametrize(("field", "value"), [*PLACED.items(), ("coupling", "x")])
def test_what_is_said_in_place_of_a_models_file_is_checked_as_the_file_is(field, value, tmp_path):
    tiny_model().save_pretrained(tmp_path)
    for cls in (CoDDConfig, AutoConfig, CoDDModel, AutoModelForCausalLM):
        with pytest.raises(ValueError, match=f"`{field}`.* must .*, got"):
            cls.from_pretrained(tmp_path, **{field: value})
    assert CoDDModel.from_pretrained(tmp_path, coupling="latent").config.coupling == "latent"


@pytest.mark.parametrize(
    ("field", "value"), [*PLACED.items(), ("evidence_size", -4), ("conditioning", ["x"])]
)
def test_what_is_said_in_place_of_a_heads_file_is_checked_as_the_file_is(field, value, tmp_path):
    tiny_model().coupling_head.save_pretrained(tmp_path)
    for cls in (CoDDHeadConfig, AutoConfig, CoDDHead, AutoModel):
        with pytest.raises(ValueError, match=f"`{field}`.* must .*, got"):
            cls.from_pretrained(tmp_path, **{field: value})


@pytest.mark.parametrize(
    ("cls", "given"),
    [
        (CoDDHeadConfig, {"vocab_size": 12}),
        (CoDDConfig, {"text_config": text_config()}),
    ],
)
@pytest.mark.parametrize("field", ["num_latens", "transformers_weights", "foo"])
def test_unknown_field_is_an_error_that_names_it(cls, given, field):
    with pytest.raises(ValueError, match=f"^`{field}` is no field of the configuration .*got 'x'"):
        cls(**given, **{field: "x"})


@pytest.mark.parametrize(
    "fields",
    [{"temperature": "x"}, {"temperatur": 1.0}, {"top_k": 1.5}, {"strategy": 3}, {"threshold": 2}],
)
def test_stored_scheduler_of_unknown_or_wrong_settings_is_an_error_that_names_them(
    fields, tmp_path
):
    CoDDScheduler().save_pretrained(tmp_path)
    path = tmp_path / "scheduler_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))
    with pytest.raises(ValueError, match=f"^`{next(iter(fields))}` .*\\.$"):
        CoDDScheduler.from_pretrained(tmp_path)
