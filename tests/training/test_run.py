"""Promises of a whole training run, from a JSONL file to a pipeline that generates."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from codd_hf import CoDDHead, CoDDModel, CoDDPipeline
from codd_hf.training import train
from codd_hf.training.run import Run


def held_out(folder, name) -> list[dict]:
    return [json.loads(line) for line in (folder / f"{name}.jsonl").read_text().splitlines()]


def test_run_writes_a_pipeline_that_loads_and_generates(trained_pipeline):
    pipe = CoDDPipeline.from_pretrained(trained_pipeline)
    pipe.set_progress_bar_config(disable=True)
    output = pipe(
        ["Where to?", "Where to?"],
        gen_length=8,
        block_length=4,
        num_inference_steps=2,
        generator=[torch.Generator().manual_seed(seed) for seed in (0, 1)],
    )
    assert len(output.texts) == 2
    assert any(name in " ".join(output.texts) for name in ("San", "New", "Los", "Las"))


def test_coupled_text_of_one_pass_keeps_cities_together_more_often(trained_pipeline):
    pipe = CoDDPipeline.from_pretrained(trained_pipeline)
    pipe.set_progress_bar_config(disable=True)
    whole = {"San Diego", "New York", "Los Angeles", "Las Vegas"}
    shares = {}
    for sampling in ("factorized", "latent"):
        texts = pipe(
            ["Where to?"] * 100,
            gen_length=4,
            block_length=4,
            num_inference_steps=1,
            sampling=sampling,
            temperature=1.0,
            generator=[torch.Generator().manual_seed(seed) for seed in range(100)],
        ).texts
        pairs = [" ".join(text.split()[:2]) for text in texts]
        shares[sampling] = sum(pair in whole for pair in pairs) / 100
    assert shares["factorized"] < 0.5
    assert shares["latent"] > shares["factorized"] + 0.3


def test_last_examples_are_held_out_in_order_beside_the_model(trained_pipeline, cities_jsonl):
    rows = [json.loads(line) for line in cities_jsonl.read_text().splitlines()]
    assert held_out(trained_pipeline, "validation") == rows[-32:-16]
    assert held_out(trained_pipeline, "test") == rows[-16:]


def test_weights_are_stored_in_the_dtype_asked_for_and_tied_ones_once(trained_pipeline):
    stored = load_file(trained_pipeline / "model" / "model.safetensors")
    numbers = [tensor for tensor in stored.values() if tensor.is_floating_point()]
    assert {tensor.dtype for tensor in numbers} == {torch.bfloat16}
    model = CoDDModel.from_pretrained(trained_pipeline / "model")
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert sum(t.shape == (model.config.vocab_size, 64) for t in stored.values()) == 1


def test_stage_one_head_is_there_and_is_not_the_fitted_one(trained_pipeline):
    stage_one = CoDDHead.from_pretrained(trained_pipeline / "generative")
    fitted = CoDDModel.from_pretrained(trained_pipeline / "model").coupling_head
    assert stage_one.config.alpha == 1.0
    assert torch.equal(stage_one.token_marginal, fitted.token_marginal)
    assert not torch.equal(stage_one.emission, fitted.emission)


def test_padding_mask_and_role_tokens_are_never_generated_but_end_of_text_is(trained_pipeline):
    pipe = CoDDPipeline.from_pretrained(trained_pipeline)
    config, tokenizer = pipe.model.config, pipe.tokenizer
    roles = tokenizer.convert_tokens_to_ids(["<|user|>", "<|assistant|>"])
    assert config.mask_token_id == tokenizer.mask_token_id
    assert {tokenizer.pad_token_id, *roles} <= set(config.forbidden_token_ids)
    assert tokenizer.eos_token_id not in config.forbidden_token_ids


def test_head_is_fitted_to_a_given_backbone_which_it_names(
    trained_pipeline, trained_config, tmp_path
):
    backbone = str(trained_pipeline.parent / "backbone")
    short = replace(trained_config.conditional, max_steps=2)
    folder = train(
        replace(trained_config, backbone=backbone, output_dir=str(tmp_path), conditional=short)
    )
    model = CoDDModel.from_pretrained(folder / "model")
    head = CoDDHead.from_pretrained(tmp_path / "generative/head")
    assert head.config.base_model_name_or_path == backbone
    # A pipeline has its own backbone and names no path of this machine.
    assert model.coupling_head.config.base_model_name_or_path is None
    assert not (tmp_path / "backbone").exists()
    given = CoDDModel.from_backbone(backbone).backbone.state_dict()
    kept = model.backbone.state_dict()
    assert all(torch.allclose(given[k], kept[k], rtol=1e-2) for k in given)


def test_pipeline_answers_in_the_longest_canvas_of_its_training(trained_pipeline, cities_jsonl):
    pipe = CoDDPipeline.from_pretrained(trained_pipeline)
    rows = [json.loads(line) for line in cities_jsonl.read_text().splitlines()]
    answers = pipe.tokenizer([row["answer"] for row in rows[:-32]], add_special_tokens=False)
    most = max(len(ids) + 1 for ids in answers["input_ids"])  # with the end
    longest = -(-most // 4) * 4 + 4  # and a further window
    backbone = CoDDPipeline.from_pretrained(trained_pipeline.parent / "backbone")
    for own in (pipe, backbone):
        assert own.prepare(prompt="Where to?").call.gen_length == [longest]


def test_head_leaves_the_length_of_the_model_that_it_is_fitted_to(
    trained_pipeline, trained_config, tmp_path
):
    pipe = CoDDPipeline.from_pretrained(trained_pipeline)
    pipe.model.generation_config.max_new_tokens = 12
    pipe.save_pretrained(tmp_path)
    run = Run(replace(trained_config, backbone=str(tmp_path)), ([], [], []))
    run.couple(pipe.model.coupling_head)
    fitted = CoDDPipeline(run.model, pipe.scheduler, pipe.tokenizer)
    assert fitted.prepare(prompt="Where to?").call.gen_length == [12]


def test_missing_dataset_is_an_error_before_anything_is_written(trained_config, tmp_path):
    config = replace(trained_config, dataset="none.jsonl", output_dir=str(tmp_path / "out"))
    with pytest.raises(FileNotFoundError, match=r"none\.jsonl"):
        train(config)
    assert not (tmp_path / "out").exists()


def test_missing_backbone_is_an_error_that_names_it(trained_config, tmp_path):
    config = replace(trained_config, backbone=str(tmp_path / "none"), output_dir=str(tmp_path))
    with pytest.raises((FileNotFoundError, OSError), match="none"):
        train(config)
