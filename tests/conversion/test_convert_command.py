"""`codd-hf convert`: the command writes a head, and refuses in one line."""

from __future__ import annotations

import pytest
from jpc_files import FIXTURES

from codd_hf import CoDDHead
from codd_hf.cli import main

SOURCE = str(FIXTURES / "cat_hmm.jpc")


def failure(capsys, *argv: str) -> str:
    """The one line that a failing command prints."""
    capsys.readouterr()
    assert main(["convert", *argv]) == 1
    captured = capsys.readouterr()
    lines = captured.err.splitlines()
    assert lines[-1].startswith("codd-hf convert: error: ")
    assert captured.out == ""
    return lines[-1]


def test_the_command_writes_a_head(tmp_path, capsys):
    folder = tmp_path / "head"
    arguments = ["--alpha", "1", "--mask-token-id", "19"]
    arguments += ["--base-model", "GSAI-ML/LLaDA-8B-Instruct"]
    assert main(["convert", SOURCE, str(folder), *arguments]) == 0
    assert "8 states, window 6, 20 tokens, alpha 1" in capsys.readouterr().out
    assert "cat_hmm.jpc" in (folder / "README.md").read_text()
    config = CoDDHead.from_pretrained(folder).config
    assert (config.alpha, config.mask_token_id) == (1, 19)
    assert config.base_model_name_or_path == "GSAI-ML/LLaDA-8B-Instruct"


def test_a_folder_that_is_not_empty_is_left_alone(tmp_path, capsys):
    (tmp_path / "README.md").write_text("mine")
    assert "or not empty: give a new folder." in failure(capsys, SOURCE, str(tmp_path))
    assert [path.read_text() for path in tmp_path.iterdir()] == ["mine"]
    assert "is a file, or not empty" in failure(capsys, SOURCE, str(tmp_path / "README.md"))


def test_a_push_asks_for_a_licence_before_anything_is_done(tmp_path, capsys):
    folder = tmp_path / "head"
    line = failure(capsys, SOURCE, str(folder), "--push-to-hub", "someone/head")
    assert "`--push-to-hub` needs `--license`" in line
    assert not folder.exists()


@pytest.mark.parametrize("source", ["nowhere/at/all", "README.md"])
def test_what_is_no_circuit_is_one_line_and_leaves_no_folder(source, tmp_path, capsys):
    (tmp_path / "README.md").write_text("a text")
    line = failure(capsys, str(tmp_path / source), str(tmp_path / "head"))
    assert "there is no file or folder" in line or "`README.md` cannot be converted" in line
    assert not (tmp_path / "head").exists()
