"""Promises of the model cards, and of the rules by which the tests judge them."""

from __future__ import annotations

import re

import pytest
import torch
from card_rules import errors_in_card
from huggingface_hub import EvalResult, ModelCard, ModelCardData

from codd_hf import CoDDHead, CoDDModel, CoDDPipeline, CoDDScheduler
from codd_hf.hub.cards import complete_card, make_card
from tiny import random_head, tiny_backbone, tiny_model


def saved_card(part, folder, **kwargs) -> ModelCard:
    part.save_pretrained(folder, **kwargs)
    return ModelCard.load(folder / "README.md")


def head_card(head: CoDDHead, **facts) -> ModelCard:
    return make_card(head, "someone/a-head", **facts)


def test_card_describes_the_circuit_as_it_is(tmp_path):
    head = random_head(
        num_latents=9,
        window_length=5,
        tie_emissions=False,
        conditioning=["latent"],
        context_size=16,
    )
    head.config.alpha = 0.25
    text = saved_card(head, tmp_path).text
    parameters = sum(
        parameter.numel() for parameter in CoDDHead.from_pretrained(tmp_path).parameters()
    )
    for line in (
        "| `num_latents` | 9 |",
        "| `window_length` | 5 |",
        "| `vocab_size` | 12 |",
        "| `conditioning` | ['latent'] |",
        "| `alpha` | 0.25 |",
        f"hidden Markov model of {parameters:,} parameters",
    ):
        assert line in text


def test_card_states_nothing_that_is_not_known(tmp_path):
    for name, part in (("head", random_head()), ("model", tiny_model())):
        card = saved_card(part, tmp_path / name)
        assert set(card.data.to_dict()) == {"library_name", "pipeline_tag", "tags"}
        assert "Training data: not recorded." in card.text
        assert "Licence: not stated." in card.text
        assert "Results" not in card.text
        assert not errors_in_card(str(card))


def test_card_names_what_is_known_and_passes_the_rules():
    results = [EvalResult("text-generation", "openai/gsm8k", "GSM8K", "accuracy", 0.25)]
    card = head_card(
        random_head(base_model_name_or_path="someone/backbone", base_model_revision="abc"),
        license="mit",
        datasets=["openai/gsm8k"],
        eval_results=results,
        tags=["mine"],
    )
    assert not errors_in_card(str(card))
    data = ModelCard(str(card)).data
    assert (data.license, data.base_model, data.datasets) == (
        "mit",
        "someone/backbone",
        ["openai/gsm8k"],
    )
    assert data.base_model_relation == "adapter"
    assert data.eval_results[0].metric_value == 0.25
    assert {"codd", "diffusion-language-model", "mine"} <= set(data.tags)
    assert "revision `abc`" in card.text
    assert "GSM8K: accuracy 0.25" in card.text


def test_path_of_a_backbone_on_this_machine_stays_out_of_the_card(tmp_path):
    tiny_backbone().save_pretrained(tmp_path / "backbone")
    head = random_head(base_model_name_or_path=str(tmp_path / "backbone"))
    head.save_pretrained(tmp_path / "head")
    model = CoDDModel.from_pretrained(tmp_path / "head")
    for name, part in (("head", head), ("model", model)):
        card = saved_card(part, tmp_path / name)
        assert str(tmp_path) not in str(card)
        assert card.data.base_model is None


def test_what_is_saved_of_a_model_or_a_pipeline_holds_no_path_of_this_machine(tmp_path):
    tiny_backbone().save_pretrained(tmp_path / "backbone")
    random_head(base_model_name_or_path=str(tmp_path / "backbone")).save_pretrained(
        tmp_path / "head"
    )
    for folder in ("one", "two"):
        model = CoDDModel.from_pretrained(tmp_path / "head")
        assert model.backbone.name_or_path == str(tmp_path / "backbone")
        CoDDPipeline(model, CoDDScheduler()).save_pretrained(tmp_path / folder)
        CoDDPipeline.from_pretrained(tmp_path / folder).save_pretrained(tmp_path / f"{folder}-2")
    for name in ("one", "one-2", "two", "two-2"):
        for file in (tmp_path / name).rglob("*"):
            assert file.is_dir() or str(tmp_path).encode() not in file.read_bytes(), file


def test_saving_again_leaves_a_card_that_is_there_alone(tmp_path):
    (tmp_path / "README.md").write_text("My own words.")
    random_head().save_pretrained(tmp_path, license="mit")
    assert (tmp_path / "README.md").read_text() == "My own words."


def test_pipeline_has_one_card_with_a_line_that_works(tmp_path, tiny_tokenizer, monkeypatch):
    vocab = len(tiny_tokenizer)
    mask = tiny_tokenizer.mask_token_id
    model = CoDDModel.from_backbone(
        tiny_backbone("llama", vocab, eos_token_id=2), random_head(vocab, mask_token_id=mask)
    )
    model.generation_config.max_new_tokens = 32  # it has 128 positions for prompt and answer
    pipe = CoDDPipeline(model, CoDDScheduler(), tiny_tokenizer)
    pipe.save_pretrained(tmp_path / "pipe", license="mit")
    assert [path.parent.name for path in tmp_path.rglob("README.md")] == ["pipe"]
    card = ModelCard.load(tmp_path / "pipe" / "README.md")
    assert card.data.license == "mit"
    code = re.search(r"```python\n(.*?)```", card.text, re.DOTALL)[1]
    assert 'CoDDPipeline.from_pretrained("pipe")' in code
    monkeypatch.chdir(tmp_path)
    exec(code, {})


@pytest.mark.parametrize("with_head", [True, False])
def test_line_in_the_card_of_a_model_works(with_head, tmp_path, monkeypatch):
    model = tiny_model() if with_head else CoDDModel.from_backbone(tiny_backbone(), mask_token_id=0)
    card = saved_card(model, tmp_path / "model")
    assert ("`num_latents`" in card.text) == with_head
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(re.search(r"```python\n(.*?)```", card.text, re.DOTALL)[1], names)
    assert isinstance(names["model"], CoDDModel)


@pytest.mark.parametrize("within", ["", "model"])
def test_size_of_shards_is_honoured_in_a_model_and_in_a_pipeline(within, tmp_path):
    model = tiny_model()
    part = CoDDPipeline(model, CoDDScheduler()) if within else model
    part.save_pretrained(tmp_path, max_shard_size="10KB")
    folder = tmp_path / within
    assert len(list(folder.glob("model-*.safetensors"))) > 1
    loaded = CoDDModel.from_pretrained(folder).state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in model.state_dict().items())


def test_card_of_somebody_is_completed_and_a_placeholder_given_up():
    new = head_card(random_head(), license="mit")
    own = ModelCard("---\nlicense: other\nlanguage: en\nlibrary_name: mine\n---\nMy words.\n")
    completed = complete_card(own, new)
    assert completed.text == "My words.\n"
    assert (completed.data.license, completed.data.language) == ("mit", "en")
    assert completed.data.library_name == "mine"
    assert completed.data.pipeline_tag == "text-generation"
    for library in ("transformers", "diffusers"):
        description = (
            f"This is the model card of a {library} model that has been pushed on the Hub. This "
            "model card has been automatically generated."
        )
        placeholder = ModelCard.from_template(ModelCardData(), model_description=description)
        assert complete_card(placeholder, new) is new
        placeholder.text += "\nIt writes poems.\n"
        assert complete_card(placeholder, new) is placeholder


def test_card_of_a_training_gives_way_to_that_of_the_next_one_only():
    first, second = (head_card(random_head(), training=f"Run {i}.") for i in (1, 2))
    assert "## Training\n\nRun 1." in first.text
    assert "Training data: see below." in first.text
    assert not errors_in_card(str(first))
    assert complete_card(first, second) is second
    assert "Run 1." in complete_card(first, head_card(random_head(), license="mit")).text
    assert complete_card(ModelCard("---\ntags: []\n---\nMine.\n"), second).text == "Mine.\n"
