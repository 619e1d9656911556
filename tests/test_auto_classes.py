"""Promises of transformers' Auto classes and of its text-generation pipeline."""

from __future__ import annotations

import subprocess
import sys
from copy import deepcopy

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    pipeline,
)

from codd_hf import CoDDConfig, CoDDHead, CoDDHeadConfig, CoDDModel
from tiny import head_config, random_head, tiny_backbone

CHAT = "{% for m in messages %}{{ m['content'] }} {% endfor %}"


@pytest.fixture(scope="module")
def folders(tiny_tokenizer, tmp_path_factory):
    root, size = tmp_path_factory.mktemp("auto"), len(tiny_tokenizer)
    backbone = tiny_backbone(vocab_size=size, pad_token_id=0, eos_token_id=2)
    head = random_head(size, mask_token_id=1, forbidden_token_ids=[0], num_latents=2)
    CoDDModel.from_backbone(backbone, head).save_pretrained(root / "model")
    head.save_pretrained(root / "head")
    tokenizer = deepcopy(tiny_tokenizer)
    tokenizer.chat_template = CHAT
    tokenizer.save_pretrained(root / "model")
    return root


def test_auto_classes_give_what_the_folders_hold(folders):
    assert type(AutoConfig.from_pretrained(folders / "model")) is CoDDConfig
    assert type(AutoConfig.from_pretrained(folders / "head")) is CoDDHeadConfig
    assert type(AutoModel.from_pretrained(folders / "model")) is CoDDModel
    assert type(AutoModelForCausalLM.from_pretrained(folders / "model")) is CoDDModel
    assert type(AutoModel.from_pretrained(folders / "head")) is CoDDHead
    expected = CoDDModel.from_pretrained(folders / "model").state_dict()
    found = AutoModelForCausalLM.from_pretrained(folders / "model").state_dict()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    assert len(AutoTokenizer.from_pretrained(folders / "model")) > 200


def test_head_alone_is_no_language_model(folders):
    for load, given in (("from_pretrained", folders / "head"), ("from_config", head_config())):
        with pytest.raises(ValueError, match="CoDDHeadConfig"):
            getattr(AutoModelForCausalLM, load)(given)


LAZY = "assert 'codd_hf.modeling_codd' not in sys.modules"


@pytest.mark.parametrize(
    "imports",
    [
        f"import codd_hf; from transformers import AutoModelForCausalLM as Auto; {LAZY}",
        pytest.param(
            f"from codd_hf import CoDDConfig; from transformers import AutoModel as Auto; {LAZY}",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_auto_classes_know_codd_whatever_is_imported_first(imports, folders):
    code = (
        f"import sys; {imports}\nmodel = Auto.from_pretrained({str(folders / 'model')!r})\n"
        "from codd_hf import CoDDModel\nassert type(model) is CoDDModel\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


@pytest.fixture(scope="module")
def generator(folders):
    return pipeline("text-generation", model=str(folders / "model"), device="cpu")


def greedy(**kwargs):
    return {"max_new_tokens": 12, "do_sample": False, "sampling": "marginal"} | kwargs


def by_hand(generator, text: str, **kwargs) -> str:
    ids = generator.tokenizer(text, return_tensors="pt")["input_ids"]
    tokens = generator.model.generate(ids, **greedy(**kwargs))[0, ids.shape[1] :]
    return generator.tokenizer.decode(tokens, skip_special_tokens=True)


def test_pipeline_continues_a_text_as_generate_does(generator):
    assert type(generator.model) is CoDDModel
    found = generator("Tom has", **greedy())
    assert found == [{"generated_text": "Tom has" + by_hand(generator, "Tom has")}]
    new = generator("Tom has", **greedy(), return_full_text=False)
    assert new == [{"generated_text": by_hand(generator, "Tom has")}]


@pytest.mark.parametrize("batch_size", [1, 2, 3])
def test_texts_of_a_batch_are_what_they_are_alone(generator, batch_size):
    prompts = ["Tom has", "Ann buys 12 red apples and eats", "How many"]
    found = generator(prompts, batch_size=batch_size, return_full_text=False, **greedy())
    assert [row[0]["generated_text"] for row in found] == [by_hand(generator, p) for p in prompts]


def test_chat_messages_go_through_the_template(generator):
    chats = [[{"role": "user", "content": text}] for text in ("Tom has", "How many eggs")]
    found = generator(chats, batch_size=2, **greedy())
    for chat, row in zip(chats, found, strict=True):
        answer = {"role": "assistant", "content": by_hand(generator, chat[0]["content"] + " ")}
        assert row[0]["generated_text"] == [*chat, answer]


def test_defaults_of_the_pipeline_are_sampling_that_the_seed_decides(generator):
    """They are 256 tokens at temperature 0.7; a model of 128 positions says that it is too many."""
    with pytest.raises(ValueError, match="The 259 tokens of a row"):
        generator("Tom has")

    def sample(seed):
        torch.manual_seed(seed)
        return generator("Tom has", max_new_tokens=12)[0]["generated_text"]

    assert sample(0) == sample(0)
    assert len({sample(seed) for seed in range(4)}) > 1


@pytest.fixture(scope="module")
def model(folders):
    return CoDDModel.from_pretrained(folders / "model")


IDS = torch.tensor([[10, 11, 12]])


def test_model_generates_by_its_saved_generation_configuration(folders, tmp_path):
    assert CoDDModel.can_generate()
    model = CoDDModel.from_pretrained(folders / "model")
    model.generation_config = GenerationConfig(
        max_new_tokens=9, num_inference_steps=3, sampling="marginal", eos_token_id=11
    )
    model.save_pretrained(tmp_path)
    loaded = CoDDModel.from_pretrained(tmp_path)
    assert loaded.generation_config.max_new_tokens == 9
    settings = {"num_inference_steps": 3, "sampling": "marginal", "eos_token_id": 11}
    expected = loaded.generate(IDS, gen_length=9, **settings)
    assert torch.equal(loaded.generate(IDS), expected)
    assert loaded.generate(IDS, max_new_tokens=6).shape == (1, 9)
    assert loaded.generate(IDS, generation_config=GenerationConfig(max_length=8)).shape == (
        1,
        8,
    )


def test_sampling_is_told_as_in_transformers(model):
    def run(**kwargs):
        generator = torch.Generator().manual_seed(3)
        return model.generate(IDS, max_new_tokens=16, generator=generator, **kwargs)

    assert torch.equal(run(do_sample=True), run(temperature=1.0))
    assert torch.equal(run(do_sample=True, temperature=0.5), run(temperature=0.5))
    assert torch.equal(run(do_sample=False, temperature=0.5), run(temperature=0.0))
    config = GenerationConfig(do_sample=True, temperature=0.5, top_k=3)
    assert torch.equal(run(generation_config=config), run(temperature=0.5, top_k=3))
    assert not torch.equal(run(do_sample=True), run(do_sample=False))


@pytest.mark.parametrize(
    ("kwargs", "error", "said"),
    [
        ({"num_beams": 4}, ValueError, "`num_beams=4` asks for something that decoding by diff"),
        ({"stop_strings": ["a"]}, ValueError, "`stop_strings="),
        ({"stop_strings": ["a"], "tokenizer": "a"}, ValueError, "`stop_strings="),
        ({"return_dict_in_generate": True}, ValueError, "`return_dict_in_generate=True`"),
        ({"generation_config": GenerationConfig(num_beams=2)}, ValueError, "`num_beams=2`"),
        ({"max_time": 1.0}, ValueError, r"`max_time=1\.0` asks for something"),
        ({"forced_eos_token_id": 0}, ValueError, "`forced_eos_token_id=0` asks for something"),
        ({"diversity_penalty": 1.0}, ValueError, r"`diversity_penalty=1\.0` asks for something"),
        ({"assistant_model": torch.nn.Linear(2, 2)}, ValueError, r"^`assistant_model=Linear.*$"),
        ({"temprature": 1.0}, TypeError, "`temprature` is not an argument of `generate`"),
        ({"temperature": -1.0}, ValueError, "`temperature` must be"),
    ],
)
def test_what_cannot_be_done_is_one_clear_sentence(model, kwargs, error, said):
    with pytest.raises(error, match=said):
        model.generate(IDS, **kwargs)


def test_values_that_ask_for_nothing_are_taken(model):
    kwargs = {"max_new_tokens": 6, "sampling": "marginal"}
    idle = {"num_beams": 1, "use_cache": True, "pad_token_id": 0, "repetition_penalty": 1.0}
    idle |= {"output_scores": False, "logits_processor": None}
    assert torch.equal(model.generate(IDS, **kwargs, **idle), model.generate(IDS, **kwargs))
