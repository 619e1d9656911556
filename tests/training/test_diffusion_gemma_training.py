"""Promises of fits of a head to a DiffusionGemma."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from codd_hf import CoDDDiffusionGemma, CoDDModel
from codd_hf.cli import main
from codd_hf.data.canvases import TokenizedExample
from codd_hf.training import ConditionalConfig, JointConfig, fit_conditional
from codd_hf.training.fits.conditional import Evidence
from codd_hf.training.windows import NoisedCanvases
from tiny import correlated_examples, enumerate_window, random_head
from tiny_gemma import tiny_gemma

TOKENS = SimpleNamespace(eos_token_id=1, pad_token_id=0)
EXAMPLES = [
    TokenizedExample([5, 6, 7, 8], [9, 3, 4, 5, 6, 1]),
    TokenizedExample([9], [7, 6, 5, 4, 3, 8, 9, 10, 11, 3, 1]),
    TokenizedExample([4, 3], [7, 6, 1]),
]


@pytest.fixture(scope="module")
def model():
    """Canvases of 8 tokens, windows of 4."""
    head = random_head(
        mask_token_id=None, forbidden_token_ids=[2], conditioning=["latent"], context_size=16
    )
    return CoDDModel.from_backbone(tiny_gemma(), head)


@pytest.mark.parametrize("seed", range(3))
def test_canvases_are_noised_throughout_and_read_behind_what_is_before_them(model, seed):
    canvases = NoisedCanvases(model, TOKENS, EXAMPLES, JointConfig(), seed)
    scores, states = canvases.scores(), canvases.states()
    assert (scores.masked == 4).all()
    for row, example in enumerate(EXAMPLES):
        given, start = len(example.prompt_ids), int(canvases.end[row]) - 8
        clean = torch.tensor([*example.prompt_ids, *example.answer_ids] + 16 * [1])
        ids, window = canvases.ids[row], int(canvases.starts[row])
        assert (start - given) % 8 == (window - start) % 4 == 0
        assert torch.equal(ids[:start], clean[:start])
        assert torch.equal(canvases.truth[row], clean[window : window + 4])
        canvas = {"decoder_input_ids": ids[None, start : start + 8]}
        stock = model.backbone(input_ids=ids[None, :start], **canvas)
        own = states.logits((torch.tensor([row]).expand(8), torch.arange(start, start + 8)))
        assert torch.allclose(own, stock.logits[0], atol=1e-4)
        first = window - start
        marginals = model(input_ids=ids[None, :start], coupling="marginal", **canvas).logits
        law = model.coupling_head(
            stock.logits[:, first : first + 4],
            last_hidden_state=states.last_hidden_state[row : row + 1, window : window + 4],
        )
        assert torch.allclose(marginals[0, first : first + 4], law.marginals.log()[0], atol=1e-3)
        expected = law.log_prob(canvases.truth[row : row + 1])
        assert scores.log_prob[row].item() == pytest.approx(expected.item(), abs=1e-3)


def test_share_of_noise_in_a_canvas_is_the_level(model):
    canvases = NoisedCanvases(model, TOKENS, EXAMPLES[:1] * 4000, JointConfig(), 0)
    canvas = canvases.ids[:, 4:12]
    clean = torch.tensor([9, 3, 4, 5, 6, 1, 1, 1])
    expected = canvases.level * 11 / 12  # noise is now and then what it replaces
    assert ((canvas != clean).float().mean(1) - expected).mean().abs() < 0.01


def test_likelihoods_are_those_of_enumeration():
    model = CoDDModel.from_backbone(
        tiny_gemma(), random_head(mask_token_id=None, forbidden_token_ids=[2])
    )
    canvases = NoisedCanvases(model, TOKENS, EXAMPLES, JointConfig(), 0)
    scores, states = canvases.scores(), canvases.states()
    place = canvases.starts[:, None] + torch.arange(4)
    logits = states.logits((torch.arange(3)[:, None].expand(-1, 4), place))
    hidden = torch.full((4,), 2)
    texts, probabilities = enumerate_window(model.coupling_head, logits[0], hidden, 2)
    expected = probabilities[(texts == canvases.truth[0]).all(1)].log().item()
    assert scores.log_prob[0].item() == pytest.approx(expected, abs=1e-4)


def test_fit_improves_the_held_out_gain(tiny_tokenizer):
    head = random_head(300, mask_token_id=None)
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.mul_(0.3)
    model = CoDDModel.from_backbone(tiny_gemma(vocab_size=300, eos_token_id=2), head)
    config = ConditionalConfig(max_steps=40, windows_per_batch=8, learning_rate=0.1)
    data = correlated_examples(40), correlated_examples(20, seed=1)
    history = fit_conditional(model, tiny_tokenizer, *data, config)
    assert history[-1]["gain"] > history[0]["gain"] + 0.3
    evidence = Evidence(model, tiny_tokenizer, data[1][:1], ConditionalConfig(), {})
    again = NoisedCanvases(model, tiny_tokenizer, data[1][:1], ConditionalConfig(), 0)
    found = evidence.scores(model.coupling_head, torch.tensor([0])).gain
    assert torch.allclose(found, again.scores().gain, atol=0.05)


def test_command_fits_a_head_that_generates(cities_jsonl, tiny_tokenizer, tmp_path, capsys):
    backbone = tiny_gemma(vocab_size=300, pad_token_id=0, eos_token_id=2)
    for part in (backbone, tiny_tokenizer):
        part.save_pretrained(tmp_path / "backbone")
    arguments = ["--dataset", str(cities_jsonl), "--num-validation", "8", "--num-latents", "8"]
    arguments += ["--window-length", "4", "--generative-num-epochs", "2"]
    arguments += ["--conditional-max-steps", "4", "--conditional-num-draws", "1"]
    arguments += ["--set", "joint.max_steps=1", "--set", "joint.lora_rank=2"]
    arguments += ["--stages", "generative", "conditional", "joint"]
    arguments += ["--backbone", str(tmp_path / "backbone"), "--output", str(tmp_path / "run")]
    assert main(["train", *arguments]) == 1
    assert "use one without 'copy'" in capsys.readouterr().err
    assert not (tmp_path / "run/evidence").exists()
    assert main(["train", *arguments, "--conditioning", "latent"]) == 0
    model = CoDDModel.from_pretrained(tmp_path / "run/head")  # over the backbone that it names
    assert isinstance(model, CoDDDiffusionGemma)
    assert model.coupling_head.config.conditioning == ["latent"]
    assert (tmp_path / "run/head/adapter").exists()
    ids = torch.tensor([[5, 6, 7]])
    call = {"max_new_tokens": 8, "max_denoising_steps": 3}
    torch.manual_seed(0)
    coupled = model.generate(ids, **call)
    torch.manual_seed(0)
    assert coupled.sequences.shape == model.generate(ids, head=False, **call).sequences.shape
