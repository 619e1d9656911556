"""The Python blocks of the pages, in order: run by `test_pages.py`, against a local Hub."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import checks
import torch

ROOT = Path(__file__).parents[2]


def run_page(path: str, **names) -> dict:
    """Runs the blocks of a page, where a reader has these names already."""
    text = (ROOT / path).read_text()
    for block in re.finditer(r"```python\n(.*?)```", text, re.DOTALL):
        lines = "\n" * text[: block.start(1)].count("\n")  # a traceback names the line of the page
        exec(compile(lines + block[1], path, "exec"), names)
    return names


def check_readme(work):
    names = run_page("README.md")
    assert names["output"].texts[0]
    assert names["model"].coupling_head.config.num_latents == 256


def check_decode(work):
    assert run_page("examples/decode.md")["output"].texts[0]


def check_couple(work):
    from diffusers import BlockRefinementScheduler, LLaDA2Pipeline
    from peft import LoraConfig, get_peft_model
    from transformers import AutoTokenizer

    from codd_hf import CoDDHead

    tokenizer = AutoTokenizer.from_pretrained("you/my-model")
    names = run_page(
        "examples/couple.md",
        input_ids=torch.tensor([[101, 103, 103, 102]]),
        mask=torch.ones(1, 4, dtype=torch.long),
        prompts=["Who?"],
        answers=["Tom"],
        tokenizer=tokenizer,
        get_peft_model=get_peft_model,
        LoraConfig=LoraConfig,
        LLaDA2Pipeline=LLaDA2Pipeline,
        BlockRefinementScheduler=BlockRefinementScheduler,
    )
    assert set(map(tuple, names["joint"].sample((64,))[:, 0].tolist())) == {(0, 3), (1, 2)}
    large = CoDDHead(names["head"])  # the page says how large it is
    assert f"{large.num_parameters() / 1e6:.1f}" == "6.7"


def check_share(work):
    from codd_hf import CoDDModel, CoDDPipeline

    model = CoDDModel.from_pretrained("you/my-head")
    names = run_page(
        "examples/share.md",
        CoDDModel=CoDDModel,
        model=model,
        pipe=CoDDPipeline.from_pretrained("you/my-pipeline"),
    )
    assert names["model"].coupling_head is not None


if __name__ == "__main__":
    sys.exit(checks.main(globals()))
