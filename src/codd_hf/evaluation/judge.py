"""An independent causal language model that says how likely it finds a text."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import is_gguf_available

from ..backbones.canvas_cache import cache_argument
from ..hub.repositories import Repository, explain_load_errors
from ..hub.stored_weights import StoredWeights
from ..text.encoding import encode_chats, encode_texts


class Judged(NamedTuple):
    """What a judge says of an answer: `nats`, the sum over its own `num_tokens` tokens of it."""

    nats: float
    num_tokens: int


class _Context(NamedTuple):
    cache: object
    attention_mask: torch.Tensor  # [n, length], padding on the left
    next_logits: torch.Tensor  # [n, vocab], for the answers' first tokens


class Judge:
    """Judges answers to fixed questions. Each question is read once, however many its answers.

    Args:
        model: a causal language model.
        tokenizer: its own. With a chat template, the question is a user's message and the answer
            the assistant's; without one, a newline stands between them.
        questions: what the answers answer.
        batch_size: answers judged together.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        questions: Sequence[str],
        batch_size: int = 8,
    ) -> None:
        self.model, self.tokenizer, self.batch_size = model.eval(), tokenizer, batch_size
        contexts = self.contexts(questions)
        self._contexts = [
            self._read(contexts[start : start + batch_size])
            for start in range(0, len(contexts), batch_size)
        ]
        self._num_questions = len(contexts)

    def contexts(self, questions: Sequence[str]) -> list[list[int]]:
        """Token ids of what comes before each answer.

        Raises:
            ValueError: a question cannot be encoded.
        """
        if self.tokenizer.chat_template is None:
            texts = [question + "\n" for question in questions]
            rows, faults = encode_texts(texts, self.tokenizer, add_special_tokens=True)
        else:
            chats = [[{"role": "user", "content": question}] for question in questions]
            rows, faults = encode_chats(chats, self.tokenizer, add_generation_prompt=True)
        for i, fault in faults.items():
            raise ValueError(f"`questions` must suit the judge, but the one at index {i} {fault}.")
        return rows

    @torch.no_grad()
    def __call__(self, answers: Sequence[str]) -> list[Judged]:
        """Nats of each answer given its question; an empty answer has none, over no token.

        Args:
            answers: one for each question, in their order.

        Raises:
            ValueError: there is not one answer for each question.
        """
        if len(answers) != self._num_questions:
            raise ValueError(
                f"`answers` must have one text for each of the {self._num_questions} questions, "
                f"got {len(answers)}."
            )
        encoded, _ = encode_texts(answers, self.tokenizer)
        judged: list[Judged] = []
        for number, context in enumerate(self._contexts):
            start = number * self.batch_size
            judged += self._judge(context, encoded[start : start + self.batch_size])
        return judged

    @torch.no_grad()
    def _read(self, contexts: Sequence[list[int]]) -> _Context:
        length, device = max(map(len, contexts)), self.model.device
        ids = torch.zeros(len(contexts), length, dtype=torch.long)
        mask = torch.zeros(len(contexts), length, dtype=torch.long)
        for row, context in enumerate(contexts):
            ids[row, length - len(context) :] = torch.tensor(context)
            mask[row, length - len(context) :] = 1
        output = self.model(
            ids.to(device),
            attention_mask=mask.to(device),
            position_ids=(mask.cumsum(1) - 1).clamp(min=0).to(device),
            use_cache=True,
            logits_to_keep=1,
        )
        return _Context(output[cache_argument(self.model)], mask, output.logits[:, -1].float())

    def _judge(self, context: _Context, answers: Sequence[list[int]]) -> list[Judged]:
        longest, device = max(map(len, answers)), self.model.device
        if longest == 0:
            return [Judged(0.0, 0)] * len(answers)
        ids = torch.zeros(len(answers), longest, dtype=torch.long)
        mask = torch.zeros(len(answers), longest, dtype=torch.long)
        for row, answer in enumerate(answers):
            ids[row, : len(answer)] = torch.tensor(answer, dtype=torch.long)
            mask[row, : len(answer)] = 1
        before = context.attention_mask
        logits = self.model(
            ids.to(device),
            attention_mask=torch.cat([before, mask], 1).to(device),
            position_ids=(before.sum(1, keepdim=True) + torch.arange(longest)).to(device),
            use_cache=True,
            **{cache_argument(self.model): copy.deepcopy(context.cache)},  # a model writes into it
        ).logits
        logits = torch.cat([context.next_logits[:, None], logits[:, :-1].float()], 1)
        chosen = logits.gather(-1, ids.to(device)[..., None])[..., 0] - logits.logsumexp(-1)
        nats = -(chosen.double() * mask.to(device)).sum(1)
        return [Judged(n, len(a)) for n, a in zip(nats.tolist(), answers, strict=True)]


def load_judge(
    name: str, gguf_file: str | None = None, device: torch.device | str = "cpu"
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A causal language model in float32 and its tokenizer.

    Args:
        name: a folder or an id on the Hub.
        gguf_file: a GGUF file in it, whose weights are dequantized (needs the package `gguf`).
        device: where the model goes.

    Raises:
        OSError: there is no such model.
        ValueError: the package `gguf` is missing, or `name` is a folder with GGUF files and no
            `config.json`, and `gguf_file` does not name one of them.
    """
    folder = Path(name)
    if folder.is_dir() and not (folder / "config.json").is_file():
        there = sorted(path.name for path in folder.glob("*.gguf"))
        if gguf_file not in there:
            raise ValueError(
                f"`judge_file` must name a GGUF file in {name!r}, which has no config.json: "
                f"one of {there}, got {gguf_file!r}."
            )
    if gguf_file is not None and not is_gguf_available():
        raise ValueError(
            "`judge_file` needs the package gguf: install it with `pip install codd-hf[quality]`."
        )
    repository = Repository(name)
    with explain_load_errors(repository):
        repository.refuse_adapter()
        stored = StoredWeights.find(repository, {"gguf_file": gguf_file})
        tokenizer = AutoTokenizer.from_pretrained(name, gguf_file=gguf_file)
        load = partial(AutoModelForCausalLM.from_pretrained, dtype=torch.float32)
        if gguf_file is None:
            stored.check_layers(repository.config)
            model, _ = stored.load(load, None, None)
        else:
            model = load(name, gguf_file=gguf_file)
    return model.to(device), tokenizer
