"""Promises on diffusers' own pipelines: `LLaDA2Pipeline` is coupled, and what loads a folder."""

from __future__ import annotations

import pytest
import torch
from diffusers import BlockRefinementScheduler, DiffusionPipeline, LLaDA2Pipeline
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import PreTrainedTokenizerFast

from codd_hf import CoDDHead, CoDDModel, CoDDPipeline, CoDDScheduler
from tiny import head_config, tiny_backbone

WORDS = ["[PAD]", "[EOS]", "[MASK]", "San", "New", "Diego", "York"]
SAN, NEW, DIEGO, YORK = 3, 4, 5, 6
CITIES = {("San", "Diego"), ("New", "York")}


@pytest.fixture(scope="module")
def tokenizer():
    words = Tokenizer(WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="[PAD]"))
    words.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="[PAD]", eos_token="[EOS]", mask_token="[MASK]"
    )


def city_model(coupling: str, **changes) -> CoDDModel:
    """The backbone finds all four words equally likely everywhere; the circuit knows two cities."""
    backbone = tiny_backbone("bert", len(WORDS), **changes)
    head = CoDDHead(head_config(len(WORDS), num_latents=4, forbidden_token_ids=[0, 1]))
    words = [SAN, DIEGO, NEW, YORK]  # what each state emits
    with torch.no_grad():
        decoder = backbone.get_output_embeddings()
        decoder.weight.zero_()
        decoder.bias.fill_(-20.0)
        decoder.bias[words] = 0.0
        head.initial.copy_(torch.tensor([0.5, 0.0, 0.5, 0.0]).log())
        step = torch.tensor([[0, 1, 0, 0], [0.5, 0, 0.5, 0], [0, 0, 0, 1], [0.5, 0, 0.5, 0]])
        head.transition.copy_(step.log())
        head.emission.fill_(-torch.inf)
        head.emission[range(4), words] = 0.0
    return CoDDModel.from_backbone(backbone, head, coupling=coupling)


def pairs(text: str) -> set[tuple[str, ...]]:
    words = text.split()
    return {tuple(words[i : i + 2]) for i in range(0, len(words), 2)}


def run(model, tokenizer, **kwargs) -> set[tuple[str, ...]]:
    pipe = LLaDA2Pipeline(model=model, scheduler=BlockRefinementScheduler(), tokenizer=tokenizer)
    pipe.set_progress_bar_config(disable=True)
    torch.manual_seed(0)
    found = set()
    for _ in range(6):
        found |= pairs(pipe(**{"gen_length": 8, "block_length": 4, **kwargs}).texts[0])
    return found


@pytest.mark.parametrize("num_inference_steps", [1, 2, 4])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("prompt", ["San Diego New York", "New York"])
def test_stock_pipeline_writes_whole_cities(prompt, temperature, num_inference_steps, tokenizer):
    kwargs = {"temperature": temperature, "num_inference_steps": num_inference_steps}
    assert run(city_model("latent"), tokenizer, prompt=prompt, **kwargs) == CITIES


def test_revision_of_tokens_by_the_stock_pipeline_keeps_what_was_drawn_together(tokenizer):
    kwargs = {"temperature": 1.0, "num_inference_steps": 2, "editing_threshold": 0.2}
    assert run(city_model("latent"), tokenizer, prompt="San Diego New York", **kwargs) == CITIES


def test_without_coupling_the_stock_pipeline_writes_san_york(tokenizer):
    found = run(
        city_model("none"),
        tokenizer,
        prompt="San Diego New York",
        temperature=1.0,
        num_inference_steps=1,
    )
    assert ("San", "York") in found


def test_stock_pipeline_with_a_prompt_of_odd_length_completes_its_city(tokenizer):
    pipe = LLaDA2Pipeline(city_model("latent"), BlockRefinementScheduler(), tokenizer)
    pipe.set_progress_bar_config(disable=True)
    for seed in range(6):
        torch.manual_seed(seed)
        text = pipe("San Diego New", gen_length=5, block_length=4, num_inference_steps=1).texts[0]
        assert text.startswith("York")
        assert pairs("New " + text) <= CITIES


@pytest.mark.parametrize("block_length", [2, 4])
def test_stock_pipeline_writes_whole_cities_block_by_block(block_length, tokenizer):
    """Windows of 4 hold a block, or two of which the first is committed."""
    model = city_model("latent", block_length=block_length)
    call = {"prompt": "San Diego New York", "temperature": 1.0, "block_length": block_length}
    assert run(model, tokenizer, num_inference_steps=1, **call) == CITIES


def test_batch_of_ids_with_padding_is_coupled_too(tokenizer):
    pipe = LLaDA2Pipeline(city_model("latent"), BlockRefinementScheduler(), tokenizer)
    pipe.set_progress_bar_config(disable=True)
    ids = torch.tensor([[SAN, DIEGO, NEW, YORK], [0, 0, SAN, DIEGO]])
    torch.manual_seed(0)
    output = pipe(
        input_ids=ids,
        attention_mask=(ids > 0).long(),
        gen_length=8,
        block_length=4,
        num_inference_steps=1,
    )
    assert all(pairs(text) <= CITIES for text in output.texts)


def test_stock_pipeline_is_as_reproducible_as_the_global_generator(tokenizer):
    pipe = LLaDA2Pipeline(city_model("latent"), BlockRefinementScheduler(), tokenizer)
    pipe.set_progress_bar_config(disable=True)
    texts = []
    for _ in range(2):
        torch.manual_seed(7)
        texts.append(pipe("New York San Diego", gen_length=16, block_length=4).texts)
    assert texts[0] == texts[1]


@pytest.fixture(scope="module")
def folder(tokenizer, tmp_path_factory):
    path = tmp_path_factory.mktemp("pipeline")
    CoDDPipeline(city_model("latent"), CoDDScheduler(), tokenizer).save_pretrained(path)
    return path


def test_stock_pipeline_runs_on_the_components_of_a_loaded_one(folder):
    loaded = CoDDPipeline.from_pretrained(folder)
    pipe = LLaDA2Pipeline(loaded.model, BlockRefinementScheduler(), loaded.tokenizer)
    pipe.set_progress_bar_config(disable=True)
    text = pipe("San Diego New York", gen_length=8, block_length=4, num_inference_steps=1).texts[0]
    assert pairs(text) <= CITIES


def test_generic_pipeline_class_needs_the_class_from_this_package(folder, tmp_path):
    """diffusers looks the class up in diffusers itself, unless a file imports ours."""
    with pytest.raises(AttributeError, match="CoDDPipeline"):
        DiffusionPipeline.from_pretrained(folder)
    file = tmp_path / "pipeline.py"
    file.write_text("from codd_hf import CoDDPipeline\n")
    pipe = DiffusionPipeline.from_pretrained(
        folder, custom_pipeline=str(file), trust_remote_code=True
    )
    assert type(pipe) is CoDDPipeline
    assert type(CoDDPipeline.from_pretrained(folder)) is CoDDPipeline
