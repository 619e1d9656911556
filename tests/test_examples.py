"""The examples run and show what they say."""

from __future__ import annotations

import importlib.util
import math
import re
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

ROOT = Path(__file__).parents[1]
CHECKPOINT = ROOT.parent / "shared" / "models" / "rxn_albert_mlm"


def load_example(name: str):
    spec = importlib.util.spec_from_file_location(name, ROOT / "examples" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def cities():
    return load_example("san_diego_new_york").main(num_samples=10_000)


def test_coupled_sampling_draws_real_cities_only(cities):
    assert set(cities["coupled"]) == {"San Diego", "New York"}
    # 10,000 fair draws: five standard deviations are 250.
    assert abs(cities["coupled"]["San Diego"] - 5000) < 250


def test_factorized_sampling_draws_san_york_a_quarter_of_the_time(cities):
    # 10,000 draws of probability 1/4: five standard deviations are 217.
    assert abs(cities["factorized"]["San York"] - 2500) < 217


def test_log_prob_of_a_city_is_a_half_and_of_a_mixture_zero(cities):
    for name in ("San Diego", "New York"):
        assert cities["log_prob"][name] == pytest.approx(math.log(0.5), abs=1e-5)
    for name in ("San York", "New Diego"):
        assert cities["log_prob"][name] == -math.inf


def test_each_family_decodes_a_tiny_model_as_it_is_published(capsys):
    example = load_example("families")
    answers = example.main()
    assert set(answers) == set(example.FAMILIES)
    assert all(len(tokens) == 16 and example.MASK not in tokens for tokens in answers.values())
    told = capsys.readouterr().out
    assert "sdar: a qwen3 that sees blocks of 4; decodes by strategy threshold" in told
    assert "fast-dllm-v2: a qwen2 that sees blocks of 8, of the next token;" in told


def test_judge_of_the_toy_corpus_knows_real_text_from_shuffled_words():
    import torch

    grammar = load_example("toy_corpus").Grammar()
    generator = torch.Generator().manual_seed(0)
    real = grammar.sample(512, generator)
    unrelated = torch.stack([column[torch.randperm(512, generator=generator)] for column in real.T])
    assert 1.5 < grammar.perplexity(real) < 4
    assert grammar.perplexity(unrelated.roll(1, dims=1)) > 50
    assert torch.allclose(grammar.transition.sum(-1), torch.ones(len(grammar.start)))
    assert torch.allclose(grammar.emission.sum(-1), torch.ones(len(grammar.start)))


@pytest.mark.slow
def test_at_few_passes_factorized_perplexity_explodes_and_coupled_does_not():
    result = load_example("toy_corpus").main(passes=(1, 2, 16), num_texts=256)
    real = result["real"]
    assert result["factorized"][1] > 50 * real
    assert result["coupled"][1] < 8 * real
    assert result["factorized"][2] > 15 * real
    assert result["coupled"][2] < 5 * real
    assert result["factorized"][16] < 2 * real
    assert result["coupled"][16] < 1.5 * real


@pytest.mark.skipif(not CHECKPOINT.is_dir(), reason="needs ../shared/models/rxn_albert_mlm")
def test_third_party_checkpoint_completes_reactions_and_an_untrained_head_changes_nothing(tmp_path):
    result = load_example("complete_reaction").main(CHECKPOINT, tmp_path)
    assert (tmp_path / "model.safetensors").is_file()
    assert result["difference"] < 1e-5
    completions = result["completions"]
    for name in ("esterification of benzoic acid", "Suzuki coupling"):
        completed, truth = completions[name]
        assert completed == truth


@pytest.fixture
def datasets_cache(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


def test_head_is_fitted_stage_by_stage_to_a_backbone(
    trained_pipeline, cities_jsonl, datasets_cache, tmp_path, capsys
):
    from codd_hf import CoDDModel

    command = ["--backbone", str(trained_pipeline), "--dataset", str(cities_jsonl)]
    command += ["--output", str(tmp_path), "--num-validation", "8", "--num-latents", "8"]
    gains = load_example("fit_a_head").main(
        [*command, "--epochs", "2", "--draws", "1", "--steps", "2"]
    )
    assert set(gains) >= {"gain", "gain_0.00-0.25", "gain_0.75-1.00"}
    assert f"{gains['gain']:+.3f} nats per masked token" in capsys.readouterr().out
    model = CoDDModel.from_backbone(trained_pipeline.parent / "backbone", tmp_path / "head")
    assert model.coupling_head.config.conditioning == ["latent", "copy"]


def test_text_file_becomes_a_pipeline(datasets_cache, tmp_path, monkeypatch):
    command = ["--output", str(tmp_path), "--pretraining-steps", "4", "--steps", "2"]
    example = load_example("text_to_pipeline")
    text = example.made_up_text(120)
    monkeypatch.setattr(example, "made_up_text", lambda: text)
    texts = example.main(command)
    assert len(texts) == 2
    assert "packing True" in (tmp_path / "pipeline" / "README.md").read_text()


def test_listed_tokens_says_which_share_of_them_is_distinct(
    tiny_tokenizer, tmp_path, capsys, monkeypatch
):
    config = LlamaConfig(
        vocab_size=len(tiny_tokenizer),
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    tiny_tokenizer.save_pretrained(tmp_path)
    example = load_example("listed_tokens")
    monkeypatch.setattr(example, "LISTED", 4)
    monkeypatch.setattr("sys.argv", ["listed_tokens.py", "--model", str(tmp_path)])
    example.main()
    text = capsys.readouterr().out
    assert "4 tokens listed" in text
    shares = [float(part.split(" %")[0].split()[-1]) for part in text.splitlines()[1:]]
    assert 0 < shares[1] <= shares[0] <= 100
    windows = [torch.tensor([[1, 2], [2, 3]]), torch.tensor([[1, 2], [1, 2]])]
    assert example.distinct_share(windows) == 3 / 8


def test_tests_that_the_readme_names_for_its_promises_are_there():
    root = Path(__file__).parents[1]
    table = (root / "README.md").read_text().split("## What is promised")[1].split("\n## ")[0]
    rows = [row for row in table.splitlines() if row.startswith("| ")][2:]
    for row in rows:
        named = re.findall(r"`(tests/[\w/.]+)`", row.split("|")[-2])
        assert named, row
        assert all((root / path).exists() for path in named), row
