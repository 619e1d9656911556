"""Promises on backbones whose noise is uniform: our loop decodes them, coupled."""

from __future__ import annotations

import pytest
import torch
from scipy.stats import chi2
from transformers import PreTrainedConfig, PreTrainedModel, TextStreamer
from transformers.modeling_outputs import MaskedLMOutput
from windows import HEAD, LENGTH, LOGITS, VOCAB, assert_follows

from codd_hf import CoDDHead, CoDDModel, CoDDPipeline, CoDDScheduler
from tiny import SAMPLING, STRATEGIES, enumerate_window, head_config, random_head, tiny_backbone

SAN, NEW, DIEGO, YORK, END = 3, 4, 5, 6, 1
IDS = torch.tensor([[3, 4, 5], [0, 0, 6]])
CALL = {"gen_length": [9, 7], "block_length": 4, "num_inference_steps": 6, "temperature": 1.0}


def seeds(*numbers: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(number) for number in numbers]


@pytest.fixture(scope="module")
def model():
    return uniform_model("llama")


def uniform_model(kind: str, **changes) -> CoDDModel:
    backbone = tiny_backbone(kind, 12, **changes)
    backbone.config.noise = "uniform"
    return CoDDModel.from_backbone(backbone, random_head(mask_token_id=None))


def run(model, ids=IDS, **call):
    pipe = CoDDPipeline(model, CoDDScheduler())
    pipe.set_progress_bar_config(disable=True)
    mask = {"attention_mask": (ids > 0).long()} if isinstance(ids, torch.Tensor) else {}
    return pipe(input_ids=ids, output_type="seq", **mask, **(CALL | call))


class CitiesConfig(PreTrainedConfig):
    model_type = "cities"
    noise = "uniform"
    vocab_size = 7
    hidden_size = 1


class Cities(PreTrainedModel):
    """San or New with even odds at even positions, Diego or York at odd ones, whatever is there."""

    config_class = CitiesConfig

    def __init__(self) -> None:
        super().__init__(CitiesConfig())
        self.embed_tokens = torch.nn.Embedding(7, 1)

    def forward(self, input_ids, attention_mask=None, **_):
        position = torch.arange(input_ids.shape[1]).expand_as(input_ids)
        logits = torch.full((*input_ids.shape, 7), -30.0)
        logits[..., [SAN, NEW]] -= 30.0 * (position % 2)[..., None]
        logits[..., [SAN, NEW]] += 30.0
        logits[..., [DIEGO, YORK]] += 30.0 * (position % 2)[..., None]
        return MaskedLMOutput(logits=logits, hidden_states=(torch.zeros(*input_ids.shape, 1),))


def city_model() -> CoDDModel:
    head = CoDDHead(head_config(7, num_latents=2, window_length=2, mask_token_id=None))
    with torch.no_grad():
        head.transition.copy_(torch.eye(2).log())
        head.emission.fill_(-torch.inf)
        head.emission[[0, 0, 1, 1], [SAN, DIEGO, NEW, YORK]] = 0.0
    return CoDDModel.from_backbone(Cities(), head)


def test_2000_of_2000_cities_are_coherent_in_one_pass():
    prompts = torch.tensor([[SAN, DIEGO]]).expand(2000, -1)
    call = {"gen_length": 2, "num_inference_steps": 1, "generator": seeds(0)[0]}
    found = run(city_model(), prompts, **call).sequences
    assert ((found[:, 0] == SAN) == (found[:, 1] == DIEGO)).all()
    assert torch.isin(found[:, 0], torch.tensor([SAN, NEW])).all()
    assert (found[:, 0] == SAN).float().mean() == pytest.approx(0.5, abs=0.04)
    found = run(city_model(), prompts, sampling="factorized", **call).sequences
    share = ((found[:, 0] == SAN) == (found[:, 1] == DIEGO)).float().mean()
    assert share == pytest.approx(0.5, abs=0.04)


def test_noise_that_is_an_end_token_ends_no_text():
    prompts = torch.tensor([[SAN, DIEGO]]).expand(300, -1)
    call = {"gen_length": 8, "num_inference_steps": 4, "eos_token_id": [END], "block_length": 4}
    seen = []

    def keep(pipe, step, timestep, state):
        seen.append((state["canvas"] == END).sum())
        return {}

    output = run(city_model(), prompts, callback_on_step_end=keep, generator=seeds(0)[0], **call)
    assert seen[0] > 0  # among the noise
    assert seen[-1] == 0
    assert (output.passes_per_row == 4).all()
    assert torch.isin(output.sequences, torch.tensor([SAN, NEW, DIEGO, YORK])).all()


@pytest.mark.parametrize("paradigm", ["block", "full"])
@pytest.mark.parametrize(
    ("sampling", "strategy"),
    [(mode, "low_confidence") for mode in SAMPLING] + [("latent", rule) for rule in STRATEGIES],
)
def test_rows_are_independent_in_every_mode_and_strategy(model, sampling, strategy, paradigm):
    how = {"sampling": sampling, "strategy": strategy, "paradigm": paradigm}
    both = run(model, generator=seeds(0, 1), **how)
    alone = run(model, [6], **how | {"gen_length": 7, "generator": seeds(1)})
    assert torch.equal(both.sequences[1, :7], alone.sequences[0])
    assert both.passes_per_row[1] == alone.passes_per_row[0]
    ids = {"inputs": IDS, "attention_mask": (IDS > 0).long(), "generator": seeds(0, 1)}
    assert torch.equal(model.generate(**ids, **CALL, **how)[:, 3:], both.sequences)


@pytest.mark.parametrize("changes", [{"block_length": 4}, {"block_length": 4, "logit_shift": True}])
def test_block_causal_backbones_keep_complete_blocks(changes):
    model = uniform_model("qwen2", **changes)
    kept = run(model, generator=seeds(0, 1))
    read = run(model, generator=seeds(0, 1), cache=False)
    assert torch.equal(kept.sequences, read.sequences)


def test_forced_tokens_stay_and_are_observed(model):
    output = run(model, forced_tokens={0: 9, 5: 10}, eos_token_id=[], generator=seeds(0, 1))
    assert (output.sequences[:, [0, 5]] == torch.tensor([9, 10])).all()


def test_streamed_blocks_are_the_answer(model):
    class Blocks(TextStreamer):
        def __init__(self):
            self.blocks, self.drafts = [], 0

        def put(self, value):
            self.blocks.append(value)

        def put_draft(self, value):
            self.drafts += 1

        def end(self):
            self.blocks = torch.cat(self.blocks, 1)

    streamer, call = Blocks(), CALL | {"gen_length": 8, "eos_token_id": []}
    answer = model.generate(IDS[:1], streamer=streamer, generator=seeds(0), **call)
    assert torch.equal(streamer.blocks, answer)
    assert streamer.drafts == 6


def stepped(number: int, steps: int, rows: int = 1500, **settings):
    """A step of the scheduler, from a canvas of zeros."""
    scheduler = CoDDScheduler(noise="uniform", temperature=1.0, **settings)
    scheduler.set_timesteps(steps)
    sample = torch.zeros(rows, LENGTH, dtype=torch.long)
    distribution = HEAD(LOGITS.expand(rows, -1, -1))
    generator = torch.Generator().manual_seed(number)
    return scheduler.step(distribution, scheduler.timesteps[number], sample, generator=generator)


@pytest.mark.parametrize("sampling", ["latent", "any_order"])
def test_last_step_keeps_a_draw_of_the_joint(sampling):
    output = stepped(2, 3, sampling=sampling)
    assert output.transfer_index.all()
    tokens = torch.full((LENGTH,), 2)  # which the head forbids
    assert_follows(output.prev_sample, *enumerate_window(HEAD, LOGITS, tokens, 2))


def test_what_a_step_does_not_keep_is_uniform_noise():
    for number, kept in enumerate([2, 3, 4]):  # ceil(4 n / 3)
        output = stepped(number, 3)
        assert (output.transfer_index.sum(1) == kept).all()
        noise = output.prev_sample[~output.transfer_index]
        if len(noise):
            counts = torch.bincount(noise, minlength=VOCAB).double()
            expected = len(noise) / VOCAB
            assert float(((counts - expected) ** 2 / expected).sum()) < chi2.ppf(0.9999, VOCAB - 1)
    plain = CoDDScheduler(noise="uniform")
    plain.set_timesteps(2)
    output = plain.step(LOGITS[None], 1.0, torch.zeros(1, LENGTH, dtype=torch.long))
    best = LOGITS.argmax(-1)[None]
    assert torch.equal(output.sampled_tokens, best)
    assert (output.prev_sample == best)[output.transfer_index].all()
    assert output.transfer_index.sum() == 2


def test_noise_that_is_added_is_of_either_kind(tmp_path):
    scheduler = CoDDScheduler(noise="uniform")
    clean = torch.full((2, 20_000), 3)
    noisy = scheduler.add_noise(clean, torch.tensor([0.0, 0.5]), seeds(0)[0], vocab_size=5)
    assert (noisy[0] == 3).all()
    counts = torch.bincount(noisy[1], minlength=5) / 20_000
    assert torch.allclose(counts, torch.tensor([0.1, 0.1, 0.1, 0.6, 0.1]), atol=0.01)
    with pytest.raises(ValueError, match="`vocab_size` must be given"):
        scheduler.add_noise(clean, 0.5)
    scheduler.save_pretrained(tmp_path)
    assert CoDDScheduler.from_pretrained(tmp_path).is_uniform
    masked = CoDDScheduler(mask_token_id=2).add_noise(clean, 0.5, seeds(0)[0])
    assert set(masked.unique().tolist()) == {2, 3}


def test_noise_is_kept_with_the_backbone(model, tmp_path):
    model.save_pretrained(tmp_path / "whole")
    model.backbone.save_pretrained(tmp_path / "backbone")
    model.save_head(tmp_path / "head")
    CoDDPipeline(model, CoDDScheduler()).save_pretrained(tmp_path / "pipeline")
    wanted = run(model, generator=seeds(0, 1)).sequences
    for loaded in (
        CoDDModel.from_pretrained(tmp_path / "whole"),
        CoDDModel.from_backbone(tmp_path / "backbone", tmp_path / "head"),
        CoDDPipeline.from_pretrained(tmp_path / "pipeline").model,
    ):
        assert torch.equal(run(loaded, generator=seeds(0, 1)).sequences, wanted)


def test_all_of_a_window_is_predicted(model):
    ids = torch.tensor([[3, 4, 5, 6, 7]])
    output = model(ids, coupling="marginal", return_distribution=True)
    assert output.distribution.masked.all()
    assert torch.isfinite(model(ids, labels=ids).loss)


def test_what_is_about_masks_is_refused(model):
    for told, call in {
        "`infill` is about mask tokens": {"infill": True},
        "`editing_threshold` is about mask tokens": {"editing_threshold": 0.5},
        "`cache` is about mask tokens": {"cache": "dual"},
        "`activation_ratio` must be 1 with uniform noise": {"activation_ratio": 0.5},
    }.items():
        with pytest.raises(ValueError, match=told):
            run(model, **call)
    with pytest.raises(ValueError, match="noise is uniform"):
        model.score([[3]], [[4]])
    with pytest.raises(ValueError, match="`mask_token_id` must be None"):
        CoDDModel.from_backbone(model.backbone, mask_token_id=2)
    with pytest.raises(ValueError, match="`noise` must be one of mask, uniform"):
        CoDDScheduler(noise="gaussian")
