"""What a user does who shares: run by `test_round_trip.py`, against the local server."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import checks
import torch
from huggingface_hub import EvalResult, ModelCard, create_repo, upload_folder
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from transformers import AutoTokenizer

from codd_hf import CoDDModel, CoDDPipeline, CoDDScheduler
from codd_hf.training.run import train
from codd_hf.training.settings import ConditionalConfig, GenerativeConfig, TrainConfig
from tiny import random_head, tiny_backbone

SECRET = {"role": "assistant", "content": "Tom has 3 boxes of secret eggs."}
PROMPT = torch.tensor([[5, 6, 7, 8]])
TEXT = "Tom has"


def refusal(push, *arguments, **kwargs) -> str:
    try:
        push(*arguments, **kwargs)
    except ValueError as error:
        return str(error)
    raise AssertionError(f"nothing was refused: {arguments}, {kwargs}")


def coupled(work: Path) -> CoDDModel:
    """The model that is shared: its backbone is on the server as `tester/backbone`."""
    tokenizer = AutoTokenizer.from_pretrained(work / "tokenizer")
    vocab = len(tokenizer)
    mask = tokenizer.mask_token_id
    backbone = tiny_backbone("llama", vocab, eos_token_id=2, mask_token_id=mask)
    head = random_head(
        vocab,
        mask_token_id=mask,
        conditioning=["latent"],
        context_size=16,
        base_model_name_or_path="tester/backbone",
    )
    model = CoDDModel.from_backbone(backbone, head)
    model.generation_config.max_new_tokens = 32  # it has 128 positions for prompt and answer
    return model


def decode(model: CoDDModel) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return model.generate(PROMPT, gen_length=12, generator=generator)


def say(pipe: CoDDPipeline) -> str:
    generator = torch.Generator().manual_seed(0)
    return pipe(TEXT, gen_length=12, num_inference_steps=6, generator=generator).texts[0]


def check_backbone_is_pushed_by_transformers(work):
    model = coupled(work)
    model.backbone.push_to_hub("tester/backbone")
    AutoTokenizer.from_pretrained(work / "tokenizer").push_to_hub("tester/backbone")


def check_head_model_and_pipeline_are_pushed(work):
    model = coupled(work)
    tokenizer = AutoTokenizer.from_pretrained(work / "tokenizer")
    pipe = CoDDPipeline(model, CoDDScheduler(temperature=0.7), tokenizer)
    commit = model.coupling_head.push_to_hub("tester/head", license="mit", datasets="openai/gsm8k")
    assert commit.repo_url.repo_id == "tester/head"
    results = [EvalResult("text-generation", "openai/gsm8k", "GSM8K", "accuracy", 0.5)]
    model.push_to_hub("model", license="mit", eval_results=results)
    tokenizer.push_to_hub("tester/model")
    pipe.push_to_hub("tester/pipeline", commit_message="The first pipeline")
    save_file(model.state_dict(), work / "expected.safetensors")
    torch.save(decode(model), work / "expected_tokens.pt")
    (work / "expected.txt").write_text(say(pipe))


def check_adapter_with_its_head_is_pushed_by_peft(work):
    torch.manual_seed(3)
    config = LoraConfig(
        r=2,
        target_modules=["q_proj", "v_proj"],
        modules_to_save=["coupling_head"],
        init_lora_weights=False,
    )
    tuned = get_peft_model(coupled(work), config)
    tuned.push_to_hub("tester/adapter")
    torch.save(tuned(PROMPT, coupling="marginal").logits.detach(), work / "expected_adapter.pt")


def check_private_head_goes_to_a_private_repository(work):
    coupled(work).coupling_head.push_to_hub("tester/private", private=True)


def check_branches_and_pull_requests_leave_the_main_branch_alone(work):
    head = random_head(seed=5)
    assert head.push_to_hub("tester/branches").pr_url is None
    random_head(seed=6).push_to_hub("tester/branches", revision="second")
    assert random_head(seed=7).push_to_hub("tester/branches", create_pr=True).pr_url is not None


def check_saving_pushes_as_well_if_asked(work):
    random_head().save_pretrained(work / "saved-head", push_to_hub=True, license="mit")
    random_head().save_pretrained(work / "named", push_to_hub=True, repo_id="tester/by-name")


def check_card_that_somebody_wrote_keeps_its_text(work):
    head = random_head()
    ModelCard("---\ntags:\n- mine\n---\n\nMy own words.\n").push_to_hub("tester/branches")
    head.push_to_hub("tester/branches", license="apache-2.0")


def check_placeholder_of_an_earlier_push_gives_way_to_the_card(work):
    AutoTokenizer.from_pretrained(work / "tokenizer").push_to_hub("tester/tokenizer-first")
    coupled(work).push_to_hub("tester/tokenizer-first")


def check_card_that_the_hub_refuses_creates_no_repository(work):
    message = refusal(random_head().push_to_hub, "tester/refused", license="my licence")
    assert '"license" must be one of' in message


def check_converted_circuit_becomes_public_with_a_licence_only(work):
    head = random_head()
    head.config.converted_from = "somebody/circuit"
    model = CoDDModel.from_backbone(tiny_backbone(), head)
    pipe = CoDDPipeline(model, CoDDScheduler())
    for part in (head, model, pipe):
        message = refusal(part.push_to_hub, "tester/refused")
        assert "converted from somebody/circuit" in message
        assert "`license=" in message
    head.push_to_hub("tester/converted-private", private=True)
    head.push_to_hub("tester/converted", license="mit")
    random_head().push_to_hub("tester/already-public")
    message = refusal(head.push_to_hub, "tester/already-public", private=True)
    assert "converted from" in message


def check_paths_of_this_machine_are_not_pushed(work):
    coupled(work).backbone.save_pretrained(work / "local-backbone")
    head = coupled(work).coupling_head
    head.config.base_model_name_or_path = str(work / "local-backbone")
    head.save_pretrained(work / "local-head")
    local = CoDDModel.from_backbone(work / "local-backbone", work / "local-head")
    torch.manual_seed(0)
    tuned = get_peft_model(local, LoraConfig(r=2, target_modules=["q_proj"])).get_base_model()
    tuned.coupling_head.push_to_hub("tester/clean-head")
    tuned.push_to_hub("tester/clean-model")
    CoDDPipeline(tuned, CoDDScheduler()).save_pretrained(work / "local-pipeline")
    CoDDPipeline.from_pretrained(work / "local-pipeline").push_to_hub("tester/clean-pipeline")
    named = CoDDModel.from_pretrained("tester/head")
    CoDDPipeline(named, CoDDScheduler()).push_to_hub("tester/named-pipeline")


def check_head_and_the_lora_that_belongs_to_it_are_pushed_together(work):
    model = CoDDModel.from_pretrained("tester/head")
    torch.manual_seed(5)
    lora = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    get_peft_model(model.backbone, lora).save_pretrained(work / "lora-of-backbone")
    model = CoDDModel.from_backbone("tester/backbone", "tester/head", work / "lora-of-backbone")
    model.save_head(work / "with-lora", push_to_hub=True, repo_id="tester/with-lora")
    torch.save(model(PROMPT, coupling="marginal").logits.detach(), work / "expected_lora.pt")


def training_config(work: Path, name: str, **changes) -> TrainConfig:
    """A run of seconds on the shared backbone."""
    rows = [{"messages": [{"role": "user", "content": TEXT}, SECRET]}] * 12
    (work / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = {
        "num_validation": 4,
        "num_latents": 3,
        "window_length": 4,
        "generative": GenerativeConfig(num_epochs=1),
        "conditional": ConditionalConfig(max_steps=1, num_draws=1, num_validation_draws=1),
        "push_to_hub": True,
    }
    return TrainConfig(
        str(work / "data.jsonl"),
        str(work / name),
        backbone="tester/backbone",
        **settings | changes,
    )


def check_training_ends_on_the_hub(work):
    config = training_config(work, "trained")
    train(config)
    train(replace(config, num_gap_problems=0))  # which writes the card anew
    private = replace(config, num_gap_problems=0, hub_model_id="tester/private-run")
    train(replace(private, hub_private=True))
    random_head().push_to_hub("tester/own-card")
    ModelCard("---\nlicense: mit\n---\n\nMy own words.\n").push_to_hub("tester/own-card")
    train(replace(config, num_gap_problems=0, hub_model_id="tester/own-card"))


def check_private_run_is_not_pushed_to_a_public_repository(work):
    config = training_config(work, "never", hub_model_id="tester/trained", hub_private=True)
    assert "is public" in refusal(train, config)
    assert not (work / "never").exists()


def check_head_names_backbones_that_a_stranger_must_not_reach(work):
    name = "tester/with-code"
    random_head(base_model_name_or_path=name).push_to_hub("tester/head-of-code")
    here = str(work / "tokenizer")
    random_head(base_model_name_or_path=here).save_pretrained(work / "head-of-path")
    create_repo("tester/head-of-path")
    upload_folder(repo_id="tester/head-of-path", folder_path=work / "head-of-path")
    random_head(base_model_name_or_path="tester/nowhere").push_to_hub("tester/head-of-nothing")


if __name__ == "__main__":
    sys.exit(checks.main(globals()))
