"""Stage 1: fit a circuit to windows of text, as a generative model.

Clusters of tokens give the start (from a random one EM stalls, from a uniform one it never moves);
minibatch EM does the rest. Two updates mix the counts of a batch with something steadier, with a
share `s` that falls from step to step:

- *stepwise* EM with a running average of the counts (Liang and Klein, 2009);
- *anemone* with the counts `m(theta)` that the circuit itself expects of as many windows (Liu, Shao
  and Van den Broeck, arXiv 2505.19982): `theta' = normalise((1 - s) m(theta) + s counts)`. It
  maximises `s` times the linearised log-likelihood minus `(1 - s) KL(p_theta || p_theta')` over
  tokens and latents, so that a state that a batch says little about is hardly moved by it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from accelerate import Accelerator
from sklearn.cluster import KMeans, MiniBatchKMeans
from tqdm.auto import tqdm

from ...circuits import Potentials
from ...circuits.em import Counts, log_likelihood, maximise
from ...data.canvases import TokenizedExample, collate
from ...data.fingerprint import tensor_fingerprint
from ..loop.checkpoints import Checkpoints, check_same_run
from ..loop.trackers import Log, Speedometer
from ..settings import GenerativeConfig
from .counting import batch_counts, model_counts, summing_dtype

MAY_CHANGE = ("num_epochs", "checkpointing_steps")
"""Settings that a run may be continued with other values of."""


def text_windows(
    examples: Sequence[TokenizedExample], window_length: int, eos_token_id: int
) -> torch.Tensor:
    """The windows `[N, L]` of all answers, cut as decoding cuts them, filled with end-of-text."""
    windows = []
    for example in examples:
        canvas = collate(
            [TokenizedExample([], example.answer_ids)],
            window_length=window_length,
            eos_token_id=eos_token_id,
            pad_token_id=eos_token_id,
        )
        windows.append(canvas.input_ids.view(-1, window_length))
    return torch.cat(windows)


def cluster_tokens(
    embeddings: torch.Tensor, counts: torch.Tensor, num_clusters: int, seed: int = 0
) -> torch.Tensor:
    """k-means of token embeddings, weighted by frequency.

    Args:
        embeddings: `[V, d]`, the backbone's output embeddings.
        counts: `[V]`, how often each token occurs.
        num_clusters: number of clusters; no more than there are tokens that occur.
        seed: seed of the clustering.

    Returns:
        `[V]` cluster of each token.
    """
    features = torch.nn.functional.normalize(embeddings.float(), dim=-1).cpu().numpy()
    weights = counts.float().cpu().numpy()
    seen = weights > 0
    if num_clusters > seen.sum():
        raise ValueError(
            f"`num_latents` ({num_clusters}) exceeds the {int(seen.sum())} different tokens of the "
            "training text: use fewer latents or more text."
        )
    estimator = KMeans if len(features) <= 20_000 else MiniBatchKMeans
    kmeans = estimator(num_clusters, n_init=1, max_iter=30, random_state=seed)
    kmeans.fit(features[seen], sample_weight=weights[seen])
    return torch.from_numpy(kmeans.predict(features)).long()


def initial_potentials(
    windows: torch.Tensor,
    clusters: torch.Tensor,
    num_latents: int,
    config: GenerativeConfig,
) -> Potentials:
    """A circuit whose states are clusters of tokens and whose transitions are cluster bigrams."""
    vocab_size = len(clusters)
    generator = torch.Generator().manual_seed(config.seed)
    unigrams = windows.flatten().bincount(minlength=vocab_size).float()
    smoothed = unigrams + 0.1

    own = torch.zeros(num_latents, vocab_size)
    own[clusters, torch.arange(vocab_size)] = smoothed
    own = own / own.sum(-1, keepdim=True).clamp(min=1e-9)
    shared = smoothed / smoothed.sum()
    emission = config.concentration * own + (1 - config.concentration) * shared

    states = clusters[windows]
    pairs = states[:, :-1] * num_latents + states[:, 1:]
    bigrams = pairs.flatten().bincount(minlength=num_latents**2).view(num_latents, num_latents)
    starts = states[:, 0].bincount(minlength=num_latents).float() + 0.1
    occupancy = states.flatten().bincount(minlength=num_latents).float() + 0.1
    transition = bigrams + occupancy / occupancy.sum()

    def noisy(weights: torch.Tensor) -> torch.Tensor:
        noise = config.noise * torch.randn(weights.shape, generator=generator)
        return (weights.log() + noise).log_softmax(-1)

    steps = noisy(transition)[None]
    return Potentials(noisy(starts), steps, noisy(emission)[None])


def fit_generative(
    windows: torch.Tensor,
    validation: torch.Tensor,
    embeddings: torch.Tensor,
    num_latents: int,
    config: GenerativeConfig | None = None,
    checkpoint_dir: str | Path | None = None,
    log: Log | None = None,
    *,
    resume_from_checkpoint: str | Path = "latest",
    checkpoints_total_limit: int | None = 2,
) -> tuple[Potentials, list[dict[str, float]]]:
    """Fits a circuit with shared transitions and emissions to windows of tokens.

    Args:
        windows: `[N, L]` tokens; several processes share each batch of them.
        validation: `[M, L]` tokens.
        embeddings: `[V, d]`, for the clustering.
        num_latents: number of states `H`.
        config: how to fit.
        checkpoint_dir: receives the checkpoints, in `checkpoint_dir/generative`.
        log: told of every step.
        resume_from_checkpoint: `"latest"` goes on from the newest checkpoint there, if there is
            one; `"none"` deletes them and begins; a checkpoint's folder goes on from that, and
            deletes later ones.
        checkpoints_total_limit: how many checkpoints are kept, the newest ones; all if None.

    Returns:
        The circuit, and per epoch the log-likelihood per token of training and validation windows.

    Raises:
        FloatingPointError: the likelihood is no longer finite; the message names the windows.
        OSError: the disk has no room for a checkpoint.
        ValueError: the windows have fewer than 2 tokens, or fewer different ones than there are
            states, or the checkpoint is another run's, or damaged.
    """
    config = config or GenerativeConfig()
    if windows.ndim != 2 or windows.shape[1] < 2:
        raise ValueError(
            "`windows` must be `[N, L]` of at least 2 tokens each, which a circuit couples, got "
            f"shape {tuple(windows.shape)}."
        )
    accelerator = Accelerator()
    device = accelerator.device
    unigrams = windows.flatten().bincount(minlength=len(embeddings)).float()
    spread = (unigrams + 0.1) / (unigrams + 0.1).sum()
    checkpoints = None
    if checkpoint_dir is not None:
        checkpoints = Checkpoints(Path(checkpoint_dir) / "generative", checkpoints_total_limit)
    made_of = asdict(config) | {
        "num_latents": num_latents,
        "windows": tensor_fingerprint(windows),
        "validation": tensor_fingerprint(validation),
        "embeddings": tensor_fingerprint(embeddings),
    }
    found = None if checkpoints is None else checkpoints.load(resume_from_checkpoint)
    if found is None:
        clusters = torch.zeros(len(embeddings), dtype=torch.long)
        if accelerator.is_main_process:
            clusters = cluster_tokens(embeddings, unigrams, num_latents, config.seed)
        # They are zero elsewhere, so the sum is the main process's.
        clusters = accelerator.reduce(clusters.to(device), "sum").cpu()
        potentials = initial_potentials(windows, clusters, num_latents, config)
        counts, step, history, total = None, 0, [], 0.0
    else:
        tensors, state = found
        check_same_run(checkpoints.folder, state["config"], made_of, MAY_CHANGE)
        potentials, counts = _restored(tensors, device)
        step, history, total = state["step"], state["history"], state["total"]
    potentials = potentials.with_leaves([leaf.to(device) for leaf in potentials.leaves()])
    steps = torch.full((num_latents,), config.transition_prior / num_latents)
    prior = (torch.ones(1), steps, config.emission_prior * spread)
    prior = Counts(tuple(part.to(device) for part in prior))

    per_epoch = -(-len(windows) // config.windows_per_batch)
    if found is not None and accelerator.is_main_process:
        steps = config.num_epochs * per_epoch
        going_on = f"goes on from step {step} of {steps}" if step < steps else "is complete"
        tqdm.write(f"The generative fit {going_on}.")
    progress, epoch, batches, speed = None, None, [], Speedometer(device)
    while step < config.num_epochs * per_epoch:
        speed.start()
        if epoch != step // per_epoch:
            epoch = step // per_epoch
            generator = torch.Generator().manual_seed(config.seed * 1_000_003 + epoch)
            order = torch.randperm(len(windows), generator=generator)
            batches = order.split(config.windows_per_batch)
            progress = tqdm(
                total=per_epoch,
                initial=step % per_epoch,
                desc=f"EM epoch {epoch + 1}/{config.num_epochs}",
                unit="batch",
                disable=not accelerator.is_local_main_process,
            )
        batch = batches[step % per_epoch]
        new, score = batch_counts(potentials, windows[batch], config.windows_per_chunk, accelerator)
        if not math.isfinite(score):
            raise FloatingPointError(
                f"The log-likelihood is {score} at step {step}, from some of the windows "
                f"{batch[:8].tolist()} and so on: raise `emission_prior` or `transition_prior`."
            )
        new = new.scaled(len(windows) / len(batch))
        share = (step + 2) ** -config.step_decay
        if config.update == "anemone":
            own = model_counts(potentials, windows.shape[1]).scaled(len(windows))
            potentials = maximise(potentials, own.mixed_with(new, share), prior.scaled(share))
        else:
            counts = new if counts is None else counts.mixed_with(new, share)
            potentials = maximise(potentials, counts, prior)
        step, total = step + 1, total + score
        progress.update()
        seen = min((step - epoch * per_epoch) * config.windows_per_batch, len(windows))
        per_token = total / (seen * windows.shape[1])
        progress.set_postfix(nats=f"{-per_token:.3f}")
        told = {"log_likelihood": score / windows[batch].numel(), "step_size": share}
        told |= speed.read(windows[batch].numel())
        ended = step % per_epoch == 0
        if ended:
            progress.close()
            heldout = _mean_log_likelihood(potentials, validation, accelerator)
            history.append({"epoch": epoch + 1, "train": per_token, "validation": heldout})
            total = 0.0
            told["validation_log_likelihood"] = heldout
            if accelerator.is_main_process:
                tqdm.write(str(history[-1]))
        if log is not None:
            log(step, told)
        if checkpoints is not None and (ended or step % config.checkpointing_steps == 0):
            if accelerator.is_main_process:
                tensors = {f"potentials.{i}": leaf for i, leaf in enumerate(potentials.leaves())}
                if counts is not None:
                    tensors |= {f"counts.{i}": leaf for i, leaf in enumerate(counts.leaves)}
                state = {"step": step, "history": history, "total": total, "config": made_of}
                checkpoints.save(step, tensors, state)
            accelerator.wait_for_everyone()
    return potentials.with_leaves([leaf.cpu() for leaf in potentials.leaves()]), history


def _restored(
    tensors: dict[str, torch.Tensor], device: torch.device
) -> tuple[Potentials, Counts | None]:
    """The circuit and the running counts of a checkpoint."""

    def leaves(kind: str) -> list[torch.Tensor]:
        number = sum(name.startswith(f"{kind}.") for name in tensors)
        return [tensors[f"{kind}.{i}"].to(device) for i in range(number)]

    potentials = Potentials(*leaves("potentials"))
    counts = leaves("counts")
    return potentials, Counts(tuple(counts)) if counts else None


@torch.no_grad()
def _mean_log_likelihood(
    potentials: Potentials, windows: torch.Tensor, accelerator: Accelerator
) -> float:
    """Nats per token of windows `[M, L]`, which the processes share."""
    device = accelerator.device
    total = torch.zeros((), dtype=summing_dtype(device), device=device)
    for part in windows.split(512)[accelerator.process_index :: accelerator.num_processes]:
        total += log_likelihood(potentials, part.to(device)).to(total.dtype).sum()
    return accelerator.reduce(total, "sum").item() / windows.numel()
