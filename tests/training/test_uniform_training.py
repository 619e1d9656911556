"""Promises of training for backbones whose noise is uniform tokens."""

from __future__ import annotations

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from fitting import equal_states, new_model, untimed
from scipy.stats import chi2
from torch.func import functional_call

from codd_hf import CoDDModel, CoDDPipeline
from codd_hf.cli import main
from codd_hf.data.canvases import TokenizedExample, collate
from codd_hf.data.noise import draw_canvases, sample_noise
from codd_hf.evaluation import GapSettings
from codd_hf.evaluation.gap import _windows, measure_gap
from codd_hf.training import (
    Checkpoints,
    ConditionalConfig,
    DataCollatorForMaskedDiffusion,
    JointConfig,
    PretrainingConfig,
    fit_backbone,
    fit_conditional,
    fit_joint,
)
from codd_hf.training.fits.conditional import Evidence
from codd_hf.training.fits.pretraining import diffusion_loss, uniform_bound
from codd_hf.training.inputs import load_start
from codd_hf.training.windows import NoisedCanvases
from tiny import correlated_examples, enumerate_window, random_head, tiny_backbone

TRAIN, VALIDATION = correlated_examples(40), correlated_examples(20, seed=1)
STEPS = {"max_steps": 6, "warmup_steps": 2, "evaluation_steps": 3, "checkpointing_steps": 2}
FITS = {
    "pretraining": PretrainingConfig(**STEPS, tokens_per_batch=128, mixed_precision="no"),
    "conditional": ConditionalConfig(**STEPS, windows_per_batch=8, learning_rate=0.1),
    "joint": JointConfig(**STEPS, windows_per_batch=6, lora_rank=2, num_validation_draws=1),
}
EXAMPLES = [TokenizedExample([5, 6, 7, 8], [9, 3, 4, 1]), TokenizedExample([9], [7, 6, 5, 4, 3])]
TOKENS = SimpleNamespace(eos_token_id=1, pad_token_id=0)


class Called(SimpleNamespace):
    """A head with other parameters than its own."""

    def __call__(self, *args, **kwargs):
        return self.call(*args, **kwargs)


def uniform_model(tokenizer, conditioning=("latent", "copy")) -> CoDDModel:
    backbone = {"noise": "uniform", "attention_dropout": 0.1}
    return new_model(tokenizer, conditioning, backbone, mask_token_id=None)


def small_model(**changes) -> CoDDModel:
    """Of 12 tokens, of which 2 is never generated, so that windows can be enumerated."""
    backbone = tiny_backbone(noise="uniform", **changes)
    return CoDDModel.from_backbone(
        backbone, random_head(mask_token_id=None, forbidden_token_ids=[2])
    )


def run(stage, tokenizer, folder=None, log=None, **changes):
    model, config = uniform_model(tokenizer), replace(FITS[stage], **changes)
    checkpoints = None if folder is None else Checkpoints(folder / stage)
    args = (model, tokenizer, TRAIN, VALIDATION, config, checkpoints, log)
    if stage == "pretraining":
        return model, fit_backbone(*args, window_length=4)
    return model, (fit_conditional if stage == "conditional" else fit_joint)(*args)


def test_noise_is_any_token_and_all_of_the_span_is_predicted():
    examples = [TokenizedExample([7, 8, 9], [5] * (4 * (1 + i % 5))) for i in range(2000)]
    config = small_model().backbone.config
    generator = torch.Generator().manual_seed(0)
    canvas, noise = draw_canvases(
        examples, TOKENS, 4, 0, generator, config=config, window_probability=1.0
    )
    assert torch.equal(noise.target, noise.span)
    position = torch.arange(canvas.input_ids.shape[1])
    behind = (position >= noise.window[:, None] + 4) & (position < canvas.answer_end[:, None])
    assert torch.equal(noise.predicted, noise.span | behind)
    assert noise.masked[behind].all()
    share = (noise.masked & noise.span).sum(1) / 4
    assert (share - noise.level).mean().abs() < 0.02
    ids = noise.applied(canvas.input_ids, small_model())
    assert torch.equal(ids[~noise.masked], canvas.input_ids[~noise.masked])
    counts = torch.bincount(ids[noise.masked], minlength=12).double()
    expected = counts.sum() / 12
    assert float(((counts - expected) ** 2 / expected).sum()) < chi2.ppf(0.9999, 11)
    # The same draws as of masks, before those of tokens.
    masks = sample_noise(canvas, window_length=4, generator=torch.Generator().manual_seed(3))
    same = {"window_length": 4, "generator": torch.Generator().manual_seed(3)}
    assert torch.equal(sample_noise(canvas, **same, config=config).masked, masks.masked)


def test_loss_is_the_cross_entropy_of_all_clean_tokens():
    model, canvas = small_model(), collate(EXAMPLES, TOKENS, 4)
    draw = {"window_length": 4, "config": model.backbone.config}
    noise = sample_noise(canvas, **draw, generator=torch.Generator().manual_seed(0))
    loss, losses = diffusion_loss(model, canvas, noise)
    ids = noise.applied(canvas.input_ids, model)
    logits = model(ids, canvas.attention_mask).logits.log_softmax(-1)
    expected = -logits.gather(-1, canvas.input_ids[..., None])[..., 0][noise.span]
    assert torch.allclose(losses, expected, atol=1e-5)
    assert loss.item() == pytest.approx(expected.mean().item(), rel=1e-5)


def test_bound_of_the_exact_posterior_is_the_entropy_and_of_others_more():
    law, number = torch.tensor([0.5, 0.3, 0.15, 0.05]).double(), 200
    level = (torch.arange(number).double() + 0.5) / number
    totals = torch.zeros(2, dtype=torch.float64)
    for truth in range(4):
        for seen in range(4):
            likely = torch.eye(4).double()[seen] * (1 - level[:, None]) + level[:, None] / 4
            posterior = law * likely / (law * likely).sum(-1, keepdim=True)
            for i, given in enumerate((posterior, (posterior + 0.05) / 1.2)):
                tokens = torch.full((number,), truth), torch.full((number,), seen)
                found = uniform_bound(given.log(), *tokens, level)
                totals[i] += law[truth] * (likely[:, truth] * found).mean()
    assert totals[0].item() == pytest.approx(-(law * law.log()).sum().item(), rel=2e-3)
    assert totals[1] > totals[0] + 0.1


def test_window_likelihoods_are_those_of_enumeration():
    model = small_model()
    windows = NoisedCanvases(model, TOKENS, EXAMPLES, JointConfig(), 0)
    scores = windows.scores()
    assert (scores.masked == 4).all()
    for row, start in enumerate(windows.starts.tolist()):
        place, real = slice(start, start + 4), windows.mask[row].bool()
        truth = windows.truth[row]
        logits = model(windows.ids[row, real][None]).logits[0, place]
        hidden = torch.full((4,), 2)
        texts, probabilities = enumerate_window(model.coupling_head, logits, hidden, 2)
        expected = probabilities[(texts == truth).all(1)].log().item()
        assert scores.log_prob[row].item() == pytest.approx(expected, abs=1e-4)


def test_evidence_is_what_the_model_predicts_and_no_position_is_observed(tiny_tokenizer):
    model = uniform_model(tiny_tokenizer).eval()
    config = ConditionalConfig(cache_size=1000)
    for seed, example in enumerate(VALIDATION[:6]):
        evidence = Evidence(model, tiny_tokenizer, [example], config, {}, seed=seed)
        (part,) = evidence.parts
        assert part.columns["masked"].all()
        scores = evidence.scores(model.coupling_head, torch.tensor([0]))
        again = NoisedCanvases(model, tiny_tokenizer, [example], config, seed * 1_000_003)
        assert torch.equal(part.columns["tokens"].long(), again.truth)
        # What is before the window is known, and can be copied.
        known = (part.columns["preceding_tokens"] >= 0).sum()
        assert known == min(int(again.starts), model.coupling_head.config.copy_length)
        # Half precision in the cache.
        assert torch.allclose(scores.gain, again.scores().gain, atol=0.03)


def test_gradients_of_the_conditional_fit_pass_gradcheck(tiny_tokenizer):
    model = uniform_model(tiny_tokenizer, ["latent"]).eval().double()
    evidence = Evidence(model, tiny_tokenizer, VALIDATION[:3], ConditionalConfig(), {})
    windows, head = evidence.take(torch.arange(3)), model.coupling_head
    columns = windows.columns
    windows.columns = columns | {"hidden": columns["hidden"].double()}
    parameters = dict(head.named_parameters())

    def loss(*leaves):
        given = dict(zip(parameters, leaves, strict=True))

        def call(*args, **kwargs):
            return functional_call(head, given, args, kwargs)

        view = Called(config=head.config, device=head.device, log_spread=head.log_spread)
        view.call = call
        return -windows.scores(view).gain.sum()

    leaves = tuple(p.detach().clone().requires_grad_() for p in parameters.values())
    assert torch.autograd.gradcheck(loss, leaves, fast_mode=True)


def test_gap_is_of_all_tokens_of_a_window_with_a_share_of_noise(tiny_tokenizer):
    model, settings = uniform_model(tiny_tokenizer, []).eval(), GapSettings(ratios=[0.5])
    examples = correlated_examples(4)
    heads = {"head": model.coupling_head}
    (row,) = measure_gap(model, heads, tiny_tokenizer, examples, settings)
    (window,) = _windows(model, examples, tiny_tokenizer, settings)
    totals = torch.zeros(3)
    for i, (start, truth) in enumerate(zip(window.start.tolist(), window.truth, strict=True)):
        ids = window.ids[i : i + 1, window.seen[i].bool()].clone()
        ids[0, start : start + 4] = torch.where(window.order[i] < 2, window.noise[i], truth)
        at = {"window_start": torch.tensor([start]), "return_distribution": True}
        output = model(ids, **at)
        logits = output.logits[0, start : start + 4].log_softmax(-1)
        totals[0] -= logits.gather(1, truth[:, None]).sum()
        totals[1] -= output.distribution.log_prob(truth[None])[0]
        for place, token in enumerate(truth, start):
            totals[2] -= model(ids).logits[0, place].log_softmax(-1)[token]
            ids[0, place] = token
    found = [row[name].value for name in ("factorized", "head", "sequential")]
    assert found == pytest.approx((totals / 16).tolist(), abs=1e-4)


@pytest.mark.parametrize("stage", FITS)
def test_run_that_stopped_ends_bit_equal_to_one_that_did_not(tiny_tokenizer, tmp_path, stage):
    whole, history = run(stage, tiny_tokenizer)

    def interrupt(step, _):
        if step == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(stage, tiny_tokenizer, tmp_path, interrupt)
    torch.manual_seed(99)
    resumed, resumed_history = run(stage, tiny_tokenizer, tmp_path)
    assert untimed(resumed_history) == untimed(history)
    assert equal_states(whole, resumed)


def test_every_stage_learns(tiny_tokenizer):
    more = {"max_steps": 40, "evaluation_steps": 40}
    for stage, name, sign in (
        ("pretraining", "elbo", -1),
        ("conditional", "gain", 1),
        ("joint", "coupled_nats", -1),
    ):
        rate = {} if stage == "conditional" else {"learning_rate": 1e-2}
        _, history = run(stage, tiny_tokenizer, **more, **rate)
        assert sign * (history[-1][name] - history[0][name]) > 0.1


def test_command_trains_all_stages_to_a_pipeline_that_decodes(cities_jsonl, tmp_path, capsys):
    small = {"vocab_size": 300, "hidden_size": 64, "num_layers": 1, "num_gap_problems": 4}
    small |= {"pretraining.max_steps": 60, "joint.max_steps": 2, "joint.lora_rank": 2}
    small |= {"pretraining.tokens_per_batch": 512, "pretraining.max_extra_windows": 0}
    small |= {"conditional.max_steps": 10, "conditional.num_draws": 1}
    arguments = ["--dataset", str(cities_jsonl), "--num-validation", "16", "--num-latents", "8"]
    arguments += ["--window-length", "4", "--generative-num-epochs", "3"]
    arguments += [word for pair in small.items() for word in ("--set", "{}={}".format(*pair))]
    stages = ["--stages", "pretraining", "generative", "conditional", "joint"]
    noise = ["--set", "pretraining.noise=uniform"]
    made = tmp_path / "run"
    assert main(["train", *arguments, *noise, "--output", str(made), *stages]) == 0
    assert json.loads((made / "backbone/config.json").read_text())["noise"] == "uniform"
    pipe = CoDDPipeline.from_pretrained(made / "pipeline")
    assert pipe.scheduler.config.noise == "uniform"
    assert pipe.model.config.mask_token_id is None
    assert pipe.tokenizer.mask_token_id in pipe.model.config.forbidden_token_ids
    # Later runs find the noise in the backbone.
    given = ["--backbone", str(made / "backbone"), "--output", str(tmp_path / "given")]
    assert main(["train", *arguments, *given]) == 0
    capsys.readouterr()
    for folder in (made, tmp_path / "given"):
        model = ["--model", str(folder / "pipeline")]
        call = ["--gen-length", "8", "--block-length", "4", "--temperature", "1", "--seed", "0"]
        assert main(["generate", *model, *call, "Where to?"]) == 0
        assert capsys.readouterr().out.strip()
    few = ["--num-problems", "4", "--output", str(tmp_path / "found.json")]
    assert main(["evaluate", "gap", *model, *few, "--ratios", "0.5", "1"]) == 0
    rows = json.loads((tmp_path / "found.json").read_text())["rows"]
    assert [row["mask ratio"] for row in rows] == [0.5, 1.0]
    answers = ["--passes", "1", "2", "--checker", "exact"]
    assert main(["evaluate", "answers", *model, *few, *answers]) == 0


def test_what_is_about_masks_is_refused(tiny_tokenizer, tmp_path):
    with pytest.raises(ValueError, match="`infill` is about mask tokens"):
        run("conditional", tiny_tokenizer, infill=True)
    model = uniform_model(tiny_tokenizer)
    model.backbone.save_pretrained(tmp_path)
    tiny_tokenizer.save_pretrained(tmp_path)
    assert load_start(str(tmp_path)).model.config.mask_token_id is None
    with pytest.raises(ValueError, match="`mask_token_id` must be None"):
        load_start(str(tmp_path), 1)
    assert load_start(str(tmp_path), noise="mask").model.config.mask_token_id == 1
    with pytest.raises(ValueError, match="`config` is of a backbone whose noise is uniform"):
        DataCollatorForMaskedDiffusion(tiny_tokenizer, 1, config=model.backbone.config)
    with pytest.raises(ValueError, match="`noise` must be one of mask, uniform"):
        PretrainingConfig(noise="gaussian")
