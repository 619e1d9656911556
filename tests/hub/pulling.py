"""What users do who load what was shared: run by `test_round_trip.py`, with an empty cache."""

from __future__ import annotations

import os
import re
import sys
import urllib.request
from pathlib import Path
from unittest import mock

import checks
import torch
from huggingface_hub import hf_hub_download
from peft import PeftModel
from pushing import PROMPT, decode, say
from safetensors.torch import load_file
from server import TOKEN

from codd_hf import CoDDHead, CoDDModel, CoDDPipeline, CoDDScheduler
from tiny import random_head


def assert_same(model: torch.nn.Module, work: Path, prefix: str = "") -> None:
    expected = load_file(work / "expected.safetensors")
    expected = {k.removeprefix(prefix): v for k, v in expected.items() if k.startswith(prefix)}
    found = model.state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def assert_one_sentence(error: BaseException, *parts: str) -> None:
    """The message is one line, ends as a sentence does, and names what it must."""
    message = str(error)
    assert "\n" not in message, message
    assert message.endswith("."), message
    assert len(message) < 400, message
    for part in parts:
        assert part in message, (part, message)


def refusal(loader, *arguments, **kwargs) -> BaseException:
    try:
        loader(*arguments, **kwargs)
    except (OSError, ValueError) as error:
        return error
    raise AssertionError(f"nothing was refused: {arguments}, {kwargs}")


def check_head_comes_back_alone(work):
    assert_same(CoDDHead.from_pretrained("tester/head"), work, "coupling_head.")


def check_head_comes_back_with_the_backbone_that_it_names(work):
    model = CoDDModel.from_pretrained("tester/head")
    assert_same(model, work)
    assert torch.equal(decode(model), torch.load(work / "expected_tokens.pt"))


def check_model_comes_back(work):
    model = CoDDModel.from_pretrained("tester/model")
    assert_same(model, work)
    assert torch.equal(decode(model), torch.load(work / "expected_tokens.pt"))


def check_pipeline_comes_back_with_its_scheduler_and_writes_the_same_text(work):
    pipe = CoDDPipeline.from_pretrained("tester/pipeline")
    assert_same(pipe.model, work)
    assert pipe.scheduler.config.temperature == 0.7
    assert say(pipe) == (work / "expected.txt").read_text()


def check_model_comes_back_out_of_the_pipeline(work):
    assert_same(CoDDModel.from_pretrained("tester/pipeline"), work)


def check_pipeline_is_made_of_a_head_or_a_model_with_the_same_text(work):
    for name in ("tester/head", "tester/model"):
        pipe = CoDDPipeline.from_pretrained(name)
        pipe.scheduler = CoDDScheduler(temperature=0.7)
        assert say(pipe) == (work / "expected.txt").read_text()


def check_adapter_with_its_head_comes_back(work):
    model = CoDDModel.from_pretrained("tester/model")
    tuned = PeftModel.from_pretrained(model, "tester/adapter").eval()
    expected = torch.load(work / "expected_adapter.pt")
    assert torch.equal(tuned(PROMPT, coupling="marginal").logits, expected)


def check_head_with_its_lora_comes_back_with_the_backbone_that_it_names(work):
    expected = torch.load(work / "expected_lora.pt")
    for model in (
        CoDDModel.from_pretrained("tester/with-lora"),
        CoDDPipeline.from_pretrained("tester/with-lora").model,
        CoDDModel.from_backbone("tester/backbone", "tester/with-lora"),
    ):
        assert torch.equal(model(PROMPT, coupling="marginal").logits, expected)
    assert_same(CoDDModel.from_pretrained("tester/head"), work)


def check_lines_of_code_in_the_cards_run(work):
    for name in ("tester/head", "tester/model", "tester/pipeline"):
        text = Path(hf_hub_download(name, "README.md")).read_text()
        code = re.search(r"```python\n(.*?)```", text, re.DOTALL)[1]
        assert f'from_pretrained("{name}")' in code
        exec(code, {})


def check_revision_is_honoured(work):
    first, second = (
        CoDDHead.from_pretrained("tester/branches", revision=revision)
        for revision in ("main", "second")
    )
    assert torch.equal(second.initial, random_head(seed=6).initial)
    assert not torch.equal(first.initial, second.initial)


def check_private_repository_needs_the_token(work):
    refusal(CoDDHead.from_pretrained, "tester/private")
    for loader in (CoDDModel.from_pretrained, CoDDPipeline.from_pretrained):
        assert_one_sentence(refusal(loader, "tester/private"), "'tester/private'", "token")
    assert_same(CoDDHead.from_pretrained("tester/private", token=TOKEN), work, "coupling_head.")
    assert_same(CoDDModel.from_pretrained("tester/private", token=TOKEN), work)


def check_cache_dir_is_honoured_by_all_three(work):
    cache = work / "another-cache"
    CoDDModel.from_pretrained("tester/model", cache_dir=cache)
    CoDDModel.from_pretrained("tester/head", cache_dir=cache)
    CoDDPipeline.from_pretrained("tester/pipeline", cache_dir=cache)
    found = {path.name for path in cache.iterdir()}
    assert {f"models--tester--{name}" for name in ("model", "head", "pipeline")} <= found


LOADERS = {
    "tester/model": CoDDModel.from_pretrained,
    "tester/head": CoDDModel.from_pretrained,
    "tester/pipeline": CoDDPipeline.from_pretrained,
}


def check_wrong_revision_is_said_in_one_sentence(work):
    for name, loader in LOADERS.items():
        error = refusal(loader, name, revision="no-such-branch")
        assert_one_sentence(error, repr(name), "no-such-branch")


def check_missing_repository_is_said_in_one_sentence(work):
    for loader in LOADERS.values():
        assert_one_sentence(refusal(loader, "tester/no-such-thing"), "'tester/no-such-thing'")


def check_repository_without_the_files_is_said_in_one_sentence(work):
    for loader in (CoDDModel.from_pretrained, CoDDPipeline.from_pretrained):
        for name in ("tester/no-config", "tester/no-weights"):
            assert_one_sentence(refusal(loader, name), name)


def check_local_files_only_without_the_files_is_said_in_one_sentence(work):
    for name, loader in LOADERS.items():
        error = refusal(loader, name, local_files_only=True, cache_dir=work / "empty-cache")
        assert_one_sentence(error, repr(name), "local_files_only")


def check_head_is_refused_that_names_code_a_path_or_nothing(work):
    for loader in (CoDDModel.from_pretrained, CoDDPipeline.from_pretrained):
        for switches in ({}, {"trust_remote_code": True}):
            error = refusal(loader, "tester/head-of-code", **switches)
            assert_one_sentence(error, "'tester/with-code'")
        error = refusal(loader, "tester/head-of-path")
        assert_one_sentence(error, "'tester/head-of-path'", "local path", "from_backbone")
        error = refusal(loader, "tester/head-of-nothing")
        assert_one_sentence(error, "'tester/nowhere'")
    error = refusal(CoDDModel.from_backbone, "tester/nowhere", head="tester/head")
    assert_one_sentence(error, "'tester/nowhere'")


def check_without_network_what_is_cached_loads_and_what_is_not_says_so(work):
    stop = urllib.request.Request(os.environ["HF_ENDPOINT"] + "/stop", method="POST")
    urllib.request.urlopen(stop).close()
    # huggingface_hub sleeps between attempts.
    with mock.patch("time.sleep", side_effect=AssertionError("what is cached need not wait")):
        for switches in ({}, {"local_files_only": True}):
            for name in ("tester/model", "tester/head", "tester/pipeline"):
                assert_same(CoDDModel.from_pretrained(name, **switches), work)
                pipe = CoDDPipeline.from_pretrained(name, **switches)
                pipe.scheduler = CoDDScheduler(temperature=0.7)
                assert say(pipe) == (work / "expected.txt").read_text()
            assert_same(CoDDModel.from_backbone("tester/backbone", "tester/head", **switches), work)
    with mock.patch("time.sleep"):
        for name, loader in LOADERS.items():
            error = refusal(loader, name, cache_dir=work / "empty-cache")
            assert_one_sentence(error, repr(name), "connection")


if __name__ == "__main__":
    sys.exit(checks.main(globals()))
