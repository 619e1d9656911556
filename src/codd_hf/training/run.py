"""The whole way from a data source to a coupled model that can be loaded and shared.

`train` is what `codd-hf train` calls. Each stage is a function of its own that can be called alone.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from ..circuits import Potentials, occupancy, token_marginal
from ..configuration_codd import CoDDHeadConfig
from ..modeling_codd import CoDDModel
from ..modeling_head import CoDDHead
from .conditional import fit_conditional
from .data import Example, TokenizedExample, load_examples, tokenize_examples
from .generative import fit_generative, text_windows
from .pretraining import pretrain_backbone, small_backbone_config
from .settings import TrainConfig
from .tokenizers import train_tokenizer

logger = logging.getLogger(__name__)


def train(config: TrainConfig) -> Path:
    """Runs all stages and writes a pipeline folder.

    Returns:
        `output_dir/pipeline`: `model/`, `scheduler/`, `tokenizer/`, the stage-1 head in `stage1/`
        and the held-out examples as `validation.jsonl` and `test.jsonl`; `demo.jsonl` holds the
        ten of the latter (or else the former) with the most familiar words.

    Raises:
        FileNotFoundError: the dataset or the backbone is not there.
        ValueError: the data cannot be used; the message says why.
    """
    output = Path(config.output_dir)
    examples = load_examples(
        config.dataset,
        prompt_column=config.prompt_column,
        answer_column=config.answer_column,
        remove_pattern=config.remove_pattern,
    )
    train_part, validation, test = split_examples(examples, config.num_validation, config.num_test)
    output.mkdir(parents=True, exist_ok=True)
    (output / "train_config.json").write_text(json.dumps(asdict(config), indent=2))

    if config.backbone is None:
        _pretrain(config, train_part, validation, output / "backbone")
    source = config.backbone or str(output / "backbone")
    tokenizer = AutoTokenizer.from_pretrained(source)
    model = CoDDModel.from_backbone(source, dtype=torch.float32)
    mask_token_id = config.mask_token_id
    if mask_token_id is None:
        mask_token_id = model.config.mask_token_id
    if mask_token_id is None:
        mask_token_id = tokenizer.mask_token_id
    if mask_token_id is None:
        raise ValueError("`mask_token_id` must be given: the tokenizer has no mask token.")
    parts = [tokenize_examples(p, tokenizer, config.max_length) for p in (train_part, validation)]

    head = fit_stage_one(config, model, tokenizer, *parts, mask_token_id)
    head.save_pretrained(output / "stage1")
    head = start_of_stage_three(config, model, head)
    model = CoDDModel.from_backbone(model.backbone, head)
    history = fit_conditional(model, tokenizer, *parts, output, config.conditional)
    (output / "conditional_history.json").write_text(json.dumps(history, indent=2))

    stage_one = CoDDHead.from_pretrained(output / "stage1")
    pipeline = output / "pipeline"
    save_pipeline(pipeline, model, stage_one, tokenizer, getattr(torch, config.dtype))
    demo = familiar_examples(test or validation, tokenizer)[:10]
    for name, part in (("validation", validation), ("test", test), ("demo", demo)):
        lines = [json.dumps({"question": e.prompt, "answer": e.answer}) for e in part]
        (pipeline / f"{name}.jsonl").write_text("".join(f"{line}\n" for line in lines))
    return pipeline


def split_examples(
    examples: Sequence[Example], num_validation: int, num_test: int
) -> tuple[Sequence[Example], Sequence[Example], Sequence[Example]]:
    """Training, validation and test examples; the last ones are held out.

    Raises:
        ValueError: nothing is left to train on, or nothing to validate on.
    """
    held_out = num_validation + num_test
    if num_validation < 1 or num_test < 0 or held_out >= len(examples):
        raise ValueError(
            f"`num_validation` ({num_validation}) and `num_test` ({num_test}) must hold out at "
            f"least one and fewer than all of the {len(examples)} examples."
        )
    first, last = len(examples) - held_out, len(examples) - num_test
    return examples[:first], examples[first:last], examples[last:]


def familiar_examples(
    examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase
) -> list[Example]:
    """The examples by the share of their words that are not one token, the smallest first."""

    def share(example: Example) -> float:
        words = re.findall(r"[A-Za-z]+", f"{example.prompt} {example.answer}")
        pieces = tokenizer([f" {word}" for word in words], add_special_tokens=False)["input_ids"]
        return sum(len(ids) > 1 for ids in pieces) / max(len(words), 1)

    return sorted(examples, key=share)


def _pretrain(
    config: TrainConfig, train_part: Sequence[Example], validation: Sequence[Example], folder: Path
) -> None:
    """Stage 0: a tokenizer and a small backbone, unless a finished one is there."""
    if (folder / "config.json").exists():
        logger.info("The backbone in %s is complete.", folder)
        return
    texts = [e.prompt for e in train_part] + [e.answer for e in train_part]
    tokenizer = train_tokenizer(texts, config.vocab_size)
    backbone_config = small_backbone_config(tokenizer, config.hidden_size, config.num_layers)
    backbone_config.is_causal = False
    torch.manual_seed(config.pretraining.seed)
    # The eager path's backward pass is the faster one in bf16 on CPUs.
    attention = "eager" if not torch.cuda.is_available() else None
    model = AutoModelForCausalLM.from_config(backbone_config, attn_implementation=attention)
    history = pretrain_backbone(
        model,
        tokenizer,
        tokenize_examples(train_part, tokenizer, config.max_length),
        tokenize_examples(validation, tokenizer, config.max_length),
        folder,
        config.pretraining,
    )
    (folder / "pretraining_history.json").write_text(json.dumps(history, indent=2))


def fit_stage_one(
    config: TrainConfig,
    model: CoDDModel,
    tokenizer: PreTrainedTokenizerBase,
    train_part: Sequence[TokenizedExample],
    validation: Sequence[TokenizedExample],
    mask_token_id: int,
) -> CoDDHead:
    """Stages 1 and 2: a head from EM on the answers' windows, marginally corrected."""
    embeddings = model.get_output_embeddings().weight.detach().float()
    windows = text_windows(train_part, config.window_length, tokenizer.eos_token_id)
    potentials, _ = fit_generative(
        windows,
        text_windows(validation, config.window_length, tokenizer.eos_token_id),
        embeddings,
        config.num_latents,
        config.generative,
        config.output_dir,
        config.structure,
    )
    marginal = token_marginal(potentials, config.window_length)
    # A token that the circuit has never seen gets the ratio 1: it says nothing about it.
    unseen = windows.flatten().bincount(minlength=len(embeddings)) == 0
    emission = torch.where(unseen, marginal.log(), potentials.emission.dense())
    forbidden = {tokenizer.pad_token_id, *tokenizer.all_special_ids} - {
        tokenizer.eos_token_id,
        None,
    }
    beyond = range(len(tokenizer), model.config.vocab_size)
    head_config = CoDDHeadConfig(
        vocab_size=model.config.vocab_size,
        num_latents=config.num_latents,
        window_length=config.window_length,
        structure=config.structure,
        mask_token_id=mask_token_id,
        forbidden_token_ids=sorted({*forbidden, *beyond} - {mask_token_id}),
        base_model_name_or_path=config.backbone,
    )
    head = CoDDHead(head_config)
    fitted = Potentials(potentials.initial, potentials.transition, emission)
    head.set_potentials(fitted, marginal, alpha=config.alpha)
    return head


@torch.no_grad()
def start_of_stage_three(config: TrainConfig, model: CoDDModel, stage_one: CoDDHead) -> CoDDHead:
    """The head that the conditional fit begins with: stage 1's, flattened, with conditioning.

    Tied emissions start as the least-squares fit of stage 1's dense ones.
    """
    changes = {
        "emission": config.emission,
        "emission_rank": config.emission_rank,
        "conditioning": config.conditioning,
        "num_gate_groups": config.num_gate_groups,
        "transition_rank": config.transition_rank,
        "noise_conditioning": config.noise_conditioning,
        "context_size": model.config.hidden_size,
    }
    torch.manual_seed(config.conditional.seed)  # of the maps that start at random
    head = CoDDHead(CoDDHeadConfig.from_dict(stage_one.config.to_dict() | changes))
    if config.emission == "tied":
        head.bind(model.get_output_embeddings().weight)
    fitted = stage_one.potentials.scaled_by_marginal(stage_one.token_marginal.log(), config.alpha)
    head.set_potentials(fitted, stage_one.token_marginal, alpha=config.alpha)
    head.temper(config.emission_power, config.transition_power)
    if head.context_maps is not None:
        law = fitted.emission.dense().log_softmax(-1).mean(0)
        head.context_maps.start(law, occupancy(fitted, config.window_length).mean(0))
    return head


def save_pipeline(
    folder: Path,
    model: CoDDModel,
    stage_one: CoDDHead,
    tokenizer: PreTrainedTokenizerBase,
    dtype: torch.dtype,
) -> None:
    """Writes a pipeline folder with weights stored in `dtype` (computation stays in float32)."""
    from ..pipelines.pipeline_codd import CoDDPipeline
    from ..schedulers.scheduling_codd import CoDDScheduler

    if Path(model.config.text_config._name_or_path).exists():
        model.config.text_config._name_or_path = ""  # a path on this machine says nothing elsewhere
    CoDDPipeline(model=model, scheduler=CoDDScheduler(), tokenizer=tokenizer).save_pretrained(
        folder
    )
    for part, target in ((model, folder / "model"), (stage_one, folder / "stage1")):
        # One copy of a tensor with several names, so that tied weights are stored once.
        copies: dict[int, torch.Tensor] = {}
        stored = {
            name: copies.setdefault(
                tensor.data_ptr(), tensor.to(dtype) if tensor.is_floating_point() else tensor
            )
            for name, tensor in part.state_dict().items()
        }
        part.save_pretrained(target, state_dict=stored)
