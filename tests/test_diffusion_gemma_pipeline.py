"""Promises on diffusers' `DiffusionGemmaPipeline`: it runs on our model, and is coupled."""

from __future__ import annotations

import pytest
import torch
from diffusers import (
    BlockRefinementScheduler,
    DiffusionGemmaPipeline,
    DiscreteDDIMScheduler,
    EntropyBoundScheduler,
)
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import PreTrainedTokenizerFast

from codd_hf import CoDDModel
from tiny import head_config, random_head
from tiny_gemma import WORDS, city_gemma, tiny_gemma

pytestmark = pytest.mark.filterwarnings("ignore:`past_key_values`:FutureWarning")
TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
SCHEDULERS = {
    "block refinement": BlockRefinementScheduler(),
    "discrete ddim": DiscreteDDIMScheduler(),
    "entropy bound": EntropyBoundScheduler(entropy_bound=1.0),
}
CALL = {"gen_length": 16, "num_inference_steps": 3, "temperature": 1.0, "output_type": "seq"}
PROMPTS = ["San Diego New York", "New York"]


@pytest.fixture(scope="module")
def tokenizer():
    words = Tokenizer(WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="[ANY]"))
    words.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=words,
        pad_token="[PAD]",
        eos_token="[EOS]",
        chat_template=TEMPLATE,
        padding_side="left",
    )


@pytest.fixture(scope="module")
def backbone():
    return tiny_gemma(vocab_size=len(WORDS))


def run(model, scheduler, tokenizer, seed: int = 0, **changes):
    """The output of a call, of a generator of its own or, with None, the global one."""
    pipe = DiffusionGemmaPipeline(model, scheduler, tokenizer)
    pipe.set_progress_bar_config(disable=True)
    torch.manual_seed(seed)
    call = {"prompt": PROMPTS[0], "generator": torch.Generator().manual_seed(seed)}
    return pipe(**(call | CALL | changes))


@pytest.mark.parametrize("coupling", ["none", "latent"])
@pytest.mark.parametrize("name", SCHEDULERS)
def test_pipeline_with_a_new_head_is_the_stock_one(backbone, tokenizer, name, coupling):
    scheduler, config = SCHEDULERS[name], head_config(len(WORDS), mask_token_id=None)
    models = [CoDDModel.from_backbone(backbone, config, coupling=coupling)]
    models.append(CoDDModel.from_backbone(backbone, coupling=coupling))
    for changes in (
        {"confidence_threshold": 2.0},
        {"confidence_threshold": None, "generator": None},
        {"prompt": None, "messages": [{"role": "user", "content": PROMPTS[1]}], "temperature": 0.0},
        {"cache_implementation": "static", "gen_length": 8},
    ):
        wanted = run(backbone, scheduler, tokenizer, **changes).sequences
        for model in models:
            assert torch.equal(run(model, scheduler, tokenizer, **changes).sequences, wanted)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", SCHEDULERS)
def test_coupled_pipeline_writes_whole_cities(tokenizer, name, seed):
    """At temperature 0, where the stock pipeline has one answer, and at 1, where it has all."""
    model, pairs = city_gemma("latent")
    stock, _ = city_gemma("none")
    cities = {("San", "Diego"), ("New", "York")}
    for temperature in (0.0, 1.0):
        call = {"temperature": temperature, "num_inference_steps": 1, "gen_length": 32}
        call |= {"confidence_threshold": None, "eos_early_stop": False}
        output = run(model, SCHEDULERS[name], tokenizer, seed, **call, return_dict=True)
        assert pairs(output.sequences) == cities
        again = run(model, SCHEDULERS[name], tokenizer, seed, **call)
        assert torch.equal(again.sequences, output.sequences)
        assert not pairs(run(stock, SCHEDULERS[name], tokenizer, seed, **call).sequences) <= cities


def test_pipeline_answers_in_text_and_calls_back(backbone, tokenizer):
    head = random_head(len(WORDS), mask_token_id=None)
    model, told = CoDDModel.from_backbone(backbone, head, coupling="latent"), []

    def keep(pipe, step, timestep, given):
        told.append((step, sorted(given), given["logits"].shape))
        return {}

    call = {"callback_on_step_end": keep, "confidence_threshold": None, "eos_early_stop": False}
    call |= {"callback_on_step_end_tensor_inputs": ["canvas", "logits"], "return_dict": False}
    scheduler = SCHEDULERS["entropy bound"]
    sequences, texts = run(model, scheduler, tokenizer, output_type="text", **call)
    assert sequences.shape == (1, 16)
    assert all(word in WORDS for word in texts[0].split())
    assert told == [(step, ["canvas", "logits"], (1, 8, len(WORDS))) for step in range(6)]
    with pytest.raises(ValueError, match="Provide either"):
        run(model, scheduler, tokenizer, prompt=None)
