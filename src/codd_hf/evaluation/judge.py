"""An independent causal language model that says how likely it finds a text."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from ..hub.repositories import Repository, explain_load_errors
from ..hub.stored_weights import load_stored
from ..text.encoding import encode_chats, encode_texts


@dataclass(frozen=True)
class Judge:
    """A model that gives nats of answers, and the numbers of its tokens that these are sums over.

    With a chat template, the question is a user's message and the answer the assistant's; without
    one, a newline stands between them.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    batch_size: int = 8

    @torch.no_grad()
    def __call__(self, questions: Sequence[str], answers: Sequence[str]) -> list[tuple[float, int]]:
        """Nats and number of tokens of each answer after its question, in their order.

        Raises:
            ValueError: a question cannot be encoded.
        """
        encoded, _ = encode_texts(answers, self.tokenizer)
        pairs = list(zip(self._contexts(questions), encoded, strict=True))
        judged = []
        for start in range(0, len(pairs), self.batch_size):
            batch = pairs[start : start + self.batch_size]
            rows = [torch.tensor(context + answer) for context, answer in batch]
            ids = pad_sequence(rows, batch_first=True).to(self.model.device)
            mask = pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
            logits = self.model(ids, attention_mask=mask.to(ids.device), use_cache=False).logits
            logits = logits[:, :-1].float()
            log_probs = logits.gather(-1, ids[:, 1:, None])[..., 0] - logits.logsumexp(-1)
            for row, (context, answer) in zip(log_probs.double(), batch, strict=True):
                nats = -row[len(context) - 1 : len(context) + len(answer) - 1].sum().item()
                judged.append((nats, len(answer)))
        return judged

    def _contexts(self, questions: Sequence[str]) -> list[list[int]]:
        if self.tokenizer.chat_template is None:
            texts = [question + "\n" for question in questions]
            rows, faults = encode_texts(texts, self.tokenizer, add_special_tokens=True)
        else:
            chats = [[{"role": "user", "content": question}] for question in questions]
            rows, faults = encode_chats(chats, self.tokenizer, add_generation_prompt=True)
        for i, fault in faults.items():
            raise ValueError(f"`questions` must suit the judge, but the one at index {i} {fault}.")
        return rows


def load_judge(
    name: str, gguf_file: str | None = None, device: torch.device | str = "cpu"
) -> Judge:
    """A causal language model in float32 and its tokenizer, of a folder or the Hub.

    A `gguf_file` in it needs the package `gguf`; its weights are dequantized.

    Raises:
        OSError: there is no such model.
        ValueError: weights are missing, or an adapter lies beside them.
    """
    repository = Repository(name)
    with explain_load_errors(repository):
        repository.refuse_adapter()
        tokenizer = AutoTokenizer.from_pretrained(name, gguf_file=gguf_file)
        load: Any = partial(AutoModelForCausalLM.from_pretrained, dtype=torch.float32)
        if gguf_file is None:
            model: Any = load_stored(repository, load, None, None)
        else:
            model = load(name, gguf_file=gguf_file)
    return Judge(model.to(device), tokenizer)
