"""A head is trained for a backbone of any family, decodes, is shared and comes back by its id."""

from __future__ import annotations

import json

import pytest
from checks import run_script
from server import TOKEN, LocalHub

from codd_hf.data.tokenizers import train_tokenizer
from families import FAMILIES, checkpoint
from tiny import SENTENCES

FIRST = ("llada2",)
"""With blocks, experts, and weights that are cut on loading."""

OTHERS = sorted({*FAMILIES} - {*FIRST})
GROUPS = [pytest.param(OTHERS[i::4], marks=pytest.mark.slow) for i in range(4)]


@pytest.mark.parametrize("kinds", [FIRST, *GROUPS], ids=" ".join)
def test_head_and_lora_are_trained_for_a_family_and_come_back_by_id(kinds, tmp_path):
    tokenizer = train_tokenizer(SENTENCES, vocab_size=300)
    rows = [{"question": f"{i} eggs?", "answer": SENTENCES[i % 3]} for i in range(12)]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "kinds.json").write_text(json.dumps([*kinds]))
    special = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    sizes = {"vocab_size": len(tokenizer), "num_hidden_layers": 2, "max_position_embeddings": 256}
    with LocalHub() as hub:
        for kind in kinds:
            folder = checkpoint(kind, tmp_path / "backbones" / kind, **special | sizes)
            tokenizer.save_pretrained(folder)
            hub.add(f"tester/{kind}", folder)
        environment = hub.environment(tmp_path / "home") | {"HF_TOKEN": TOKEN}
        report = run_script("training_families", tmp_path, environment)
    failures = {kind: failure for kind, failure in report.items() if failure}
    assert len(report) == len(kinds)
    assert not failures, "\n".join(failures.values())
