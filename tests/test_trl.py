"""Promises of trl's trainers: the loss is that of the model, and the head is trained."""

from __future__ import annotations

import types

import pytest
import torch
from torch import nn

from tiny import tiny_model

MASK = 2
IDS = torch.tensor([[5, 6, 7, MASK, 8, MASK, MASK], [9, 4, MASK, MASK, 3, MASK, 0]])
REAL = torch.tensor([[1] * 7, [1] * 6 + [0]])
LABELS = torch.where(IDS == MASK, torch.tensor([4, 5, 6, 7, 8, 9, 3]), -100)


@pytest.mark.parametrize("extra", [{}, {"use_cache": False, "inputs_embeds": None}])
def test_what_trl_asks_for_is_the_loss_of_the_model(extra):
    model = tiny_model()

    def of_next_tokens(self, *args, fused_lm_head=False, **kwargs):
        assert not fused_lm_head
        return type(self).forward(self, *args, **kwargs)

    model.forward = types.MethodType(of_next_tokens, model)  # trl's own would leave the head out
    batch = {"input_ids": IDS, "attention_mask": REAL, "labels": LABELS}
    expected = model(**batch)
    asked = model(**batch, **extra, fused_lm_head=True)
    assert torch.equal(asked.label_mask, LABELS != -100)
    assert torch.equal(asked.loss, expected.loss)
    mean = (-asked.log_probs.sum() / asked.label_mask.sum()).item()
    assert mean == pytest.approx(expected.loss.item())
    asked.log_probs.sum().backward()
    assert all(p.grad.abs().sum() > 0 for p in model.coupling_head.parameters())
    right = expected.logits.argmax(-1) == LABELS
    assert torch.equal(asked.is_top1.bool(), right & asked.label_mask)
    entropy = torch.distributions.Categorical(logits=expected.logits.clamp(min=-1e4)).entropy()
    assert torch.allclose(asked.entropy, entropy * asked.label_mask, atol=1e-5)


def test_tokens_without_labels_are_refused():
    with pytest.raises(ValueError, match="`labels` must be given"):
        tiny_model()(input_ids=IDS, fused_lm_head=True)


@pytest.mark.filterwarnings("ignore:.*deprecated:FutureWarning")  # those of trl
@pytest.mark.parametrize("peft_config", [False, True])
def test_sft_trainer_steps_as_the_trainer_of_transformers(peft_config, tiny_tokenizer, tmp_path):
    trl = pytest.importorskip("trl")
    from datasets import Dataset
    from peft import LoraConfig, get_peft_model
    from transformers import Trainer, TrainingArguments

    from codd_hf.data.collator import DataCollatorForMaskedDiffusion

    rows = Dataset.from_list([{"input_ids": [18, 10, 14, 11, 15, 2]}] * 8)

    def losses(trainer: type, arguments: type, **settings) -> list[float]:
        torch.manual_seed(0)
        settings |= {"max_steps": 3, "logging_steps": 1, "use_cpu": True, "report_to": []}
        settings |= {"remove_unused_columns": False, "disable_tqdm": True, "learning_rate": 1e-3}
        model: nn.Module = tiny_model(
            vocab_size=len(tiny_tokenizer), mask_token_id=1, forbidden_token_ids=[]
        )
        given, config = {}, LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM")
        if peft_config and trainer is Trainer:
            model = get_peft_model(model, config)
        elif peft_config:
            given = {"peft_config": config}
        made = trainer(
            model,
            args=arguments(str(tmp_path), bf16=False, **settings),
            train_dataset=rows,
            data_collator=DataCollatorForMaskedDiffusion(tiny_tokenizer, 1, 4),
            processing_class=tiny_tokenizer,
            **given,
        )
        made.train()
        return [entry["loss"] for entry in made.state.log_history if "loss" in entry]

    own = {"dataset_kwargs": {"skip_prepare_dataset": True}}
    found = losses(trl.SFTTrainer, trl.SFTConfig, **own)
    off = 0.05 if peft_config else 1e-4  # the LoRA is drawn at another time
    assert found == pytest.approx(losses(Trainer, TrainingArguments), abs=off)
    assert all(loss > 0 for loss in found)
