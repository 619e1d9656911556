"""Promises to those who read the code: imports go one way."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import torch

import codd_hf
from codd_hf import CoDDModel, default_model
from codd_hf.decoding import loop
from codd_hf.decoding.step import CanvasReader

ROOT = Path(__file__).parent.parent
LINT = "from importlinter.cli import lint_imports_command; lint_imports_command()"


def test_imports_go_one_way():
    # In a process of its own, since it switches off all loggers that there are.
    command = [sys.executable, "-c", LINT, "--no-cache"]
    told = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert told.returncode == 0, told.stdout + told.stderr
    assert "1 kept, 0 broken" in told.stdout


def files_of(call, warmed_up: bool = False) -> list[str]:
    """The files of the package that a call passes."""
    root, passed = str(Path(codd_hf.__file__).parent), set()

    def watch(frame, event, argument):
        file = frame.f_code.co_filename
        if event == "call" and file.startswith(root):
            passed.add(file.removeprefix(root + "/"))

    if not warmed_up:
        call()  # imports are not counted
    sys.setprofile(watch)
    try:
        call()
    finally:
        sys.setprofile(None)
    return sorted(passed)


def test_loading_the_embedded_model_passes_eight_files():
    load, folder = CoDDModel.from_pretrained, Path(default_model(), "model")
    passed = files_of(lambda: load(folder))
    print(len(passed), "files:", *passed)
    assert len(passed) <= 8


def test_a_step_of_the_embedded_model_passes_few_files(monkeypatch):
    """One pass of the loop, from the backbone to the tokens on the canvas."""
    model, passed = CoDDModel.from_pretrained(Path(default_model(), "model")), []
    reads, steps = CanvasReader.read, loop.take_step

    def watched(function):
        def run(*args):
            passed.extend(files_of(lambda: function(*args), warmed_up=True))
            return function(*args)

        return run

    call = {"max_new_tokens": 32, "num_inference_steps": 3}
    model.generate(torch.tensor([[5, 6, 7]]), **call)
    monkeypatch.setattr(CanvasReader, "read", watched(reads))
    monkeypatch.setattr(loop, "take_step", watched(steps))
    model.generate(torch.tensor([[5, 6, 7]]), **call)
    files = sorted({*passed})
    print(len(files), "files:", *files)
    assert len(files) <= 14


def is_docstring(node: ast.stmt) -> bool:
    value = getattr(node, "value", None)
    is_text = isinstance(value, ast.Constant) and isinstance(value.value, str)
    return isinstance(node, ast.Expr) and is_text


def test_package_grows_no_larger():
    lines = statements = 0
    for path in Path(codd_hf.__file__).parent.rglob("*.py"):
        text = path.read_text(encoding="utf-8")
        nodes = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.stmt)]
        length = len(text.splitlines())
        assert length <= 400, f"{path} has {length} lines"
        lines += length
        statements += sum(not is_docstring(node) for node in nodes)
    print(lines, "lines,", statements, "statements")
    assert lines <= 18_426
    assert statements <= 9_245
