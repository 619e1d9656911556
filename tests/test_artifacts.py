"""Promises of the three artifacts: each loads from the others' entry points, and safely."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import load_file
from transformers import AutoConfig

from codd_hf import CoDDHead, CoDDHeadConfig, CoDDModel, CoDDPipeline, CoDDScheduler
from codd_hf.backbones import execution_device
from tiny import random_head, tiny_backbone

MASK = 1
IDS = torch.tensor([[10, 11, MASK, 12, MASK, MASK]])
HUB_ID = "somebody/head"


def coupled(model: CoDDModel) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS, coupling="marginal").logits.softmax(-1)


@pytest.fixture(scope="module")
def folders(tiny_tokenizer, tmp_path_factory):
    root, size = tmp_path_factory.mktemp("artifacts"), len(tiny_tokenizer)
    tiny_backbone(vocab_size=size).save_pretrained(root / "backbone")
    tiny_tokenizer.save_pretrained(root / "backbone")
    head = random_head(
        size,
        mask_token_id=MASK,
        forbidden_token_ids=[0],
        base_model_name_or_path=str(root / "backbone"),
    )
    head.save_pretrained(root / "head")
    model = CoDDModel.from_backbone(root / "backbone", head)
    model.save_pretrained(root / "model", max_shard_size="20KB")
    assert (root / "model" / "model.safetensors.index.json").exists()
    tiny_tokenizer.save_pretrained(root / "model")
    pipe = CoDDPipeline(model, CoDDScheduler(sampling="marginal"), tiny_tokenizer)
    pipe.save_pretrained(root / "pipeline")
    shutil.copytree(root / "pipeline", root / "nested" / "inside")
    return root


@pytest.fixture(scope="module")
def expected(folders):
    return coupled(CoDDModel.from_pretrained(folders / "model"))


@pytest.mark.parametrize("artifact", ["head", "model", "pipeline"])
def test_model_and_pipeline_load_from_each_artifact(artifact, folders, expected):
    assert torch.equal(coupled(CoDDModel.from_pretrained(folders / artifact)), expected)
    pipe = CoDDPipeline.from_pretrained(folders / artifact)
    pipe.set_progress_bar_config(disable=True)
    assert torch.equal(coupled(pipe.model), expected)
    decode = {"gen_length": 8, "block_length": 4, "num_inference_steps": 4, "sampling": "marginal"}
    reference = CoDDPipeline.from_pretrained(folders / "pipeline")
    reference.set_progress_bar_config(disable=True)
    assert pipe("Tom has", **decode).texts == reference("Tom has", **decode).texts


@pytest.mark.parametrize("artifact", ["head", "model", "pipeline"])
def test_head_loads_from_each_artifact_and_joins_another_copy_of_the_backbone(
    artifact, folders, expected, caplog
):
    head = CoDDHead.from_pretrained(folders / artifact)
    stored = CoDDHead.from_pretrained(folders / "head").state_dict()
    assert all(torch.equal(head.state_dict()[name], tensor) for name, tensor in stored.items())
    assert not caplog.records
    model = CoDDModel.from_backbone(folders / "backbone", folders / artifact)
    assert torch.equal(coupled(model), expected)


def test_subfolders_are_followed(folders, expected):
    kwargs = {"subfolder": "inside"}
    assert torch.equal(coupled(CoDDModel.from_pretrained(folders / "nested", **kwargs)), expected)
    pipe = CoDDPipeline.from_pretrained(folders / "nested", **kwargs)
    assert torch.equal(coupled(pipe.model), expected)
    model = CoDDModel.from_pretrained(folders / "nested", subfolder="inside/model")
    assert torch.equal(coupled(model), expected)
    head = CoDDHead.from_pretrained(folders, subfolder="head")
    assert torch.equal(head.emission, CoDDHead.from_pretrained(folders / "head").emission)


def test_backbone_with_a_head_loads_as_a_pipeline(folders, expected):
    pipe = CoDDPipeline.from_pretrained(folders / "backbone", head=folders / "head")
    assert torch.equal(coupled(pipe.model), expected)
    bare = CoDDPipeline.from_pretrained(folders / "backbone", coupling="marginal")
    assert (bare.model.coupling_head, bare.model.config.coupling) == (None, "marginal")


@pytest.mark.parametrize("artifact", ["head", "model", "pipeline", "backbone"])
def test_dtype_reaches_the_backbone_and_spares_the_head(artifact, folders):
    entry = CoDDModel.from_pretrained
    if artifact in ("pipeline", "backbone"):
        model = CoDDPipeline.from_pretrained(folders / artifact, torch_dtype=torch.bfloat16).model
    else:
        model = entry(folders / artifact, dtype=torch.bfloat16)
    assert {p.dtype for p in model.backbone.parameters()} == {torch.bfloat16}
    if artifact != "backbone":
        assert {p.dtype for p in model.coupling_head.parameters()} == {torch.float32}


@pytest.mark.parametrize("artifact", ["head", "model"])
def test_settings_of_the_model_can_be_given_on_loading(artifact, folders):
    model = CoDDModel.from_pretrained(folders / artifact, coupling="latent")
    assert model.config.coupling == "latent"
    assert model.coupling_head is not None
    assert execution_device(model.backbone) == model.device


def test_backbone_holds_no_head(folders):
    with pytest.raises(ValueError, match="holds a model of type 'llama' without a CoDD head"):
        CoDDHead.from_pretrained(folders / "backbone")


def test_folder_of_nothing_is_said_in_one_sentence(tmp_path):
    for cls in (CoDDHead, CoDDModel):
        with pytest.raises(OSError, match="holds no CoDD head, model or pipeline") as caught:
            cls.from_pretrained(tmp_path)
        assert "\n" not in str(caught.value)


def cached(folder: Path, cache: Path, repo_id: str) -> None:
    """Puts a folder into a cache as if it had been downloaded from the Hub."""
    repository = cache / f"models--{repo_id.replace('/', '--')}"
    commit = "0" * 40
    shutil.copytree(folder, repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)


@pytest.fixture
def downloaded(folders, tmp_path, monkeypatch):
    """A function that makes a downloaded head which names a backbone."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    cache = {"cache_dir": tmp_path / "cache", "local_files_only": True}

    def make(backbone: str) -> dict:
        head = CoDDHead.from_pretrained(folders / "head")
        head.config.base_model_name_or_path = backbone
        head.save_pretrained(tmp_path / "made")
        cached(tmp_path / "made", tmp_path / "cache", HUB_ID)
        return cache

    return make


@pytest.mark.parametrize("trust", [{}, {"trust_remote_code": True, "token": "mine"}])
def test_downloaded_head_may_not_name_a_local_path(trust, folders, downloaded, tmp_path):
    cache = downloaded(str(folders / "backbone"))
    for entry in (CoDDModel.from_pretrained, CoDDPipeline.from_pretrained):
        with pytest.raises(ValueError, match=r"names the local path .*use `CoDDModel.from_back"):
            entry(HUB_ID, **cache, **trust)


def test_downloaded_head_may_not_even_name_a_path_that_is_not_there(downloaded):
    cache = downloaded("../somewhere/else")
    with pytest.raises(ValueError, match="names the local path"):
        CoDDModel.from_pretrained(HUB_ID, **cache)


@pytest.mark.parametrize("trust", [{}, {"trust_remote_code": True}])
def test_head_whose_backbone_brings_code_is_refused_and_the_code_does_not_run(
    trust, downloaded, tmp_path
):
    code, ran = tmp_path / "code", tmp_path / "ran"
    code.mkdir()
    config = {"model_type": "stranger", "auto_map": {"AutoConfig": "evil.Config"}}
    (code / "config.json").write_text(json.dumps(config))
    (code / "evil.py").write_text(f"open({str(ran)!r}, 'w').close()\nclass Config: ...\n")
    cache = downloaded("somebody/code")
    cached(code, tmp_path / "cache", "somebody/code")
    for entry in (CoDDModel.from_pretrained, CoDDPipeline.from_pretrained):
        with pytest.raises(ValueError, match=r"brings its own code.*if you trust.*from_backbone"):
            entry(HUB_ID, **cache, **trust)
    assert not ran.exists()


def test_what_was_given_for_the_head_does_not_reach_the_backbone(folders, downloaded, tmp_path):
    """The backbone's cached revision is main: another one would not be found."""
    cache = downloaded("somebody/backbone")
    cached(folders / "backbone", tmp_path / "cache", "somebody/backbone")
    refs = tmp_path / "cache" / "models--somebody--head" / "refs"
    (refs / "main").rename(refs / "tuned")
    model = CoDDModel.from_pretrained(HUB_ID, revision="tuned", **cache)
    assert model.coupling_head is not None
    with pytest.raises(OSError, match="leave out `local_files_only`"):
        CoDDModel.from_pretrained("somebody/backbone", revision="tuned", **cache)


def test_circuit_is_converted_on_the_way_with_the_mask_token_of_the_backbone(tmp_path):
    pytest.importorskip("codd_hf.conversion")
    source = Path(__file__).parent / "fixtures" / "cat_hmm.jpc"
    from codd_hf.conversion import convert_jpc

    size = convert_jpc(source).config.vocab_size
    (tmp_path / "circuit").mkdir()
    shutil.copy(source, tmp_path / "circuit" / "model.jpc")
    backbone = tiny_backbone(vocab_size=size)
    for head in (source, tmp_path / "circuit"):
        model = CoDDModel.from_backbone(backbone, head, mask_token_id=MASK)
        assert model.coupling_head.config.mask_token_id == MASK
        assert torch.equal(model.coupling_head.emission, convert_jpc(source).emission)
    model.load_head(tmp_path / "circuit", "again")
    assert [*model.heads] == ["default", "again"]


@pytest.mark.parametrize("artifact", ["head", "model", "pipeline", "backbone"])
@pytest.mark.parametrize("dtype", ["bfloat16", "auto", torch.bfloat16])
def test_arguments_for_the_model_reach_it_through_a_pipeline(artifact, dtype, folders):
    pipe = CoDDPipeline.from_pretrained(
        folders / artifact, dtype=dtype, attn_implementation="eager", coupling="latent"
    )
    assert pipe.model.dtype == (torch.float32 if dtype == "auto" else torch.bfloat16)
    assert pipe.model.backbone.config._attn_implementation == "eager"
    assert pipe.model.config.coupling == "latent"


OLD = Path(__file__).parent / "fixtures" / "version_1"


def old_config(**changes) -> dict:
    return json.loads((OLD / "static" / "config.json").read_text()) | changes


@pytest.mark.parametrize("name", ["static", "untied", "tied", "conditioned"])
def test_head_that_version_0_1_saved_gives_the_same_logits(name, tmp_path):
    ids = torch.tensor([[5, 6, 7, 2, 8, 2, 2], [9, 4, 2, 2, 3, 2, 10]])
    model = CoDDModel.from_backbone(tiny_backbone(), OLD / name)
    config = model.coupling_head.config
    assert (config.format_version, config.evidence_temperature) == (2, 1.0)
    assert config.evidence_size == {"untied": 5, "tied": 5}.get(name)
    assert AutoConfig.from_pretrained(OLD / name).to_dict().keys() == config.to_dict().keys()
    expected = load_file(OLD / "logits.safetensors")[name]
    with torch.no_grad():
        torch.testing.assert_close(model(ids, coupling="marginal").logits, expected)
        model.save_pretrained(tmp_path)
        of_model = json.loads((tmp_path / "config.json").read_text())
        of_model["head_config"] |= json.loads((OLD / name / "config.json").read_text())
        (tmp_path / "config.json").write_text(json.dumps(of_model))
        model = CoDDModel.from_pretrained(tmp_path)
        torch.testing.assert_close(model(ids, coupling="marginal").logits, expected)


def test_what_the_caller_says_counts_before_the_file_of_version_0_1():
    changes = {"evidence_size": 3, "evidence_temperature": 0.5}
    config = CoDDHead.from_pretrained(OLD / "tied", **changes).config
    assert (config.evidence_size, config.evidence_temperature) == (3, 0.5)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"structure": "monarch"}, "`structure='monarch'` in a head's configuration is no lon"),
        ({"evidence_dtype": "bfloat16"}, "`evidence_dtype='bfloat16'` in a head's configuration"),
        ({"noise_conditioning": True}, "`noise_conditioning=True` in a head's configuration is no"),
        ({"conditioning": ["latent", "gate"]}, "`conditioning` must list some of latent, copy"),
        ({"conditioning": ["low_rank"]}, "`conditioning` must list some of latent, copy"),
    ],
)
@pytest.mark.parametrize("cls", [CoDDHeadConfig, AutoConfig, CoDDHead])
def test_head_with_a_part_that_is_no_more_is_an_error_that_names_it(cls, changes, said, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(old_config(**changes)))
    with pytest.raises(ValueError, match=f"^{re.escape(said)}"):
        cls.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("changes", "said"),
    [({"format_version": 3}, "upgrade codd-hf"), ({"evidence_tok_k": 3}, "`evidence_tok_k` is no")],
)
def test_head_of_a_later_version_or_with_an_unknown_field_is_refused(changes, said):
    with pytest.raises(ValueError, match=said):
        CoDDHeadConfig.from_dict(old_config(**changes))
