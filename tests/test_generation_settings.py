"""Promises of what a call does where it does not say: `generate`, pipelines and commands alike."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from transformers import GenerationConfig, pipeline

from codd_hf import CoDDModel, CoDDPipeline, CoDDScheduler, default_model
from codd_hf.cli import main
from codd_hf.decoding.choices import entries, settings_of, with_settings_of
from tiny import random_head, tiny_backbone
from tiny_pipeline import tiny_pipeline

SETTINGS = {
    "default": {},
    "greedy": {"sampling": "any_order", "evidence_temperature": 0.7},
    "drawn": {"sampling": "latent", "temperature": 0.8, "top_k": 20, "top_p": 0.9},
    "limits without a draw": {"sampling": "marginal", "top_k": 3, "strategy": "margin"},
    "at random": {"sampling": "any_order", "strategy": "random"},
    "forbidding": {"sampling": "viterbi", "forbidden_token_ids": [20, 21], "threshold": 0.5},
}
PROMPT = [40, 41, 42]


def of_pipe(pipe, **call) -> list[int]:
    torch.manual_seed(0)
    return pipe(input_ids=PROMPT, output_type="seq", **call).sequences[0].tolist()


def of_model(model, **call) -> list[int]:
    torch.manual_seed(0)
    return model.generate(torch.tensor([PROMPT]), **call)[0, len(PROMPT) :].tolist()


@pytest.mark.parametrize("name", SETTINGS)
def test_folder_of_a_pipeline_decodes_alike_by_every_door(name, tmp_path):
    tiny_pipeline(**SETTINGS[name]).save_pretrained(tmp_path)
    pipe = CoDDPipeline.from_pretrained(tmp_path)
    expected = of_pipe(pipe, gen_length=20)
    model = CoDDModel.from_pretrained(tmp_path)
    assert of_model(model, max_new_tokens=20) == expected
    assert of_model(pipe.model, max_new_tokens=20) == expected
    assert of_pipe(CoDDPipeline.from_pretrained(tmp_path / "model"), gen_length=20) == expected
    model.save_pretrained(tmp_path / "again")
    again = CoDDPipeline.from_pretrained(tmp_path / "again")
    assert of_pipe(again, gen_length=20) == expected
    assert again.scheduler.settings == pipe.scheduler.settings
    warmer = {"temperature": 0.5, "gen_length": 20}
    assert of_model(model, **warmer) == of_pipe(pipe, **warmer)


def test_embedded_model_decodes_alike_by_every_door(capsys):
    pipe = CoDDPipeline.from_pretrained(default_model())
    pipe.set_progress_bar_config(disable=True)
    model = CoDDModel.from_pretrained(default_model())
    prompt, few = "Tom has 3 eggs and", {"max_new_tokens": 32}
    expected = pipe(prompt, use_chat_template=False, gen_length=32).texts[0]
    ids = pipe.tokenizer(prompt, return_tensors="pt")["input_ids"]
    for own in (model, pipe.model):
        output = own.generate(ids, **few)[0, ids.shape[1] :]
        assert pipe.tokenizer.decode(output, skip_special_tokens=True) == expected
    generator = pipeline("text-generation", model=model, tokenizer=pipe.tokenizer)
    (answer,) = generator(prompt, return_full_text=False, **few)
    assert answer["generated_text"] == expected
    (greedy,) = generator(prompt, return_full_text=False, do_sample=False, **few)
    assert greedy == answer
    argv = ["generate", "--no-chat-template", prompt, "--gen-length", "32"]
    assert main(argv) == 0
    assert capsys.readouterr().out.strip() == expected.strip()


@pytest.mark.parametrize(
    ("call", "own", "temperature"),
    [
        ({}, {}, 0.0),
        ({}, {"do_sample": False, "temperature": 0.7}, 0.0),
        ({}, {"do_sample": True}, 1.0),
        ({}, {"do_sample": True, "temperature": 0.3}, 0.3),
        ({"do_sample": False}, {"do_sample": True, "temperature": 0.3}, 0.0),
        ({"do_sample": False, "temperature": 0.7}, {}, 0.0),
        ({"do_sample": True}, {"do_sample": False}, 1.0),
        ({"do_sample": True}, {"do_sample": True, "temperature": 0.3}, 0.3),
        ({"temperature": 0.6}, {"do_sample": False}, 0.6),
        ({"temperature": 0}, {"do_sample": True, "temperature": 0.3}, 0.0),
    ],
)
def test_call_counts_before_the_model_in_whether_and_how_to_sample(
    call, own, temperature, monkeypatch
):
    model = CoDDModel.from_backbone(tiny_backbone(), random_head())
    model.generation_config = GenerationConfig(**own)
    asked = []
    inner = CoDDScheduler.for_call

    def told(self, *args, **overrides):
        scheduler = inner(self, *args, **overrides)
        asked.append(scheduler.settings.temperature)
        return scheduler

    monkeypatch.setattr(CoDDScheduler, "for_call", told)
    model.generate(torch.tensor([[5, 6]]), max_new_tokens=4, **call)
    assert asked[-1] == temperature


def test_sampling_at_temperature_0_is_refused():
    model = CoDDModel.from_backbone(tiny_backbone(), random_head())
    with pytest.raises(ValueError, match="`do_sample=True` draws, and `temperature=0`"):
        model.generate(torch.tensor([[5, 6]]), do_sample=True, temperature=0.0)


def test_scheduler_of_a_call_counts_before_the_model_s_configuration():
    pipe = tiny_pipeline(sampling="viterbi")
    model = pipe.model
    model.generation_config = with_settings_of(
        model.generation_config, CoDDScheduler(sampling="factorized")
    )
    assert of_model(model, max_new_tokens=8, scheduler=pipe.scheduler) == of_pipe(
        pipe, gen_length=8
    )
    assert of_model(model, max_new_tokens=8) == of_pipe(pipe, gen_length=8, sampling="factorized")


def test_evidence_temperature_is_the_call_s_then_the_scheduler_s_then_the_head_s(tmp_path):
    made = tiny_pipeline(sampling="marginal")
    made.model.coupling_head.config.evidence_temperature = 5.0
    made.save_pretrained(tmp_path)
    pipe = CoDDPipeline.from_pretrained(tmp_path)
    model, of_head = pipe.model, of_pipe(pipe, gen_length=20)
    plain = of_pipe(pipe, gen_length=20, evidence_temperature=1.0)
    assert of_head == of_model(model, max_new_tokens=20) != plain
    said = CoDDScheduler(sampling="marginal", evidence_temperature=1.0)
    assert of_model(model, max_new_tokens=20, scheduler=said) == plain
    model.generation_config.evidence_temperature = 1.0
    assert of_model(model, max_new_tokens=20) == plain
    assert of_model(model, max_new_tokens=20, evidence_temperature=5.0) == of_head


def test_lengths_and_steps_come_from_the_call_then_the_model_then_one_rule():
    pipe = tiny_pipeline()
    pipe.model.backbone.config.max_position_embeddings = 256  # the positions are rotary
    passes = pipe(input_ids=PROMPT, output_type="seq").num_passes
    assert (passes, pipe.num_timesteps) == (32, 32)
    assert len(of_model(pipe.model)) == len(of_pipe(pipe)) == 128
    pipe(input_ids=PROMPT, gen_length=10, output_type="seq")
    assert pipe.num_timesteps == 3
    config = pipe.model.generation_config
    config.max_new_tokens, config.num_inference_steps, config.block_length = 12, 4, 6
    assert len(of_model(pipe.model)) == len(of_pipe(pipe)) == 12
    assert pipe.num_timesteps == 4
    assert len(of_pipe(pipe, gen_length=9)) == 9
    rows = pipe(input_ids=[PROMPT, PROMPT], gen_length=[None, 5], output_type="seq").sequences
    assert rows.shape == (2, 12)
    assert (rows[1, 5:] == pipe.tokenizer.pad_token_id).all()
    with pytest.raises(ValueError, match="number of blocks that are decoded, 3 in row 0"):
        of_pipe(pipe, block_length=4, num_inference_steps=2)


def test_model_that_is_given_to_a_pipeline_keeps_its_configuration(tmp_path):
    tiny_pipeline(sampling="viterbi").save_pretrained(tmp_path)
    model = CoDDModel.from_pretrained(tmp_path)
    model.generation_config = config = GenerationConfig(max_new_tokens=7)
    pipe = CoDDPipeline.from_pretrained(tmp_path, model=model)
    assert pipe.model.generation_config is config


@pytest.mark.parametrize("name", SETTINGS)
def test_settings_survive_the_way_through_a_configuration(name, tmp_path):
    scheduler = CoDDScheduler(**SETTINGS[name])
    with_settings_of(GenerationConfig(), scheduler).save_pretrained(tmp_path)
    stored = GenerationConfig.from_pretrained(tmp_path)
    assert CoDDScheduler(**settings_of(entries(stored))).settings == scheduler.settings


def test_setting_of_a_folder_that_is_none_is_refused_by_its_name(tmp_path):
    tiny_pipeline().save_pretrained(tmp_path)
    file = tmp_path / "model" / "generation_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"sampling": "guess"}))
    with pytest.raises(ValueError, match="`sampling` must be one of"):
        CoDDModel.from_pretrained(tmp_path).generate(torch.tensor([PROMPT]))


def ending_pipeline() -> CoDDPipeline:
    """Its model decodes as it does, with tokens that differ from each other."""
    pipe = tiny_pipeline(sampling="marginal", strategy="left_to_right", repetition_penalty=3.0)
    config = pipe.model.generation_config
    pipe.model.generation_config = with_settings_of(config, pipe.scheduler)
    return pipe


ENDS = {
    "list": lambda tokens: list(tokens),
    "tuple": lambda tokens: tuple(tokens),
    "tensor": lambda tokens: torch.tensor(tokens),
    "array": lambda tokens: np.array(tokens),
}


@pytest.mark.parametrize(
    ("where", "form"), [*(("call", form) for form in ENDS), ("configuration", "list")]
)
def test_text_ends_at_the_first_of_several_end_tokens_and_padding_follows(where, form):
    pipe = ending_pipeline()
    plain = of_pipe(pipe, gen_length=12, eos_token_id=[])
    chosen = [plain[6], plain[3]]
    ends, first = ENDS[form](chosen), min(plain.index(token) for token in chosen)
    call = {"eos_token_id": ends} if where == "call" else {}
    if where == "configuration":
        pipe.model.generation_config.eos_token_id = ends
    pad = pipe.tokenizer.pad_token_id
    expected = [*plain[: first + 1], *[pad] * (11 - first)]
    assert of_pipe(pipe, gen_length=12, **call) == expected
    assert of_model(pipe.model, max_new_tokens=12, **call) == expected
    text = pipe(input_ids=PROMPT, gen_length=12, **call).texts[0]
    assert text == pipe.tokenizer.decode(plain[:first], skip_special_tokens=True)


def test_padding_of_a_call_stands_behind_an_end_and_an_end_where_there_is_none():
    pipe = ending_pipeline()
    model, plain = pipe.model, of_pipe(pipe, gen_length=6, eos_token_id=[])
    ends = [plain[2], 99]
    place = plain.index(plain[2])
    padded = of_model(model, max_new_tokens=6, eos_token_id=ends, pad_token_id=17)
    assert padded == [*plain[: place + 1], *[17] * (5 - place)]
    model.config.text_config.pad_token_id = model.generation_config.pad_token_id = None
    ended = of_model(model, max_new_tokens=6, eos_token_id=ends)
    assert ended == [*plain[: place + 1], *[ends[0]] * (5 - place)]


def test_no_end_token_comes_before_its_time_whichever_it_is():
    pipe = ending_pipeline()
    model, plain = pipe.model, of_pipe(pipe, gen_length=8, eos_token_id=[])
    ends = [plain[0], plain[4]]
    output = of_model(model, max_new_tokens=8, eos_token_id=ends, min_new_tokens=8)
    assert not set(output) & set(ends)


def test_rows_that_end_by_different_tokens_are_padded_in_the_result_and_the_stream():
    class Recorder:
        def __init__(self):
            self.values = []

        def put(self, value):
            self.values.append(value)

        def end(self):
            self.values = torch.cat(self.values, dim=1)

    pipe = ending_pipeline()
    rows, recorder = torch.tensor([PROMPT, [50, 51, 52]]), Recorder()
    plain = pipe.model.generate(rows, max_new_tokens=8, eos_token_id=[])[:, 3:]
    ends = [int(plain[0, 1]), int(plain[1, 4])]
    output = pipe.model.generate(
        rows, max_new_tokens=8, eos_token_id=ends, block_length=4, streamer=recorder
    )
    alone = [
        pipe.model.generate(row[None], max_new_tokens=8, eos_token_id=ends, block_length=4)[0]
        for row in rows
    ]
    assert [row.tolist() for row in output] == [row.tolist() for row in alone]
    assert torch.equal(recorder.values, output[:, : recorder.values.shape[1]])
    for row in output[:, 3:].tolist():
        first = next((i for i, token in enumerate(row) if token in ends), len(row))
        assert set(row[first + 1 :]) <= {pipe.tokenizer.pad_token_id}


def test_end_tokens_of_a_backbone_s_generation_configuration_are_the_model_s():
    backbone = tiny_backbone()
    backbone.generation_config = GenerationConfig(
        eos_token_id=[5, 6], pad_token_id=7, temperature=0.6, do_sample=True
    )
    model = CoDDModel.from_backbone(backbone, random_head())
    config = model.generation_config
    assert (config.eos_token_id, config.pad_token_id, config.do_sample) == ([5, 6], 7, None)


@pytest.mark.parametrize("ends", [1.5, True, "2", [2, None], -1, 10_000, [[1, 2]]])
def test_end_tokens_that_are_none_are_refused(ends):
    pipe = tiny_pipeline()
    for door in (of_pipe, of_model):
        with pytest.raises((TypeError, ValueError), match="`eos_token_id` must be"):
            door(pipe if door is of_pipe else pipe.model, eos_token_id=ends)


def test_mask_token_ends_no_text():
    pipe = tiny_pipeline()
    mask = pipe.tokenizer.mask_token_id
    for door in (of_pipe, of_model):
        with pytest.raises(ValueError, match="`eos_token_id` must not hold the mask token"):
            door(pipe if door is of_pipe else pipe.model, gen_length=4, eos_token_id=[3, mask])


def test_end_token_that_the_tokenizer_alone_knows_is_stored_for_the_model(tmp_path):
    pipe = tiny_pipeline(sampling="marginal")
    tokens = pipe.tokenizer.eos_token_id, pipe.tokenizer.pad_token_id
    for config in (pipe.model.config.text_config, pipe.model.generation_config):
        config.eos_token_id = config.pad_token_id = None
    pipe.save_pretrained(tmp_path)
    stored = CoDDModel.from_pretrained(tmp_path).generation_config
    assert (stored.eos_token_id, stored.pad_token_id) == ([tokens[0]], tokens[1])
