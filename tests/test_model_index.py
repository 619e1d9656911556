"""Promises that the file which describes a pipeline runs and imports nothing."""

from __future__ import annotations

import json
import sys

import pytest

from codd_hf import CoDDModel, CoDDPipeline
from tiny_pipeline import tiny_pipeline

MARK = "codd_marks_that_it_was_imported"


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pipeline")
    tiny_pipeline().save_pretrained(folder)
    return folder


@pytest.fixture
def change_index(saved, tmp_path, monkeypatch):
    """Changes the file; any code that it names would leave a mark."""
    code = f"import sys\nsys.{MARK} = True\nclass CoDDModel: pass\nCoDDScheduler = CoDDModel\n"
    (tmp_path / f"{MARK}.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    index = saved / "model_index.json"
    content = index.read_text()
    beside = [saved / part / f"{MARK}.py" for part in ("", "model", "scheduler", "tokenizer")]
    for file in beside:
        file.write_text(code)
    yield lambda changes: index.write_text(json.dumps(json.loads(content) | changes))
    index.write_text(content)
    for file in beside:
        file.unlink()


OTHERS = [
    {"model": [MARK, "CoDDModel"]},
    {"model": ["codd_hf.modeling_codd", MARK]},
    {"model": None},
    {"scheduler": [MARK, "CoDDScheduler"]},
    {"scheduler": ["diffusers", "DDIMScheduler"]},
]


def test_pipeline_that_names_other_classes_is_refused_and_imports_nothing(saved, change_index):
    for changes in OTHERS:
        change_index(changes)
        with pytest.raises(ValueError, match=rf"^`{next(iter(changes))}` in .* must be .*\.$"):
            CoDDPipeline.from_pretrained(saved)
        assert MARK not in sys.modules
        assert not hasattr(sys, MARK)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"tokenizer": [MARK, "Tokenizer"]},
        {"_class_name": [MARK, "A"]},
        {"checker": [MARK, "B"]},
    ],
)
def test_code_beside_the_parts_is_not_run_whatever_else_is_named(saved, change_index, changes):
    change_index(changes)
    assert CoDDPipeline.from_pretrained(saved).tokenizer is not None
    assert MARK not in sys.modules
    assert not hasattr(sys, MARK)


def test_model_of_a_pipeline_is_found_without_what_the_index_says(saved, change_index):
    change_index({"model": [MARK, "CoDDModel"]})
    assert CoDDModel.from_pretrained(saved).coupling_head is not None
    assert not hasattr(sys, MARK)
