"""Promises on DiffusionGemma: all is as in transformers' class, and a head couples it."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import LoraConfig
from transformers import (
    AutoModelForCausalLM,
    DiffusionGemmaForBlockDiffusion,
    DiffusionGemmaGenerationConfig,
    EntropyBoundSamplerConfig,
    LogitsProcessorList,
    StaticCache,
    SuppressTokensLogitsProcessor,
)
from transformers.generation.streamers import BaseStreamer

from codd_hf import (
    CoDDDiffusionGemma,
    CoDDGenerationConfig,
    CoDDHead,
    CoDDModel,
    CoDDPipeline,
    CoDDScheduler,
    CoupledBoundSamplerConfig,
)
from codd_hf.backbones import noise_of
from tiny import head_config, random_head, tiny_backbone
from tiny_gemma import city_gemma, images, tiny_gemma

IDS = torch.tensor([[3, 4, 5, 6, 7], [0, 0, 6, 5, 4], [0, 8, 8, 8, 8]])
PADDED = {"attention_mask": (IDS > 0).long()}
CALL = PADDED | {"max_new_tokens": 12, "max_denoising_steps": 6}
HEADS = {
    "no head": None,
    "new head": {},
    "windows that do not fill the canvas": {"window_length": 3},
    "tied emissions": {"emission": "tied", "emission_rank": 3, "context_size": 16},
    "conditioning": {"conditioning": ["latent"], "context_size": 16, "num_latents": 5},
    "untied": {"tie_emissions": False, "tie_transitions": False},
}
CALLS = {
    "never stops": {"confidence_threshold": 1e-9},
    "stops": {"confidence_threshold": 1.5, "stability_threshold": 1},
    "stops at once": {"confidence_threshold": 10.0, "stability_threshold": 0},
    "accepts more": {"sampler_config": EntropyBoundSamplerConfig(entropy_bound=3.0)},
    "other temperatures": {"t_min": 0.1, "t_max": 3.0},
    "one prompt, no mask": {"input_ids": IDS[:1], "attention_mask": None},
    "beyond the sliding window": {"max_new_tokens": 40, "max_denoising_steps": 2},
    "static cache": {"cache_implementation": "static", "disable_compile": True},
}


@pytest.fixture(scope="module")
def backbone():
    return tiny_gemma()


def coupled(backbone, **head) -> CoDDDiffusionGemma:
    return CoDDModel.from_backbone(backbone, random_head(mask_token_id=None, **head))


def run(model, seed: int = 0, **changes):
    """A call, and the state of the global generator behind it."""
    torch.manual_seed(seed)
    call = {"input_ids": IDS} | CALL | changes
    output = model.generate(**{k: v for k, v in call.items() if v is not None})
    return output, torch.get_rng_state()


def assert_same(one, other) -> None:
    (output, state), (wanted, wanted_state) = one, other
    assert torch.equal(output.sequences, wanted.sequences)
    assert torch.equal(output.tokens_per_forward, wanted.tokens_per_forward)
    assert torch.equal(state, wanted_state)


def test_backbone_decides_the_class(backbone, tmp_path):
    model = CoDDModel.from_backbone(backbone)
    assert type(model) is CoDDDiffusionGemma
    assert (model.config.canvas_length, model.config.vocab_size) == (8, 12)
    assert noise_of(backbone.config) == "uniform"
    assert noise_of(tiny_backbone("llama").config) == "mask"
    backbone.save_pretrained(tmp_path)
    loaded = CoDDModel.from_backbone(tmp_path)
    assert type(loaded) is CoDDDiffusionGemma
    assert type(loaded.backbone) is DiffusionGemmaForBlockDiffusion
    assert_same(run(loaded), run(backbone))


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("call", ["never stops", "stops"])
def test_without_a_head_and_with_a_new_one_generate_is_the_stock_one(backbone, head, call):
    config = HEADS[head]
    config = config if config is None else head_config(mask_token_id=None, **config)
    model = CoDDModel.from_backbone(backbone, config)
    wanted = run(backbone, **CALLS[call])
    assert_same(run(model, **CALLS[call]), wanted)
    assert (wanted[0].tokens_per_forward > 16 / 12).any() == (call == "stops")


@pytest.mark.parametrize("call", CALLS)
def test_every_choice_of_the_stock_generate_is_kept_by_a_new_head(backbone, call):
    model = CoDDModel.from_backbone(backbone, head_config(mask_token_id=None))
    assert_same(run(model, **CALLS[call]), run(backbone, **CALLS[call]))


def test_images_pass_through(backbone):
    inputs = images(backbone.config)
    call = {"max_new_tokens": 8, "max_denoising_steps": 2, "attention_mask": None}
    model = CoDDModel.from_backbone(backbone, head_config(mask_token_id=None))
    assert_same(run(model, **inputs, **call), run(backbone, **inputs, **call))
    assert not torch.equal(
        run(backbone, **inputs, **call)[0].sequences,
        run(backbone, **inputs | {"pixel_values": 1 - inputs["pixel_values"]}, **call)[0].sequences,
    )


class Recorder(BaseStreamer):
    """Keeps what it is given."""

    def __init__(self) -> None:
        self.told: list = []

    def put(self, value):
        self.told.append(("put", value.tolist()))

    def put_draft(self, value):
        self.told.append(("draft", value.tolist()))

    def end(self):
        self.told.append(("end", None))


@pytest.mark.parametrize("head", [None, {}])
def test_streamers_processors_configurations_and_caches_are_the_stock_ones(backbone, head):
    config = None if head is None else head_config(mask_token_id=None)
    model, told = CoDDModel.from_backbone(backbone, config), []
    for one in (model, backbone):
        streamer = Recorder()
        suppress = LogitsProcessorList([SuppressTokensLogitsProcessor([3, 4])])
        settings = DiffusionGemmaGenerationConfig(max_new_tokens=8, max_denoising_steps=3)
        output, _ = run(
            one,
            streamer=streamer,
            generation_config=settings,
            logits_processor=suppress,
            max_new_tokens=16,
            max_denoising_steps=None,
        )
        assert output.sequences.shape == (3, 5 + 16)
        assert not torch.isin(output.sequences[:, 5:], torch.tensor([3, 4])).any()
        more = torch.cat((output.sequences, IDS), 1)
        mask = torch.cat((PADDED["attention_mask"], torch.ones(3, 16).long()), 1)
        mask = torch.cat((mask, torch.ones(3, 5).long()), 1)
        name = next(name for name in ("cache", "past_key_values") if name in output)
        cached = {name: output[name], "input_ids": more[:, 13:], "attention_mask": mask}
        again, _ = run(one, **cached)
        plain, _ = run(one, return_dict_in_generate=True)
        bare = one.generate(**{"input_ids": IDS} | CALL, return_dict_in_generate=False)
        assert isinstance(bare, torch.Tensor)
        told.append((streamer.told, again.sequences.tolist(), plain.sequences.tolist()))
    assert told[0] == told[1]


def test_coupled_generate_leaves_the_global_stream_to_the_stock_draws(backbone):
    """As many numbers are drawn as without a head, and paths are reproducible all the same."""
    model, call = coupled(backbone), CALLS["never stops"]
    one, state = run(model, **call)
    again, _ = run(model, **call)
    other, _ = run(model, seed=1, **call)
    stock, stock_state = run(backbone, **call)
    assert torch.equal(state, stock_state)
    assert torch.equal(one.sequences, again.sequences)
    assert not torch.equal(one.sequences, other.sequences)
    assert not torch.equal(one.sequences, stock.sequences)
    by_hand = [run(model, generator=torch.Generator().manual_seed(s), **call)[0] for s in (0, 0, 1)]
    assert torch.equal(by_hand[0].sequences, by_hand[1].sequences)
    assert not torch.equal(by_hand[0].sequences, by_hand[2].sequences)
    assert_same(run(model, head=False, **call), (stock, stock_state))


def test_heads_by_name(backbone):
    model = CoDDModel.from_backbone(backbone)
    model.load_head(random_head(mask_token_id=None), "cities")
    assert_same(run(model, head="cities"), run(coupled(backbone)))
    assert_same(run(model), run(backbone))


def test_compilation_is_off_with_a_head_and_that_is_said(backbone, monkeypatch):
    model, told = coupled(backbone), []
    monkeypatch.setattr("codd_hf.decoding.diffusion_gemma.logger.warning_once", told.append)
    compiled = run(model, cache_implementation="static")
    assert len(told) == 1
    assert "compiled" in told[0]
    assert_same(compiled, run(model, cache_implementation="static", disable_compile=True))
    cache = StaticCache(config=backbone.config.text_config, max_cache_len=64)
    run(model, cache=cache, disable_compile=True)
    assert len(told) == 1


@pytest.mark.parametrize("seed", range(10))
def test_canvas_given_a_path_is_coherent(seed):
    """The stock loop ends as the best tokens, here those of one path: San Diego or New York."""
    model, words = city_gemma()
    torch.manual_seed(seed)
    output = model.generate(torch.tensor([[3]] * 8), max_new_tokens=8, max_denoising_steps=1)
    found = words(output.sequences[:, 1:])
    assert found == {("San", "Diego"), ("New", "York")}
    stock = model.generate(
        torch.tensor([[3]] * 8), max_new_tokens=8, max_denoising_steps=1, head=False
    )
    assert words(stock.sequences[:, 1:]) == {("San", "San")}


def test_stopping_goes_by_the_marginals():
    """Given a path the cities are sure, but which ones they are is not."""
    model, _ = city_gemma()
    call = {"max_new_tokens": 8, "max_denoising_steps": 6, "stability_threshold": 1}
    call |= {"sampler_config": EntropyBoundSamplerConfig(entropy_bound=100.0)}
    output = model.generate(torch.tensor([[3]] * 4), confidence_threshold=0.5, **call)
    assert (output.tokens_per_forward == 8 / 6).all()
    # ln 2 at every position, and the best tokens of the marginals never change.
    output = model.generate(torch.tensor([[3]] * 4), confidence_threshold=0.7, **call)
    assert (output.tokens_per_forward == 8 / 2).all()


def test_whole_model_is_saved_with_its_sampler(backbone, tmp_path):
    model = coupled(copy.deepcopy(backbone))
    sampler = CoupledBoundSamplerConfig(entropy_bound=0.5, dependence="own", num_samples=3)
    model.generation_config = CoDDGenerationConfig(sampler_config=sampler, t_min=0.3, t_max=0.9)
    model.save_pretrained(tmp_path)
    for load in (CoDDModel, CoDDDiffusionGemma, AutoModelForCausalLM):
        loaded = load.from_pretrained(tmp_path)
        assert type(loaded) is CoDDDiffusionGemma
        assert loaded.generation_config.sampler_config == sampler
        assert type(loaded.generation_config.sampler_config) is CoupledBoundSamplerConfig
        assert loaded.generation_config.t_max == 0.9
        assert_same(run(loaded), run(model))
        weights = loaded.backbone.lm_head.weight, loaded.model.decoder.embed_tokens.weight
        assert weights[0] is weights[1] is loaded.get_output_embeddings().weight
    own = CoDDGenerationConfig.from_pretrained(tmp_path)
    own.sampler_config = EntropyBoundSamplerConfig(entropy_bound=0.2)
    own.save_pretrained(tmp_path)
    stock = DiffusionGemmaGenerationConfig.from_pretrained(tmp_path)
    assert CoDDGenerationConfig.from_pretrained(tmp_path).sampler_config == stock.sampler_config


def test_head_repository_brings_its_backbone(backbone, tmp_path):
    backbone.save_pretrained(tmp_path / "backbone")
    model = CoDDModel.from_backbone(tmp_path / "backbone", random_head(mask_token_id=None))
    model.save_head(tmp_path / "head")
    loaded = CoDDModel.from_pretrained(tmp_path / "head")
    assert type(loaded) is CoDDDiffusionGemma
    assert_same(run(loaded), run(model))
    head = CoDDHead.from_pretrained(tmp_path / "head")
    assert head.config.mask_token_id is None


def test_lora_goes_with_the_head_and_the_model(tmp_path):
    """Layers of encoder and decoder share weights, and adapters stand in the place of each."""
    backbone = tiny_gemma()
    backbone.save_pretrained(tmp_path / "backbone")
    model = CoDDModel.from_backbone(tmp_path / "backbone", random_head(mask_token_id=None))
    before = run(model)
    layers = model.family.lora_targets(model.backbone)
    model.add_adapter(LoraConfig(r=2, target_modules=layers))
    assert_same(run(model), before)
    with torch.no_grad():
        for name, weight in model.backbone.named_parameters():
            if "lora_B" in name:
                weight.normal_(std=0.5)
    wanted = run(model)
    assert not torch.equal(wanted[0].sequences, before[0].sequences)
    model.save_head(tmp_path / "head")
    model.save_pretrained(tmp_path / "whole")
    for folder in ("head", "whole"):
        assert_same(run(CoDDModel.from_pretrained(tmp_path / folder)), wanted)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"entropy_bound": 0.0}, "entropy_bound"),
        ({"dependence": "both"}, "`dependence` must be one of left_out, own"),
        ({"num_samples": 0}, "`num_samples`"),
    ],
)
def test_sampler_settings_are_checked(change, told):
    with pytest.raises(ValueError, match=told):
        CoupledBoundSamplerConfig(**{"entropy_bound": 0.1} | change)
    with pytest.raises(ValueError, match="Unexpected"):
        CoDDGenerationConfig(do_sample=True)


def test_what_uniform_noise_has_not_is_refused(backbone, tmp_path):
    join, model = CoDDModel.from_backbone, coupled(backbone)
    for told, arguments in {
        "`mask_token_id` must be None .* got 2": {"head": random_head()},
        "`mask_token_id` must be None .* got 5": {"mask_token_id": 5},
        "`forbidden_token_ids` need a head": {"forbidden_token_ids": [3]},
        "vocabulary of 7 tokens": {"head": random_head(7)},
        "`block_length` cannot be set": {"block_length": 4},
    }.items():
        with pytest.raises(ValueError, match=told):
            join(copy.deepcopy(backbone), **arguments)
    copying = random_head(mask_token_id=None, conditioning=["copy"], context_size=16)
    with pytest.raises(ValueError, match="without 'copy'"):
        join(backbone, copying).generate(IDS)
    with pytest.raises(ValueError, match="rows of tokens alone"):
        CoDDPipeline(model, CoDDScheduler())(input_ids=IDS, output_type="seq")
    with pytest.raises(ValueError, match="rows of tokens alone"):
        model.backbone_states(IDS)
    with pytest.raises(ValueError, match="noise is uniform"):
        model.score([[3]], [[4]])
    with pytest.raises(ValueError, match="`coupling` must be one of"):
        model(input_ids=IDS, coupling="all")
