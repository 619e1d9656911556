"""What stands in code in README and guides runs; what stands there in figures is in their files."""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import subprocess
import sys
import tomllib
from itertools import pairwise
from pathlib import Path

import pytest
from checks import names_in, run_script
from jpc_files import hmm_nodes, random_hmm, write
from server import TOKEN, LocalHub

from codd_hf import CoDDModel
from codd_hf.cli import build_parser
from codd_hf.data.tokenizers import train_tokenizer
from codd_hf.training.settings import build_config, from_text
from tiny import random_head, tiny_backbone
from tiny_gemma import tiny_gemma
from tiny_pipeline import save_tiny_pipeline, tiny_pipeline

ROOT = Path(__file__).parents[2]
PAGES = [
    path.relative_to(ROOT).as_posix()
    for pattern in ("*.md", "examples/**/*.md", "model_cards/*.md")
    for path in sorted(ROOT.glob(pattern))
    if path.name != "CHANGELOG.md"
]
FIXTURES = Path(__file__).parents[1] / "fixtures"


def commands(page: str) -> list[list[str]]:
    """The shell commands of a page, in blocks and in running text, each as its words."""
    text = (ROOT / page).read_text()
    blocks = re.findall(r"```bash\n(.*?)```", text, re.DOTALL)
    prose = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    spans = [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", prose)]
    lines += [span for span in spans if re.match(r"(codd-hf|python examples/\S+) \S", span)]
    words = [shlex.split(line, comments=True) for line in lines]
    return [part for line in words for part in parts(line, {"&&", "|", ">"}) if part]


def parts(words: list[str], marks: set[str]) -> list[list[str]]:
    """The parts of a line between some of its words."""
    ends = [i for i, word in enumerate(words) if word in marks]
    return [words[a + 1 : b] for a, b in pairwise([-1, *ends, len(words)])]


def leaf_parser(words: list[str]) -> argparse.ArgumentParser:
    """The parser of a subcommand, and of its own."""
    parser = build_parser()
    for word in words:
        choices = [action.choices for action in parser._actions if action.nargs == "A..."]
        if not choices or word not in choices[0]:
            break
        parser = choices[0][word]
    return parser


@pytest.mark.parametrize("page", PAGES)
def test_commands_of_a_page_are_there_and_know_their_flags(page):
    """What they name of the repository is there; settings of training can be what is said."""
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"][
        "optional-dependencies"
    ]
    for words in commands(page):
        flags = [word.partition("=")[0] for word in words if word.startswith("--")]
        start = words.index("codd_hf.cli") if "codd_hf.cli" in words else 0
        if start or words[0] == "codd-hf":
            parser = leaf_parser(words[start + 1 :])
            assert parser.prog != "codd-hf" or "NAME" in words, words
            known = {option for action in parser._actions for option in action.option_strings}
            assert known.issuperset(flag for flag in flags if words.index(flag) > start), words
            pairs = [words[i + 1] for i, word in enumerate(words) if word == "--set"]
            for name, _, value in (pair.partition("=") for pair in pairs):
                build_config({"dataset": "", "output_dir": "", name: from_text(name, value)})
        elif words[0] == "python" and words[1].startswith("examples/"):
            source = (ROOT / words[1]).read_text()
            assert all(f'"{flag}"' in source for flag in flags), words
        for word in words:
            assert not word.startswith("examples/") or (ROOT / word).exists(), words
            extra = re.search(r"\[([\w-]+)\]", word) if words[:2] == ["pip", "install"] else None
            assert extra is None or extra[1] in extras, words


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    """A Hub that has what the pages name, in small."""
    work = tmp_path_factory.mktemp("pages")
    bert = tiny_backbone("bert", 30522, hidden_size=8, intermediate_size=8)
    bert.save_pretrained(work / "bert")
    circuit = random_hmm(states=4, vocab=128, length=4)
    (work / "circuit").mkdir()
    write(work / "circuit" / "model.jpc", hmm_nodes(*circuit))
    save_tiny_pipeline(work / "pipeline")
    pipe = tiny_pipeline()
    pipe.model.backbone.config.max_position_embeddings = 512
    pipe.model.backbone.save_pretrained(work / "backbone")
    pipe.tokenizer.save_pretrained(work / "backbone")
    pipe.model.coupling_head.config.base_model_name_or_path = "you/backbone"
    pipe.model.save_head(work / "head")
    pipe.tokenizer.save_pretrained(work / "head")
    pipe.model.save_pretrained(work / "model")
    pipe.tokenizer.save_pretrained(work / "model")
    gemma = tiny_gemma(vocab_size=128, moe_intermediate_size=16)
    gemma.generation_config.update(max_new_tokens=8, max_denoising_steps=2)
    gemma.save_pretrained(work / "gemma")
    head = random_head(128, mask_token_id=None)
    CoDDModel.from_backbone(gemma, head).save_head(work / "gemma-head")
    with LocalHub() as server:
        for name, folder in {
            "google-bert/bert-base-uncased": work / "bert",
            "GSAI-ML/LLaDA-8B-Instruct": FIXTURES / "llada_tiny",
            "Dream-org/Dream-v0-Instruct-7B": FIXTURES / "dream_tiny",
            "google/diffusiongemma-26B-A4B-it": work / "gemma",
            "il18/llada-math-pc": work / "circuit",
            "you/backbone": work / "backbone",
            "you/my-head": work / "head",
            "you/code-head": work / "head",
            "you/gemma-head": work / "gemma-head",
            "you/my-model": work / "model",
            "you/my-pipeline": work / "pipeline",
        }.items():
            server.add(name, folder)
        yield server


@pytest.fixture(scope="module")
def report(hub, tmp_path_factory):
    work = tmp_path_factory.mktemp("running")
    return run_script("pages", work, hub.environment(work / "home") | {"HF_TOKEN": TOKEN})


@pytest.mark.parametrize("name", names_in("pages"))
def test_python_of_a_page_runs(name, report):
    assert report[name] is None, report[name]


NOT_RUN = {"openai/gsm8k": "a dataset of the Hub", "book.txt": "hours", "gsm8k_train": "hours"}


@pytest.mark.slow
@pytest.mark.parametrize(
    "page", ["README.md", "examples/couple.md", "examples/decode.md", "examples/fit.md"]
)
def test_shell_blocks_of_a_page_run(page, hub, tmp_path):
    """The text is that of the pages: a circuit of the default size needs so many words."""
    parts = [
        part.split(" ", 4) for page in PAGES for part in (ROOT / page).read_text().split("\n\n")
    ]
    rows = [{"question": " ".join(p[:4]), "answer": p[4]} for p in parts if len(p) == 5]
    for name in ("my.jsonl", "my_heldout.jsonl", "questions.jsonl"):
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    tokenizer = train_tokenizer([row["answer"] for row in rows], vocab_size=1000)
    backbone = tiny_backbone("llama", len(tokenizer), max_position_embeddings=1024)
    for part in (backbone, tokenizer):
        part.save_pretrained(tmp_path / "path" / "to" / "backbone")
    scripts = str(Path(sys.executable).parent)
    environment = os.environ | hub.environment(tmp_path / "home")
    environment |= {"PATH": f"{scripts}{os.pathsep}{os.environ['PATH']}", "HF_TOKEN": TOKEN}
    text = (ROOT / page).read_text()
    blocks = re.findall(r"```bash\n(.*?)```", text, re.DOTALL)
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    lines = [line for line in lines if line.startswith("codd-hf")]
    run = [line for line in lines if not any(name in line for name in NOT_RUN)]
    assert run
    for line in run:
        command = ["bash", "-c", line]
        options = {"cwd": tmp_path, "env": environment, "stdin": subprocess.DEVNULL}
        done = subprocess.run(command, capture_output=True, text=True, timeout=1200, **options)
        assert done.returncode == 0, (line, done.stderr)
