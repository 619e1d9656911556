"""Stage 4: train backbone and head together (CoDD, arXiv 2603.00045, Eq. 7 with phi trainable).

The loss is the coupled conditional likelihood `-log p(x_M | x_O)` of noised windows, of which
`sum_M log phi_i(x_i)` now depends on what is trained, as does `log p_w(x) - log Z`. The backbone
runs at every step, on windows and noise that are a function of the step alone.

As in the conditional fit, the processes share the chunks of a step's windows, and gradients of
chunks are summed in float64, so that a step does not depend on who computed what.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from accelerate import Accelerator
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ...coupling.adapters import active_adapter, set_adapter
from ...data.canvases import TokenizedExample
from ...modeling_codd import CoDDModel
from ...runtime.precision import chosen_precision, precision_note
from ..evidence.fingerprint import fit_identity, model_fingerprint
from ..evidence.live_windows import LiveWindows, window_scores
from ..joint_settings import JointConfig
from ..loop.checkpoints import Checkpoints
from ..loop.steps import StepLoop
from ..loop.trackers import Log
from .counting import summing_dtype
from .lora import add_lora, trained_in_float32
from .rates import head_groups, warmup_then_cosine

MAY_CHANGE = (
    "max_steps",
    "evaluation_steps",
    "checkpointing_steps",
    "num_validation_draws",
    "gradient_checkpointing",
)
"""Settings that a run may be continued with other values of."""


def fit_joint(
    model: CoDDModel,
    tokenizer: PreTrainedTokenizerBase,
    train: Sequence[TokenizedExample],
    validation: Sequence[TokenizedExample],
    checkpoint_dir: str | Path | None = None,
    config: JointConfig | None = None,
    log: Log | None = None,
    *,
    resume_from_checkpoint: str | Path = "latest",
    checkpoints_total_limit: int | None = 2,
) -> list[dict[str, float]]:
    """Trains a backbone, or a LoRA on it, and its head together, in place.

    The head should come from the conditional fit: a LoRA starts as a no-op and the rates warm up,
    so that training goes on from what is there. What is trained is held in float32. A LoRA belongs
    to the head: `model.save_pretrained` and `model.save_head` write it beside what they write.

    Args:
        model: a backbone with a head.
        tokenizer: its tokenizer.
        train: what both learn from.
        validation: what they are measured on, with fixed noise.
        checkpoint_dir: receives the checkpoints, in `checkpoint_dir/joint`. A run that goes on is
            given the model as it was before the first step.
        config: how to train.
        log: told of every step.
        resume_from_checkpoint: `"latest"` goes on from the newest checkpoint there, if there is
            one; `"none"` deletes them and begins; a checkpoint's folder goes on from that, and
            deletes later ones.
        checkpoints_total_limit: how many checkpoints are kept, the newest ones; all if None.

    Returns:
        The validation history: `step`, `factorized_nats` and `coupled_nats` (per masked token),
        `gain` (their difference, all and by mask ratio), `loss` (the mean since the last entry) and
        `seconds`.

    Raises:
        FloatingPointError: the loss is no longer finite; the message names the examples.
        OSError: the disk has no room for a checkpoint.
        ValueError: the model has no head, or the checkpoint is another run's, or damaged.
    """
    config = config or JointConfig()
    if model.active_head is None:
        raise ValueError("`model` has no head to fit: load one, or switch it on with `set_head`.")
    device = Accelerator().device
    model.to(device)
    precision = chosen_precision(config.mixed_precision, device)
    identity = fit_identity(model_fingerprint(model, tokenizer), train, validation)
    groups = _trained(model, config)
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.98), weight_decay=0.0)
    parameters = {f"model.{name}": p for name, p in model.named_parameters() if p.requires_grad}
    checkpoints = None
    if checkpoint_dir is not None:
        checkpoints = Checkpoints(Path(checkpoint_dir) / "joint", checkpoints_total_limit)
    made_of = asdict(config) | {"mixed_precision": precision} | identity
    loop = StepLoop("joint fit", config, made_of, parameters, [optimizer], checkpoints, log)
    if loop.resume(resume_from_checkpoint, MAY_CHANGE):
        loop.show(f"The joint fit goes on from step {loop.step} of {config.max_steps}.")
    if config.mixed_precision != "no":
        loop.show(precision_note(precision, device))
    lengths = torch.tensor([len(e.prompt_ids) + len(e.answer_ids) for e in train])

    def backward(step: int) -> tuple[dict[str, float], int, dict[str, str]]:
        chunks = _chunks_of_step(lengths, step, config)
        rate = warmup_then_cosine(step, config.warmup_steps, config.max_steps)
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * rate
        seed = (config.seed * 1_000_003 + step) * 100_003

        def draw(number: int) -> LiveWindows:
            examples = [train[i] for i in chunks[number].tolist()]
            length = model.window_length
            return LiveWindows.drawn(examples, tokenizer, length, config, seed + number)

        model.backbone.train(config.backbone != "frozen")
        told = _step_gradients(model, list(parameters.values()), draw, len(chunks), config, seed)
        norms = [
            torch.nn.utils.clip_grad_norm_(part.parameters(), 1.0).item()
            for part in (model.coupling_head, model.backbone)
        ]
        if not all(math.isfinite(value) for value in (told["loss"], *norms)):
            bad, reason = _not_finite(model, draw, chunks, config)
            raise FloatingPointError(
                f"The loss is {told['loss']} and its gradient's norms {norms} at step {step}, from "
                f"the windows of the examples {bad[:8] or torch.cat(chunks).tolist()} of `train`: "
                f"lower `backbone_learning_rate` (now {config.backbone_learning_rate}) and "
                f"`learning_rate` (now {config.learning_rate}).{reason}"
            )
        told["learning_rate"] = config.learning_rate * rate
        shown = {"nats": f"{told['coupled_nats']:.3f}", "gain": f"{told['gain']:+.3f}"}
        return told, sum(len(chunk) for chunk in chunks) * model.window_length, shown

    def measure() -> dict[str, float]:
        draws = config.num_validation_draws
        return window_scores(model, tokenizer, validation, config, draws).summary()

    if config.gradient_checkpointing:
        _checkpointing(model.backbone, "enable")({"use_reentrant": False})
    history = loop.run(backward, measure)
    if config.gradient_checkpointing:
        _checkpointing(model.backbone, "disable")()
    model.eval()
    return history


def _checkpointing(backbone: PreTrainedModel, switch: str) -> Callable[..., None]:
    """transformers' method that switches it, which newer releases call `activation_...`."""
    newer = getattr(backbone, f"activation_checkpointing_{switch}", None)
    return newer or getattr(backbone, f"gradient_checkpointing_{switch}")


def _trained(model: CoDDModel, config: JointConfig) -> list[dict]:
    """What the optimiser trains, with its peak rates: first the head's, then the backbone's."""
    head = model.coupling_head
    model.requires_grad_(False)
    if config.backbone == "lora":
        found = active_adapter(model)
        if found is None:
            add_lora(model.backbone, config.lora_config(), model.active_head, config.seed)
            model._adapted_heads.add(model.active_head)
        set_adapter(model.backbone, model.active_head if found is None else found)
    if config.backbone == "full":
        model.backbone.requires_grad_(True)
    head.requires_grad_(True)
    groups = head_groups(head, config)
    if backbone := trained_in_float32(model.backbone):
        groups.append({"params": backbone, "peak": config.backbone_learning_rate, "eps": 1e-8})
    return groups


def _step_gradients(
    model: CoDDModel,
    parameters: list[torch.nn.Parameter],
    draw: Callable[[int], LiveWindows],
    num_chunks: int,
    config: JointConfig,
    seed: int,
) -> dict[str, float]:
    """Sets the gradients of the mean loss of a step's windows.

    Args:
        model: the model.
        parameters: what is trained.
        draw: gives a chunk of the step's windows.
        num_chunks: how many there are, for all processes.
        config: how to train.
        seed: of the step's dropout.

    Returns:
        The loss, and the gain and the coupled nats per masked token.
    """
    accelerator, device = Accelerator(), model.device
    kind = {"device": device, "dtype": summing_dtype(device)}
    sums = [torch.zeros(p.shape, **kind) for p in parameters]
    totals = torch.zeros(5, **kind)  # loss, gain, log-likelihood, masked tokens, windows
    for number in range(accelerator.process_index, num_chunks, accelerator.num_processes):
        windows = draw(number)
        try:
            with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
                torch.manual_seed(seed + number)
                factorized, gain, masked = windows.log_probs(model, config)
                log_prob = factorized + gain
                weight = 1 / windows.level.to(device) if config.loss == "elbo" else 1
                loss = -(weight * log_prob).sum()
                gradients = torch.autograd.grad(loss, parameters, materialize_grads=True)
        except ValueError:
            totals += torch.nan  # all processes must learn of it, not this one alone
            continue
        for mine, new in zip(sums, gradients, strict=True):
            mine += new
        found = (loss, gain.sum(), log_prob.sum(), masked.sum(), masked.new_tensor(len(masked)))
        totals += torch.stack([value.detach().to(totals.dtype) for value in found])
    sums, totals = accelerator.reduce(sums, "sum"), accelerator.reduce(totals, "sum")
    loss, gain, log_prob, masked, windows = totals.tolist()
    masked = max(masked, 1)
    norm = masked if config.loss == "token" else model.window_length * windows
    for parameter, total in zip(parameters, sums, strict=True):
        parameter.grad = total.div_(norm).to(parameter.dtype)
    return {"loss": loss / norm, "gain": gain / masked, "coupled_nats": -log_prob / masked}


@torch.no_grad()
def _not_finite(
    model: CoDDModel,
    draw: Callable[[int], LiveWindows],
    chunks: Sequence[torch.Tensor],
    config: JointConfig,
) -> tuple[list[int], str]:
    """The examples whose windows have no finite likelihood, and what was said of the last one."""
    bad, reason = [], ""
    for number, chunk in enumerate(chunks):
        windows = draw(number)
        for row, example in enumerate(chunk.tolist()):
            try:
                factorized, gain, _ = windows.row(row).log_probs(model, config)
                finite = bool((factorized + gain).isfinite())
            except ValueError as error:
                finite, reason = False, f" {error}"
            if not finite:
                bad.append(example)
    return bad, reason


def _chunks_of_step(
    lengths: torch.Tensor, step: int, config: JointConfig
) -> tuple[torch.Tensor, ...]:
    """The examples of a step in chunks of like length; every epoch is a new permutation."""
    size = min(config.windows_per_batch * config.gradient_accumulation_steps, len(lengths))
    epoch, place = divmod(step, len(lengths) // size)
    generator = torch.Generator().manual_seed(config.seed * 1_000_003 + epoch)
    rows = torch.randperm(len(lengths), generator=generator)[place * size : (place + 1) * size]
    return rows[lengths[rows].argsort(stable=True)].split(config.windows_per_chunk)
