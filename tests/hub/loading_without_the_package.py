"""What users do who have not installed codd-hf: run by `test_export.py`, without `site`.

Neither an installed codd-hf (`PYTHONPATH` holds the libraries' folder, whose `.pth` files are not
read) nor the sources can be found in this process; nor can PEFT and accelerate, which a model
without a LoRA or offloaded weights does not need.
"""

from __future__ import annotations

import ast
import importlib
import importlib.util
import sys
from pathlib import Path

import checks
import torch
from safetensors.torch import load_file
from transformers import AutoModel, AutoModelForCausalLM

PROMPT = torch.tensor([[5, 6, 7]])


def check_the_package_is_not_there(work):
    for name in ("codd_hf", "peft", "accelerate"):
        assert importlib.util.find_spec(name) is None
    assert not any("codd_hf" in name for name in sys.modules)


def check_model_in_a_folder_writes_the_same_tokens(work):
    model = AutoModelForCausalLM.from_pretrained(work / "model", trust_remote_code=True)
    assert type(model).__module__.startswith("transformers_modules.")
    generator = torch.Generator().manual_seed(0)
    tokens = model.generate(PROMPT, gen_length=12, generator=generator)
    assert torch.equal(tokens, torch.load(work / "tokens.pt"))
    weights = load_file(work / "model" / "model.safetensors")
    assert all(torch.equal(model.state_dict()[k], v) for k, v in weights.items())


def check_model_on_the_hub_writes_the_same_tokens(work):
    model = AutoModel.from_pretrained("tester/model", trust_remote_code=True)
    generator = torch.Generator().manual_seed(0)
    tokens = model.generate(PROMPT, gen_length=12, generator=generator)
    assert torch.equal(tokens, torch.load(work / "tokens.pt"))


def check_nothing_runs_that_was_not_asked_for(work):
    for name in (work / "model", "tester/model"):
        message = None
        try:
            AutoModelForCausalLM.from_pretrained(name, trust_remote_code=False)
        except ValueError as error:
            message = str(error)
        assert message is not None
        assert "trust_remote_code" in message


def check_head_alone_gives_the_same_distribution(work):
    head = AutoModel.from_pretrained(work / "head", trust_remote_code=True)
    expected = load_file(work / "marginals.safetensors")
    found = head(expected["logits"], last_hidden_state=expected["hidden"]).marginals
    assert torch.equal(found, expected["marginals"])


def check_saving_again_keeps_the_code_and_says_so(work):
    model = AutoModelForCausalLM.from_pretrained(work / "model", trust_remote_code=True)
    model.save_pretrained(work / "again")
    for file in (work / "model").glob("*.py"):
        assert (work / "again" / file.name).read_bytes() == file.read_bytes()
    assert "trust_remote_code=True" in (work / "again" / "README.md").read_text()


def check_every_name_that_a_file_imports_from_another_is_there(work):
    """Also those that are imported late, which loading a model does not try."""
    sys.path.insert(0, str(work))
    for folder in ("model", "head"):
        for file in sorted(Path(work, folder).glob("*.py")):
            importlib.import_module(f"{folder}.{file.stem}")
            for node in ast.walk(ast.parse(file.read_text())):
                if isinstance(node, ast.ImportFrom) and node.level:
                    assert node.level == 1
                    source = importlib.import_module(f"{folder}.{node.module or file.stem}")
                    for alias in node.names if node.module else ():
                        assert hasattr(source, alias.name), (file.name, node.module, alias.name)


if __name__ == "__main__":
    sys.exit(checks.main(globals()))
