"""Promises of `transformers.Trainer` with a `CoDDModel`."""

from __future__ import annotations

import random

import pytest
import torch
from transformers import Trainer, TrainerCallback, TrainingArguments

from codd_hf import CoDDModel
from codd_hf.data.collator import DataCollatorForMaskedDiffusion
from tiny import correlated_examples, random_head, tiny_backbone

MASK, PAD, EOS = 1, 0, 2


def features(number: int, seed: int = 0) -> list[dict[str, list[int]]]:
    """Texts of different lengths; the prompt of each is not to be learned."""
    draw, made = random.Random(seed), []
    for example in correlated_examples(number, seed):
        prompt = [18] * draw.randint(1, 5)
        answer = [*example.answer_ids[: 2 * draw.randint(2, 4)], EOS]
        made.append({"input_ids": prompt + answer, "labels": [-100] * len(prompt) + answer})
    return made


@pytest.fixture
def collator(tiny_tokenizer):
    return DataCollatorForMaskedDiffusion(tiny_tokenizer, MASK, window_length=4)


def new_model(vocab_size: int) -> CoDDModel:
    backbone = tiny_backbone(
        vocab_size=vocab_size, pad_token_id=PAD, eos_token_id=EOS, initializer_range=0.1
    )
    head = random_head(vocab_size, mask_token_id=MASK, conditioning=["latent"], context_size=16)
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.mul_(0.3)
    return CoDDModel.from_backbone(backbone, head)


def trainer(collator, folder, model=None, stop_at=None, **changes) -> Trainer:
    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == stop_at:
                control.should_training_stop = True

    settings = {
        "max_steps": 20,
        "per_device_train_batch_size": 16,
        "per_device_eval_batch_size": 5,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "constant",
        "eval_strategy": "steps",
        "save_strategy": "steps",
        "eval_steps": 10,
        "save_steps": 10,
        "logging_steps": 5,
        "load_best_model_at_end": True,
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
    }
    model = new_model(len(collator.tokenizer)) if model is None else model
    return Trainer(
        model,
        TrainingArguments(str(folder), **(settings | changes)),
        data_collator=collator,
        train_dataset=features(96),
        eval_dataset=collator.fixed(features(24, seed=1)),
        callbacks=[Stop()],
    )


def test_loss_falls_and_the_best_checkpoint_loads(collator, tmp_path):
    made = trainer(collator, tmp_path)
    before = made.evaluate()["eval_loss"]
    made.train()
    after = made.evaluate()["eval_loss"]
    assert after < before - 1
    assert after == made.evaluate()["eval_loss"] == pytest.approx(made.state.best_metric)
    loaded = CoDDModel.from_pretrained(made.state.best_model_checkpoint)
    again = trainer(collator, tmp_path / "again", loaded).evaluate()["eval_loss"]
    assert again == pytest.approx(after, abs=1e-5)
    with torch.no_grad():
        batch = collator(made.eval_dataset[:3])
        output = loaded(**{k: v for k, v in batch.items() if k != "labels"}, coupling="marginal")
    assert output.logits.isfinite().any()


def test_run_that_stopped_goes_on_as_if_it_had_not(collator, tmp_path):
    settings = {"max_steps": 9, "eval_steps": 9, "save_steps": 3, "load_best_model_at_end": False}
    models = {}
    for name, stop_at in (("whole", None), ("parts", 3), ("resumed", None)):
        folder = tmp_path / ("whole" if name == "whole" else "parts")
        made = trainer(collator, folder, stop_at=stop_at, **settings)
        made.train_dataset = collator.fixed(features(96))
        made.train(resume_from_checkpoint=name == "resumed")
        assert made.state.global_step == (stop_at or 9)
        models[name] = made.model
    states = models["whole"].state_dict(), models["resumed"].state_dict()
    assert all(torch.equal(states[0][k], states[1][k]) for k in states[0])


def test_what_is_derived_from_a_circuit_follows_the_steps_of_a_fused_optimizer(collator):
    model = new_model(len(collator.tokenizer))
    batch = collator.fixed(features(8))
    batch = collator(batch)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, fused=True)

    def score(other) -> float:
        with torch.no_grad():
            return other(**batch).loss.item()

    for _ in range(2):
        score(model)
        model(**batch).loss.backward()
        score(model)
        optimizer.step()
        optimizer.zero_grad()
        fresh = new_model(len(collator.tokenizer))
        fresh.load_state_dict(model.state_dict())
        assert score(model) == score(fresh)


def test_batch_masks_one_window_of_the_answer_and_labels_it(collator):
    torch.manual_seed(0)
    given = features(200)
    batch = collator(given)
    ids, labels, real = (batch[k] for k in ("input_ids", "labels", "attention_mask"))
    in_window = labels != -100
    assert (in_window.sum(1) == 4).all()
    first = in_window.long().argmax(1)
    hidden = ids == MASK
    starts = torch.tensor([sum(label == -100 for label in f["labels"]) for f in given])
    assert ((first - starts) % 4 == 0).all()
    assert (first >= starts).all()
    for row, feature in enumerate(given):
        text = feature["input_ids"] + [EOS] * 12
        shown = [(i, t) for i, t in enumerate(ids[row].tolist()) if real[row, i] and t != MASK]
        assert all(text[i] == token for i, token in shown)
        window = slice(int(first[row]), int(first[row]) + 4)
        assert labels[row, window].tolist() == text[window]
        assert not hidden[row, : window.start].any()
        assert hidden[row, window.stop :][real[row, window.stop :].bool()].all()
    assert not hidden[real == 0].any()
    share = (hidden & in_window).sum() / in_window.sum()
    assert share.item() == pytest.approx(0.5, abs=0.05)
    assert not torch.equal(collator(given)["input_ids"], ids)


def test_evaluation_set_keeps_its_noise(collator):
    given = features(30)
    state = torch.get_rng_state()
    fixed = collator.fixed(given)
    assert torch.equal(torch.get_rng_state(), state)
    assert fixed == collator.fixed(given) != collator.fixed(given, seed=1)
    assert 15 < len(fixed) <= 30
    batch = collator(fixed[:5])
    for row, feature in enumerate(fixed[:5]):
        real = batch["attention_mask"][row].bool()
        assert batch["input_ids"][row, real].tolist() == feature["input_ids"]
        assert batch["labels"][row, real].tolist() == feature["labels"]
        assert (batch["labels"][row, ~real] == -100).all()


def test_text_without_labels_is_all_answer_and_one_without_an_answer_is_refused(collator):
    torch.manual_seed(0)
    collator.max_extra_windows = 0
    starts = {
        int((collator([{"input_ids": [5] * 8}])["labels"] != -100).long().argmax())
        for _ in range(20)
    }
    assert starts == {0, 4}
    with pytest.raises(
        ValueError, match=r"`labels` must leave a token to learn, got -100 for all 3"
    ):
        collator([{"input_ids": [5, 6, 7], "labels": [-100] * 3}])


@pytest.mark.parametrize(
    ("feature", "said"),
    [
        ({"input_ids": [5.5, 6]}, "`input_ids` must be integers, got torch.float32"),
        ({"input_ids": [True, False]}, "`input_ids` must be integers, got torch.bool"),
        ({"input_ids": "56"}, "`input_ids` must be a tensor, an array, or rows"),
        (
            {"input_ids": [[5, 6]]},
            r"`input_ids` of a feature must have shape \[length\], got \(1, 2\)",
        ),
        ({"input_ids": [5, 6], "labels": [5.0, 6.0]}, "`labels` must be integers, got"),
        ({"input_ids": [5, 6], "labels": 3}, r"`labels` of a feature must have shape \[length\]"),
        ({"input_ids": [5, 6], "labels": ["x"]}, "`labels` must be a tensor, an array, or rows"),
        ({"input_ids": [5, 6], "attention_mask": 1}, "`attention_mask` of a feature must have"),
        ({"input_ids": None}, "`input_ids` of a feature must be token ids, got None"),
        (3, r"`features` must hold at least one, each with `input_ids`, got \[3\]"),
        (
            {"text": "a"},
            r"`features` must hold at least one, each with `input_ids`, got \[\['text'\]",
        ),
    ],
)
def test_feature_without_tokens_is_named(collator, feature, said):
    with pytest.raises((TypeError, ValueError), match=said):
        collator([feature])
    with pytest.raises(ValueError, match=r"`features` must hold at least one, .* got \[\]"):
        collator([])
