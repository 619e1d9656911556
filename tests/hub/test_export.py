"""Promises of the code that a repository carries along for those without codd-hf."""

from __future__ import annotations

import ast
import importlib.util
import json
import sysconfig
from pathlib import Path

import checks
import pytest
import torch
from safetensors.torch import save_file
from server import LocalHub

from codd_hf import CoDDHead, CoDDModel
from codd_hf.hub import export_code
from tiny import random_head, tiny_model

SCRIPT = "loading_without_the_package"
CONDITIONED = {"conditioning": ["latent"], "context_size": 16}


def libraries_without(work: Path, *left_out: str) -> Path:
    """A folder with what is installed, some libraries left out."""
    folder = work / "libraries"
    folder.mkdir()
    for entry in Path(sysconfig.get_path("purelib")).iterdir():
        if not entry.name.startswith(left_out):
            (folder / entry.name).symlink_to(entry)
    return folder


@pytest.fixture(scope="module")
def without_the_package(tmp_path_factory):
    """The report of a process in which codd-hf cannot be imported."""
    work = tmp_path_factory.mktemp("export")
    model = tiny_model(**CONDITIONED)
    model.save_pretrained(work / "model", custom_code=True)
    model.coupling_head.save_pretrained(work / "head", custom_code=True)
    generator = torch.Generator().manual_seed(0)
    tokens = model.generate(torch.tensor([[5, 6, 7]]), gen_length=12, generator=generator)
    torch.save(tokens, work / "tokens.pt")
    inputs = {"logits": torch.randn(2, 4, 12), "hidden": torch.randn(2, 4, 16)}
    with torch.no_grad():
        marginals = model.coupling_head(
            inputs["logits"], last_hidden_state=inputs["hidden"]
        ).marginals
    save_file({**inputs, "marginals": marginals.contiguous()}, work / "marginals.safetensors")
    with LocalHub() as hub:
        hub.add("tester/model", work / "model")
        libraries = {"PYTHONPATH": str(libraries_without(work, "peft", "accelerate"))}
        environment = hub.environment(work / "home") | libraries
        return checks.run_script(SCRIPT, work, environment, "-S")


@pytest.mark.parametrize("name", checks.names_in(SCRIPT))
def test_user_without_the_package(name, without_the_package):
    failure = without_the_package[name]
    assert failure is None, failure


def test_code_is_the_same_each_time_and_flat(tmp_path):
    for name in ("one", "two"):
        random_head().save_pretrained(tmp_path / name, custom_code=True)
    sources = {path.name: path.read_text() for path in (tmp_path / "one").glob("*.py")}
    for name, source in sources.items():
        assert (tmp_path / "two" / name).read_text() == source
        imported = [n for n in ast.walk(ast.parse(source)) if isinstance(n, ast.ImportFrom)]
        assert not [n.module for n in imported if "codd_hf" in (n.module or "")]
        for node in imported:
            if node.level and node.module:
                assert f"{node.module}.py" in sources
    assert "codd_modeling_head.py" in sources
    assert "modeling_codd.py" not in sources  # a head needs no model


def test_configuration_points_to_the_code_and_the_package_ignores_it(tmp_path):
    tiny_model().save_pretrained(tmp_path, custom_code=True)
    auto_map = json.loads((tmp_path / "config.json").read_text())["auto_map"]
    assert auto_map == {
        "AutoConfig": "configuration_codd.CoDDConfig",
        "AutoModel": "modeling_codd.CoDDModel",
        "AutoModelForCausalLM": "modeling_codd.CoDDModel",
    }
    assert type(CoDDModel.from_pretrained(tmp_path)) is CoDDModel


def test_saving_without_the_code_points_to_none(tmp_path):
    tiny_model().save_pretrained(tmp_path / "with", custom_code=True)
    CoDDModel.from_pretrained(tmp_path / "with").save_pretrained(tmp_path / "without")
    assert not list((tmp_path / "without").glob("*.py"))
    assert "auto_map" not in json.loads((tmp_path / "without" / "config.json").read_text())
    assert "trust_remote_code" not in (tmp_path / "without" / "README.md").read_text()


def test_code_can_be_added_to_a_folder_that_was_saved_before(tmp_path):
    random_head().save_pretrained(tmp_path)
    assert "codd_circuits_chain.py" in export_code(tmp_path, CoDDHead)
    with pytest.raises(FileNotFoundError):
        export_code(tmp_path / "nowhere", CoDDHead)


def test_package_is_there_in_this_process():
    """Else the process without it would prove nothing."""
    assert importlib.util.find_spec("codd_hf") is not None
