"""Every file of a saved pipeline, damaged in every way, is named in one sentence."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from peft import LoraConfig

from codd_hf import CoDDHead, CoDDModel, CoDDPipeline
from codd_hf.cli import main
from codd_hf.coupling.adapters import add_adapter
from tiny_pipeline import tiny_pipeline

SHORT = ["--gen-length", "8", "--block-length", "4", "--num-inference-steps", "2"]
FILES = (
    "model_index.json",
    "model/config.json",
    "model/generation_config.json",
    "model/model.safetensors.index.json",
    "model/model-00001-of-00002.safetensors",
    "scheduler/scheduler_config.json",
    "tokenizer/tokenizer.json",
    "tokenizer/tokenizer_config.json",
    "tokenizer/chat_template.jinja",
)
DAMAGES = {
    "empty": lambda whole: b"",
    "bytes that are no text": lambda whole: b"\x80\x81\xff\x00" + whole,
    "cut off": lambda whole: whole[: len(whole) // 2],
    "a byte order mark": lambda whole: b"\xef\xbb\xbf" + whole,
    "another encoding": lambda whole: whole.replace(b"e", b"\xe9", 3),
    "a list": lambda whole: b"[]",
    "null": lambda whole: b"null",
    "a string": lambda whole: b'"x"',
    "a number": lambda whole: b"3",
    "nested too deeply": lambda whole: b'{"a":' + b"[" * 100_000,
    "control characters": lambda whole: b'{"\x1b]0;title\x07\xe2\x80\xae": ',
}
OF_TEXT = ("bytes that are no text", "another encoding")
"""What damages a text of any content."""


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A pipeline with its weights in several files."""
    folder, pipe = tmp_path_factory.mktemp("whole"), tiny_pipeline()
    pipe.save_pretrained(folder)
    shutil.rmtree(folder / "model")
    pipe.model.save_pretrained(folder / "model", max_shard_size="40KB")
    return folder


@pytest.fixture
def copy(whole, tmp_path):
    return Path(shutil.copytree(whole, tmp_path / "copy"))


def loaders(file: Path, folder: Path) -> list:
    found = [lambda: CoDDPipeline.from_pretrained(folder)]
    if file.parent.name == "model":
        found += [lambda: CoDDModel.from_pretrained(folder / "model")]
        found += [lambda: CoDDHead.from_pretrained(folder / "model")]
    return found


@pytest.mark.parametrize("name", FILES)
def test_damaged_file_is_named_by_every_loader_and_the_command_line(copy, capsys, name):
    file = copy / name
    content = file.read_bytes()
    for damage in OF_TEXT if name.endswith("jinja") else DAMAGES:
        file.write_bytes(DAMAGES[damage](content))
        for load in loaders(file, copy):
            with pytest.raises(OSError, match=file.name) as raised:
                load()
            assert str(file) in str(raised.value), damage
        capsys.readouterr()
        assert main(["generate", "How many?", "--model", str(copy), *SHORT]) == 1
        error = capsys.readouterr().err
        assert error.startswith("codd-hf generate: error: "), damage
        assert str(file) in error
        assert error.count("\n") == 1
        assert not any(ord(c) < 32 for c in error[:-1])
        assert "\u202e" not in error


@pytest.mark.parametrize("name", FILES)
def test_folder_or_broken_link_in_place_of_a_file_is_named(copy, name):
    file = copy / name
    file.unlink()
    file.mkdir()
    with pytest.raises(OSError, match=file.name):
        CoDDPipeline.from_pretrained(copy)
    file.rmdir()
    file.symlink_to(copy / "nowhere")
    with pytest.raises(OSError, match=file.name):
        CoDDPipeline.from_pretrained(copy)


@pytest.mark.parametrize(
    "content",
    [{}, {"weight_map": []}, {"weight_map": {"a": 1}}, {"weight_map": {"a": "../x.safetensors"}}],
)
def test_index_that_does_not_say_where_the_weights_are_is_named(copy, content):
    (copy / "model" / "model.safetensors.index.json").write_text(json.dumps(content))
    for load in loaders(copy / "model" / "x", copy):
        with pytest.raises(OSError, match=r"model.safetensors.index.json'"):
            load()


def test_missing_shard_is_named(copy):
    (copy / "model" / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(OSError, match=r"names the file 'model-00002-of-00002.safetensors'"):
        CoDDPipeline.from_pretrained(copy)


def test_file_that_is_mended_is_read_again(copy):
    file = copy / "model" / "config.json"
    content = file.read_bytes()
    file.write_bytes(b"{}"[:1])
    with pytest.raises(OSError, match=r"config.json' is damaged"):
        CoDDModel.from_pretrained(copy / "model")
    file.write_bytes(content)
    CoDDModel.from_pretrained(copy / "model")


@pytest.mark.parametrize(
    ("name", "field", "value"),
    [
        ("model/config.json", ("text_config", "hidden_size"), "x"),
        ("model/config.json", ("head_config", "num_latents"), "x"),
        ("model/config.json", ("mask_token_id",), 1.5),
        ("model/generation_config.json", ("pad_token_id",), "x"),
        ("model/generation_config.json", ("eos_token_id",), {}),
        ("scheduler/scheduler_config.json", ("sampling",), "luck"),
        ("scheduler/scheduler_config.json", ("top_k",), "x"),
        ("tokenizer/tokenizer_config.json", ("model_max_length",), "x"),
        ("tokenizer/tokenizer_config.json", ("pad_token",), 3),
        ("tokenizer/tokenizer.json", ("model",), []),
        ("tokenizer/tokenizer.json", ("added_tokens",), 3),
    ],
)
def test_value_of_a_wrong_type_is_one_line(copy, capsys, name, field, value):
    file = copy / name
    content = json.loads(file.read_text())
    part = content
    for key in field[:-1]:
        part = part[key]
    part[field[-1]] = value
    file.write_text(json.dumps(content))
    assert main(["generate", "How many?", "--model", str(copy), *SHORT]) == 1
    error = capsys.readouterr().err
    assert error.splitlines()[-1].startswith("codd-hf generate: error: ")
    assert "Traceback" not in error


@pytest.fixture
def adapted(tmp_path):
    """The folder of a head with an adapter beside it."""
    model = tiny_pipeline().model
    add_adapter(model.backbone, LoraConfig(r=2, target_modules=["q_proj"]), "default")
    model.save_head(tmp_path / "head")
    return tmp_path / "head"


def test_damaged_adapter_is_named_and_half_of_one_is_not_passed_over(adapted):
    backbone = tiny_pipeline().model.backbone
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        file = adapted / "adapter" / name
        content = file.read_bytes()
        for damage in DAMAGES.values():
            file.write_bytes(damage(content))
            with pytest.raises(OSError, match=name) as raised:
                CoDDModel.from_backbone(backbone, adapted)
            assert str(file) in str(raised.value)
        file.unlink()
        with pytest.raises(OSError, match=f"`{name}`"):
            CoDDModel.from_backbone(backbone, adapted)
        file.write_bytes(content)
    assert CoDDModel.from_backbone(backbone, adapted).coupling_head is not None
