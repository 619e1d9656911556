"""Promises of what callers may give: any form of numbers and ids, and one sentence for the rest."""

from __future__ import annotations

import re
import warnings

import numpy as np
import pytest
import torch
from transformers import (
    BertTokenizerFast,
    GenerationConfig,
    MPNetConfig,
    MPNetForMaskedLM,
    pipeline,
)

from codd_hf import CoDDConfig, CoDDModel, CoDDPipeline, CoDDScheduler
from tiny import head_config, random_head, tiny_backbone, tiny_model

MASK, PAD = 2, 0
PROMPTS = [[5, 6, 7], [9]]
SHORT = {"max_new_tokens": 6, "block_length": 4, "num_inference_steps": 2, "sampling": "marginal"}


@pytest.fixture(scope="module")
def model() -> CoDDModel:
    return tiny_model()


@pytest.fixture(scope="module")
def pipe(model) -> CoDDPipeline:
    pipe = CoDDPipeline(model=model, scheduler=CoDDScheduler())
    pipe.set_progress_bar_config(disable=True)
    return pipe


def padded(side: str) -> tuple[torch.Tensor, torch.Tensor]:
    ids, mask = torch.full((2, 5), PAD), torch.zeros(2, 5, dtype=torch.long)
    for row, prompt in enumerate(PROMPTS):
        at = slice(0, len(prompt)) if side == "right" else slice(5 - len(prompt), 5)
        ids[row, at], mask[row, at] = torch.tensor(prompt), 1
    return ids, mask


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_without_a_mask_is_padding_as_in_transformers(model, pipe, side):
    ids, mask = padded(side)
    assert torch.equal(
        model.generate(ids, **SHORT), model.generate(ids, attention_mask=mask, **SHORT)
    )
    scores = model.score(ids, [[4, 5], [6]]).coupled
    assert torch.equal(scores, model.score(PROMPTS, [[4, 5], [6]]).coupled)
    assert torch.equal(scores, model.score(PROMPTS, [[4, 5], [6, PAD]]).coupled)
    kwargs = {"gen_length": 6, "block_length": 4, "output_type": "seq", "num_inference_steps": 2}
    sequences = pipe(input_ids=ids, sampling="marginal", **kwargs).sequences
    assert torch.equal(sequences, pipe(input_ids=PROMPTS, sampling="marginal", **kwargs).sequences)


def test_padding_token_of_the_call_is_the_one_that_counts(model):
    ids = torch.tensor([[9, 4, 11]])
    expected = model.generate(ids[:, :2], **SHORT)[:, 2:]
    assert torch.equal(model.generate(ids, pad_token_id=11, **SHORT)[:, 3:], expected)
    config = GenerationConfig(pad_token_id=11)
    told = model.generate(ids, generation_config=config, **SHORT)[:, 3:]
    assert torch.equal(told, expected)
    assert not torch.equal(model.generate(ids, **SHORT)[:, 3:], expected)


def test_forward_reads_what_it_is_given_and_tells_of_padding_without_a_mask(model):
    ids, mask = padded("left")
    with pytest.warns(UserWarning, match="without an `attention_mask`: give one"):
        model(ids)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        model(ids, mask)
        model(torch.tensor([[5, PAD, MASK]]))


def test_padding_token_that_ends_texts_is_text_as_in_transformers():
    model = CoDDModel.from_backbone(tiny_backbone(eos_token_id=PAD), random_head())
    ids = torch.tensor([[PAD, 5, 6]])
    expected = model.generate(ids, attention_mask=torch.ones_like(ids), **SHORT)
    assert torch.equal(model.generate(ids, **SHORT), expected)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        model(ids)


IN_OTHER_FORMS = {
    "array": lambda ids: np.array(ids, dtype=np.int32),
    "uint8": lambda ids: torch.tensor(ids, dtype=torch.uint8),
    "tuple": tuple,
    "list of tensors": lambda ids: [torch.tensor(row) for row in ids],
}


@pytest.mark.parametrize("form", IN_OTHER_FORMS.values(), ids=IN_OTHER_FORMS)
def test_ids_may_come_in_any_form_of_integers(model, pipe, form):
    ids = [[5, 6, MASK, 8], [9, MASK, MASK, 4]]
    assert torch.equal(model(form(ids)).logits, model(torch.tensor(ids)).logits)
    assert torch.equal(
        model(form(ids), attention_mask=form([[1, 1, 1, 1], [1, 1, 1, 0]])).logits,
        model(torch.tensor(ids), torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0]])).logits,
    )
    whole = [[5, 6, 7, 8], [9, 3, 3, 4]]
    expected = model.generate(torch.tensor(whole), **SHORT)
    assert torch.equal(model.generate(form(whole), **SHORT), expected)
    kwargs = {"gen_length": 6, "block_length": 4, "output_type": "seq", "num_inference_steps": 2}
    found = pipe(input_ids=form(whole), sampling="marginal", **kwargs).sequences
    assert torch.equal(found, expected[:, 4:])
    scores = model.score(form(whole), form(whole)).coupled
    assert torch.equal(scores, model.score(whole, whole).coupled)


def test_numbers_may_be_numpys_or_tensors_and_one_for_each_row_in_any_list(model):
    ids = torch.tensor(PROMPTS[:1] * 2)
    expected = model.generate(ids, **{**SHORT, "max_new_tokens": [3, 6]}, do_sample=False)
    for form in (np.array, torch.tensor, tuple):
        found = model.generate(
            ids,
            max_new_tokens=form([3, 6]),
            num_inference_steps=form([2, 2]),
            block_length=np.int32(4),
            do_sample=np.bool_(False),
            sampling="marginal",
            forced_tokens={np.int64(0): torch.tensor(int(expected[0, 3]))},
            eos_token_id=form([1]),
            forbidden_token_ids=form([MASK]),
        )
        assert torch.equal(found, expected)
    drawn = []
    for kind in (int, np.int64, torch.tensor):
        settings = {"top_k": kind(3), "temperature": np.float32(0.5), "threshold": np.array(0.5)}
        generator = torch.Generator().manual_seed(0)
        drawn.append(model.generate(ids, max_new_tokens=kind(6), generator=generator, **settings))
    assert torch.equal(drawn[0], drawn[1])
    assert torch.equal(drawn[0], drawn[2])


def test_settings_of_numpy_are_saved_as_plain_numbers(tmp_path):
    scheduler = CoDDScheduler(
        top_k=np.int64(3), threshold=np.float64(0.5), forbidden_token_ids=np.array([4])
    )
    scheduler.save_pretrained(tmp_path)
    assert CoDDScheduler.from_pretrained(tmp_path).config.forbidden_token_ids == [4]
    config = CoDDConfig(
        text_config=tiny_backbone().config,
        head_config=head_config(mask_token_id=np.int64(MASK)),
        forbidden_token_ids=np.array([4]),
    )
    config.save_pretrained(tmp_path / "model")
    loaded = CoDDConfig.from_pretrained(tmp_path / "model")
    assert (loaded.mask_token_id, loaded.forbidden_token_ids) == (MASK, [4])


IDS = torch.tensor([[5, 6, 7]])
HIDDEN = torch.tensor([[5, 6, MASK]])


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda m: m.generate(IDS.float()), "`inputs` must be integers, got torch.float32"),
        (lambda m: m.generate([[5], [6, 7]]), "`inputs` must be a tensor, an array, or rows of"),
        (lambda m: m.generate(IDS, input_ids=IDS), "`inputs` and `input_ids` are two names"),
        (lambda m: m.generate(HIDDEN), "`input_ids` must not hold the mask token (2), got it in"),
        (lambda m: m.generate(IDS, attention_mask=IDS[:, :2]), "`attention_mask` must have shape"),
        (lambda m: m.generate(IDS, attention_mask=IDS), "`attention_mask` must be 1 at real"),
        (lambda m: m.generate(IDS, max_new_tokens=True), "`gen_length` must be an integer, got T"),
        (lambda m: m.generate(IDS, max_new_tokens=10**30), "`gen_length` must be at most 1,048"),
        (lambda m: m.generate(IDS, block_length=0), "`block_length` must be at least 1, got 0"),
        (lambda m: m.generate(IDS, do_sample="no"), "`do_sample` must be True or False, got 'no'"),
        (lambda m: m.generate(IDS, eos_token_id=12), "`eos_token_id` must be at most 11, got 12"),
        (
            lambda m: m.generate(IDS, forbidden_token_ids=[12]),
            "`forbidden_token_ids` must be a",
        ),
        (lambda m: m.generate(IDS, temperature=1e-40), "`temperature` must be 0 or at least"),
        (lambda m: m.generate(IDS, strategy=["entropy"]), "`strategy` must be one of"),
        (lambda m: m.generate(IDS, generation_config={}), "`generation_config` must be a Gen"),
        (lambda m: m.generate(IDS, token_type_ids=IDS), "`token_type_ids` cannot be used"),
        (lambda m: m.generate(IDS, prompt_lookup=3), "`prompt_lookup` is not an argument"),
        (lambda m: m.generate(IDS, streamer=3, **SHORT), "`streamer` must have `put` and `end`"),
        (lambda m: m.generate(IDS, on_step=3, **SHORT), "`on_step` must be a function of the step"),
        (lambda m: m.generate(IDS, logits_processor=3), "`logits_processor` must be transformers'"),
        (lambda m: m.generate(IDS, scheduler={}), "`scheduler` must be a CoDDScheduler, got {}"),
        (lambda m: m(HIDDEN[:, :0]), "`input_ids` must hold at least one token"),
        (lambda m: m(HIDDEN - 3), "`input_ids` must hold ids of the vocabulary, 0 to 11, got -1"),
        (lambda m: m(HIDDEN, labels=HIDDEN[:, :2]), "`labels` must have shape (1, 3), got (1, 2)"),
        (lambda m: m(HIDDEN, labels=HIDDEN), "`labels` must be -100 or tokens that the model may"),
        (lambda m: m(IDS, labels=IDS), "`labels` supervise tokens, but `input_ids` hold the mask"),
        (
            lambda m: m(
                HIDDEN, (HIDDEN != MASK).long(), labels=torch.where(HIDDEN == MASK, 6, -100)
            ),
            "hold the mask token (2) at none of them but padding: mask some",
        ),
        (lambda m: m(HIDDEN, position_ids=HIDDEN + 126), "must hold positions, 0 to 127"),
        (lambda m: m(HIDDEN, position_ids=0), "`position_ids` must have shape (1, 3), got ()"),
        (lambda m: m(HIDDEN, window_start=3), "`window_start` must have shape (1,), got ()"),
        (lambda m: m(HIDDEN, past_key_values=(1,)), "`past_key_values` cannot be used here"),
        (lambda m: m.score([[5]], [[6]], batch_size=0), "`batch_size` must be at least 1, got 0"),
        (lambda m: m.score([[True]], [[6]]), "`prompts` must be integers, got torch.bool"),
        (lambda m: m.score([[5], [12]], [[6]] * 2), "0 to 11, got 12 in row 1"),
        (lambda m: m.score([[5]], [[MASK]]), "`answers` must not hold the mask token (2)"),
        (lambda m: m.score("ab", [[6], [7]]), "`prompts` must be a list of texts or of token ids"),
    ],
)
def test_what_cannot_be_meant_gets_one_sentence(model, call, said):
    with pytest.raises((TypeError, ValueError), match=re.escape(said)) as error:
        call(model)
    assert "\n" not in str(error.value)


def ready(steps: int = 2, **settings) -> CoDDScheduler:
    scheduler = CoDDScheduler(mask_token_id=MASK, **settings)
    scheduler.set_timesteps(steps)
    return scheduler


@pytest.mark.parametrize("value", [1.5, -1, True, "2", [2]])
def test_mask_token_that_is_no_token_is_refused_at_every_door(value):
    for call in (
        lambda: CoDDModel.from_backbone(tiny_backbone(), random_head(), mask_token_id=value),
        lambda: CoDDConfig(text_config=tiny_backbone().config, mask_token_id=value),
        lambda: head_config(mask_token_id=value),
        lambda: CoDDScheduler(mask_token_id=value),
        lambda: CoDDScheduler().add_noise(IDS, 0.5, mask_token_id=value),
    ):
        with pytest.raises((TypeError, ValueError), match="`mask_token_id`"):
            call()


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda s, x: s.set_timesteps(10**12), "`num_inference_steps` must be at most 1,048,576"),
        (lambda s, x: s.step(x.long(), 1.0, [[2] * 4]), "`model_output` must be floating-point"),
        (lambda s, x: s.step(x, "1", [[2] * 4]), "`timestep` must be a number"),
        (lambda s, x: s.step(x, 1.0, [2] * 4), "`sample` must have shape [batch, length]"),
        (lambda s, x: s.step(x, 1.0, [[12] * 4]), "`sample` must hold ids of the vocabulary"),
        (lambda s, x: s.step(x, 1.0, [[2] * 4], eligible=[[1] * 4]), "`eligible` must be True or"),
        (lambda s, x: s.step(x, 1.0, [[2] * 4], at_least=[1, 1]), "`at_least` must have shape"),
        (lambda s, x: s.add_noise(IDS, float("nan")), "`timesteps` must be in [0, 1]"),
    ],
)
def test_scheduler_says_what_cannot_be_meant(call, said):
    with pytest.raises((TypeError, ValueError), match=re.escape(said)):
        call(ready(), torch.zeros(1, 4, 12))


@pytest.mark.parametrize(
    ("sampling", "temperature", "paradigm"),
    [
        ("factorized", 0.0, "full"),
        ("latent", 1.0, "block"),
        ("any_order", 1.0, "full"),
        ("marginal", 0.0, "block"),
        ("viterbi", 0.0, "full"),
    ],
)
def test_with_all_tokens_forbidden_none_is_committed(model, sampling, temperature, paradigm):
    with pytest.raises(ValueError, match=r"No token can be drawn in row 0: `forbidden_token_ids`"):
        model.generate(
            PROMPTS[:1],
            max_new_tokens=4,
            sampling=sampling,
            temperature=temperature,
            paradigm=paradigm,
            forbidden_token_ids=list(range(12)),
        )


def test_processor_that_leaves_no_token_is_told_with_its_row(model):
    def processor(ids, scores):
        return scores if ids[0, 0] == 9 else torch.full_like(scores, -torch.inf)

    with pytest.raises(ValueError, match="No token can be drawn in row 1"):
        model.generate([[9, 9], [5, 5]], logits_processor=processor, **SHORT)


@pytest.mark.parametrize(("value", "head"), [(float("nan"), True), (-float("inf"), False)])
def test_logits_that_are_no_numbers_are_told_with_their_row(value, head):
    model = tiny_model()
    output = model.backbone.lm_head.forward

    def broken(hidden):
        return output(hidden).masked_fill(hidden.isnan().any(-1, keepdim=True), value)

    model.backbone.lm_head.forward = broken
    model.backbone.model.embed_tokens.weight.data[7] = torch.nan
    ids = torch.tensor([[5, 6], [5, 5], [6, 7]])
    call = {"head": None if head else False}
    with pytest.raises(ValueError, match="logits are NaN or infinite in row 2"):
        model.generate(ids, **SHORT, **call)
    masked = torch.cat((ids, torch.full((3, 1), MASK)), 1)
    with pytest.raises(ValueError, match="logits are NaN or infinite in row 2"):
        model(masked, coupling="marginal", **call)
    with pytest.raises(ValueError, match="logits are NaN or infinite in row 2"):
        model(masked, labels=torch.where(masked == MASK, 5, -100), **call)


@pytest.mark.parametrize(("value", "temperature"), [(float("nan"), 0.0), (float("inf"), 1.0)])
def test_plain_logits_that_are_no_numbers_are_told_with_their_row(value, temperature):
    logits = torch.zeros(2, 4, 12)
    logits[1, 3, 5] = value
    with pytest.raises(ValueError, match="in row 1"):
        ready(1).step(logits, 1.0, torch.full((2, 4), MASK), temperature=temperature)


@pytest.mark.parametrize("kind", ["roberta", "llama"])
def test_rows_fill_the_positions_of_the_backbone_and_no_more(kind):
    model = tiny_model(kind)
    most = 127 if kind == "roberta" else 128  # one is the padding token's
    assert model.max_positions == most
    assert model(torch.full((1, most), 5)).logits.isfinite().all()
    assert model.score([[5] * (most - 2)], [[6, 7]]).coupled.isfinite().all()
    assert model.generate([[5] * (most - 4)], max_new_tokens=4).shape == (1, most)
    assert model.generate([[5] * (most - 1) + [MASK]], infill=True).shape == (1, most)
    for call in (
        lambda: model(torch.full((1, most + 1), 5)),
        lambda: model(torch.full((1, most + 1), 5), torch.ones(1, most + 1)),
        lambda: model.score([[5] * (most - 1)], [[6, 7]]),
        lambda: model.generate([[5] * (most - 3)], max_new_tokens=4),
        lambda: model.generate([[5] * most + [MASK]], infill=True),
    ):
        with pytest.raises(ValueError, match=f"exceed the {most} positions of the backbone"):
            call()


@pytest.mark.parametrize("kind", ["roberta", "llama"])
def test_padding_beyond_the_positions_is_no_token(kind):
    model = tiny_model(kind)
    ids = torch.randint(3, 12, (2, 100), generator=torch.Generator().manual_seed(0))
    padding = torch.zeros(2, 100, dtype=torch.long)
    mask = torch.cat((padding, torch.ones_like(ids)), 1)
    output = model(torch.cat((padding, ids), 1), mask)
    assert torch.allclose(output.logits[:, 100:], model(ids).logits, atol=1e-4)


def test_backbones_that_count_positions_from_padding_say_so_without_it():
    model = CoDDModel.from_backbone(tiny_backbone("roberta", pad_token_id=None), random_head())
    with pytest.raises(ValueError, match=r"`pad_token_id` must be set .* 'roberta'"):
        model(HIDDEN)
    sizes = {"vocab_size": 12, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
    config = MPNetConfig(**sizes, num_attention_heads=2, max_position_embeddings=20)
    model = CoDDModel.from_backbone(MPNetForMaskedLM(config), random_head())
    assert model.max_positions == 18
    assert model(torch.full((1, 18), 5)).logits.isfinite().all()


@pytest.fixture
def bert_tokenizer(tmp_path):
    words = ["[PAD]", "[SEP]", "[MASK]", "[UNK]", "[CLS]", "tom", "has", "three", "eggs", "and"]
    (tmp_path / "vocab.txt").write_text("\n".join([*words, "eats", "one"]))
    return BertTokenizerFast.from_pretrained(tmp_path)


def test_what_a_tokenizer_gives_goes_into_the_model_as_it_is(bert_tokenizer):
    model = tiny_model("bert")
    encoded = bert_tokenizer("tom has three [MASK]", return_tensors="pt")
    assert "token_type_ids" in encoded
    alone = model(encoded.input_ids, encoded.attention_mask).logits
    assert torch.equal(model(**encoded).logits, alone)
    encoded = bert_tokenizer(["tom has", "one"], return_tensors="pt", padding=True)
    alone = model.generate(encoded.input_ids, attention_mask=encoded.attention_mask, **SHORT)
    assert torch.equal(model.generate(**encoded, **SHORT), alone)
    with pytest.raises(TypeError, match="`token_type_ids` cannot be used here"):
        model(**bert_tokenizer("tom", "has [MASK]", return_tensors="pt"))


def test_arguments_of_transformers_that_ask_for_nothing_change_nothing(model):
    expected = model(HIDDEN).logits
    nothing = {"past_key_values": None, "output_router_logits": False, "logits_to_keep": 0}
    nothing |= {"inputs_embeds": None, "cache_position": torch.arange(3)}
    assert torch.equal(model(HIDDEN, use_cache=True, **nothing).logits, expected)
    expected = model.generate(IDS, **SHORT)
    nothing = {"num_beams": np.int64(1), "assistant_model": None, "synced_gpus": False}
    assert torch.equal(model.generate(IDS, use_cache=True, **nothing, **SHORT), expected)


@pytest.mark.parametrize("kind", ["bert", "llama"])
def test_attention_implementation_is_the_backbones_and_can_be_changed(kind):
    model = tiny_model(kind)
    expected = model(HIDDEN).logits
    for name in ("eager", "sdpa"):
        model.set_attn_implementation(name)
        assert model.backbone.config._attn_implementation == name
        assert model.config.text_config._attn_implementation == name
        assert torch.allclose(model(HIDDEN).logits, expected, atol=1e-5)


def test_text_without_a_prompt_is_the_same_by_every_name(tiny_tokenizer):
    size, mask = len(tiny_tokenizer), tiny_tokenizer.mask_token_id
    special = {"eos_token_id": tiny_tokenizer.eos_token_id, "pad_token_id": 0}
    backbone = tiny_backbone(vocab_size=size, **special)
    model = CoDDModel.from_backbone(backbone, random_head(size, mask_token_id=mask))
    pipe = CoDDPipeline(model=model, scheduler=CoDDScheduler(), tokenizer=tiny_tokenizer)
    pipe.set_progress_bar_config(disable=True)
    kwargs = {"block_length": 4, "num_inference_steps": 2, "sampling": "marginal"}
    empty = torch.zeros(2, 0, dtype=torch.long)
    expected = model.generate(empty, max_new_tokens=6, **kwargs)
    assert expected.shape == (2, 6)
    assert torch.equal(expected[0], expected[1])
    for inputs in ([[], []], np.zeros((2, 0)), [torch.tensor([])] * 2):
        assert torch.equal(model.generate(inputs, max_new_tokens=6, **kwargs), expected)
    assert torch.equal(model.generate(max_new_tokens=6, **kwargs), expected[:1])
    kwargs |= {"gen_length": 6}
    output = pipe("", use_chat_template=False, **kwargs)
    assert torch.equal(output.sequences, expected[:1])
    assert torch.equal(pipe(input_ids=[[]], **kwargs).sequences, expected[:1])
    both = pipe(["Tom has", ""], use_chat_template=False, **kwargs).sequences
    assert torch.equal(both[1:], expected[:1])
    ours = {**SHORT, "do_sample": False}
    text = pipeline("text-generation", model=model, tokenizer=tiny_tokenizer)("", **ours)
    assert text[0]["generated_text"] == output.texts[0]


def test_a_mask_token_that_was_set_beyond_the_vocabulary_is_named():
    model = tiny_model()
    model.config.mask_token_id = 12
    with pytest.raises(ValueError, match="`mask_token_id` must be at most 11, got 12"):
        model.generate(IDS, max_new_tokens=4)
