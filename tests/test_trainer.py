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
        eval_dataset=features(24, seed=1),
        callbacks=[Stop()],
    )


def test_loss_falls_and_the_best_checkpoint_loads(collator, tmp_path):
    made = trainer(collator, tmp_path)
    before = made.evaluate()["eval_loss"]
    made.train()
    after = made.evaluate()["eval_loss"]
    assert after < before - 1
    loaded = CoDDModel.from_pretrained(made.state.best_model_checkpoint)
    again = trainer(collator, tmp_path / "again", loaded).evaluate()["eval_loss"]
    assert again < before - 1
    with torch.no_grad():
        batch = collator(made.eval_dataset[:3])
        output = loaded(**{k: v for k, v in batch.items() if k != "labels"}, coupling="marginal")
    assert output.logits.isfinite().any()


def test_what_is_derived_from_a_circuit_follows_the_steps_of_a_fused_optimizer(collator):
    model = new_model(len(collator.tokenizer))
    batch = collator(features(8))
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
        ({"input_ids": "56"}, "`input_ids` must be a tensor, an array, or rows"),
        ({"input_ids": [5, 6], "labels": [5.0, 6.0]}, "`labels` must be integers, got"),
        ({"input_ids": [5, 6], "labels": 3}, r"`labels` must have shape \(2,\)"),
        ({"input_ids": [5, 6], "attention_mask": 1}, r"`attention_mask` must have shape \(2,\)"),
    ],
)
def test_part_of_a_feature_that_is_wrong_is_named(collator, feature, said):
    with pytest.raises((TypeError, ValueError), match=said):
        collator([feature])
